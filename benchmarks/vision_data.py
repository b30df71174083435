"""Speed and bytes of images in the data pipeline, from compressed files on disk to a batch on the host.

    python benchmarks/vision_data.py [--digits 4000] [--pages 120] [--seconds 5] [--steps 60] [--json]

Measures for small images (strings of digits, 48 x 16, PNG) and large ones (pages of text, 448 x 448, JPEG): the time to
draw one, to check one in `prepare`, images a second decoded into batches with 0, 1 and 2 threads, and bytes a patch and
a token, stored and fed, against the reference's 600 a patch and 4 a token. Ratios are of numbers measured in this run;
`free_cores`, what two threads that never touch Python do over one, is the most that threads can bring just now.
`--steps` of the vision quickstart then say what share of their time the device waited for data, at most, with as many
threads (`data_wait_fraction` of `metrics.jsonl`): at most 0.05 is wanted. Its text model is not needed for that.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import inspect
import itertools
import json
import math
import os
import pathlib
import tempfile
import threading
import time

import numpy as np

from gpt4moe.config.data import DataConfig, ImageConfig, SourceConfig
from gpt4moe.config.tokenizer import TokenizerConfig
from gpt4moe.configure import build_run
from gpt4moe.data import rendered
from gpt4moe.data.documents import Document
from gpt4moe.data.image_bytes import FED_BYTES_PER_TOKEN
from gpt4moe.data.images import image_problem
from gpt4moe.data.pipeline import TrainRows, open_store
from gpt4moe.data.store import TokenStore
from gpt4moe.train.loop import train

WORKERS = (0, 1, 2)
TRAINED = "gin_configs/run/vision_quickstart.gin"
WARM_UP_STEPS = 5
TRAINED_IMAGES = 4000
MICROBATCH_ROWS = 8


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of image: how it is drawn, how it comes into rows of how many tokens, the patch that a model cuts.

    `warm_up` images are drawn first, after which every font is there at every size.
    """

    draw: functools.partial
    warm_up: int
    images: ImageConfig
    sequence_length: int
    patch: tuple[int, int]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digits", type=int, default=4000, help="small images to draw")
    parser.add_argument("--pages", type=int, default=120, help="large images to draw")
    parser.add_argument("--seconds", type=float, default=5, help="how long to decode with each number of threads")
    parser.add_argument("--steps", type=int, default=60, help="steps to train with each number of threads; 0: none")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    for name, least in (("digits", 1), ("pages", 1), ("steps", 0)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name}={getattr(arguments, name)} must be at least {least}")
    if not (0 < arguments.seconds < math.inf):
        parser.error(f"--seconds={arguments.seconds} must be a number above 0")
    small, large = ImageConfig(height=16, width=48, per_row=16), ImageConfig(height=448, width=448, per_row=2)
    # Drawn in this process, whose CPU time is measured, and not by as many as there are cores.
    digits, pages = map(inspect.unwrap, (rendered.digits, rendered.pages))
    kinds = {
        "digits": Kind(functools.partial(digits, count=arguments.digits), 3000, small, 128, (8, 8)),
        "pages": Kind(functools.partial(pages, count=arguments.pages), 1, large, 2048, (14, 14)),
    }
    results: dict = {"cores": len(os.sched_getaffinity(0)), "free_cores": free_cores()}
    for name, kind in kinds.items():
        results |= {f"{name}/{key}": value for key, value in measure(kind, arguments.seconds).items()}
    if arguments.steps:
        results |= waiting(arguments.steps)
    if arguments.json:
        print(json.dumps(results))
    else:
        print("\n".join(f"{key:44} {value}" for key, value in results.items()))


def measure(kind: Kind, seconds: float) -> dict:
    """Everything about one kind of image."""
    list(itertools.islice(kind.draw(seed=1), kind.warm_up))
    start = time.process_time()
    documents = list(kind.draw())
    results = {"draw_cpu_microseconds": cpu_microseconds(start, len(documents))}
    start = time.process_time()
    for document in documents:
        assert image_problem(document.images[0], kind.images.max_pixels) is None
    results["check_cpu_microseconds"] = cpu_microseconds(start, len(documents))
    with tempfile.TemporaryDirectory() as folder:
        store, config = stored(kind, documents, pathlib.Path(folder))
        results |= counted(kind, store, config)
        rates = {workers: images_per_second(store, config, workers, seconds) for workers in WORKERS}
    results |= {f"images_per_second/{workers}_threads": round(rate) for workers, rate in rates.items()}
    results |= {f"{workers}_threads_over_0": round(rates[workers] / rates[0], 2) for workers in WORKERS[1:]}
    return results


