"""What the engine can serve at all: pages that fit in memory, requests that fit in the model."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from gpt4moe.config.check import require
from gpt4moe.config.engine import EngineConfig
from gpt4moe.config.model import ModelConfig
from gpt4moe.infer.decoder import FREE, Decoder
from gpt4moe.infer.engine.request import EngineRequest
from gpt4moe.infer.expert_rows import FEWEST_SORTED
from gpt4moe.infer.pages import page_bytes


def num_pages(decoder: Decoder, config: EngineConfig, max_length: int, draft: Decoder | None = None) -> int:
    """How many pages the engine has; `CallerError` where they hold not even one row of `max_length`.

    draft: a model that proposes tokens, whose keys and values of a page take room beside the model's.
    """
    model, of_a_row = decoder.config, -(-max_length // config.page_size)
    constraint = f"must be at most the model's context_length ({model.context_length})"
    require(max_length <= model.context_length, "max_length", max_length, constraint)
    require(max_length > 1, "max_length", max_length, "must have room for a prompt and a token after it")
    constraint = f"must be below max_length ({max_length})"
    require(config.draft_tokens < max_length, "draft_tokens", config.draft_tokens, constraint)
    exact = not config.deterministic or decoder.dtype == jnp.float32
    mend = "load the decoder in float32 or leave deterministic out"
    require(exact, "deterministic", config.deterministic, f"needs float32, not {decoder.dtype.name}", mend)
    rows = config.slots * (config.draft_tokens + 1)
    # More are sorted by expert and multiplied in blocks, whose size is a matter of the others in the batch.
    few = not config.deterministic or rows < FEWEST_SORTED
    constraint = f"times draft_tokens + 1 ({config.draft_tokens + 1}) must be below {FEWEST_SORTED} where deterministic"
    require(few, "slots", config.slots, constraint)
    number, setting = config.num_pages or config.slots * of_a_row, "num_pages"
    if config.cache_bytes is not None:
        models = [decoder] if draft is None else [decoder, draft]
        of_page = sum(page_bytes(m.config, m.num_kv_heads, config.page_size, m.dtype) for m in models)
        number, setting = config.cache_bytes // of_page, "cache_bytes"
    constraint = f"gives {number} pages, fewer than a row of max_length={max_length} needs ({of_a_row})"
    require(number >= of_a_row, setting, getattr(config, setting), constraint, f"raise {setting} or lower max_length")
    return number


def check_draft(draft: Decoder | None, model: ModelConfig, config: EngineConfig) -> None:
    """Raises where a model cannot propose tokens to another one."""
    if draft is None:
        return
    mend = "set how many it proposes"
    require(config.draft_tokens > 0, "draft_tokens", config.draft_tokens, "leaves the draft nothing to do", mend)
    sizes = (("vocab_size", "be that of the model"), ("context_length", "be at least that of the model"))
    for name, constraint in sizes:
        own, needed = getattr(draft.config, name), getattr(model, name)
        fits = own == needed if name == "vocab_size" else own >= needed
        require(fits, f"the draft's {name}", own, f"must {constraint} ({needed})")


def check_stages(num_stages: int, config: EngineConfig, draft: Decoder | None) -> None:
    """Raises where rows cannot go through a pipeline in groups."""
    fits = config.slots % num_stages == 0
    require(fits, "slots", config.slots, f"must be a multiple of the pipeline's {num_stages} stages")
    alone = num_stages == 1 or draft is None
    require(alone, "draft", "a model", f"does not propose to a pipeline of {num_stages} stages", "propose by lookup")


def check(
    request: EngineRequest, model: ModelConfig, config: EngineConfig, max_length: int, image_token: int | None
) -> int:
    """The most tokens that each continuation may get; `CallerError` for a request that cannot be served."""
    ids, sampling = np.asarray(request.prompt_ids), request.sampling
    constraint = f"must be shorter than the {max_length} tokens of prompt and continuation"
    require(len(ids) < max_length, "prompt tokens", len(ids), constraint, "shorten the prompt")
    lowest, highest = int(ids.min()), int(ids.max())
    for token in (lowest, highest, *sampling.stop_ids, *(token for token, _ in sampling.logit_bias)):
        require(0 <= token < model.vocab_size, "token id", token, f"must be from 0 to {model.vocab_size - 1}")
    top = sampling.logprobs or 0
    require(top <= config.max_logprobs, "logprobs", top, f"must be at most {config.max_logprobs}")
    most = config.max_queue + config.slots
    require(sampling.n <= most, "n", sampling.n, f"must be at most {most}, the slots and the queue")
    _check_replay(request, model, config)
    _check_pictures(request, model, config, image_token)
    return min(sampling.max_new_tokens, max_length - len(ids))


def _check_replay(request: EngineRequest, model: ModelConfig, config: EngineConfig) -> None:
    replay = request.replay_ids_TLK
    if replay is None:
        return
    is_ids = isinstance(replay, np.ndarray) and np.issubdtype(replay.dtype, np.integer)
    require(is_ids, "replay_ids_TLK", type(replay).__name__, "must be a numpy array of integers")
    require(config.replay, "replay_ids_TLK", "given", "but the engine forces no experts", "set EngineConfig.replay")
    per_token = (model.num_moe_layers, model.moe.experts_per_token)
    fits = replay.ndim == 3 and replay.shape[1:] == per_token
    require(fits, "replay_ids_TLK", replay.shape, f"must have the shape [tokens, {per_token[0]}, {per_token[1]}]")
    known = bool(np.all((replay >= FREE) & (replay < model.moe.num_experts)))
    require(known, "replay_ids_TLK", "given", f"must hold experts from 0 to {model.moe.num_experts - 1}, -1 or {FREE}")


def _check_pictures(request: EngineRequest, model: ModelConfig, config: EngineConfig, image_token: int | None) -> None:
    number = len(request.pictures)
    if number == 0:
        return
    mend = "give the workdir of a model that does"
    require(model.vision is not None, "pictures", number, "but the model reads no images", mend)
    most = config.max_pictures
    require(number <= most, "pictures", number, f"must be at most {most}", "raise EngineConfig.max_pictures")
    places = list(request.prompt_ids).count(image_token)
    require(places == number, "pictures", number, f"must be as many as image tokens in the prompt ({places})")
    encoder = model.vision.encoder
    wanted = (encoder.height, encoder.width, 3)
    for picture in request.pictures:
        frames, *size = picture.pixels.shape
        fits = tuple(size) == wanted and frames <= encoder.max_frames
        require(fits, "a picture", (frames, *size), f"must be of at most {encoder.max_frames} frames of {wanted}")
