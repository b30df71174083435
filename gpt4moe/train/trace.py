"""Records of where every token went, step by step, to look at or to force on another run.

`routing/STEP.npz` in a work directory holds of one step: `expert_ids` [microbatches, B, T, L, K] int16, -1 for none,
and `tokens_crc`, the checksum of the tokens they are for.
"""

from __future__ import annotations

import io
import os
import zlib

import jax
import numpy as np
from etils import epath

from gpt4moe.config.check import require
from gpt4moe.config.run import RunConfig

FOLDER = "routing"


def write(workdir: epath.Path, step: int, chosen_WLBTK: np.ndarray, count: int, crc: int) -> None:
    """Records the choices of a step's first `count` microbatches; the first process writes."""
    if jax.process_index():
        return
    folder = workdir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    ids_WBTLK = np.moveaxis(chosen_WLBTK[:count], 1, 3).astype(np.int16)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, expert_ids=ids_WBTLK, tokens_crc=np.uint32(crc))
    (folder / f"{step}.npz").write_bytes(buffer.getvalue())


def read(workdir: os.PathLike | str, step: int) -> tuple[np.ndarray, int] | None:
    """The choices of a step and the checksum of its tokens; None where it has not been recorded."""
    path = epath.Path(workdir) / FOLDER / f"{step}.npz"
    if not path.exists():
        return None
    with np.load(io.BytesIO(path.read_bytes())) as record:
        return record["expert_ids"], int(record["tokens_crc"])


def replayed(run: RunConfig, step: int, tokens_BT: list[np.ndarray]) -> np.ndarray | None:
    """The choices [microbatches, B, T, L, K] to force on the microbatches of a step, None where none are recorded.

    Raises `CallerError` where they were recorded on other tokens.
    """
    record = read(run.train.replay_routing, step)
    if record is None:
        return None
    ids_WBTLK, crc = record
    same = len(ids_WBTLK) == len(tokens_BT) and crc == checksum(tokens_BT)
    constraint = f"was recorded on other tokens than those of step {step}"
    require(same, "replay_routing", run.train.replay_routing, constraint, "train on the same data, batch and seed")
    return ids_WBTLK.astype(np.int32)


def recorded_width(run: RunConfig) -> int:
    """Choices of a token (K) in the records that `run` replays.

    Raises `CallerError` where there is no record, or one of another shape of batch or model.
    """
    source, setting = run.train.replay_routing, "replay_routing"
    steps = sorted((epath.Path(source) / FOLDER).glob("*.npz"), key=lambda path: int(path.stem))
    mend = "name the work directory of a run with record_routing=True"
    require(bool(steps), setting, source, f"has no {FOLDER}/STEP.npz", mend)
    one_process = jax.process_count() == 1
    require(one_process, setting, source, "needs a single process", "leave it out in a job of several")
    _, *dims, width = read(source, int(steps[0].stem))[0].shape
    wanted = [run.microbatch_rows, run.data.sequence_length, run.model.num_moe_layers]
    constraint = f"was recorded for rows, tokens and layers {dims}; this run has {wanted}"
    require(dims == wanted, setting, source, constraint, "change MICROBATCH_ROWS, SEQUENCE_LENGTH or NUM_LAYERS")
    return width


def checksum(tokens_BT: list[np.ndarray]) -> int:
    """CRC-32 of the tokens of microbatches, in their order."""
    crc = 0
    for tokens in tokens_BT:
        crc = zlib.crc32(np.ascontiguousarray(tokens), crc)
    return crc
