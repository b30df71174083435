"""Records of where every token went, step by step, to look at or to force on another run.

`routing/STEP.npz` in a work directory holds of one step: `expert_ids` [microbatches, B, T, L, K] int16, -1 for none,
`num_experts` and `experts_per_token` of the model, and `tokens_crc`, the checksum of the tokens they are for.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import os
import zlib
from collections.abc import Callable

import jax
import numpy as np
from etils import epath

from gpt4moe.config.check import require
from gpt4moe.config.moe import MoeConfig
from gpt4moe.config.run import RunConfig

FOLDER = "routing"
Replay = Callable[[list[np.ndarray]], np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
    """The choices of one step. K of `expert_ids_WBTLK` is the router's, all experts where they choose the tokens."""

    expert_ids_WBTLK: np.ndarray
    tokens_crc: int
    num_experts: int
    experts_per_token: int


def write(workdir: epath.Path, step: int, chosen_WLBTK: np.ndarray, count: int, crc: int, moe: MoeConfig) -> None:
    """Records the choices of a step's first `count` microbatches; no killed writer leaves half of a record."""
    folder = workdir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    ids_WBTLK = np.moveaxis(chosen_WLBTK[:count], 1, 3).astype(np.int16)
    numbers = {"num_experts": moe.num_experts, "experts_per_token": moe.experts_per_token}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, expert_ids=ids_WBTLK, tokens_crc=np.uint32(crc), **numbers)
    partial = folder / f"{step}.npz.partial"
    partial.write_bytes(buffer.getvalue())
    partial.replace(folder / f"{step}.npz")


def read(workdir: os.PathLike | str, step: int) -> Record | None:
    """The record of a step; None where there is none."""
    path = epath.Path(workdir) / FOLDER / f"{step}.npz"
    if not path.exists():
        return None
    with np.load(io.BytesIO(path.read_bytes())) as record:
        whole = {"num_experts", "experts_per_token"} <= set(record.files)
        require(whole, "record", str(path), "does not say of which model it is", "record the run again")
        numbers = (int(record[name]) for name in ("tokens_crc", "num_experts", "experts_per_token"))
        return Record(record["expert_ids"], *numbers)


def replay(run: RunConfig, step: int, width: int) -> Replay | None:
    """What gives the choices [microbatches, B, T, L, K] to force on the tokens of a step; None without a record.

    `width` is the K of the first record. Raises `CallerError` where this one is of another model or shape of batch;
    what is returned does where its tokens are others.
    """
    record = read(run.train.replay_routing, step)
    if record is None:
        return None
    _check(record, run, step, width)
    return functools.partial(_of_tokens, record, run, step)


def check_run(run: RunConfig) -> None:
    """Raises `CallerError` where `run` cannot record, or not replay the first record that it names."""
    one_process = jax.process_count() == 1
    for name in ("record_routing", "replay_routing"):
        value = getattr(run.train, name)
        require(one_process or not value, name, value, "needs a single process", "leave it out in a job of several")
    if run.train.replay_routing:
        step = _first_step(run)
        _check(read(run.train.replay_routing, step), run, step, recorded_width(run))


def recorded_width(run: RunConfig) -> int:
    """Choices of a token (K) in the records that `run` replays. Raises `CallerError` where there are none."""
    return read(run.train.replay_routing, _first_step(run)).expert_ids_WBTLK.shape[-1]


def checksum(tokens_BT: list[np.ndarray]) -> int:
    """CRC-32 of the tokens of microbatches, in their order."""
    crc = 0
    for tokens in tokens_BT:
        crc = zlib.crc32(np.ascontiguousarray(tokens), crc)
    return crc


def _first_step(run: RunConfig) -> int:
    source = run.train.replay_routing
    steps = [int(path.stem) for path in (epath.Path(source) / FOLDER).glob("*.npz")]
    mend = "name the work directory of a run with record_routing=True"
    require(bool(steps), "replay_routing", source, f"has no {FOLDER}/STEP.npz", mend)
    return min(steps)


def _check(record: Record, run: RunConfig, step: int, wanted_width: int) -> None:
    """Every record is held against the run: nothing says that one run, with one configuration, wrote them all."""
    moe, ids_WBTLK, source = run.model.moe, record.expert_ids_WBTLK, run.train.replay_routing
    _, *dims, width = ids_WBTLK.shape
    least, most = (int(bound(ids_WBTLK, initial=0)) for bound in (np.min, np.max))
    checks = [
        ("rows, tokens and layers", dims, [run.microbatch_rows, run.data.sequence_length, run.model.num_moe_layers],
         "MICROBATCH_ROWS, SEQUENCE_LENGTH or NUM_LAYERS"),
        ("experts", record.num_experts, moe.num_experts, "NUM_EXPERTS"),
        ("experts per token", record.experts_per_token, moe.experts_per_token, "EXPERTS_PER_TOKEN"),
    ]  # fmt: skip
    for what, recorded, wanted, names in checks:
        constraint = f"was recorded at step {step} for {what} {recorded}; this run has {wanted}"
        require(recorded == wanted, "replay_routing", source, constraint, f"change {names}")
    sound = least >= -1 and most < record.num_experts and width == wanted_width
    constraint = f"names experts at step {step} that the model recorded has not, or another number of choices"
    require(sound, "replay_routing", source, constraint, "record the run again")


def _of_tokens(record: Record, run: RunConfig, step: int, tokens_BT: list[np.ndarray]) -> np.ndarray:
    same = len(record.expert_ids_WBTLK) == len(tokens_BT) and record.tokens_crc == checksum(tokens_BT)
    constraint = f"was recorded on other tokens than those of step {step}"
    require(same, "replay_routing", run.train.replay_routing, constraint, "train on the same data, batch and seed")
    return record.expert_ids_WBTLK.astype(np.int32)
