"""Kills a training process again and again and compares its losses with those of a run left alone, bit by bit.

    python -m tests.train.kill_campaign --kills 8 --steps 60

Kills take turns: while a checkpoint is being written, between checkpoints, and at any moment from the start of the
process on. Prints one JSON document; exit code 1 on a difference.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

# What the clock says differs from run to run; everything else must not.
CLOCK_KEYS = {"tokens_per_second", "model_flops_utilization", "step_seconds", "data_wait_fraction", "goodput"}
POLL_SECONDS = 0.002
DEADLINE_SECONDS = 300
# From the start of a worker to somewhere in its training.
START_SECONDS = 8
MOMENTS = ("saving", "between", "any")


def campaign(directory: pathlib.Path, *, kills: int, steps: int, seed: int = 0) -> dict:
    """Trains once undisturbed and once under `kills` kills; returns what was killed when, and what differed."""
    from tests.train import tiny

    tiny.write_corpus(directory / "corpus")
    _finish(_start(directory, "reference", steps))
    draw = random.Random(seed)
    moments = itertools.islice(itertools.cycle(MOMENTS), kills)
    killed = [_kill(directory, steps, moment, draw) for moment in moments]
    _finish(_start(directory, "killed", steps))
    reference, survivor = (_rows(directory / name) for name in ("reference", "killed"))
    differing = [a["step"] for a, b in zip(reference, survivor, strict=False) if a != b]
    return {
        "kills": killed,
        "rows": [len(reference), len(survivor)],
        "differing_steps": differing,
        "same": reference == survivor and len(reference) > steps,
    }


def train(directory: pathlib.Path, name: str, steps: int) -> None:
    """The body of a worker process."""
    from gpt4moe.train import loop
    from tests.train import tiny

    run = tiny.run_config(directory / "corpus", steps=steps, checkpoint_every=3, evaluate_every=6)
    loop.train(run, directory / name, config_text="", show_progress=False)


def _start(directory: pathlib.Path, name: str, steps: int) -> subprocess.Popen:
    # The reference leaves its compiled programs for the others, which start in a quarter of the time.
    cache = {"JAX_COMPILATION_CACHE_DIR": str(directory / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, "-m", "tests.train.kill_campaign", "--worker", name, "--steps", str(steps)]
    return subprocess.Popen([*command, "--directory", str(directory)], env=os.environ | cache)


def _finish(process: subprocess.Popen) -> None:
    if process.wait(DEADLINE_SECONDS):
        raise RuntimeError(f"a worker that was left alone failed with exit code {process.returncode}")


def _kill(directory: pathlib.Path, steps: int, moment: str, draw: random.Random) -> dict:
    """Kills a worker at its `moment`: some rows on and (not) saving, or some seconds after its start."""
    at_row = min(len(_rows(directory / "killed")) + draw.randrange(1, max(steps // 4, 2)), steps - 2)
    process, started = _start(directory, "killed", steps), time.monotonic()
    seconds = draw.uniform(0, START_SECONDS) if moment == "any" else DEADLINE_SECONDS
    while process.poll() is None and time.monotonic() < started + seconds:
        if len(_rows(directory / "killed")) >= at_row and bool(_saving(directory)) == (moment == "saving"):
            break
        time.sleep(POLL_SECONDS)
    process.send_signal(signal.SIGKILL)
    process.wait()
    rows = len(_rows(directory / "killed"))
    return {"moment": moment, "rows": rows, "half_written": _saving(directory), "code": process.returncode}


def _saving(directory: pathlib.Path) -> list[str]:
    """Checkpoints that are begun and not complete."""
    return sorted(path.name for path in (directory / "killed" / "checkpoints").glob("*tmp*"))


def _rows(workdir: pathlib.Path) -> list[dict]:
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{key: value for key, value in row.items() if key not in CLOCK_KEYS} for row in rows]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=pathlib.Path)
    parser.add_argument("--worker")
    args = parser.parse_args()
    if args.worker:
        train(args.directory, args.worker, args.steps)
        return 0
    with tempfile.TemporaryDirectory() as directory:
        result = campaign(args.directory or pathlib.Path(directory), kills=args.kills, steps=args.steps, seed=args.seed)
    print(json.dumps(result, indent=1))
    return 0 if result["same"] else 1


if __name__ == "__main__":
    sys.exit(main())
