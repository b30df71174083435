"""What every route works with: the engine, the words for its tokens, the limits, and whether the server is ending."""

from __future__ import annotations

import dataclasses
import functools
import time

from gpt4moe.config.data import ImageConfig
from gpt4moe.config.serve import ServeConfig
from gpt4moe.data.tokenizer import Tokenizer
from gpt4moe.infer.engine.engine import Engine
from gpt4moe.serve.chat_template import ChatTemplate


@dataclasses.dataclass
class Service:
    """One per server. `images` is how the model's images are fitted, None where it reads none.

    `active` requests are being answered; while `draining` no other is taken.
    """

    engine: Engine
    tokenizer: Tokenizer
    config: ServeConfig
    template: ChatTemplate
    images: ImageConfig | None = None
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))
    active: int = 0
    draining: bool = False

    @property
    def max_prompt_tokens(self) -> int:
        """The most tokens of a prompt: one less than the context at most, so that there is room for an answer."""
        room = self.engine.max_length - 1
        return min(room, self.config.max_prompt_tokens or room)

    @property
    def max_choices(self) -> int:
        """The most continuations of one request: no more than fit in the slots and the queue."""
        return min(self.config.max_choices, self.engine.config.max_queue + self.engine.config.slots)

    @functools.cached_property
    def max_prompt_characters(self) -> int | None:
        """A longer text has too many tokens for sure, and need not be encoded; None where that cannot be known."""
        pieces = self.tokenizer.token_bytes
        return None if pieces is None else self.max_prompt_tokens * max(map(len, pieces))

    @functools.cached_property
    def _special_names(self) -> dict[int, str]:
        return {token: name for name, token in self.tokenizer.specials.items()}

    def token_bytes(self, token: int) -> bytes | None:
        """The bytes that a token adds to a text; None of a special one, which adds nothing."""
        return None if token in self._special_names else self.tokenizer.decode_bytes([token])

    def token_name(self, token: int) -> str:
        """What stands for a token in a report; bytes that are no text by themselves are told as bytes:\\xe2\\x80."""
        data = self.token_bytes(token)
        if data is None:
            return self._special_names[token]
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
