"""What may be asked: the bodies of /v1/completions and /v1/chat/completions.

Names and meanings are OpenAI's; those that OpenAI does not have are marked as extensions in docs/serving.md. A field
that is not here is refused, so that nobody believes it has had an effect.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

MAX_STOPS, MAX_TEXT_STOP = 16, 1000
MAX_LIST, MAX_SECONDS, MAX_TOKENS = 4096, 86_400.0, 2**31 - 1

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
StopText = Annotated[str, Field(min_length=1, max_length=MAX_TEXT_STOP)]
TokenIdText = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]


class Strict(pydantic.BaseModel):
    """A body whose values have the very types it says, without fields it does not name."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class StreamOptions(Strict):
    """What a stream says besides text; `include_obfuscation` has no effect here."""

    include_usage: bool | None = False
    include_obfuscation: bool | None = None


class Generation(Strict):
    """What both ways of asking have in common."""

    model: str = Field(description="the name that /v1/models lists")
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[TokenIdText, Bias], Field(max_length=1024)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    user: str | None = Field(None, description="has no effect")
    # Extensions.
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = Field(None, description="extension; 0, -1: all tokens")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = Field(None, description="extension")
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = Field(None, description="extension")
    stop_token_ids: Annotated[list[TokenId], Field(max_length=1024)] | None = Field(None, description="extension")
    ignore_eos: bool | None = Field(None, description="extension: end-of-text does not end a continuation")
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = Field(
        None, description="extension; higher is served first"
    )
    deadline_seconds: Annotated[float, Field(gt=0, le=MAX_SECONDS)] | None = Field(
        None, description="extension: what has not ended by then ends with finish_reason deadline"
    )
    expert_ids: bool | None = Field(None, description="extension: report the experts of every token")
    return_token_ids: bool | None = Field(None, description="extension: report token ids")


class CompletionRequest(Generation):
    """The body of POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_LIST)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=MAX_LIST)]
    ) = ""
    max_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=1000)] | None = None
    echo: bool | None = False
    best_of: Annotated[int, Field(ge=1, le=128)] | None = None
    suffix: Literal[""] | None = None

    @pydantic.model_validator(mode="after")
    def _check(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError(f"best_of={self.best_of} must equal n: nothing is drawn to be thrown away")
        return self


class TextPart(Strict):
    """A piece of text in a message."""

    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    """An image as data URL (data:image/png;base64,...) or, where the server allows it, a file of its own."""

    url: str
    detail: Literal["auto", "low", "high"] | None = Field(None, description="has no effect")


class ImagePart(Strict):
    """An image in a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(Strict):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(min_length=1, max_length=MAX_LIST)]
    name: str | None = None


class PlainFormat(Strict):
    """Text as it comes, or any JSON object."""

    type: Literal["text", "json_object"]


class NamedSchema(Strict):
    """A JSON schema and what OpenAI wants beside it."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class SchemaFormat(Strict):
    """JSON that follows a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


class ChatRequest(Generation):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_LIST)]
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=1000)] | None = None
    response_format: Annotated[PlainFormat | SchemaFormat, Field(discriminator="type")] | None = None
    metadata: dict[str, str] | None = Field(None, description="has no effect")
    store: Literal[False] | None = None

    @pydantic.model_validator(mode="after")
    def _check(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs: true")
        return self


FIELDS = frozenset(
    name
    for kind in (StreamOptions, CompletionRequest, ChatRequest, Message, TextPart, ImagePart, ImageUrl, NamedSchema)
    for name in kind.model_fields
)
