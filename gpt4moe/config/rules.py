"""Which mesh axes each logical dim of a tensor lies on."""

from __future__ import annotations

import dataclasses

from gpt4moe.config.check import require
from gpt4moe.config.mesh import MESH_AXES


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """One table from logical dims to mesh axes; a dim that is mapped to no axis is replicated.

    Parameters name their dims with these words; a word that the table lacks is refused when shardings are made.
    """

    rules: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("layers", ("stage",)),
        ("vocab", ("tensor",)),
        ("embed", ("fsdp",)),
        ("heads", ("tensor",)),
        ("kv_heads", ()),
        ("head_dim", ()),
        ("experts", ("expert",)),
        ("router_experts", ()),
        ("mlp", ("tensor",)),
        ("norm", ()),
    )
    batch_axes: tuple[str, ...] = ("data", "fsdp", "expert")

    def __post_init__(self) -> None:
        names = [name for name, _ in self.rules]
        require(len(set(names)) == len(names), "ShardingRules.rules", names, "must name every logical dim once")
        used = {axis for _, axes in self.rules for axis in axes} | set(self.batch_axes)
        require(used <= set(MESH_AXES), "ShardingRules.rules", sorted(used), f"must use axes of {MESH_AXES}")

    def axes_of(self, dim: str) -> tuple[str, ...]:
        """Mesh axes of one logical dim; raises for a dim that the table lacks."""
        table = dict(self.rules)
        require(dim in table, "logical dim", dim, f"is not in ShardingRules ({', '.join(table)})")
        return table[dim]
