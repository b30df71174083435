"""Matrix product, norm, feed-forward and parameter initialisation that every part of the model is made of."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Float32

from gpt4moe.model.product import contract, contract_nt, contract_tn
from gpt4moe.types import Array

# Standard deviation of a standard normal cut at two sigmas; dividing by it gives the stated deviation.
TRUNCATED_STD = 0.87962566103423978
# What the remat policy `dots` keeps.
MATMUL_NAME = "matmul"


Slots = tuple[int, ...]  # which layer each slot of a stack holds, -1 where it holds none


def normal_parameter(
    rngs: nnx.Rngs,
    layers: Slots | None,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    std: float,
    stack: str = "layers",
):
    """Returns a float32 parameter from a normal cut at two sigmas, of deviation `std`.

    `layers` stacks one for each of these layers along a leading dim, each from its own key, so that a layer's values
    depend neither on how many layers there are nor on where they lie; an empty slot (-1) is zeros. `axes` are the
    logical dims of one layer; the parameter carries them, `stack` first where stacked, as its `logical_axes`.
    """

    def draw(key: Array) -> Array:
        return jax.random.truncated_normal(key, -2.0, 2.0, shape, jnp.float32) * (std / TRUNCATED_STD)

    key = rngs.params()
    if layers is None:
        return nnx.Param(draw(key), logical_axes=axes)
    slots = jnp.array(layers)
    keys = jax.vmap(lambda layer: jax.random.fold_in(key, layer))(jnp.maximum(slots, 0))
    held = (slots >= 0).reshape(-1, *(1,) * len(shape))
    return nnx.Param(jnp.where(held, jax.vmap(draw)(keys), 0.0), logical_axes=(stack, *axes))


def filled_parameter(layers: Slots | None, shape: tuple[int, ...], axes: tuple[str, ...], value: float, stack: str):
    """Returns a float32 parameter of one value, stacked as in `normal_parameter`."""
    if layers is None:
        return nnx.Param(jnp.full(shape, value, jnp.float32), logical_axes=axes)
    return nnx.Param(jnp.full((len(layers), *shape), value, jnp.float32), logical_axes=(stack, *axes))


def depth_scale(num_layers: int) -> float:
    """Factor on the deviation of matrices that write to the residual stream: 1 / sqrt(2L) (GPT-2, section 2.3)."""
    return 1.0 / math.sqrt(2 * num_layers)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x: Float[Array, " ..."], w: Float[Array, " ..."], num_contracted: int = 1) -> Float[Array, " ..."]:
    """Returns x [..., *contracted] times w [*contracted, ...] in x's dtype, the last `num_contracted` dims of x summed.

    Both operands enter in x's dtype, forward and backward, and every product accumulates in float32: the only bfloat16
    form that reaches the matrix units of a CPU, and the right one elsewhere. The gradient of w comes in w's dtype,
    never rounded to x's.
    """
    y = contract(x, w.astype(x.dtype), num_contracted).astype(x.dtype)
    return checkpoint_name(y, MATMUL_NAME)


def _matmul_forward(x: Array, w: Array, num_contracted: int) -> tuple[Array, tuple[Array, Array]]:
    return matmul(x, w, num_contracted), (x, w)


def _matmul_backward(num_contracted: int, residuals: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, w = residuals
    dx = contract_nt(dy, w.astype(x.dtype), w.ndim - num_contracted).astype(x.dtype)
    return dx, contract_tn(x, dy, x.ndim - num_contracted).astype(w.dtype)


matmul.defvjp(_matmul_forward, _matmul_backward)


def rematerialised(function: Callable, remat: str, *, in_loop: bool) -> Callable:
    """Returns `function` under the remat policy of `ModelConfig.remat`.

    Outside a loop XLA would find that recomputing is what was computed before, and keep that.
    """
    if remat == "none":
        return function
    saved = jax.checkpoint_policies.save_only_these_names(MATMUL_NAME) if remat == "dots" else None
    return jax.checkpoint(function, policy=saved, prevent_cse=not in_loop)


class Linear(nnx.Module):
    """x [*rows, *contracted] times a matrix of `shape` [*contracted, *rest], plus a bias where it `has_bias`.

    The bias is kept as one dim, named like the first of the rest: weight decay tells a matrix by its number of dims.
    """

    def __init__(
        self,
        layers: Slots | None,
        shape: tuple[int, ...],
        axes: tuple[str, ...],
        rngs: nnx.Rngs,
        *,
        num_contracted: int = 1,
        out_scale: float = 1.0,
        has_bias: bool = True,
        stack: str = "layers",
    ):
        std = math.prod(shape[:num_contracted]) ** -0.5 * out_scale
        size, name = math.prod(shape[num_contracted:]), axes[num_contracted]
        self.weight = normal_parameter(rngs, layers, shape, axes, std, stack)
        self.bias = filled_parameter(layers, (size,), (name,), 0.0, stack) if has_bias else None
        self.num_contracted = num_contracted

    def __call__(self, x: Float[Array, " ..."]) -> Float[Array, " ..."]:
        y = matmul(x, self.weight[...], self.num_contracted)
        if self.bias is None:
            return y
        return y + self.bias[...].astype(y.dtype).reshape(self.weight[...].shape[self.num_contracted :])


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last dim, in float32, returned in x's dtype (Zhang and Sennrich 2019).

    The scale begins at `initial`.
    """

    def __init__(self, layers: Slots | None, dim: int, epsilon: float, initial: float = 1.0, stack: str = "layers"):
        self.scale = filled_parameter(layers, (dim,), ("norm",), initial, stack)
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return rms_normed(x, self.scale[...], self.epsilon).astype(x.dtype)


