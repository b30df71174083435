"""Where each tensor of a Mixtral lies in our parameters, and parameters made of tensors and tensors of parameters.

Both turn the halves of a head against each other, store gate, up and down of SwiGLU experts, and norm without a bias.
A Mixtral's embedding enters the residual stream as it is: `ModelConfig.embedding_std` is 1 where one was imported. The
released checkpoints name every expert's matrices (`block_sparse_moe.experts.N.w1`), newer ones keep those of a layer
together (`mlp.experts.gate_up_proj`); we read both and write the former.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from gpt4moe.config.check import CallerError, require
from gpt4moe.config.model import ModelConfig
from gpt4moe.interop.tensor_files import StoredTensor, listed, read_tensor

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
LAYER = "model.layers.{}."
RELEASED, NEWER = "block_sparse_moe", "mlp"
MOST_MISSING = 100  # times the tensors that are there
Turn = Callable[[np.ndarray], np.ndarray]
Index = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Place:
    """A foreign tensor, or `part` of its second dim, and where in a parameter of ours it lies.

    shape: of the whole tensor. index: layer, or layer and expert; () where it is the whole parameter. to_ours,
    to_theirs: each other's inverse.
    """

    name: str
    shape: tuple[int, ...]
    index: Index
    to_ours: Turn
    to_theirs: Turn
    part: slice | None = None


@dataclasses.dataclass(frozen=True)
class Naming:
    """How a checkpoint names its experts: `block` of a layer, and whether matrices of all experts are one tensor."""

    block: str = RELEASED
    fused: bool = False


def naming_of(tensors: Mapping[str, StoredTensor]) -> Naming:
    """Returns the naming that these tensors follow."""
    block = NEWER if any(f".{NEWER}." in name for name in tensors) else RELEASED
    return Naming(block, any(name.endswith(".experts.gate_up_proj") for name in tensors))


def require_enough(config: ModelConfig, naming: Naming, tensors: Mapping[str, StoredTensor]) -> None:
    """Raises `CallerError` where config.json speaks of more layers and experts than anybody would list as missing."""
    layers, experts = config.num_layers, config.moe.num_experts
    fewest = layers if naming.fused else layers * experts
    constraint = f"are too few for num_hidden_layers={layers} of num_local_experts={experts} in config.json"
    require(fewest <= MOST_MISSING * len(tensors), "tensors", len(tensors), constraint)


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every parameter of ours by its dotted path."""
    layers, dim, hidden, experts = config.num_layers, config.model_dim, config.moe.hidden_dim, config.moe.num_experts
    heads, kv_heads, head_dim = config.attention.num_heads, config.attention.num_kv_heads, config.head_dim
    head = {} if config.tie_embeddings else {"head": (config.vocab_size, dim)}
    return {
        "embedding": (config.vocab_size, dim),
        "blocks.attention_norm.scale": (layers, dim),
        "blocks.attention.query": (layers, dim, heads, head_dim),
        "blocks.attention.key": (layers, dim, kv_heads, head_dim),
        "blocks.attention.value": (layers, dim, kv_heads, head_dim),
        "blocks.attention.output": (layers, heads, head_dim, dim),
        "blocks.feed_forward_norm.scale": (layers, dim),
        "blocks.moe.router": (layers, dim, experts),
        "blocks.moe.experts.gate": (layers, experts, dim, hidden),
        "blocks.moe.experts.up": (layers, experts, dim, hidden),
        "blocks.moe.experts.down": (layers, experts, hidden, dim),
        "final_norm.scale": (dim,),
    } | head


def places(config: ModelConfig, naming: Naming) -> dict[str, list[Place]]:
    """Returns, for every parameter of ours by path, the tensors that it is made of."""
    dim, head_dim = config.model_dim, config.head_dim
    table = (config.vocab_size, dim)
    # A tied head reads what the residual stream is given times `embedding_std`; the final norm has the factor instead.
    scale, tied = config.embedding_std, config.tie_embeddings
    norm = scale if tied else 1.0
    found = {
        "embedding": [Place(EMBEDDING, table, (), _times(scale), _times(1 / scale))],
        "final_norm.scale": [Place(NORM, (dim,), (), _times(1 / norm), _times(norm))],
    }
    if not tied:
        found["head"] = [Place(HEAD, table, (), _same, _same)]
    of_layer = {
        "blocks.attention_norm.scale": ("input_layernorm", (dim,), _same, _same),
        "blocks.feed_forward_norm.scale": ("post_attention_layernorm", (dim,), _same, _same),
        "blocks.moe.router": (f"{naming.block}.gate", (config.moe.num_experts, dim), _transposed, _transposed),
    }
    attention = config.attention
    counts = {"query": attention.num_heads, "key": attention.num_kv_heads, "value": attention.num_kv_heads}
    for name, heads in counts.items():
        turns = _into_heads(heads, head_dim), _out_of_heads
        of_layer[f"blocks.attention.{name}"] = (f"self_attn.{name[0]}_proj", (heads * head_dim, dim), *turns)
    turns = _out_to_heads(attention.num_heads, head_dim), _heads_to_out
    of_layer["blocks.attention.output"] = ("self_attn.o_proj", (dim, attention.num_heads * head_dim), *turns)
    for path, (name, *rest) in of_layer.items():
        shape, to_ours, to_theirs = rest
        names = [f"{LAYER.format(layer)}{name}.weight" for layer in range(config.num_layers)]
        found[path] = [Place(each, shape, (layer,), to_ours, to_theirs) for layer, each in enumerate(names)]
    experts = _fused_places if naming.fused else _expert_places
    return found | experts(config, f"{LAYER}{naming.block}.experts.")


