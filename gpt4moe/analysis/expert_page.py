"""`experts.html`: text coloured by the expert that each token went to, in one self-contained page."""

from __future__ import annotations

import base64
import html
import json
import pathlib
import string

import numpy as np
from etils import epath

from gpt4moe.analysis.capture import Capture
from gpt4moe.analysis.expert_colours import css
from gpt4moe.analysis.experts import Experts, Text
from gpt4moe.analysis.text_pieces import Piece, pieces
from gpt4moe.data.tokenizer import Tokenizer

EXPERT_PAGE = "experts.html"
TEMPLATE = pathlib.Path(__file__).with_name("experts.html")
NO_EXPERT = 0xFFFF
# Gates travel as whole thousandths.
GATE_UNIT = 1000


def write_expert_page(workdir: str | epath.Path, experts: Experts) -> epath.Path | None:
    """Writes `experts.html` into `workdir` and returns its path; None where there is no text to show."""
    path = epath.Path(workdir) / EXPERT_PAGE
    if not experts.texts:
        return None
    path.write_text(expert_page(epath.Path(workdir).name, experts))
    return path


def expert_page(name: str, experts: Experts) -> str:
    """The page of all texts of `experts`, of which the run is called `name`."""
    seen = [text.seen for text in experts.texts]
    first = np.cumsum([0, *(len(each.token_ids_U) for each in seen)])
    num_experts, num_layers = seen[0].num_experts, len(seen[0].expert_ids_LUK)
    ids_LUK = np.concatenate([each.expert_ids_LUK for each in seen], axis=1)
    gates_LUK = np.concatenate([each.gates_LUK for each in seen], axis=1)
    most = max(int((ids_LUK >= 0).sum(-1).max()), 1)  # what no token uses is not carried
    sections = [
        _section(text, int(start), experts.tokenizer) for text, start in zip(experts.texts, first, strict=False)
    ]
    data = {
        "experts": num_experts,
        "shape": [num_layers, int(first[-1]), most],
        "ids": _packed(ids_LUK[..., :most] % (NO_EXPERT + 1)),
        "gates": _packed((gates_LUK[..., :most] * GATE_UNIT).round()),
        "unit": GATE_UNIT,
        "none": NO_EXPERT,
    }
    return string.Template(TEMPLATE.read_text()).substitute(
        title=html.escape(f"gpt4moe: experts of {name}, step {experts.step:,d}"),
        light=css(num_experts, dark=False),
        dark=css(num_experts, dark=True),
        rules=" ".join(f".x{expert} {{ --x: var(--x{expert}) }}" for expert in range(num_experts)),
        num_experts=num_experts,
        last_layer=num_layers - 1,
        sections="".join(sections),
        data=json.dumps(data, separators=(",", ":")),
    )


def _section(text: Text, first: int, tokenizer: Tokenizer) -> str:
    """One text: its name, how much of it there is, and its pieces under the colours of the first layer."""
    seen, shown = text.seen, len(text.seen.token_ids_U)
    note = f"{shown:,d} tokens"
    if text.num_tokens and text.num_tokens > shown:
        note = f"the first {shown:,d} of {text.num_tokens:,d} tokens, for which there is room here"
    found = pieces(seen.token_ids_U, seen.positions_U, tokenizer)
    spans = "".join(_span(piece, first, seen) for piece in found)
    return (
        f"<section><h2>{html.escape(text.name)}</h2><p>{note}</p>"
        f'<div class="text" role="list" aria-label="{html.escape(text.name)}">{spans}</div></section>'
    )


def _span(piece: Piece, first: int, seen: Capture) -> str:
    """One piece at the first layer, as the page's script makes it for every other."""
    expert = seen.expert_ids_LUK[0, piece.first, 0]
    kind = f"x{expert}" if expert >= 0 else "none"
    kind += " special" if piece.special else ""
    label = f"{piece.text}: {f'expert {expert}' if expert >= 0 else 'no expert'}"
    count = f' data-n="{piece.count}"' if piece.count > 1 else ""
    text = html.escape(piece.text).replace("\n", '<i class="newline"></i>\n')
    return (
        f'<span role="listitem" tabindex="-1" class="{kind}" data-i="{first + piece.first}"{count} '
        f'aria-label="{html.escape(label)}">{text}</span>'
    )


def _packed(values: np.ndarray) -> str:
    """Base64 of little-endian uint16, cut at its largest value."""
    return base64.b64encode(np.clip(values, 0, 0xFFFF).astype("<u2").tobytes()).decode()
