"""How the HTTP server listens, whom it lets in and how much it takes."""

from __future__ import annotations

import dataclasses

from gpt4moe.config.check import require, require_count, require_positive, require_text

MAX_PORT = 2**16 - 1


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """Settings of `gpt4moe serve` besides those of the engine.

    It listens on `host` and `port` (0: any that is free). Requests name the model `model_name`. With an `api_key`
    everything below /v1 wants `Authorization: Bearer KEY`. A body of more than `max_body_bytes`, or one that has not
    come within `body_seconds`, is refused, and so are prompts of more than `max_prompt_tokens` (None: the model's
    context), requests for more than `max_choices` continuations, prompts times n, and, with 429, more than
    `max_concurrent` requests at a time. `image_root` is the folder that images of chats may lie in (None: only
    data URLs). `chat_template` is a file with a Jinja template (None: the tokenizer's own where the work directory has
    one, else a plain one). After SIGTERM requests that run have `drain_seconds` to end.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    model_name: str = "gpt4moe"
    api_key: str | None = None
    max_body_bytes: int = 16 * 2**20
    body_seconds: float = 60.0
    max_prompt_tokens: int | None = None
    max_choices: int = 128
    max_concurrent: int = 512
    image_root: str | None = None
    chat_template: str | None = None
    drain_seconds: float = 120.0

    def __post_init__(self) -> None:
        for name in ("host", "model_name", "api_key", "image_root", "chat_template"):
            require_text(name, getattr(self, name))
        require(self.host is not None and self.model_name is not None, "host, model_name", None, "must be text")
        require_count("port", self.port, least=0)
        require(self.port <= MAX_PORT, "port", self.port, f"must be at most {MAX_PORT}")
        for name in ("max_body_bytes", "max_choices", "max_concurrent"):
            require_count(name, getattr(self, name))
        if self.max_prompt_tokens is not None:
            require_count("max_prompt_tokens", self.max_prompt_tokens)
        for name in ("body_seconds", "drain_seconds"):
            require_positive(name, getattr(self, name))