def stored(kind: Kind, documents: list[Document], folder: pathlib.Path) -> tuple[TokenStore, DataConfig]:
    """A store of the documents, all of them for training."""
    source = SourceConfig("images", documents=lambda: documents)
    tokenizer = TokenizerConfig(byte_level_only=True)
    config = DataConfig((source,), kind.sequence_length, tokenizer, held_out_fraction=0.0, images=kind.images)
    return open_store(config, folder), config


def counted(kind: Kind, store: TokenStore, config: DataConfig) -> dict:
    """Bytes a patch and a token, and how many times as many a patch is."""
    rows = TrainRows(store, config, microbatch_rows=MICROBATCH_ROWS)
    counts = rows.image_bytes(kind.patch)["images"]
    return {
        "stored_bytes_per_image": round(counts.stored_per_image),
        "stored_bytes_per_patch": round(counts.stored_per_patch, 1),
        "stored_patch_over_token": round(counts.stored_per_patch / counts.stored_per_token, 1),
        "fed_bytes_per_patch": round(counts.fed_per_patch),
        "fed_patch_over_token": round(counts.fed_per_patch / FED_BYTES_PER_TOKEN, 1),
        "fed_pixel_bytes_per_text_token": round(counts.fed_per_token),
        "image_slots_filled": round(counts.slots_filled, 3),
    }


def images_per_second(store: TokenStore, config: DataConfig, workers: int, seconds: float) -> float:
    """Images decoded into batches, of which there is one at least, by wall clock; nothing else is done with them."""
    config = dataclasses.replace(config, images=dataclasses.replace(config.images, workers=workers))
    rows = TrainRows(store, config, microbatch_rows=MICROBATCH_ROWS)
    next(rows)
    images, start, elapsed = 0, time.perf_counter(), 0.0
    while elapsed < seconds:
        batch = next(rows)
        images += int(batch.image_valid.any(axis=tuple(range(2, batch.image_valid.ndim))).sum())
        elapsed = time.perf_counter() - start
    return images / elapsed


def waiting(steps: int) -> dict:
    """The share of the vision quickstart's steps in which the device waits for data, with each number of threads.

    `steps` are timed after a few more. The step's own time stands beside each share.
    """
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for workers in WORKERS:
            rows = steps_of_quickstart(pathlib.Path(folder), workers, steps)
            seconds = np.array([row["step_seconds"] for row in rows])
            waited = seconds * [row["data_wait_fraction"] for row in rows]
            results[f"train/{workers}_threads_data_wait_fraction"] = round(waited.sum() / seconds.sum(), 4)
            results[f"train/{workers}_threads_step_milliseconds"] = round(float(np.median(seconds)) * 1e3, 2)
    return results


def steps_of_quickstart(folder: pathlib.Path, workers: int, steps: int) -> list[dict]:
    """The metrics of so many steps of the quickstart from fresh parameters, compilation and the first few aside."""
    changes = {
        "INIT_FROM": None,
        "NUM_IMAGES": TRAINED_IMAGES,
        "IMAGE_WORKERS": workers,
        "TRAIN_STEPS": WARM_UP_STEPS + steps,
        "EVALUATE_EVERY": None,
        "CHECKPOINT_EVERY": WARM_UP_STEPS + steps,
        "data.DataConfig.held_out_tokens": 1000,
        "data.DataConfig.store": str(folder / "data"),
    }
    run, text = build_run([TRAINED], [f"{name}={value!r}" for name, value in changes.items()])
    workdir = folder / f"{workers}_threads"
    train(run, workdir, config_text=text, show_progress=False)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "step_seconds" in row][WARM_UP_STEPS:]


def free_cores() -> float:
    """What two threads that sort arrays do in a second over what one does."""
    values = np.random.default_rng(0).random(1_000_000)

    def rate(threads: int) -> float:
        running = [threading.Thread(target=lambda: [np.sort(values) for _ in range(10)]) for _ in range(threads)]
        start = time.perf_counter()
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        return threads / (time.perf_counter() - start)

    return round(rate(2) / rate(1), 2)


def cpu_microseconds(start: float, count: int) -> float:
    """CPU time of this process since `start`, by image."""
    return round((time.process_time() - start) / count * 1e6, 1)


if __name__ == "__main__":
    main()
