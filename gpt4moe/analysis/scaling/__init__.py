"""Scaling laws: published ones evaluated, and the same forms fitted to one's own runs."""
