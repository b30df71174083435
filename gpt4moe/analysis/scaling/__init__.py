"""Scaling laws: published ones with their constants, and the same forms fitted to one's own runs."""

from gpt4moe.analysis.scaling.chinchilla import C4, EPOCH, HOFFMANN, MUENNIGHOFF, Chinchilla, DataConstrained
from gpt4moe.analysis.scaling.clark_table import read_clark_csv
from gpt4moe.analysis.scaling.curve import Curve, curve, residual_rows, summary
from gpt4moe.analysis.scaling.fitting import Fit, FitConfig, fit
from gpt4moe.analysis.scaling.granular import KRAJEWSKI, KRAJEWSKI_DENSE, Granular
from gpt4moe.analysis.scaling.law import Law, Published, Ranges
from gpt4moe.analysis.scaling.observations import Observations, observe
from gpt4moe.analysis.scaling.routed import (
    CLARK_HASH,
    CLARK_RL_R,
    CLARK_S_BASE,
    REFIT_HASH,
    REFIT_RL_R,
    REFIT_S_BASE,
    Routed,
)
from gpt4moe.analysis.scaling.sparse import ABNAR, Sparse, sparsity
