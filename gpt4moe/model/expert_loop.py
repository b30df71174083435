"""The feed-forwards of experts on a CPU, one expert after the other, with their own VJPs.

`serve` takes tokens and choices (dropless), `feed_forward_in_turn` rows that lie in equal blocks (capacity). Each
expert is visited once, forward and backward: its matrices are rounded and transposed once, and their gradients are
summed in float32 in a cache before they are written. What the backward pass needs of the hidden rows is kept.

A dropless expert has any number of rows, and XLA only products of known sizes: the rows are cut into pieces of
`PIECES` sizes such that little padding is multiplied and most work lies in large products. Rows lie sorted by expert,
without gaps; a last piece reads into the next expert's rows, whose own pieces then overwrite what it wrote there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from gpt4moe.model.layers import activate
from gpt4moe.model.product import from_bits, product, to_bits, transposed
from gpt4moe.types import Array

PIECES = (512, 256, 128, 64, 32, 16)
# Rows that could be multiplied in the time that a product costs beside its rows.
PIECE_OVERHEAD = 20
# Columns that lie together in a matrix being transposed, so that its rows do not all map to the same cache lines.
COLUMN_BLOCK = 64

Matrices = tuple[tuple[Array, ...], Array]  # inward [.., D, F]: (gate, up) or (up,); outward [.., F, D]
Places = tuple[Array, Array, Array, Array]  # token_S, slot_UK, used_UK, counts_E


def serve(
    matrices: Matrices,
    x_UD: Float[Array, "U D"],
    gates_UK: Float[Array, "U K"],
    used_UK: Array,
    order_S: Int[Array, " S"],
    counts_E: Int[Array, " E"],
) -> Float[Array, "U D"]:
    """Returns y_UD: the sum of each token's experts' outputs, weighted by its gates.

    order_S: all choices (token * K + k) sorted by expert, unused ones last; counts_E: used choices of each expert.
    """
    num_choices = gates_UK.shape[1]
    slots_S = jnp.arange(order_S.size, dtype=jnp.int32)
    slot_UK = jnp.zeros(order_S.size, jnp.int32).at[order_S].set(slots_S, unique_indices=True).reshape(gates_UK.shape)
    token_S = jnp.pad(order_S // num_choices, (0, _overhang(_sizes(order_S.size))))
    return _serve(matrices, x_UD, gates_UK, (token_S, slot_UK, used_UK, counts_E))


@jax.custom_vjp
def _serve(matrices: Matrices, x_UD: Array, gates_UK: Array, places: Places) -> Array:
    return _serve_forward(matrices, x_UD, gates_UK, places)[0]


def _serve_forward(matrices: Matrices, x_UD: Array, gates_UK: Array, places: Places) -> tuple[Array, tuple]:
    token_S, slot_UK, used_UK, counts_E = places
    y_SD, hidden_SF = _forward(matrices, _used_rows(x_UD, token_S, counts_E), counts_E, slot_UK.size)
    weights_UK = jnp.where(used_UK, gates_UK, 0.0)
    y_UD = sum(
        jnp.where(used_U[:, None], _rows(y_SD, slot_U).astype(jnp.float32), 0.0) * weight_U[:, None]
        for slot_U, used_U, weight_U in zip(slot_UK.T, used_UK.T, weights_UK.T, strict=True)
    ).astype(x_UD.dtype)
    return y_UD, (matrices, x_UD, gates_UK, places, y_SD, hidden_SF)


def _serve_backward(residuals: tuple, dy_UD: Array) -> tuple:
    matrices, x_UD, gates_UK, places, y_SD, hidden_SF = residuals
    token_S, slot_UK, used_UK, counts_E = places
    gate_S = jnp.zeros(token_S.size).at[slot_UK].set(gates_UK, unique_indices=True)
    dweighted_SD = _rows(dy_UD, token_S).astype(jnp.float32)
    dgate_S = jnp.sum(dweighted_SD * y_SD.astype(jnp.float32), axis=-1)
    dgates_UK = jnp.where(used_UK, _rows(dgate_S, slot_UK), 0.0).astype(gates_UK.dtype)
    dy_SD = (dweighted_SD * gate_S[:, None]).astype(x_UD.dtype)
    x_SD = _used_rows(x_UD, token_S, counts_E)
    dx_SD, dmatrices = _backward(matrices, dy_SD, x_SD, hidden_SF, counts_E, slot_UK.size)
    dx_UD = sum(
        jnp.where(used_U[:, None], _rows(dx_SD, slot_U).astype(jnp.float32), 0.0)
        for slot_U, used_U in zip(slot_UK.T, used_UK.T, strict=True)
    ).astype(x_UD.dtype)
    return _in_dtypes_of(matrices, dmatrices), dx_UD, dgates_UK, None


_serve.defvjp(_serve_forward, _serve_backward)


def _forward(matrices: Matrices, x_SD: Array, counts_E: Array, num_rows: int) -> tuple[Array, tuple[Array, ...]]:
    """Returns y_SD and what was kept of the hidden rows, as bits."""
    sizes, dtype = _sizes(num_rows), x_SD.dtype
    x_SD, hidden_dim = to_bits(x_SD), matrices[1].shape[1]

    def expert(written: tuple, inputs: tuple) -> tuple[tuple, None]:
        one, start, pieces_Z = inputs
        one = _rounded(one, dtype)

        def piece(row: Array, size: int, written: tuple) -> tuple:
            y_CD, hidden = _forward_rows(one, from_bits(_piece(x_SD, row, size)))
            return jax.tree.map(lambda whole, part: _put(whole, to_bits(part), row), written, (y_CD, hidden))

        return _over_pieces(sizes, pieces_Z, start, piece, written), None

    empty = (
        to_bits(jnp.zeros(x_SD.shape, dtype)),
        tuple(to_bits(jnp.zeros((len(x_SD), hidden_dim), dtype)) for _ in matrices[0]),
    )
    inputs = matrices, jnp.cumsum(counts_E) - counts_E, _pieces_of(counts_E, sizes)
    (y_SD, hidden_SF), _ = jax.lax.scan(expert, empty, inputs)
    return from_bits(y_SD), hidden_SF


def _backward(
    matrices: Matrices, dy_SD: Array, x_SD: Array, hidden_SF: tuple[Array, ...], counts_E: Array, num_rows: int
) -> tuple[Array, Matrices]:
    """Returns dx_SD and the gradients of the matrices in float32."""
    sizes, dtype = _sizes(num_rows), x_SD.dtype
    dy_SD, x_SD = to_bits(dy_SD), to_bits(x_SD)

    def expert(dx_SD: Array, inputs: tuple) -> tuple[Array, Matrices]:
        one, start, count, pieces_Z = inputs
        turned = _turned_outward(one, dtype)
        zero = jnp.minimum(start, 0)

        def piece(row: Array, size: int, sums: tuple) -> tuple:
            dx_SD, dmatrices = sums
            x_CD, *hidden, dy_CD = (from_bits(_piece(rows, row, size)) for rows in (x_SD, *hidden_SF, dy_SD))
            own_C = row + jnp.arange(size) < start + count
            dy_CD = jnp.where(own_C[:, None], dy_CD, 0)
            dx_CD, parts = _backward_rows(turned, dy_CD, x_CD, hidden, zero)
            return _put(dx_SD, to_bits(dx_CD.astype(dtype)), row), jax.tree.map(jnp.add, dmatrices, parts)

        nothing = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), one)
        return _over_pieces(sizes, pieces_Z, start, piece, (dx_SD, nothing))

    inputs = matrices, jnp.cumsum(counts_E) - counts_E, counts_E, _pieces_of(counts_E, sizes)
    dx_SD, dmatrices = jax.lax.scan(expert, to_bits(jnp.zeros(x_SD.shape, dtype)), inputs)
    return from_bits(dx_SD), dmatrices


@jax.custom_vjp
def feed_forward_in_turn(matrices: Matrices, rows_ECD: Float[Array, "E C D"]) -> Float[Array, "E C D"]:
    """Returns block e through expert e."""
    return _in_turn_forward(matrices, rows_ECD)[0]


def _in_turn_forward(matrices: Matrices, rows_ECD: Array) -> tuple[Array, tuple]:
    dtype = rows_ECD.dtype

    def expert(_: None, inputs: tuple) -> tuple[None, tuple]:
        one, rows_CD = inputs
        return None, jax.tree.map(to_bits, _forward_rows(_rounded(one, dtype), from_bits(rows_CD)))

    _, (y_ECD, hidden_ECF) = jax.lax.scan(expert, None, (matrices, to_bits(rows_ECD)))
    return from_bits(y_ECD), (matrices, rows_ECD, hidden_ECF)


def _in_turn_backward(residuals: tuple, dy_ECD: Array) -> tuple[Matrices, Array]:
    matrices, rows_ECD, hidden_ECF = residuals
    dtype = rows_ECD.dtype

    def expert(_: None, inputs: tuple) -> tuple[None, tuple]:
        one, zero, *rows = inputs
        x_CD, dy_CD, *hidden = map(from_bits, rows)
        dx_CD, dmatrices = _backward_rows(_turned_outward(one, dtype), dy_CD, x_CD, hidden, jnp.minimum(zero, 0))
        return None, (to_bits(dx_CD.astype(dtype)), dmatrices)

    rows = (to_bits(rows_ECD), to_bits(dy_ECD), *hidden_ECF)
    _, (dx_ECD, dmatrices) = jax.lax.scan(expert, None, (matrices, jnp.arange(len(rows_ECD)), *rows))
    return _in_dtypes_of(matrices, dmatrices), from_bits(dx_ECD)


feed_forward_in_turn.defvjp(_in_turn_forward, _in_turn_backward)


def _forward_rows(matrices: Matrices, x_CD: Array) -> tuple[Array, tuple[Array, ...]]:
    """Returns the output of one expert and its hidden rows before the activation, all in the rows' dtype."""
    inward, down_FD = matrices
    hidden = tuple(product(x_CD, w_DF).astype(x_CD.dtype) for w_DF in inward)
    return product(_activated(*hidden), down_FD).astype(x_CD.dtype), hidden


