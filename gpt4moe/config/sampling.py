"""How the next token is chosen, when generation ends, and what is reported of it."""

from __future__ import annotations

import dataclasses
import json

from gpt4moe.config.check import (
    CallerError,
    require,
    require_count,
    require_flag,
    require_fraction,
    require_not_negative,
    require_number,
    require_positive,
    require_seed,
    require_text,
)

ENGINE_SETTINGS = (
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "stop", "stop_ids"),
    *("ignore_end_of_text", "n", "logprobs", "prompt_logprobs", "json_schema"),
)
# The most that may be added to a logit, and what it may be multiplied or divided by: float32 stays finite.
MOST_ADDED, MOST_TIMES = 10_000, 1_000_000


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """Bias and penalties, then temperature, top-k, top-p (nucleus) and min-p, in that order; temperature 0 is greedy.

    `top_k` None, `top_p` 1 and `min_p` 0 keep the whole distribution. `max_new_tokens` counts the end-of-text token
    where one is produced. `seed` fixes the draws: a continuation depends on the seed, on its place in the batch or
    among the `n`, and on the text before it, not on what else is in the batch.

    `min_p` keeps tokens at least so probable as this share of the likeliest.

    What only the engine reads: `repetition_penalty` divides positive logits, and multiplies negative ones, of every
    token of prompt and continuation (Keskar et al. 2019); `presence_penalty` is subtracted once and `frequency_penalty`
    for every time a token stands in the continuation. `logit_bias` is pairs of token id and what is added to its logit.
    `stop` are texts before which the continuation ends, `stop_ids` tokens that end it as end-of-text does, which
    `ignore_end_of_text` lets pass. `n` continuations are drawn. `logprobs` None reports none, 0 that of each token
    drawn, k those of the k likeliest besides; `prompt_logprobs` also those of the prompt's tokens. `json_schema` is
    the text of a JSON schema that the continuation must follow.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    max_new_tokens: int = 64
    seed: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_end_of_text: bool = False
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: bool = False
    json_schema: str | None = None

    def __post_init__(self) -> None:
        require_not_negative("temperature", self.temperature)
        if self.top_k is not None:
            require_count("top_k", self.top_k)
        for name in ("top_p", "min_p"):
            require_fraction(name, getattr(self, name))
        for name in ("top_p", "repetition_penalty"):
            require_positive(name, getattr(self, name))
        for name in ("presence_penalty", "frequency_penalty"):
            _require_logit(name, getattr(self, name))
        constraint = f"must be from {1 / MOST_TIMES} to {MOST_TIMES}"
        fits = 1 / MOST_TIMES <= self.repetition_penalty <= MOST_TIMES
        require(fits, "repetition_penalty", self.repetition_penalty, constraint)
        for name in ("max_new_tokens", "n"):
            require_count(name, getattr(self, name))
        require_seed("seed", self.seed)
        object.__setattr__(self, "stop", _stop_texts(self.stop))
        object.__setattr__(self, "stop_ids", _ids("stop_ids", self.stop_ids))
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        for name in ("ignore_end_of_text", "prompt_logprobs"):
            require_flag(name, getattr(self, name))
        if self.logprobs is not None:
            require_count("logprobs", self.logprobs, least=0)
        self._check_schema()

    def require_plain(self) -> None:
        """Raises where a setting is given that only the engine reads."""
        given = [name for name in ENGINE_SETTINGS if getattr(self, name) != getattr(SamplingConfig, name)]
        if given:
            mend = "leave it out, or give requests to an Engine (gpt4moe generate --requests)"
            require(False, given[0], getattr(self, given[0]), "is read by the engine alone", mend)

    def _check_schema(self) -> None:
        require_text("json_schema", self.json_schema)
        if self.json_schema is not None:
            try:
                schema = json.loads(self.json_schema)
            except (ValueError, RecursionError) as error:
                raise CallerError(f"json_schema={self.json_schema[:40]!r} is not JSON: {error}") from None
            is_schema = isinstance(schema, (dict, bool))
            require(is_schema, "json_schema", self.json_schema[:40], "must be a JSON object, or true or false")


def _require_logit(setting: str, value: object) -> None:
    require_number(setting, value)
    require(abs(value) <= MOST_ADDED, setting, value, f"must be from {-MOST_ADDED} to {MOST_ADDED}")


def _stop_texts(values: object) -> tuple[str, ...]:
    """A blank or a line end is a fine place to stop; only the empty text would stop everything."""
    texts = (values,) if isinstance(values, str) else values
    listed = isinstance(texts, (tuple, list)) and all(isinstance(text, str) and text for text in texts)
    require(listed, "stop", values, "must be text, or a list of texts that are not empty")
    return tuple(texts)


def _ids(setting: str, values: object) -> tuple[int, ...]:
    listed = isinstance(values, (tuple, list))
    require(listed, setting, values, "must be a list of token ids")
    for value in values:
        require_count(setting, value, least=0)
    return tuple(values)


def _biases(values: object) -> tuple[tuple[int, float], ...]:
    pairs = tuple(values.items()) if isinstance(values, dict) else values
    listed = isinstance(pairs, (tuple, list)) and all(isinstance(p, (tuple, list)) and len(p) == 2 for p in pairs)
    require(listed, "logit_bias", values, "must be pairs of token id and bias")
    for token, bias in pairs:
        require_count("a token id of logit_bias", token, least=0)
        _require_logit("logit_bias", bias)
    return tuple((token, float(bias)) for token, bias in sorted(dict(pairs).items()))
