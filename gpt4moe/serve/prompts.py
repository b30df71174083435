"""What was asked, as the engine takes it: token ids of prompts, sampling, deadlines."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Sequence

from gpt4moe.config.sampling import SamplingConfig
from gpt4moe.infer.engine.request import EngineRequest
from gpt4moe.infer.pictures import Picture
from gpt4moe.serve.errors import ApiError
from gpt4moe.serve.requests import CompletionRequest, Generation
from gpt4moe.serve.service import Service

SEED_BITS = 32


@dataclasses.dataclass(frozen=True)
class Prompt:
    """`ids` are all its tokens; the first `num_hidden` of them the caller did not give. `text` is what an echo says."""

    ids: Sequence[int]
    text: str
    num_hidden: int = 0
    pictures: Sequence[Picture] = ()


def completion_prompts(service: Service, body: CompletionRequest) -> list[Prompt]:
    """The prompts of a body: a text follows the token that begins one, token ids are taken as they are."""
    given = body.prompt
    if isinstance(given, str) or isinstance(given[0], int):
        given = [given]
    return [_text_prompt(service, one) if isinstance(one, str) else _id_prompt(service, one) for one in given]


def check_length(service: Service, num_tokens: int, param: str) -> None:
    """Raises the refusal of a prompt that is too long."""
    if num_tokens > service.max_prompt_tokens:
        said = f"{param} has {num_tokens} tokens and must have at most {service.max_prompt_tokens}; shorten it"
        raise ApiError(400, said, param=param, code="context_length_exceeded")


def check_characters(service: Service, text: str, param: str) -> None:
    """The same for one that need not be encoded to know it."""
    most = service.max_prompt_characters
    if most is not None and len(text) > most:
        said = f"{param} has {len(text)} characters, too many for {service.max_prompt_tokens} tokens; shorten it"
        raise ApiError(400, said, param=param, code="context_length_exceeded")


def engine_requests(
    service: Service, body: Generation, prompts: Sequence[Prompt], sampling: SamplingConfig
) -> list[EngineRequest]:
    """One request a prompt; each takes draws of its own of the one seed."""
    choices = len(prompts) * sampling.n
    if choices > service.max_choices:
        said = f"n={sampling.n} of {len(prompts)} prompts are {choices} choices and may be {service.max_choices}"
        raise ApiError(400, f"{said}; ask for fewer", param="n", code="too_many_choices")
    return [
        EngineRequest(
            prompt.ids,
            sampling,
            pictures=prompt.pictures,
            priority=body.priority or 0,
            deadline_seconds=body.deadline_seconds,
            draw=place * sampling.n,
            with_expert_ids=bool(body.expert_ids),
        )
        for place, prompt in enumerate(prompts)
    ]


def sampling_of(body: Generation, **given) -> SamplingConfig:
    """The sampling that a body asks for; given: what completions and chats say in different ways.

    Without a seed the draws are new each time; seeds that are alike modulo 2**32 are one.
    """
    stop = () if body.stop is None else (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)
    seed = secrets.randbits(SEED_BITS) if body.seed is None else body.seed % 2**SEED_BITS
    settings = {
        "temperature": _or(body.temperature, 1.0),
        "top_k": body.top_k if body.top_k and body.top_k > 0 else None,
        "top_p": _or(body.top_p, 1.0),
        "min_p": _or(body.min_p, 0.0),
        "repetition_penalty": _or(body.repetition_penalty, 1.0),
        "presence_penalty": _or(body.presence_penalty, 0.0),
        "frequency_penalty": _or(body.frequency_penalty, 0.0),
        "logit_bias": tuple((int(token), bias) for token, bias in (body.logit_bias or {}).items()),
        "stop": stop + given.pop("template_stops", ()),
        "stop_ids": tuple(body.stop_token_ids or ()),
        "ignore_end_of_text": bool(body.ignore_eos),
        "n": body.n or 1,
        "seed": seed,
    }
    return SamplingConfig(**settings, **given)


def _text_prompt(service: Service, text: str) -> Prompt:
    check_characters(service, text, "prompt")
    ids = [service.tokenizer.begin_of_text, *service.tokenizer.encode(text)]
    check_length(service, len(ids), "prompt")
    return Prompt(ids, text, num_hidden=1)


def _id_prompt(service: Service, ids: Sequence[int]) -> Prompt:
    check_length(service, len(ids), "prompt")
    return Prompt(ids, service.tokenizer.decode(ids))


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
