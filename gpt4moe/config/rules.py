"""Which mesh axes each logical dim of a tensor lies on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from gpt4moe.config.check import require
from gpt4moe.config.mesh import MESH_AXES


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """One table from logical dims to mesh axes; a dim that is mapped to no axis is replicated.

    Parameters name their dims with these words; a word that the table lacks is refused when shardings are made.
    `overrides` is a dict of the entries in which a run departs from the table.
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
        ("cross_layers", ("stage",)),
        ("vision_layers", ()),
        ("vision_embed", ("fsdp",)),
        ("patch", ()),
        ("position", ()),
    )
    batch_axes: tuple[str, ...] = ("data", "fsdp", "expert")
    overrides: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", _axes_by_dim("ShardingRules.rules", self.rules))
        object.__setattr__(self, "overrides", _axes_by_dim("ShardingRules.overrides", self.overrides))
        object.__setattr__(self, "batch_axes", _axes("ShardingRules.batch_axes", self.batch_axes))
        table = dict(self.rules)
        for dim, _ in self.overrides:
            mend = f"use one of {', '.join(table)}"
            require(dim in table, "ShardingRules.overrides", dict(self.overrides), f"has unknown dim {dim!r}", mend)

    def axes_of(self, dim: str) -> tuple[str, ...]:
        """Mesh axes of one logical dim; raises for a dim that the table lacks."""
        table = dict(self.rules) | dict(self.overrides)
        require(dim in table, "logical dim", dim, f"is not in ShardingRules ({', '.join(table)})")
        return table[dim]


def _axes_by_dim(setting: str, given: object) -> tuple[tuple[str, tuple[str, ...]], ...]:
    form = "must be a dict from logical dims to lists of mesh axes"
    require(isinstance(given, (Mapping, list, tuple)), setting, given, form, 'e.g. {"embed": ["fsdp"]}')
    pairs = list(given.items() if isinstance(given, Mapping) else given)
    require(all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs), setting, given, form)
    names = [name for name, _ in pairs]
    require(len(set(names)) == len(names), setting, names, "must name every logical dim once")
    return tuple((name, _axes(f"{setting}[{name!r}]", axes)) for name, axes in pairs)


def _axes(setting: str, given: object) -> tuple[str, ...]:
    listed = isinstance(given, (list, tuple)) and all(axis in MESH_AXES for axis in given)
    require(listed, setting, given, f"must be a list of axes of {MESH_AXES}")
    require(len(set(given)) == len(given), setting, given, "must name every axis once")
    return tuple(given)