def _expert_places(config: ModelConfig, prefix: str) -> dict[str, list[Place]]:
    dim, hidden = config.model_dim, config.moe.hidden_dim
    matrices = {"gate": ("w1", (hidden, dim)), "up": ("w3", (hidden, dim)), "down": ("w2", (dim, hidden))}
    indices = [(layer, expert) for layer in range(config.num_layers) for expert in range(config.moe.num_experts)]
    return {
        f"blocks.moe.experts.{ours}": [
            Place(f"{prefix.format(layer)}{expert}.{name}.weight", shape, (layer, expert), _transposed, _transposed)
            for layer, expert in indices
        ]
        for ours, (name, shape) in matrices.items()
    }


def _fused_places(config: ModelConfig, prefix: str) -> dict[str, list[Place]]:
    experts, dim, hidden = config.moe.num_experts, config.model_dim, config.moe.hidden_dim
    inward, outward = (experts, 2 * hidden, dim), (experts, dim, hidden)
    matrices = {
        "gate": ("gate_up_proj", inward, slice(0, hidden)),
        "up": ("gate_up_proj", inward, slice(hidden, 2 * hidden)),
        "down": ("down_proj", outward, None),
    }
    return {
        f"blocks.moe.experts.{ours}": [
            Place(f"{prefix.format(layer)}{name}", shape, (layer,), _transposed, _transposed, part)
            for layer in range(config.num_layers)
        ]
        for ours, (name, shape, part) in matrices.items()
    }


def check_tensors(config: ModelConfig, table: Mapping[str, list[Place]], tensors: Mapping[str, StoredTensor]) -> None:
    """Raises `CallerError` unless `tensors` are those of the `table`, each in its shape, and no others.

    A head beside a tied embedding may be stored, if it is the same.
    """
    wanted = {place.name: place.shape for parts in table.values() for place in parts}
    there = {name: tensor for name, tensor in tensors.items() if not (name == HEAD and config.tie_embeddings)}
    missing, unknown = sorted(wanted.keys() - there.keys()), sorted(there.keys() - wanted.keys())
    said = [f"missing are {listed(missing)}"] if missing else []
    said += [f"unknown are {listed(unknown)}"] if unknown else []
    require(not said, "tensors", len(tensors), f"are not those of config.json: {'; '.join(said)}")
    wrong = [
        f"{name} has shape {there[name].shape}, config.json {shape}"
        for name, shape in wanted.items()
        if there[name].shape != shape
    ]
    if wrong:
        raise CallerError(f"shapes are not those of config.json: {listed(wrong)}")
    if config.tie_embeddings and HEAD in tensors:
        same = np.array_equal(read_tensor(tensors[HEAD], HEAD), read_tensor(tensors[EMBEDDING], EMBEDDING))
        mend = "set tie_word_embeddings to false in config.json, or leave the head out"
        require(same, "tie_word_embeddings", True, f"but {HEAD} is not {EMBEDDING}", mend)


def parameter(
    shape: tuple[int, ...], parts: list[Place], tensors: Mapping[str, StoredTensor], dtype: np.dtype
) -> np.ndarray:
    """Returns one parameter of ours, of `parts` that are read one after the other."""
    made = np.empty(shape, dtype)
    for place in parts:
        made[place.index] = place.to_ours(read_tensor(tensors[place.name], place.name, place.part))
    return made


def tensors_of(ours: np.ndarray, parts: list[Place]) -> Iterator[tuple[str, np.ndarray]]:
    """Gives the tensors that one parameter of ours holds, by name."""
    for place in parts:
        yield place.name, place.to_theirs(ours[place.index])


def size_of(place: Place, dtype: np.dtype) -> int:
    """Returns the bytes of a tensor of this dtype."""
    return math.prod(place.shape) * dtype.itemsize


def _same(array: np.ndarray) -> np.ndarray:
    return array


def _times(factor: float) -> Turn:
    """A product in float32 and the given dtype again; 1 leaves every bit as it is."""
    return _same if factor == 1 else lambda array: (array.astype(np.float32) * np.float32(factor)).astype(array.dtype)


def _transposed(array: np.ndarray) -> np.ndarray:
    return np.swapaxes(array, -1, -2)


def _into_heads(heads: int, head_dim: int) -> Turn:
    """[heads * head_dim, D] as our [D, heads, head_dim]."""
    return lambda array: array.T.reshape(array.shape[1], heads, head_dim)


def _out_of_heads(array: np.ndarray) -> np.ndarray:
    return array.reshape(array.shape[0], -1).T


def _out_to_heads(heads: int, head_dim: int) -> Turn:
    """[D, heads * head_dim] as our [heads, head_dim, D]."""
    return lambda array: array.T.reshape(heads, head_dim, array.shape[0])


def _heads_to_out(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1, array.shape[-1]).T