def _backward_rows(
    matrices: Matrices, dy_CD: Array, x_CD: Array, hidden: Sequence[Array], zero: Array
) -> tuple[Array, Matrices]:
    """Returns dx and the gradients of one expert's matrices in float32; outward comes as `_turned_outward` gave it."""
    inward, down_DF = matrices
    activated_CF, pull = jax.vjp(_activated, *hidden)
    dhidden = pull(product(dy_CD, down_DF).astype(x_CD.dtype))
    ddown_FD = product(_turned(activated_CF, zero), dy_CD)
    x_DC = _turned(x_CD, zero)
    if x_CD.dtype == jnp.float32:
        dx_CD = sum(product(d_CF, w_DF.T) for d_CF, w_DF in zip(dhidden, inward, strict=True))
    else:  # of the operands that could be transposed the rows are the smaller, unless an expert has many of them
        dx_CD = transposed(sum(product(w_DF, _turned(d_CF, zero)) for d_CF, w_DF in zip(dhidden, inward, strict=True)))
    return dx_CD, (tuple(product(x_DC, d_CF) for d_CF in dhidden), ddown_FD)


def _activated(*hidden: Array) -> Array:
    return activate(hidden[-1], hidden[0] if len(hidden) == 2 else None)


def _rounded(matrices: Matrices, dtype: jnp.dtype) -> Matrices:
    return jax.tree.map(lambda w: w.astype(dtype), matrices)


