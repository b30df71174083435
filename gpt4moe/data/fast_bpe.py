"""The tiktoken engine built from a `tokenizer.json`: the same ids about eight times faster."""

from __future__ import annotations

import functools
import itertools
import json

import tiktoken
import tokenizers

# What both engines must agree on before the fast one is used.
PROBE = (
    "Hello, world! It's 2024; they'LL say: don't   stop.\n\n\tdef f(x_1, **kw):\n    return x_1[0x1F] != 12345 # ok\r\n"
    "na\u00efve caf\u00e9 \u0395\u03bb\u03bb\u03ac\u03b4\u03b1 \u041f\u0440\u0438\u0432\u0435\u0442 \u4f60\u597d\uff0c"
    "\u4e16\u754c \u3053\u3093 \U0001f642\u200d \u00a0 \u200b '\"'\" https://example.org/?a=b&c=%20   "
)
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@functools.cache
def byte_of_letter() -> dict[str, int]:
    """The printable letter that byte-level BPE writes for every byte, to that byte (GPT-2, `bytes_to_unicode`)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(256 + index): byte for index, byte in enumerate(rest)}


def fast_engine(serialized: str, reference: tokenizers.Tokenizer) -> tiktoken.Encoding | None:
    """A tiktoken encoder with the ids of `reference`, or None where its kind has none or the ids differ on a probe."""
    fields = json.loads(serialized)
    pattern = _pattern(fields.get("pre_tokenizer"))
    model = fields["model"]
    if model.get("type") != "BPE" or fields.get("normalizer") or pattern is None or not _merges_in_id_order(model):
        return None
    added = {token["content"]: token["id"] for token in fields.get("added_tokens", ())}
    byte_of = byte_of_letter()
    plain = {token: index for token, index in model["vocab"].items() if token not in added}
    if not all(letter in byte_of for token in plain for letter in token):
        return None
    ranks = {bytes(byte_of[letter] for letter in token): index for token, index in plain.items()}
    if len(ranks) != len(plain) or any(bytes([byte]) not in ranks for byte in range(256)):
        return None
    # Special tokens are left out on purpose: their text inside a document is plain text.
    engine = tiktoken.Encoding("gpt4moe", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    same = engine.encode_ordinary(PROBE) == reference.encode(PROBE, add_special_tokens=False).ids
    return engine if same else None


def _merges_in_id_order(model: dict) -> bool:
    # tiktoken takes the id of the merged token as the priority of the merge.
    pairs = (pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"])
    ids = [model["vocab"]["".join(pair)] for pair in pairs]
    return all(first <= second for first, second in itertools.pairwise(ids))


def _pattern(pre_tokenizer: dict | None) -> str | None:
    """The regex of `[Split, ByteLevel]` or `ByteLevel`; None for any other way of cutting text into pieces."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer]) if pre_tokenizer else []
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    if len(steps) == 1 and steps[0].get("use_regex", True):
        return GPT2_PATTERN
    if len(steps) == 2 and steps[0]["type"] == "Split" and not steps[1].get("use_regex", True):
        isolated = steps[0]["behavior"].lower() == "isolated" and not steps[0].get("invert")
        return steps[0]["pattern"].get("Regex") if isolated else None
    return None
