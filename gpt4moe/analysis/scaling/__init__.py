"""Scaling laws: published ones with their constants, and the same forms fitted to one's own runs."""

from gpt4moe.analysis.scaling.chinchilla import C4, EPOCH, HOFFMANN, Chinchilla, Optimum
from gpt4moe.analysis.scaling.law import Law, Published
