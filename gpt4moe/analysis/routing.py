"""What choices say of a router: load, dead experts, co-activation, saturation. In: expert ids [L, U, K], -1 for none.

Saturation and co-activation are those of OLMoE (Muennighoff et al. 2024, section 5).
"""

from __future__ import annotations

import numpy as np

DEAD_BELOW = 0.01


def load(expert_ids_LUK: np.ndarray, num_experts: int) -> np.ndarray:
    """Fraction of a layer's assignments at each expert, [L, E]; 1/E everywhere is balanced."""
    counts_LE = np.stack([np.bincount(ids[ids >= 0], minlength=num_experts) for ids in expert_ids_LUK])
    return counts_LE / np.maximum(counts_LE.sum(1, keepdims=True), 1)


def dead_experts(load_LE: np.ndarray) -> np.ndarray:
    """Which experts have less than 1 % (`DEAD_BELOW`) of the mean load of their layer, bool [..., L, E]."""
    return load_LE < DEAD_BELOW * load_LE.mean(-1, keepdims=True)


def coactivation(expert_ids_LUK: np.ndarray, num_experts: int) -> np.ndarray:
    """Share of the tokens of expert i that also go to expert j, N_ij / N_i, [L, E (i), E (j)].

    Not symmetric where loads differ. Not a number on the diagonal and for experts without tokens. A row sums to K - 1;
    experts that pair up by chance have (K - 1) / (E - 1).
    """
    by_layer = []
    for ids_UK in expert_ids_LUK:
        chosen_UE = _chosen(ids_UK, num_experts)
        together_EE = chosen_UE.T @ chosen_UE
        tokens_E1 = np.diag(together_EE)[:, None]
        share_EE = np.where(tokens_E1 > 0, together_EE / np.maximum(tokens_E1, 1), np.nan)
        np.fill_diagonal(share_EE, np.nan)
        by_layer.append(share_EE)
    return np.stack(by_layer)


def saturation(earlier_LUK: np.ndarray, final_LUK: np.ndarray) -> np.ndarray:
    """Share of the final choices that an earlier checkpoint made for the same tokens, whatever their order, [L].

    1/U sum_u |E_u(t) and E_u(T)| / K: 1 where routing is settled, K / E where two routers agree by chance.
    """
    kept_LUK = (final_LUK[..., :, None] == earlier_LUK[..., None, :]).any(-1) & (final_LUK >= 0)
    return kept_LUK.sum((1, 2)) / np.maximum((final_LUK >= 0).sum((1, 2)), 1)


def _chosen(ids_UK: np.ndarray, num_experts: int) -> np.ndarray:
    """Whether each token goes to each expert, float32 [U, E], in which counts are exact up to 2**24 tokens."""
    chosen_UE = np.zeros((len(ids_UK), num_experts + 1), np.float32)
    np.put_along_axis(chosen_UE, ids_UK, 1, axis=1)  # -1 falls on the last column
    return chosen_UE[:, :num_experts]
