"""Speed and exactness of the data pipeline, from tokens on disk to a batch on the host.

    python benchmarks/data.py [--tokens 100000000] [--json]

Measures: seconds to plan the packing, fill, tokens a second through the whole pipeline in one process, memory, time to
restore at several positions, global batches that differ when 8 hosts become 2 and then 4, and how often every single
token is delivered under epoch caps of 2 and 4. The tokens are synthetic (log-normal document lengths).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import re
import statistics
import tempfile
import time

import numpy as np

from gpt4moe.config.data import DataConfig, SourceConfig
from gpt4moe.config.tokenizer import TokenizerConfig
from gpt4moe.data.encode import SPLITS, token_dtype
from gpt4moe.data.pipeline import TrainRows, row_plan
from gpt4moe.data.store import REPORT_FILE, TOKENIZER_FILE, PrepareReport, SourceReport, TokenStore
from gpt4moe.data.tokenizer import byte_tokenizer

SEQUENCE_LENGTH = 2048
MICROBATCH_ROWS = 8
RESTORE_TOKENS = (10**6, 10**9, 10**12)
MEAN_DOCUMENT, SIGMA = 365, 1.2  # median tokens and log-normal spread, as of English web text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000_000, help="tokens of the synthetic store")
    parser.add_argument("--batches", type=int, default=2000, help="microbatches to time")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        results = measure_speed(root / "large", arguments.tokens, arguments.batches)
        results |= measure_exactness(root / "small")
    if arguments.json:
        print(json.dumps(results))
    else:
        print("\n".join(f"{name:44} {value}" for name, value in results.items()))


def measure_speed(folder: pathlib.Path, num_tokens: int, num_batches: int) -> dict:
    """Planning, throughput, memory and restoring with a store of `num_tokens`."""
    rng = np.random.default_rng(0)
    sizes = {"text": num_tokens * 6 // 10, "code": num_tokens * 4 // 10}
    lengths = {name: document_lengths(size, rng) for name, size in sizes.items()}
    store = write_store(folder, lengths, vocab_size=32_768, tokens_of=lambda count: rng.integers(272, 32_768, count))
    config = data_config({"text": None, "code": None}, SEQUENCE_LENGTH)
    results = {"planned_tokens_per_cpu_second": round(num_tokens / cpu_seconds(lambda: plan_all(store, config)))}
    results["open_seconds"] = round(cpu_seconds(lambda: TrainRows(store, config, microbatch_rows=MICROBATCH_ROWS)), 4)
    rows = TrainRows(store, config, microbatch_rows=MICROBATCH_ROWS)
    packing = rows.packing()
    results |= {f"fill/{name}": round(packing[name]["fill"], 5) for name in packing}
    next(rows)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(num_batches):
        next(rows)
        rows.ledger()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    timed = num_batches * MICROBATCH_ROWS * SEQUENCE_LENGTH
    results |= {"tokens_per_second": round(timed / wall), "tokens_per_cpu_second": round(timed / cpu)}
    seconds = {tokens: restore(rows, tokens) for tokens in RESTORE_TOKENS}
    results |= memory() | {f"restore_seconds/{tokens:.0e}": second for tokens, second in seconds.items()}
    results["restore_1e9_over_1e6"] = round(seconds[10**9] / seconds[10**6], 2)
    return results


def plan_all(store: TokenStore, config: DataConfig) -> None:
    """Makes and saves the packing plan of every source."""
    for name in store.source_names:
        row_plan(store, config, name, "train")


def restore(rows: TrainRows, tokens: int) -> float:
    """Median CPU seconds of set_state and the next batch at a position of `tokens`."""
    position = tokens // SEQUENCE_LENGTH // MICROBATCH_ROWS * MICROBATCH_ROWS
    seconds = []
    for shift in range(21):
        state = rows.get_state() | {"next_row": position + shift * MICROBATCH_ROWS}
        seconds.append(cpu_seconds(lambda state=state: (rows.set_state(state), next(rows))))
    return round(statistics.median(seconds), 6)


def measure_exactness(folder: pathlib.Path) -> dict:
    """Batches that differ over a change of hosts, and deliveries of every token, with tokens that are all different."""
    rng = np.random.default_rng(1)
    caps = {"text": 2.0, "code": 4.0}
    lengths = {"text": document_lengths(300_000, rng), "code": document_lengths(200_000, rng)}
    store = write_store(folder, lengths, vocab_size=2**20, tokens_of=lambda count: np.arange(count) + 1)
    config = data_config(caps, 256)
    batches = list(TrainRows(store, config, microbatch_rows=MICROBATCH_ROWS))
    delivered = {name: np.zeros(store.num_tokens(name, "train") + 2, np.int64) for name in caps}
    for batch in batches:
        for index, name in enumerate(caps):
            chosen = (batch.loss_weights > 0) & (batch.source_ids == index)
            delivered[name] += np.bincount(batch.targets[chosen], minlength=len(delivered[name]))
    results = {"global_batches": len(batches), "differing_global_batches": differing(store, config, batches)}
    for name in caps:
        times = delivered[name][2:]  # the first token of a stream is no target
        results[f"deliveries/{name}"] = f"every token {times.min()}..{times.max()} times"
    return results


def differing(store: TokenStore, config: DataConfig, batches: list) -> int:
    """Global batches that 8 hosts, then 2, then 4 put together otherwise than one host."""
    state, count, first = None, 0, 0
    for num_hosts, last in ((8, len(batches) // 3), (2, 2 * len(batches) // 3), (4, len(batches))):
        hosts = [
            TrainRows(store, config, microbatch_rows=MICROBATCH_ROWS, num_hosts=num_hosts, host=host)
            for host in range(num_hosts)
        ]
        for host in hosts if state else ():
            host.set_state(state)
        for index in range(first, last):
            parts = [next(host) for host in hosts]
            fields = [field for field in dataclasses.fields(parts[0]) if getattr(parts[0], field.name) is not None]
            for field in fields:
                joined = np.concatenate([getattr(part, field.name) for part in parts])
                if not np.array_equal(joined, getattr(batches[index], field.name)):
                    count += 1
                    break
        states = [json.dumps(host.get_state(), sort_keys=True) for host in hosts]
        assert len(set(states)) == 1, "hosts disagree about the state"
        state, first = json.loads(states[0]), last
    return count


def document_lengths(num_tokens: int, rng: np.random.Generator) -> np.ndarray:
    """Log-normal document lengths that sum to `num_tokens`."""
    mean = MEAN_DOCUMENT * np.exp(SIGMA**2 / 2)
    lengths = rng.lognormal(np.log(MEAN_DOCUMENT), SIGMA, int(num_tokens / mean * 1.2) + 10).astype(np.int64) + 2
    total = np.cumsum(lengths)
    kept = int(np.searchsorted(total, num_tokens))
    return np.append(lengths[:kept], num_tokens - (total[kept - 1] if kept else 0))


def write_store(folder: pathlib.Path, lengths: dict, *, vocab_size: int, tokens_of) -> TokenStore:
    """A store with the given document lengths and tokens, without preparing text."""
    folder.mkdir()
    (folder / TOKENIZER_FILE).write_text(byte_tokenizer().serialized)
    for name, documents in lengths.items():
        for split in SPLITS:
            kept = documents if split == "train" else documents[:0]
            tokens_of(int(kept.sum()) + 1).astype(token_dtype(vocab_size)).tofile(folder / f"{name}.{split}.tokens")
            np.save(folder / f"{name}.{split}.offsets.npy", np.concatenate([[0], np.cumsum(kept)]))
            np.save(folder / f"{name}.{split}.bytes.npy", kept)
    sources = [
        SourceReport(name, len(docs), int(docs.sum()), 0, 0, 0, 0, 0, (), 0, name) for name, docs in lengths.items()
    ]
    report = PrepareReport("", "synthetic", vocab_size, tuple(sources))
    (folder / REPORT_FILE).write_text(json.dumps(dataclasses.asdict(report)))
    return TokenStore(folder)


def data_config(caps: dict[str, float | None], sequence_length: int) -> DataConfig:
    """Sources with the given epoch caps; their paths are never read."""
    sources = tuple(SourceConfig(name, paths=("synthetic.txt",), max_epochs=cap) for name, cap in caps.items())
    return DataConfig(sources, sequence_length, tokenizer=TokenizerConfig(byte_level_only=True))


def memory() -> dict[str, int]:
    """Resident memory of this process: all of it, and without the pages of memory-mapped files."""
    status = pathlib.Path("/proc/self/status").read_text()
    return {
        "resident_megabytes": int(re.search(r"VmRSS:\s+(\d+)", status)[1]) // 1024,
        "anonymous_megabytes": int(re.search(r"RssAnon:\s+(\d+)", status)[1]) // 1024,
    }


def cpu_seconds(call) -> float:
    """CPU seconds of this process that `call` takes."""
    start = time.process_time()
    call()
    return time.process_time() - start


if __name__ == "__main__":
    main()
