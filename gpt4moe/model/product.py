"""Matrix products with float32 accumulation, in the forms that are fast on every backend.

XLA:CPU reaches the matrix units in bfloat16 only for a plain row-by-column product of two matrices with a float32
result. Given a transposed operand it converts both to float32 and is five times slower, and it folds any transpose it
can see into the product. `transposed` hides it in a loop; `product_nt` and `product_tn` transpose what is smaller.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Shaped

from gpt4moe.types import Array


def contract(x: Float[Array, " ..."], w: Float[Array, " ..."], num: int) -> Float32[Array, " ..."]:
    """Returns x [*rows, *I] times w [*I, *J] in float32, summed over the `num` dims I.

    Dims stay apart, so that a partitioner may split any of them; only bfloat16 on a CPU is brought to two.
    """
    summed, kept = math.prod(w.shape[:num]), w.shape[num:]

    def as_matrices(x: Array, w: Array) -> Array:
        y_2d = product(x.reshape(-1, summed), w.reshape(summed, -1))
        return y_2d.reshape(*x.shape[: x.ndim - num], *kept)

    return _by_platform(as_matrices, lambda x, w: jnp.tensordot(x, w, num, preferred_element_type=jnp.float32), x, w)


def contract_nt(dy: Float[Array, " ..."], w: Float[Array, " ..."], num: int) -> Float32[Array, " ..."]:
    """Returns dy [*rows, *J] times w [*I, *J] in float32, summed over the `num` dims J."""
    summed, kept = math.prod(w.shape[w.ndim - num :]), w.shape[: w.ndim - num]
    dims = tuple(range(dy.ndim - num, dy.ndim)), tuple(range(w.ndim - num, w.ndim))

    def as_matrices(dy: Array, w: Array) -> Array:
        dx_2d = product_nt(dy.reshape(-1, summed), w.reshape(-1, summed))
        return dx_2d.reshape(*dy.shape[: dy.ndim - num], *kept)

    return _by_platform(
        as_matrices, lambda dy, w: jnp.tensordot(dy, w, dims, preferred_element_type=jnp.float32), dy, w
    )


def contract_tn(x: Float[Array, " ..."], dy: Float[Array, " ..."], num: int) -> Float32[Array, " ..."]:
    """Returns x [*rows, *I] times dy [*rows, *J] in float32, summed over the `num` dims of rows: [*I, *J]."""
    summed, shape = math.prod(x.shape[:num]), (*x.shape[num:], *dy.shape[num:])
    dims = tuple(range(num)), tuple(range(num))

    def as_matrices(x: Array, dy: Array) -> Array:
        return product_tn(x.reshape(summed, -1), dy.reshape(summed, -1)).reshape(shape)

    return _by_platform(
        as_matrices, lambda x, dy: jnp.tensordot(x, dy, dims, preferred_element_type=jnp.float32), x, dy
    )


def _by_platform(as_matrices: Callable, whole: Callable, a: Array, b: Array) -> Array:
    if a.dtype == jnp.float32:
        return whole(a, b)
    return jax.lax.platform_dependent(a, b, cpu=as_matrices, default=whole)


def product(a: Float[Array, "I J"], b: Float[Array, "J K"]) -> Float32[Array, "I K"]:
    """Returns a [I, J] times b [J, K] in float32."""
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def product_over(a: Float[Array, "I J"], b: Float[Array, "K L"], a_dim: int, b_dim: int) -> Float32[Array, "M N"]:
    """Returns in float32, for kernels, the product of two matrices summed over a dim of each, as they lie."""
    return jax.lax.dot_general(a, b, (((a_dim,), (b_dim,)), ((), ())), preferred_element_type=jnp.float32)


def product_nt(a: Float[Array, "I J"], b: Float[Array, "K J"]) -> Float32[Array, "I K"]:
    """Returns a [I, J] times the transpose of b [K, J] in float32."""
    if a.dtype == jnp.float32:
        return product(a, b.T)
    return product(a, transposed(b))


def product_tn(a: Float[Array, "J I"], b: Float[Array, "J K"]) -> Float32[Array, "I K"]:
    """Returns the transpose of a [J, I] times b [J, K] in float32."""
    turn = jnp.transpose if a.dtype == jnp.float32 else transposed
    if b.size < a.size:
        return turn(product(turn(b), a))
    return product(turn(a), b)


def transposed(a: Float[Array, "I J"]) -> Float[Array, "J I"]:
    """Returns the transpose of a matrix as a copy that XLA:CPU cannot fold into a product."""
    if a.shape[1] % 2:
        a_padded = jnp.pad(a, ((0, 0), (0, 1)))
        return transposed(a_padded)[:-1]
    return jax.lax.platform_dependent(a, cpu=_transposed_in_halves, default=jnp.transpose)


def products(a_EIJ: Float[Array, "E I J"], b_EJK: Float[Array, "E J K"]) -> Float32[Array, "E I K"]:
    """Returns a [E, I, J] times b [E, J, K], one by one, in float32; a CPU has no batched product in bfloat16."""
    if a_EIJ.dtype == jnp.float32:
        return _batched(a_EIJ, b_EJK)
    return jax.lax.platform_dependent(a_EIJ, b_EJK, cpu=_one_by_one, default=_batched)


def products_nt(a_EIJ: Float[Array, "E I J"], b_EKJ: Float[Array, "E K J"]) -> Float32[Array, "E I K"]:
    """Returns a [E, I, J] times the transposes of b [E, K, J] in float32."""
    return products(a_EIJ, _swap(b_EKJ) if a_EIJ.dtype == jnp.float32 else each_transposed(b_EKJ))


def products_tn(a_EJI: Float[Array, "E J I"], b_EJK: Float[Array, "E J K"]) -> Float32[Array, "E I K"]:
    """Returns the transposes of a [E, J, I] times b [E, J, K] in float32."""
    turn = _swap if a_EJI.dtype == jnp.float32 else each_transposed
    if b_EJK.size < a_EJI.size:
        return turn(products(turn(b_EJK), a_EJI))
    return products(turn(a_EJI), b_EJK)


def to_bits(a: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """Returns a bfloat16 array as its bits, others as they are.

    For what a loop writes piece by piece: XLA:CPU converts the whole of a bfloat16 buffer to float32 and back at every
    such write, and leaves integers alone.
    """
    return jax.lax.bitcast_convert_type(a, jnp.uint16) if a.dtype == jnp.bfloat16 else a


def from_bits(a: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """Undoes `to_bits`."""
    return jax.lax.bitcast_convert_type(a, jnp.bfloat16) if a.dtype == jnp.uint16 else a


def each_transposed(a_EIJ: Float[Array, "E I J"]) -> Float[Array, "E J I"]:
    """Returns the transpose of each matrix as a copy that XLA:CPU cannot fold into a product."""
    if len(a_EIJ) == 1:  # a loop of one round would be unrolled
        return transposed(a_EIJ[0])[None]
    return jax.lax.platform_dependent(a_EIJ, cpu=_transposed_in_turn, default=_swap)


def _transposed_in_halves(a: Array) -> Array:
    halves = a.reshape(a.shape[0], 2, -1).swapaxes(0, 1)
    return _transposed_in_turn(halves).reshape(a.shape[::-1])


def _transposed_in_turn(a_EIJ: Array) -> Array:
    return from_bits(jax.lax.map(jnp.transpose, to_bits(a_EIJ)))


def _swap(a_EIJ: Array) -> Array:
    return a_EIJ.swapaxes(1, 2)


def _batched(a_EIJ: Array, b_EJK: Array) -> Array:
    return jnp.einsum("eij,ejk->eik", a_EIJ, b_EJK, preferred_element_type=jnp.float32)


def _one_by_one(a_EIJ: Array, b_EJK: Array) -> Array:
    return jnp.stack([product(a, b) for a, b in zip(a_EIJ, b_EJK, strict=True)])
