"""The turns of a chat as one prompt, by a Jinja template: the tokenizer's own, one that is given, or a plain one.

In: messages. Out: text and special tokens in turn. The name of a special token inside a message is text: nobody can
speak for another by writing it.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import re
import secrets
from collections.abc import Mapping, Sequence

import jinja2
import jinja2.sandbox
from etils import epath

from gpt4moe.config.check import CallerError, require

PLAIN = """{{ bos_token }}{% for message in messages %}### {{ message.role | capitalize }}
{{ message.content }}

{% endfor %}{% if add_generation_prompt %}### Assistant
{% endif %}"""
# With the plain template a model that was trained on text goes on with the next turn.
PLAIN_STOPS = ("\n### ",)
# What a model that was trained on pictures with their texts goes on from: pictures and words as they stand.
READING = "{{ bos_token }}{% for message in messages %}{{ message.content }}{% endfor %}"
IMAGE = "image"
TEMPLATE_FILE, TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"
# Where `gpt4moe import` keeps the small files of a checkpoint.
FOREIGN = "foreign"


@dataclasses.dataclass(frozen=True)
class Special:
    """A special token, by the name that the tokenizer has for it; `IMAGE` is the next image of the messages."""

    name: str


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """`source` is Jinja; `stops` end an answer; `bos_token` and `eos_token` are what templates know by these names."""

    source: str
    bos_token: str
    eos_token: str
    stops: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        try:
            _environment().parse(self.source)
        except jinja2.TemplateError as error:
            raise CallerError(f"chat_template={self.source[:40]!r} is no Jinja template: {error}") from None

    def render(self, messages: Sequence[Mapping[str, str]], marks: Marks) -> list[str | Special]:
        """The prompt that asks for the next turn. messages: role and content, guarded by `marks`.

        Raises `CallerError` for what the template refuses.
        """
        words = {"bos_token": self.bos_token, "eos_token": self.eos_token, "add_generation_prompt": True}
        try:
            text = _environment().from_string(self.source).render(messages=list(messages), **words)
        except (jinja2.TemplateError, TypeError, ValueError, RecursionError) as error:
            raise CallerError(f"messages=[...] do not fit the chat template: {error}") from None
        return marks.split(text)


class Marks:
    """Keeps special tokens that a template writes apart from their names in messages.

    A mark holds a number that nobody can guess, so that no message holds one.
    """

    def __init__(self, specials: Sequence[str]):
        self._specials = sorted(specials, key=len, reverse=True)
        self._begin, self._end = f"\ue000{secrets.token_hex(8)}:", "\ue001"
        self._names = re.compile("|".join(map(re.escape, self._specials)) or r"(?!)")
        self.image = f"{self._begin}{IMAGE}{self._end}"

    def guard(self, text: str) -> str:
        """A message's text with a mark in the place of every name of a special token."""
        return self._names.sub(lambda found: self._mark(found[0]), text)

    def split(self, text: str) -> list[str | Special]:
        """Text and special tokens in turn; the names that were guarded are text again."""
        pieces: list[str | Special] = []
        marked = re.compile(f"{re.escape(self._begin)}(\\w+){self._end}|({self._names.pattern})")
        plain, last = [], 0
        for found in marked.finditer(text):
            plain.append(text[last : found.start()])
            last = found.end()
            guarded, name = found[1], found[2]
            if guarded is not None and guarded != IMAGE:
                plain.append(self._specials[int(guarded)])
            else:
                pieces += ["".join(plain), Special(name or IMAGE)]
                plain = []
        pieces.append("".join([*plain, text[last:]]))
        return [piece for piece in pieces if piece != ""]

    def _mark(self, name: str) -> str:
        return f"{self._begin}{self._specials.index(name)}{self._end}"


def find_template(
    workdir: str | os.PathLike | None, given: str | None, begin: str, end: str, *, reads_images: bool = False
) -> ChatTemplate:
    """The template in the file `given`, else that of the work directory's tokenizer, else a plain one.

    begin, end: the names of the tokens before and after a text, where the directory does not say others.
    """
    folders = [] if workdir is None else [epath.Path(workdir), epath.Path(workdir) / FOREIGN]
    settings = next((found for folder in folders if (found := _tokenizer_config(folder))), {})
    names = {"bos_token": begin, "eos_token": end}
    names |= {key: text for key in names if (text := _token_text(settings.get(key)))}
    if given is not None:
        path = epath.Path(given)
        require(path.is_file(), "chat_template", given, "is not a file")
        return ChatTemplate(path.read_text(), **names)
    for folder in folders:
        if (folder / TEMPLATE_FILE).exists():
            return ChatTemplate((folder / TEMPLATE_FILE).read_text(), **names)
    source = _template_in(settings.get("chat_template"))
    if source is not None:
        return ChatTemplate(source, **names)
    return ChatTemplate(READING, begin, end) if reads_images else ChatTemplate(PLAIN, begin, end, PLAIN_STOPS)


def _tokenizer_config(folder: epath.Path) -> dict:
    path = folder / TOKENIZER_CONFIG
    if not path.exists():
        return {}
    try:
        settings = json.loads(path.read_text())
    except ValueError as error:
        raise CallerError(f"{TOKENIZER_CONFIG}={os.fspath(path)!r} is not JSON: {error}") from None
    return settings if isinstance(settings, dict) else {}


def _token_text(value: object) -> str | None:
    return value.get("content") if isinstance(value, dict) else value if isinstance(value, str) else None


def _template_in(value: object) -> str | None:
    """A template, or the one called default among several."""
    if isinstance(value, list):
        value = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}.get("default")
    return value if isinstance(value, str) else None


def _environment() -> jinja2.Environment:
    """As the templates of published tokenizers expect it; what they may call can change nothing."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    return environment


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
