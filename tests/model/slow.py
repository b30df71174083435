"""Loop versions of the model's algorithms, one token at a time, and how to take one layer of a stacked module."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def one_layer(module):
    """The first layer of a module whose parameters are stacked."""
    graph, state = nnx.split(module)
    return nnx.merge(graph, jax.tree.map(lambda leaf: leaf[0], state))


def relative_difference(got, want):
    """|got - want| / |want| in norm, the largest of all leaves; the difference itself where `want` is zero."""

    def leaf(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        return np.linalg.norm(a - b) / (np.linalg.norm(b) or 1.0)

    # numpy's maximum, unlike Python's, does not pass over what is not a number
    return float(np.max(jax.tree.leaves(jax.tree.map(leaf, got, want)), initial=0.0))


def feed_forward(x_D, gate_DF, up_DF, down_FD):
    """SwiGLU, or GELU without a gate, of one token."""
    up_F = x_D @ up_DF
    hidden_F = jax.nn.gelu(up_F) if gate_DF is None else jax.nn.silu(x_D @ gate_DF) * up_F
    return hidden_F @ down_FD


def kept_choices(ids_UK, used_UK, room):
    """Which choices find a place when the queue is all first choices, then all second ones; room None keeps all."""
    taken, kept = collections.Counter(), np.zeros(ids_UK.shape, bool)
    for k in range(ids_UK.shape[1]):
        for u in range(ids_UK.shape[0]):
            expert = int(ids_UK[u, k])
            if used_UK[u, k] and (room is None or taken[expert] < room):
                taken[expert] += 1
                kept[u, k] = True
    return kept


def mixture(x_GUD, gates_GUK, experts, ids_GUK, used_GUK, room):
    """Sum over the kept choices of gate times expert, token by token; `experts` holds (gate or None, up, down)."""
    gate_EDF, up_EDF, down_EFD = experts
    rows = []
    for g, ids_UK in enumerate(ids_GUK):
        kept_UK = kept_choices(ids_UK, used_GUK[g], room)
        for u in range(len(ids_UK)):
            y_D = jnp.zeros(x_GUD.shape[-1])
            for k in np.flatnonzero(kept_UK[u]):
                e = int(ids_UK[u, k])
                gate_DF = None if gate_EDF is None else gate_EDF[e]
                y_D += gates_GUK[g, u, k] * feed_forward(x_GUD[g, u], gate_DF, up_EDF[e], down_EFD[e])
            rows.append(y_D)
    return jnp.stack(rows).reshape(x_GUD.shape)


def attention(q_TNH, k_TMH, v_TMH, segments_T):
    """Softmax attention of one row, token by token and head by head, within segments and not ahead."""
    groups = q_TNH.shape[1] // k_TMH.shape[1]
    rows = []
    for t in range(len(q_TNH)):
        seen = [s for s in range(t + 1) if segments_T[s] == segments_T[t]]
        for n in range(q_TNH.shape[1]):
            k_SH, v_SH = (x[jnp.array(seen), n // groups] for x in (k_TMH, v_TMH))
            rows.append(jax.nn.softmax(k_SH @ q_TNH[t, n] / q_TNH.shape[-1] ** 0.5) @ v_SH)
    return jnp.stack(rows).reshape(q_TNH.shape)
