"""What one device of a mesh decodes: parts of heads and hidden dims along `tensor`, whole experts along `expert`.

Every device has all rows. Partial sums are added up twice a layer, after attention and after the feed-forward
(Shoeybi et al. 2019), the experts' parts together with those of their hidden dims: decoding sends no token anywhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float

from gpt4moe.config.moe import MoeConfig
from gpt4moe.infer.decode_weights import DecoderWeights, MoeWeights
from gpt4moe.model.router import Routing
from gpt4moe.parallel.island import Axes, island
from gpt4moe.types import Array

EXPERT, TENSOR = "expert", "tensor"
EVERYWHERE = PartitionSpec()
PAGES = PartitionSpec(None, None, TENSOR)  # of keys and values: heads lie in parts


@dataclasses.dataclass(frozen=True)
class Shards:
    """The devices that hold the parts of some layers; without a mesh there is one, which holds them whole.

    `summed` to `local` are called inside an island over the mesh, on what one device holds.
    """

    mesh: Mesh | None = None

    @property
    def tensor(self) -> int:
        """Parts of heads and hidden dims."""
        return 1 if self.mesh is None else self.mesh.shape[TENSOR]

    @property
    def expert(self) -> int:
        """Parts of the experts."""
        return 1 if self.mesh is None else self.mesh.shape[EXPERT]

    @property
    def heads(self) -> Axes:
        """Axes along which heads, and the hidden dims of an expert, lie in parts."""
        return () if self.mesh is None else (TENSOR,)

    @property
    def hidden(self) -> Axes:
        """Axes along which the hidden dims of what every token goes through lie in parts."""
        return () if self.mesh is None else (EXPERT, TENSOR)

    @property
    def everywhere(self) -> NamedSharding | None:
        """How an array lies that every device holds whole."""
        return None if self.mesh is None else NamedSharding(self.mesh, EVERYWHERE)

    def island(self, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
        """Returns a function of what one device holds as one of whole arrays."""
        return function if self.mesh is None else island(function, self.mesh, in_specs, out_specs)

    def made(self, make: Callable[[], Any], spec: PartitionSpec = EVERYWHERE) -> Any:
        """Returns the arrays that `make` gives, laid out as they are made."""
        return make() if self.mesh is None else jax.jit(make, out_shardings=NamedSharding(self.mesh, spec))()

    def put(self, tree: Any) -> Any:
        """Returns arrays on every device."""
        return tree if self.mesh is None else jax.device_put(tree, self.everywhere)

    def abstract(self, tree: Any) -> Any:
        """Returns shapes for a compilation, with how arrays lie on the mesh if there is one."""

        def of_leaf(leaf: Any) -> jax.ShapeDtypeStruct:
            where = None if self.mesh is None else getattr(leaf, "sharding", None)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

        return jax.tree.map(of_leaf, tree)

    def specs(self, leaves: list[Array]) -> list[PartitionSpec] | None:
        """Returns how laid out arrays lie on the mesh."""
        return None if self.mesh is None else [leaf.sharding.spec for leaf in leaves]

    def summed(self, part: Array, axes: Axes) -> Array:
        """The sum of the devices' parts."""
        return jax.lax.psum(part, axes) if axes else part

    def joined(self, part: Float[Array, "*rows J"], size: int) -> Float[Array, "*rows all_J"]:
        """The devices' columns side by side, where `size` columns are in parts at all."""
        if not self.heads or size % self.tensor:
            return part
        return jax.lax.all_gather(part, TENSOR, axis=part.ndim - 1, tiled=True)

    def here(self, routing: Routing, config: MoeConfig) -> tuple[Routing, int]:
        """The choices of experts that are on this device, numbered as they lie on it, and how many it holds."""
        if self.expert == 1:
            return routing, config.num_experts
        held = config.num_experts // self.expert
        ids_UK = routing.expert_ids_UK - held * jax.lax.axis_index(EXPERT)
        mine_UK = routing.used_UK & (ids_UK >= 0) & (ids_UK < held)
        own = {"expert_ids_UK": jnp.where(mine_UK, ids_UK, 0), "gates_UK": jnp.where(mine_UK, routing.gates_UK, 0.0)}
        return dataclasses.replace(routing, used_UK=mine_UK, **own), held

    def local(self, weights: DecoderWeights) -> DecoderWeights:
        """A device's part of laid out weights, with experts that are apart as matrices (see `stages.cut`)."""

        def apart(part: object) -> object:
            if self.mesh is None or not isinstance(part, MoeWeights) or not isinstance(part.experts, tuple):
                return part
            return dataclasses.replace(part, experts=jax.tree.map(lambda leaf: leaf[0], part.experts))

        layers = (dataclasses.replace(layer, feed_forward=apart(layer.feed_forward)) for layer in weights.layers)
        return dataclasses.replace(weights, layers=tuple(layers))


ALONE = Shards()
