"""Counts of what the engine does, and the snapshot that is given of them."""

from __future__ import annotations

import collections

import numpy as np

from gpt4moe.infer.engine.request import FINISH_REASONS, Histogram

TOKEN_BOUNDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
REQUEST_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 60.0)


class Times:
    """Seconds of many events in a few counts."""

    def __init__(self, bounds: tuple[float, ...]):
        self._bounds, self._counts, self._total = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, seconds: float) -> None:
        """One more event."""
        self._counts[int(np.searchsorted(self._bounds, seconds))] += 1
        self._total += seconds

    def snapshot(self) -> Histogram:
        """The counts so far."""
        return Histogram(self._bounds, tuple(self._counts), self._total)


class Record:
    """Everything since the engine began; `counts` by the names of `EngineMetrics`."""

    def __init__(self, num_layers: int, num_experts: int):
        self.counts: collections.Counter[str] = collections.Counter()
        self.finished = dict.fromkeys(FINISH_REASONS, 0)
        self.time_to_first_token, self.inter_token = Times(REQUEST_BOUNDS), Times(TOKEN_BOUNDS)
        self.queue_wait, self.request_time = Times(REQUEST_BOUNDS), Times(REQUEST_BOUNDS)
        self.expert_load_LE = np.zeros((num_layers, num_experts), np.int64)
        self._distinct_L = np.zeros(num_layers, np.int64)
        self.last_distinct_L = np.zeros(num_layers, np.int64)

    def add_prefill(self, load_LE: np.ndarray) -> None:
        """A chunk of prompts was read."""
        self.counts["prefill_steps"] += 1
        self.expert_load_LE += load_LE

    def add_decode(self, load_LE: np.ndarray) -> None:
        """A step of all rows was made."""
        self.counts["decode_steps"] += 1
        self.expert_load_LE += load_LE
        self.last_distinct_L = np.sum(load_LE > 0, axis=1)
        self._distinct_L += self.last_distinct_L

    def distinct_experts_L(self) -> np.ndarray:
        """Mean number of experts that a decode step touched in each layer."""
        return self._distinct_L / max(self.counts["decode_steps"], 1)

    def snapshot(self) -> dict:
        """What of `EngineMetrics` is counted here."""
        named = (
            *("submitted", "rejected", "prompt_tokens", "cached_prompt_tokens", "new_tokens"),
            *("prefill_steps", "decode_steps", "proposed_tokens", "accepted_tokens"),
        )
        times = ("time_to_first_token", "inter_token", "queue_wait")
        return {
            **{name: self.counts[name] for name in named},
            **{name: getattr(self, name).snapshot() for name in times},
            "finished": dict(self.finished),
            "expert_load_LE": self.expert_load_LE.copy(),
            "distinct_experts_L": self.distinct_experts_L(),
            "last_distinct_experts_L": self.last_distinct_L.copy(),
        }
