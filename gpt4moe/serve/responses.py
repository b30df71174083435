"""What is answered, whole or in chunks of a stream; extensions are left out where nobody asked for them."""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

import pydantic
from pydantic import Field

Kind = TypeVar("Kind")
Optional = Annotated[Kind | None, Field(exclude_if=lambda value: value is None)]

FinishReason = Literal["stop", "length", "cancelled", "deadline"]
Experts = list[list[list[int]]]


class PromptTokensDetails(pydantic.BaseModel):
    """Of the tokens of prompts: those that were not read again, because prompts before began alike."""

    cached_tokens: int


class Usage(pydantic.BaseModel):
    """Tokens of prompts and continuations."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(pydantic.BaseModel):
    """Of every token: its text, its log-probability, the likeliest instead, where it begins in the text."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class Extended(pydantic.BaseModel):
    """What a choice has besides, on request.

    `expert_ids` [tokens, layers with experts, experts per token] are the experts of the pass that each token was drawn
    from, which is that of the token before it; `prompt_expert_ids` those of every token of the prompt.
    """

    token_ids: Optional[list[int]] = None
    prompt_token_ids: Optional[list[int]] = None
    expert_ids: Optional[Experts] = None
    prompt_expert_ids: Optional[Experts] = None


class CompletionChoice(Extended):
    """One continuation, or what it gained."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class Completion(pydantic.BaseModel):
    """The answer of /v1/completions, and each chunk of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None


class TopLogprob(pydantic.BaseModel):
    """A token that might have been drawn."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """A token that was drawn."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(pydantic.BaseModel):
    """Of every token of the content."""

    content: list[TokenLogprob]
    refusal: None = None


class AnswerMessage(pydantic.BaseModel):
    """The turn that the model wrote."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Delta(pydantic.BaseModel):
    """What the turn gained; the role comes first, once."""

    role: Optional[Literal["assistant"]] = None
    content: Optional[str] = None


class ChatChoice(Extended):
    """One turn."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatChunkChoice(Extended):
    """What one turn gained."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatCompletion(pydantic.BaseModel):
    """The answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatChunk(pydantic.BaseModel):
    """A chunk of its stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None


class Model(pydantic.BaseModel):
    """A model that is served; `max_model_len` tokens of prompt and continuation together."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    max_model_len: int


class Models(pydantic.BaseModel):
    """The answer of /v1/models."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(pydantic.BaseModel):
    """The answer of /healthz."""

    status: Literal["ok", "draining"]


class Fault(pydantic.BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class Failure(pydantic.BaseModel):
    """The body of every answer that is not what was asked for."""

    error: Fault
