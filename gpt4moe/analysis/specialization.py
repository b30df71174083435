"""What experts specialise in: choices and a group of each token (source, class, position, id) in, shares out.

Specialisation by domain and by vocabulary is that of OLMoE (Muennighoff et al. 2024, section 5).
"""

from __future__ import annotations

import dataclasses

import numpy as np

MIN_OCCURRENCES = 8


@dataclasses.dataclass(frozen=True, eq=False)
class Groups:
    """A partition of the tokens: a name for each of G groups and the group of every token, groups_U int [U]."""

    names: tuple[str, ...]
    groups_U: np.ndarray

    def without_empty(self) -> Groups:
        """The groups that have tokens, in their order."""
        held, groups_U = np.unique(self.groups_U, return_inverse=True)
        return Groups(tuple(self.names[group] for group in held), groups_U)


@dataclasses.dataclass(frozen=True)
class TopToken:
    """A token of which the share N_xe / N_x goes to an expert, out of N_x occurrences."""

    token_id: int
    share: float
    occurrences: int


def assignments(expert_ids_LUK: np.ndarray, groups: Groups, num_experts: int) -> np.ndarray:
    """How many tokens of each group go to each expert, N_ge, int64 [L, G, E]."""
    num_groups = len(groups.names)
    counts = []
    for ids_UK in expert_ids_LUK:
        place_UK = groups.groups_U[:, None] * num_experts + ids_UK
        counts.append(np.bincount(place_UK[ids_UK >= 0], minlength=num_groups * num_experts))
    return np.stack(counts).reshape(-1, num_groups, num_experts)


def over_uniform(counts_LGE: np.ndarray) -> np.ndarray:
    """Share of a group's assignments at each expert over the uniform share, E * N_ge / sum_e N_ge, [L, G, E].

    With K experts for every token that is the share of the group's tokens N_ge / N_g over K / E. Not a number for a
    group without tokens.
    """
    total_LG1 = counts_LGE.sum(-1, keepdims=True)
    return np.where(total_LG1 > 0, counts_LGE.shape[-1] * counts_LGE / np.maximum(total_LG1, 1), np.nan)


def distance(counts_LGE: np.ndarray) -> np.ndarray:
    """How far the groups of a layer differ in where they go, [L]: 0 is not at all, near 1 is experts of their own.

    Total variation between a group's distribution over experts and that of all tokens, 1/2 sum_e |p(e|g) - p(e)|,
    averaged over groups weighted by their assignments: the part of all assignments that would have to move.
    """
    total_LG1 = counts_LGE.sum(-1, keepdims=True)
    group_LGE = counts_LGE / np.maximum(total_LG1, 1)
    all_L1E = counts_LGE.sum(1, keepdims=True) / np.maximum(total_LG1.sum(1, keepdims=True), 1)
    apart_LG = np.abs(group_LGE - all_L1E).sum(-1) / 2
    weight_LG = total_LG1[..., 0]
    return (apart_LG * weight_LG).sum(1) / np.maximum(weight_LG.sum(1), 1)


def top_tokens(
    expert_ids_LUK: np.ndarray, token_ids_U: np.ndarray, num_experts: int, count: int
) -> list[list[list[TopToken]]]:
    """The `count` token ids of which the largest share goes to an expert, by layer and expert; at most that many.

    Only ids that occur at least `MIN_OCCURRENCES` times; of equal shares the more frequent id comes first.
    """
    ids_G, groups_U, occurrences_G = np.unique(token_ids_U, return_inverse=True, return_counts=True)
    groups = Groups(tuple(map(str, ids_G)), groups_U)

    def top(share_G: np.ndarray) -> list[TopToken]:
        order = np.lexsort((-occurrences_G, -share_G))
        frequent = [group for group in order if occurrences_G[group] >= MIN_OCCURRENCES and share_G[group] > 0]
        return [TopToken(int(ids_G[g]), float(share_G[g]), int(occurrences_G[g])) for g in frequent[:count]]

    layers = []
    for ids_UK in expert_ids_LUK:  # one by one: ids times experts are many
        share_GE = assignments(ids_UK[None], groups, num_experts)[0] / occurrences_G[:, None]
        layers.append([top(share_E) for share_E in share_GE.T])
    return layers


def by_position(positions_U: np.ndarray) -> Groups:
    """Tokens by how far into their document (or its piece) they stand: 0, 1, 2-3, 4-7, ... doubling."""
    bucket_U = np.ceil(np.log2(positions_U + 1.0)).astype(int)
    names = ["0", "1"] + [f"{2**n}-{2 ** (n + 1) - 1}" for n in range(1, int(bucket_U.max(initial=0)))]
    return Groups(tuple(names), bucket_U).without_empty()
