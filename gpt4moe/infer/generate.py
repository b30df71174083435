"""Text from prompts: one compiled prefill, one compiled decode loop, a donated key/value cache.

In: a model, its tokenizer, prompts and a `SamplingConfig`. Out: one `Generation` a prompt and a `Timing`. Shapes go
up in powers of two, so that prompts of many lengths share few programs.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from gpt4moe.config.check import require
from gpt4moe.config.sampling import SamplingConfig
from gpt4moe.infer import decode_loop
from gpt4moe.infer.codec import Codec, prompt_ids, required
from gpt4moe.infer.decode_loop import Request
from gpt4moe.infer.pictures import Picture, stack_pictures
from gpt4moe.infer.sampling import row_keys, sampling_params
from gpt4moe.model.transformer import Transformer

# XLA:CPU multiplies a single bfloat16 row through a slow path, 12 to 18 times slower than two rows.
MIN_ROWS = 2
MIN_LENGTH = 16


@dataclasses.dataclass(frozen=True)
class Generation:
    """What the model wrote after one prompt.

    `text` is without the prompt and without end-of-text. `token_ids` and `logprobs` (nats, under the model's own
    distribution, before temperature and filters) are the new tokens', with the end-of-text that stopped it.
    `finish_reason` is "stop" at end-of-text, "length" at `max_new_tokens` or at the end of the model's context.
    """

    prompt: str
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    num_prompt_tokens: int


@dataclasses.dataclass(frozen=True)
class Timing:
    """Wall seconds of one `generate`: compiling (0 for programs already compiled), prefill, decode; and its tokens."""

    compile_seconds: float
    prefill_seconds: float
    decode_seconds: float
    num_prompt_tokens: int
    num_new_tokens: int


def generate(
    model: Transformer,
    tokenizer: Codec,
    prompts: Sequence[str],
    sampling: SamplingConfig | None = None,
    pictures: Sequence[Sequence[Picture]] = (),
) -> tuple[list[Generation], Timing]:
    """Continues every prompt and returns the generations in the prompts' order, and how long it took.

    A prompt follows the end-of-text token as documents do in training, so that an empty one starts a new document; with
    a foreign tokenizer that has a begin-of-text token, it follows that.
    `pictures` are those of each prompt, which stand where it says `<image>`, or before it. Raises `ValueError` for a
    prompt that leaves no room in the model's context, or that has not one marker a picture.
    """
    tokenizer = required(tokenizer)
    sampling, pictures = sampling or SamplingConfig(), list(pictures) or [()] * len(prompts)
    require(len(pictures) == len(prompts), "pictures", len(pictures), f"must be of each of the {len(prompts)} prompts")
    sampling.require_plain()
    if any(pictures):
        sees, mend = model.config.vision is not None, "give the workdir of a model that does"
        require(sees, "pictures", sum(map(len, pictures)), "but the model reads no images", mend)
    length = model.config.context_length
    ids_of = [_prompt_ids(tokenizer, *of, length) for of in zip(prompts, map(len, pictures), strict=True)]
    if not prompts:
        return [], Timing(0.0, 0.0, 0.0, 0, 0)
    request = _request(ids_of, sampling, model, pictures, tokenizer)
    new, seconds = _run(model, request, tokenizer.end_of_text, _lengths(request, sampling, model.config.context_length))
    generations = [
        _generation(tokenizer, prompt, ids, new_ids, logprobs)
        for prompt, ids, new_ids, logprobs in zip(prompts, ids_of, *new, strict=False)
    ]
    num_new = sum(len(generation.token_ids) for generation in generations)
    return generations, Timing(*seconds, sum(map(len, ids_of)), num_new)


def generate_ids(
    model: Transformer,
    tokenizer: Codec,
    prompt_ids: Sequence[list[int]],
    sampling: SamplingConfig,
    pictures: Sequence[Sequence[Picture]],
) -> list[list[int]]:
    """The new ids after each prompt of ids, with the pictures of its image tokens, without the end of text."""
    request = _request(list(prompt_ids), sampling, model, pictures, tokenizer)
    lengths = _lengths(request, sampling, model.config.context_length)
    (new_ids, _), _ = _run(model, request, tokenizer.end_of_text, lengths)
    made = [row[row >= 0].tolist() for row in new_ids[: len(prompt_ids)]]
    return [ids[:-1] if ids and ids[-1] == tokenizer.end_of_text else ids for ids in made]


def write_samples(workdir: str | epath.Path, generations: Sequence[Generation]) -> epath.Path:
    """Writes the generations to `samples.json` in the work directory, where the report finds them; returns its path."""
    path = epath.Path(workdir) / "samples.json"
    path.write_text(json.dumps([dataclasses.asdict(generation) for generation in generations], indent=1) + "\n")
    return path


def _prompt_ids(tokenizer: Codec, prompt: str, num_pictures: int, context_length: int) -> list[int]:
    ids = prompt_ids(tokenizer, prompt, num_pictures)
    require(
        len(ids) < context_length,
        "prompt",
        prompt if len(prompt) <= 40 else prompt[:37] + "...",
        f"has {len(ids)} tokens with end-of-text and must be shorter than context_length ({context_length})",
        "shorten it",
    )
    return ids


def _generation(tokenizer: Codec, prompt: str, ids: list[int], new_ids: np.ndarray, logprobs: np.ndarray) -> Generation:
    """`new_ids` is -1 where the row had already finished."""
    made = new_ids[new_ids >= 0].tolist()
    stopped = made[-1] == tokenizer.end_of_text
    return Generation(
        prompt=prompt,
        text=tokenizer.decode(made[:-1] if stopped else made),
        token_ids=tuple(made),
        logprobs=tuple(logprobs[: len(made)].tolist()),
        finish_reason="stop" if stopped else "length",
        num_prompt_tokens=len(ids),
    )


def _request(
    prompt_ids: list[list[int]],
    sampling: SamplingConfig,
    model: Transformer,
    pictures: Sequence[Sequence[Picture]],
    tokenizer: Codec,
) -> Request:
    context_length = model.config.context_length
    multiple = model.layout.row_multiple
    num_rows = -(-_bucket(len(prompt_ids), MIN_ROWS) // multiple) * multiple
    lengths_B = np.ones(num_rows, np.int32)
    lengths_B[: len(prompt_ids)] = [len(ids) for ids in prompt_ids]
    limits_B = np.zeros(num_rows, np.int32)
    limits_B[: len(prompt_ids)] = [min(sampling.max_new_tokens, context_length - len(ids)) for ids in prompt_ids]
    tokens_BT = np.zeros((num_rows, min(_bucket(int(lengths_B.max()), MIN_LENGTH), context_length)), np.int32)
    for row, ids in enumerate(prompt_ids):
        tokens_BT[row, : len(ids)] = ids
    return Request(
        tokens_BT=tokens_BT,
        lengths_B=lengths_B,
        limits_B=limits_B,
        params=sampling_params([sampling] * num_rows, model.config.vocab_size),
        keys_B=row_keys(jnp.full(num_rows, sampling.seed, jnp.uint32)),
        pictures=stack_pictures(pictures, tokens_BT, tokenizer.image) if any(pictures) else None,
    )


def _lengths(request: Request, sampling: SamplingConfig, context_length: int) -> tuple[int, int]:
    """Slots of the cache and width of the result, in powers of two."""
    needed = int((request.lengths_B + request.limits_B).max())
    slots = max(min(_bucket(needed, MIN_LENGTH), context_length), request.tokens_BT.shape[1])
    return slots, _bucket(sampling.max_new_tokens, MIN_LENGTH)


def _bucket(size: int, least: int) -> int:
    return max(1 << (size - 1).bit_length(), least)


def _run(model: Transformer, request: Request, end_of_text: int, lengths: tuple[int, int]) -> tuple:
    """((new ids, their log-probabilities), (compile, prefill, decode seconds)); arrays [B, N] on the host."""
    graphdef, state = nnx.split(model)
    num_slots, num_new = lengths
    started = time.perf_counter()
    prefill, compiling = _compile(decode_loop.prefill, graphdef, state, request, end_of_text, num_slots, num_new)
    decoding = jax.block_until_ready(prefill(state, request, end_of_text))
    prefilled = time.perf_counter()
    decode, seconds = _compile(decode_loop.decode, graphdef, state, decoding, request, end_of_text)
    decoding = decode(state, decoding, request, end_of_text)
    new = (np.asarray(decoding.ids_BT), np.asarray(decoding.logprobs_BT))
    finished = time.perf_counter()
    return new, (compiling + seconds, prefilled - started - compiling, finished - prefilled - seconds)


def _compile(function: Callable, *arguments) -> tuple[Callable, float]:
    """The program of a jitted function for these arguments, and the seconds it took (JAX remembers its programs)."""
    started = time.perf_counter()
    program = function.lower(*arguments).compile()
    return program, time.perf_counter() - started
