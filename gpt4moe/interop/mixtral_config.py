"""A Mixtral's config.json as macros of `gin_configs/run/imported.gin`, and a model of ours as such a file.

What our model cannot compute is refused both ways, by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gpt4moe.config.check import require, require_count
from gpt4moe.config.model import ModelConfig
from gpt4moe.model import routers
from gpt4moe.model.router import top_k

MODEL_TYPE, ARCHITECTURE = "mixtral", "MixtralForCausalLM"
# Sizes that have no default here, and the macro of each.
SIZES = {
    "vocab_size": "VOCAB_SIZE",
    "hidden_size": "MODEL_DIM",
    "intermediate_size": "EXPERT_DIM",
    "num_hidden_layers": "NUM_LAYERS",
    "num_attention_heads": "NUM_HEADS",
}
# What MixtralConfig takes for a key that is not in the file.
NUM_KV_HEADS, NUM_EXPERTS, EXPERTS_PER_TOKEN = 8, 8, 2
MAX_POSITIONS, NORM_EPSILON, ROPE_THETA = 4096 * 32, 1e-5, 1e6
# Values that a key may have, the first for one that is not there: what our model has no other of.
ONLY = {
    "hidden_act": ("silu", "swish"),
    "sliding_window": (None,),
    "rope_scaling": (None,),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
}
ROPE_KEYS = ("rope_theta", "rope_type", "type", "partial_rotary_factor")
# Rows of a later training on imported weights are no longer than this, unless SEQUENCE_LENGTH says so.
LONGEST_ROW, BATCH_ROWS = 2048, 8


def macros(foreign: Mapping[str, Any]) -> dict[str, str]:
    """Returns the macros of `imported.gin` for a config.json, as gin writes their values.

    Raises `CallerError` for another model type, a size that is missing, and whatever our model has not.
    """
    kind = foreign.get("model_type")
    require(kind == MODEL_TYPE, "model_type", kind, f"must be {MODEL_TYPE!r}", "other models cannot be imported")
    for key, allowed in ONLY.items():
        value = foreign.get(key, allowed[0])
        mend = "our model has no other" if allowed[0] is not None else "our model has none"
        require(value in allowed, f"config.json: {key}", value, f"must be {allowed[0]!r}", mend)
    for key in SIZES:
        require_count(f"config.json: {key}", foreign.get(key))
    _check_end(foreign.get("eos_token_id"), foreign["vocab_size"])
    context, experts, chosen = _counts(foreign)
    kv_heads = foreign.get("num_key_value_heads", NUM_KV_HEADS)
    length = min(context, LONGEST_ROW)
    values = {macro: foreign[key] for key, macro in SIZES.items()} | {
        "NUM_KV_HEADS": foreign["num_attention_heads"] if kv_heads is None else kv_heads,
        "HEAD_DIM": foreign.get("head_dim"),
        "ROPE_THETA": _rope_theta(foreign),
        "NORM_EPSILON": foreign.get("rms_norm_eps", NORM_EPSILON),
        "TIE_EMBEDDINGS": foreign.get("tie_word_embeddings", False),
        "NUM_EXPERTS": experts,
        "EXPERTS_PER_TOKEN": chosen,
        "CONTEXT_LENGTH": context,
        "SEQUENCE_LENGTH": length,
        "BATCH_TOKENS": BATCH_ROWS * length,
    }
    router = "@routers.softmax_of_one" if chosen == 1 < experts else "None"
    return {name: repr(value) for name, value in values.items()} | {"ROUTER": router}


def _check_end(ids: object, vocab_size: int) -> None:
    """Raises for what is no id, or list of ids, of tokens that end a text; there may be none."""
    if ids is None:
        return
    each = ids if isinstance(ids, list) else [ids]
    known = all(isinstance(one, int) and not isinstance(one, bool) and 0 <= one < vocab_size for one in each)
    constraint = f"must be a token id below vocab_size ({vocab_size}), a list of them, or null"
    require(bool(each) and known, "config.json: eos_token_id", ids, constraint)


def _counts(foreign: Mapping[str, Any]) -> tuple[int, int, int]:
    """Context, experts and experts a token."""
    experts = foreign.get("num_local_experts", foreign.get("num_experts", NUM_EXPERTS))
    chosen = foreign.get("num_experts_per_tok", EXPERTS_PER_TOKEN)
    context = foreign.get("max_position_embeddings", MAX_POSITIONS)
    named = {"num_local_experts": experts, "num_experts_per_tok": chosen, "max_position_embeddings": context}
    for key, value in named.items():
        require_count(f"config.json: {key}", value)
    constraint = f"must be at most num_local_experts ({experts})"
    require(chosen <= experts, "config.json: num_experts_per_tok", chosen, constraint)
    return context, experts, chosen


def _rope_theta(foreign: Mapping[str, Any]) -> float:
    """The base of the rotary angles, which newer files keep in `rope_parameters`."""
    nested = foreign.get("rope_parameters") or {}
    name = "config.json: rope_parameters"
    require(isinstance(nested, Mapping), name, nested, "must be an object or null")
    kind = nested.get("rope_type", nested.get("type", "default"))
    plain = kind == "default" and nested.get("partial_rotary_factor", 1) in (1, None)
    mend = "scaled or partial rotary positions are not in our model"
    require(plain and set(nested) <= {*ROPE_KEYS}, name, dict(nested), "must be of rope_type 'default'", mend)
    theta = nested.get("rope_theta", foreign.get("rope_theta", ROPE_THETA))
    is_number = isinstance(theta, int | float) and not isinstance(theta, bool) and math.isfinite(theta) and theta > 0
    require(is_number, "config.json: rope_theta", theta, "must be a number above 0")
    return float(theta)


def foreign_config(model: ModelConfig, dtype: str) -> dict[str, Any]:
    """Returns the config.json of one of our models, in the keys that Mixtral was released with.

    Raises `CallerError`, with the setting, where a Mixtral cannot be what the model is.
    """
    _require_mixtral(model)
    attention = model.attention
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "vocab_size": model.vocab_size,
        "hidden_size": model.model_dim,
        "intermediate_size": model.moe.hidden_dim,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": model.context_length,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": attention.rope_theta,
        "sliding_window": None,
        "attention_dropout": 0.0,
        "tie_word_embeddings": model.tie_embeddings,
        "num_local_experts": model.moe.num_experts,
        "num_experts_per_tok": model.moe.experts_per_token,
        "output_router_logits": False,
        "torch_dtype": dtype,
    }


def _require_mixtral(model: ModelConfig) -> None:
    moe, mend = model.moe, "a Mixtral has no such thing; it cannot be exported"
    wanted = {
        "qk_norm": (model.attention.qk_norm, False),
        "moe_every": (model.moe_every, 1),
        "leading_dense_layers": (model.leading_dense_layers, 0),
        "vision": (model.vision, None),
        "gated": (moe.gated, True),
        "shared_hidden_dim": (moe.shared_hidden_dim, 0),
        "gate_scale": (moe.gate_scale, 1.0),
        "bias_rate": (moe.bias_rate, 0.0),
    }
    for name, (value, only) in wanted.items():
        require(value == only, name, value, f"must be {only!r}", mend)
    known = (top_k, routers.softmax_of_chosen, routers.softmax_of_one)
    name = getattr(moe.router, "__name__", moe.router)
    same = routers.is_among(moe.router, known)
    require(same, "router", name, f"must be one of {', '.join(each.__name__ for each in known)}", mend)
    sum_to_one = moe.normalize_gates or moe.num_experts == 1 or routers.is_among(moe.router, known[1:])
    constraint = "must be True: a Mixtral's gates of a token sum to 1"
    require(sum_to_one, "normalize_gates", moe.normalize_gates, constraint)