def _turned_outward(matrices: Matrices, dtype: jnp.dtype) -> Matrices:
    inward, down_FD = _rounded(matrices, dtype)
    return inward, down_FD.T if dtype == jnp.float32 else transposed(down_FD)


def _turned(a_IJ: Array, zero: Array) -> Array:
    """Returns the transpose, in bfloat16 as a copy that XLA cannot fold into a product: `zero` it does not know."""
    rows, columns = a_IJ.shape
    if a_IJ.dtype == jnp.float32:
        return a_IJ.T
    if rows < COLUMN_BLOCK or columns % COLUMN_BLOCK or columns < 2 * COLUMN_BLOCK:
        return transposed(a_IJ)
    bits_IJ = to_bits(a_IJ)
    blocks = [bits_IJ[:, start : start + COLUMN_BLOCK] for start in range(0, columns, COLUMN_BLOCK)]
    turned = jnp.concatenate(blocks).reshape(-1, rows, COLUMN_BLOCK).swapaxes(1, 2)
    return from_bits((turned ^ zero.astype(turned.dtype)).reshape(columns, rows))


def _over_pieces(sizes: tuple[int, ...], pieces_Z: Array, start: Array, piece: Callable, carried: tuple) -> tuple:
    """`piece(row, size, carried)` for every piece of one expert, from its first row to its last."""
    for z, size in enumerate(sizes):
        step = functools.partial(lambda size, start, i, carried: piece(start + i * size, size, carried), size, start)
        carried = jax.lax.fori_loop(0, pieces_Z[z], step, carried)
        start = start + pieces_Z[z] * size
    return carried


