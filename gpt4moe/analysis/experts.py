"""What the experts of a trained run do: its checkpoints, held-out and given text in; choices and numbers out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from flax import nnx

from gpt4moe import checkpoint
from gpt4moe.analysis import routing, specialization
from gpt4moe.analysis.capture import Capture, capture, given_text, held_out_text
from gpt4moe.analysis.specialization import Groups, assignments
from gpt4moe.analysis.token_class import by_class
from gpt4moe.config.check import require
from gpt4moe.config.mesh import MeshConfig
from gpt4moe.data.tokenizer import Tokenizer
from gpt4moe.infer.trained import Trained, restore
from gpt4moe.train.evaluate import trained_store

# What the page of coloured text shows at most: choices (tokens times layers times K) and tokens. Some 3 MB.
MAX_PAGE_CHOICES, MAX_PAGE_TOKENS, SAMPLE_TOKENS = 400_000, 12_000, 320
# Load over the mean load below which shares of an expert's tokens say little.
FEW = 0.1


@dataclasses.dataclass(frozen=True, eq=False)
class Text:
    """A text to be shown token by token: the first of its `num_tokens` tokens (None: as many as wanted)."""

    name: str
    seen: Capture
    num_tokens: int | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Experts:
    """The experts of the model of `step`.

    held_out: choices for held-out text, None where nothing is held out; texts: what the page of coloured text shows;
    saturation: of every older checkpoint that is kept, tokens trained -> (step, [L]).
    """

    step: int
    source_names: tuple[str, ...]
    tokenizer: Tokenizer
    held_out: Capture | None
    texts: tuple[Text, ...]
    saturation: Mapping[int, tuple[int, np.ndarray]]

    def groups(self) -> dict[str, Groups]:
        """The ways to tell tokens of the held-out text apart."""
        seen = self.held_out
        return {
            "source": Groups(self.source_names, seen.source_ids_U).without_empty(),
            "token class": by_class(seen.token_ids_U, seen.positions_U, self.tokenizer),
            "position": specialization.by_position(seen.positions_U),
        }


def examine(trained: Trained, given: Mapping[str, str], *, max_tokens: int, mesh: MeshConfig | None = None) -> Experts:
    """Runs held-out text (at most `max_tokens`) and the `given` texts by name through a run's model.

    `mesh` is what `trained` lies over. Raises `CallerError` where the tokens are gone and the sources have changed.
    """
    run, model = trained.config, trained.model
    multiple = model.layout.row_multiple
    rows = -(-run.microbatch_rows // multiple) * multiple
    store = trained_store(run, trained.workdir, trained.step)
    batches = list(held_out_text(store, run.data, rows=rows, max_tokens=max_tokens))
    held_out = capture(model, batches, run.rules) if batches else None
    page_room = _page_room(trained, held_out)
    samples = _samples(store.source_names, held_out, page_room)
    room = page_room - sum(len(sample.seen.token_ids_U) for sample in samples)
    return Experts(
        step=trained.step,
        source_names=store.source_names,
        tokenizer=trained.tokenizer,
        held_out=held_out,
        texts=tuple([*_given(trained, given, rows, room), *samples]),
        saturation=_saturation(trained, batches, held_out, mesh) if batches else {},
    )


def to_document(experts: Experts) -> dict:
    """What `--json` prints: numbers by layer."""
    texts = [
        {"name": text.name, "tokens": text.num_tokens, "shown": len(text.seen.token_ids_U)}
        for text in experts.texts
        if text.num_tokens is not None
    ]
    document = {"step": experts.step, "texts": texts}
    if (seen := experts.held_out) is None:
        return document
    load_LE = routing.load(seen.expert_ids_LUK, seen.num_experts)
    dead_LE = routing.dead_experts(load_LE)
    return document | {
        "tokens": len(seen.token_ids_U),
        "load_max_over_mean": (load_LE.max(1) * seen.num_experts).tolist(),
        "dead_experts": [np.flatnonzero(dead_E).tolist() for dead_E in dead_LE],
        "saturation": {str(step): layers.tolist() for step, layers in experts.saturation.values()},
        "strongest_pair": _strongest_pairs(seen),
        "specialization": {
            name: specialization.distance(assignments(seen.expert_ids_LUK, groups, seen.num_experts)).tolist()
            for name, groups in experts.groups().items()
        },
    }


def format_document(document: dict) -> str:
    """The numbers in a few lines, means over layers."""
    if "tokens" not in document:
        return "no held-out text: nothing to say of experts"
    dead = sum(map(len, document["dead_experts"]))
    lines = [f"experts at step {document['step']:,d}, {document['tokens']:,d} held-out tokens, means over layers"]
    lines.append(f"  dead experts {dead}, busiest over mean load {np.mean(document['load_max_over_mean']):.2f}")
    for name, layers in document["specialization"].items():
        lines.append(f"  specialisation by {name} {np.mean(layers):.3f}")
    for step, layers in document["saturation"].items():
        lines.append(f"  choices as at step {step}: {np.mean(layers):.1%}")
    return "\n".join(lines)


def _strongest_pairs(seen: Capture) -> list[dict | None]:
    """By layer the experts i and j of which the largest share of i's tokens also goes to j; None where K is 1.

    Experts of less than a tenth of the mean load are left out: one token would make any pair of theirs the strongest.
    """
    pairs = []
    load_LE = routing.load(seen.expert_ids_LUK, seen.num_experts)
    coactivation_LEE = routing.coactivation(seen.expert_ids_LUK, seen.num_experts)
    for share_EE, load_E in zip(coactivation_LEE, load_LE, strict=True):
        share_EE = np.where(load_E[:, None] * len(load_E) >= FEW, share_EE, 0.0)
        i, j = np.unravel_index(np.argmax(np.nan_to_num(share_EE)), share_EE.shape)
        share = float(np.nan_to_num(share_EE[i, j]))
        pairs.append({"of": int(i), "also": int(j), "share": share} if share else None)
    return pairs


def _page_room(trained: Trained, held_out: Capture | None) -> int:
    """Tokens that the page of coloured text has room for, by how many experts a token has at most."""
    model = trained.config.model
    most = model.moe.experts_per_token if held_out is None else int((held_out.expert_ids_LUK >= 0).sum(-1).max())
    return min(MAX_PAGE_CHOICES // (model.num_moe_layers * max(most, 1)), MAX_PAGE_TOKENS)


def _samples(names: tuple[str, ...], held_out: Capture | None, room: int) -> list[Text]:
    """The first held-out tokens of every source, in at most half of the room."""
    if held_out is None:
        return []
    count = min(SAMPLE_TOKENS, max(room // 2 // len(names), 1))
    places = [np.flatnonzero(held_out.source_ids_U == source)[:count] for source in range(len(names))]
    pairs = zip(names, places, strict=True)
    return [Text(f"{name}, held out", held_out.part(chosen)) for name, chosen in pairs if len(chosen)]


def _given(trained: Trained, given: Mapping[str, str], rows: int, room: int) -> list[Text]:
    """The given texts after an end-of-text token, as documents are trained on, each with its share of the room."""
    if not given:
        return []
    share = room // len(given)
    require(
        share > 0, "--text", list(given), f"are more texts than the page has room for ({room} tokens)", "give fewer"
    )
    encode = trained.tokenizer.encode_array
    ids = [np.concatenate([[trained.tokenizer.begin_of_text], encode(text)]) for text in given.values()]
    batches = given_text([ids_U[:share] for ids_U in ids], rows=rows, length=trained.config.data.sequence_length)
    seen = capture(trained.model, batches, trained.config.rules)
    return [Text(name, seen.part(seen.source_ids_U == number), len(ids[number])) for number, name in enumerate(given)]


def _saturation(
    trained: Trained, batches: list, final: Capture, mesh: MeshConfig | None
) -> dict[int, tuple[int, np.ndarray]]:
    """The same text through every older checkpoint that is kept, by tokens trained."""
    definition = nnx.split(trained.model)[0]
    found = {}
    for step in checkpoint.saved_steps(trained.workdir):
        if step < trained.step:
            older = nnx.split(restore(trained.config, trained.workdir, step=step, mesh=mesh).model)[1]
            seen = capture(nnx.merge(definition, older), batches, trained.config.rules)
            tokens = checkpoint.restore_progress(trained.workdir, step)["tokens"]
            found[tokens] = (step, routing.saturation(seen.expert_ids_LUK, final.expert_ids_LUK))
    return found
