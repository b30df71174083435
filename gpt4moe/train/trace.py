"""Records of where every token went, step by step, to look at or to force on another run.

`routing/STEP.npz` in a work directory holds of one step: `expert_ids` [microbatches, B, T, L, K] int16, -1 for none,
`tokens_crc`, the checksum of the tokens they are for, and `num_experts`.
"""

from __future__ import annotations

import dataclasses
import io
import os
import zlib
from collections.abc import Sequence

import jax
import numpy as np
from etils import epath

from gpt4moe.config.check import require
from gpt4moe.config.run import RunConfig

FOLDER = "routing"


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """Where the tokens of one step went: choices [microbatches, B, T, L, K], of so many experts a layer."""

    expert_ids_WBTLK: np.ndarray
    tokens_crc: int
    num_experts: int

    @property
    def width(self) -> int:
        """Choices of a token, K."""
        return self.expert_ids_WBTLK.shape[-1]

    def on(self, tokens_BT: Sequence[np.ndarray], source: str) -> np.ndarray:
        """The choices, int32, to force on these microbatches; `CallerError` where they were made on other tokens."""
        same = len(self.expert_ids_WBTLK) == len(tokens_BT) and self.tokens_crc == checksum(tokens_BT)
        mend = "train on the same data, batch and seed"
        require(same, "replay_routing", source, "was recorded on other tokens than this run draws", mend)
        return self.expert_ids_WBTLK.astype(np.int32)


def write(workdir: epath.Path, step: int, chosen_WLBTK: np.ndarray, count: int, crc: int, num_experts: int) -> None:
    """Records the choices of a step's first `count` microbatches."""
    folder = workdir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    ids_WBTLK = np.moveaxis(chosen_WLBTK[:count], 1, 3).astype(np.int16)
    buffer = io.BytesIO()
    facts = {"tokens_crc": np.uint32(crc), "num_experts": np.int32(num_experts)}
    np.savez_compressed(buffer, expert_ids=ids_WBTLK, **facts)
    partial = folder / f"{step}.partial"
    partial.write_bytes(buffer.getvalue())
    partial.replace(folder / f"{step}.npz")


def read(workdir: os.PathLike | str, step: int) -> StepRecord | None:
    """The record of a step; None where there is none."""
    path = epath.Path(workdir) / FOLDER / f"{step}.npz"
    if not path.exists():
        return None
    with np.load(io.BytesIO(path.read_bytes())) as record:
        return StepRecord(record["expert_ids"], int(record["tokens_crc"]), int(record["num_experts"]))


def replayed(run: RunConfig, step: int) -> StepRecord | None:
    """The record of a step that `run` replays, None where its records have ended.

    Raises `CallerError` where it is one of another shape of batch or model.
    """
    source, moe = run.train.replay_routing, run.model.moe
    record = read(source, step)
    if record is None:
        return None
    dims = list(record.expert_ids_WBTLK.shape[1:-1])
    wanted = [run.microbatch_rows, run.data.sequence_length, run.model.num_moe_layers]
    constraint = f"was recorded for rows, tokens and layers {dims}; this run has {wanted}"
    require(
        dims == wanted, "replay_routing", source, constraint, "change MICROBATCH_ROWS, SEQUENCE_LENGTH or NUM_LAYERS"
    )
    same = record.num_experts == moe.num_experts
    constraint = f"was recorded of {record.num_experts} experts a layer; this run has {moe.num_experts}"
    require(same, "replay_routing", source, constraint, f"set NUM_EXPERTS to {record.num_experts}")
    # Of a run in which experts choose, a token has any number of them.
    as_many = record.width in (moe.experts_per_token, moe.num_experts)
    constraint = f"was recorded with {record.width} experts a token; this run has {moe.experts_per_token}"
    require(as_many, "replay_routing", source, constraint, f"set EXPERTS_PER_TOKEN to {record.width}")
    return record


def recorded_width(run: RunConfig) -> int:
    """Choices of a token (K) in the records that `run` replays.

    Raises `CallerError` where there is no record, or one of another shape of batch or model.
    """
    source = run.train.replay_routing
    steps = sorted(int(path.stem) for path in (epath.Path(source) / FOLDER).glob("*.npz"))
    mend = "name the work directory of a run with record_routing=True"
    require(bool(steps), "replay_routing", source, f"has no {FOLDER}/STEP.npz", mend)
    return replayed(run, steps[0]).width


def require_one_process(run: RunConfig) -> None:
    """Raises `CallerError` where a job of several processes would record or replay: each draws rows of its own."""
    for setting in ("record_routing", "replay_routing"):
        value = getattr(run.train, setting)
        alone = not value or jax.process_count() == 1
        require(alone, setting, value, "needs a single process", "leave it out in a job of several")


def checksum(tokens_BT: Sequence[np.ndarray]) -> int:
    """CRC-32 of the tokens of microbatches, in their order."""
    crc = 0
    for tokens in tokens_BT:
        crc = zlib.crc32(np.ascontiguousarray(tokens), crc)
    return crc