def _sizes(num_rows: int) -> tuple[int, ...]:
    return tuple(size for size in PIECES if size <= num_rows) or PIECES[-1:]


def _pieces_of(counts_E: Array, sizes: tuple[int, ...]) -> Array:
    """Returns [E, Z]: how many pieces of each size an expert's rows are cut into."""
    table_RZ = jnp.asarray(_cheapest_pieces(sizes))
    return table_RZ[counts_E % sizes[0]].at[:, 0].add(counts_E // sizes[0])


@functools.cache
def _cheapest_pieces(sizes: tuple[int, ...]) -> np.ndarray:
    """Row r: pieces of each size that hold r rows at the least cost, a piece costing its rows and the overhead."""
    best = [(0, (0,) * len(sizes))]
    for rows in range(1, sizes[0] + 1):
        options = []
        for z, size in enumerate(sizes):
            cost, pieces = best[max(rows - size, 0)]
            options.append((cost + size + PIECE_OVERHEAD, (*pieces[:z], pieces[z] + 1, *pieces[z + 1 :])))
        best.append(min(options))
    return np.array([pieces for _, pieces in best], np.int32)


def _overhang(sizes: tuple[int, ...]) -> int:
    """Rows that the last piece of an expert may reach beyond its rows."""
    held_R = _cheapest_pieces(sizes) @ np.array(sizes)
    return int(np.max(held_R - np.arange(len(held_R))))


def _used_rows(x_UD: Array, token_S: Array, counts_E: Array) -> Array:
    """The token in each slot, zeros beyond the used ones: a piece may reach there, and what padding holds must not."""
    used_S = jnp.arange(token_S.size) < jnp.sum(counts_E)
    return jnp.where(used_S[:, None], _rows(x_UD, token_S), 0)


def _rows(rows: Array, index: Array) -> Array:
    return rows.at[index].get(mode="promise_in_bounds")


def _piece(rows_SD: Array, row: Array, size: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(rows_SD, row, size)


def _put(whole_SD: Array, part_CD: Array, row: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(whole_SD, part_CD, row, axis=0)


def _in_dtypes_of(matrices: Matrices, gradients: Matrices) -> Matrices:
    return jax.tree.map(lambda w, dw: dw.astype(w.dtype), matrices, gradients)