def rms_normed(x: Float[Array, "*shape"], scale: Float[Array, " dim"], epsilon: float) -> Float32[Array, "*shape"]:
    """Returns what `RMSNorm` does, in float32."""
    x_float = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x_float), axis=-1, keepdims=True)
    return x_float * jax.lax.rsqrt(mean_square + epsilon) * scale


class LayerNorm(nnx.Module):
    """(x - mean(x)) / std(x) * scale + bias over the last dim, in float32, returned in x's dtype (Ba et al. 2016)."""

    def __init__(self, layers: Slots | None, dim: int, epsilon: float, stack: str = "layers"):
        self.scale = filled_parameter(layers, (dim,), ("norm",), 1.0, stack)
        self.bias = filled_parameter(layers, (dim,), ("norm",), 0.0, stack)
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        x_float = x.astype(jnp.float32)
        centred = x_float - jnp.mean(x_float, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(variance + self.epsilon)
        return (normed * self.scale[...] + self.bias[...]).astype(x.dtype)


def normed(norm: nnx.Module | None, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns x after a norm that may be left out (None)."""
    return x if norm is None else norm(x)


@functools.cache  # one object a name, so that modules that hold it are of one graph
def activation(name: str) -> Callable[[Array], Array]:
    """Returns one of `config.vision.ACTIVATIONS` as a function of an array; float32 inside, x's dtype out.

    gelu is exact, gelu_tanh its approximation (Hendrycks and Gimpel 2016), quick_gelu x * sigmoid(1.702 x), as in CLIP,
    squared_relu that of So et al. 2021.
    """
    functions = {
        "gelu": functools.partial(jax.nn.gelu, approximate=False),
        "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
        "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
        "relu": jax.nn.relu,
        "squared_relu": lambda x: jnp.square(jax.nn.relu(x)),
    }
    function = functions[name]
    return lambda x: function(x.astype(jnp.float32)).astype(x.dtype)


def activate(up: Float[Array, "*rows F"], gate: Float[Array, "*rows F"] | None) -> Float[Array, "*rows F"]:
    """Returns SwiGLU, silu(gate) * up (Shazeer 2020), or GELU(up) where there is no gate; float32 inside."""
    up_float = up.astype(jnp.float32)
    hidden = jax.nn.gelu(up_float) if gate is None else jax.nn.silu(gate.astype(jnp.float32)) * up_float
    return hidden.astype(up.dtype)


class FeedForward(nnx.Module):
    """A dense feed-forward: SwiGLU where `gated` (three matrices), else a function, GELU by default; no biases."""

    def __init__(
        self,
        layers: Slots | None,
        dim: int,
        hidden: int,
        gated: bool,
        out_scale: float,
        rngs: nnx.Rngs,
        activation: Callable[[Array], Array] | None = None,
        stack: str = "layers",
    ):
        def matrix(shape: tuple[int, int], axes: tuple[str, str], std: float) -> nnx.Param:
            return normal_parameter(rngs, layers, shape, axes, std, stack)

        std, self.activation = dim**-0.5, activation
        self.gate = matrix((dim, hidden), ("embed", "mlp"), std) if gated else None
        self.up = matrix((dim, hidden), ("embed", "mlp"), std)
        self.down = matrix((hidden, dim), ("mlp", "embed"), hidden**-0.5 * out_scale)

    def __call__(self, x_D: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        gate_F = None if self.gate is None else matmul(x_D, self.gate[...])
        up_F = matmul(x_D, self.up[...])
        return matmul(activate(up_F, gate_F) if self.activation is None else self.activation(up_F), self.down[...])
