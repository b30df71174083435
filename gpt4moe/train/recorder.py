"""Turns the metrics of each step into a row, one step late, so that the device never waits for the host."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tqdm
from etils import epath
from jax.sharding import Mesh

from gpt4moe.accounting import flops, pipeline
from gpt4moe.config.run import RunConfig
from gpt4moe.model.moe import MoeOut
from gpt4moe.train import trace
from gpt4moe.train.clock import StepClock, peak_flops_per_second
from gpt4moe.train.metrics import MetricsLog
from gpt4moe.train.step import StepMetrics

TINY = 1e-30


@dataclasses.dataclass(frozen=True)
class StepFacts:
    """What the host knows of a step: its number, tokens seen after it, its own tokens, epochs of each source.

    num_microbatches, tokens_crc: as in `feed.Drawn`.
    """

    step: int
    tokens: int
    batch_tokens: int
    epochs: Mapping[str, float]
    num_microbatches: int = 1
    tokens_crc: int = 0


class Recorder:
    """Holds the metrics of the last dispatched step until the next one is dispatched or `flush` is called.

    `skipped_in_row` is that of the newest step whose metrics have been fetched.
    """

    def __init__(
        self,
        run: RunConfig,
        workdir: epath.Path,
        source_names: Sequence[str],
        log: MetricsLog,
        bar: tqdm.tqdm,
        mesh: Mesh,
    ) -> None:
        self.skipped_in_row = 0
        self.clock = StepClock()
        self._workdir = workdir
        self._sources = source_names
        self._log = log
        self._bar = bar
        self._log_every = run.train.log_every
        self._flops_per_token = flops.train_flops_per_token(run.model)
        self._moe = run.model.moe
        self._peak = peak_flops_per_second(list(mesh.devices.flat), run.model.compute_dtype)
        self._bubble = _bubble(run, dict(mesh.shape))
        self._pending: tuple[StepMetrics, StepFacts] | None = None

    def record(self, metrics: StepMetrics, facts: StepFacts) -> None:
        """Takes the metrics of a step that has just been dispatched, and writes the row of the one before."""
        self.flush()
        self._pending = (metrics, facts)

    def is_idle(self) -> bool:
        """Whether the devices are through with every step that was dispatched."""
        return self._pending is None or self._pending[0].grad_norm.is_ready()

    def flush(self) -> None:
        """Waits for the step whose metrics are held and writes its row."""
        if self._pending is None:
            return
        device_metrics, facts = self._pending
        self._pending = None
        metrics = jax.device_get(device_metrics)
        speed = self._speed(facts)
        self.skipped_in_row = int(metrics.skipped_in_row)
        row = step_row(metrics, facts, self._sources) | self._bubble | speed
        choices = metrics.sums.moe.choices
        if choices is not None:
            of = (facts.num_microbatches, facts.tokens_crc, self._moe)
            trace.write(self._workdir, facts.step, choices.expert_ids_BTK, *of)
        if facts.step % self._log_every == 0:
            self._log.write(row)
        self._bar.set_postfix_str(_summary(row), refresh=False)
        self._bar.update(facts.batch_tokens)

    def _speed(self, facts: StepFacts) -> dict[str, float]:
        seconds = self.clock.lap()
        rate = facts.batch_tokens / seconds
        return {
            "tokens_per_second": rate,
            "model_flops_utilization": rate * self._flops_per_token / self._peak,
            "step_seconds": seconds,
            "data_wait_fraction": self.clock.data_wait_fraction,
            "goodput": self.clock.goodput(),
        }


def _bubble(run: RunConfig, sizes: Mapping[str, int]) -> dict[str, float]:
    """What the formula says of the idle share, beside which a step's row has what was counted."""
    if sizes["stage"] == 1:
        return {}
    chunks = run.mesh.chunk_sizes(run.model.num_moe_layers, sizes["stage"])
    idle = pipeline.uneven_idle_fraction(chunks, sizes["stage"], run.stage_microbatches(sizes))
    return {"pipeline/idle_formula": float(idle)}


def step_row(metrics: StepMetrics, facts: StepFacts, source_names: Sequence[str]) -> dict[str, Any]:
    """The row of one step: all of `metrics.jsonl` but its speed. Loads, router figures and gates: one entry a layer.

    `loss` is the mean cross-entropy in nats per unit of target weight, without auxiliary terms; the auxiliary losses
    are means over layers, without their weights. A source without a target in the batch has no `loss/<source>`.
    """
    sums, counts = metrics.sums, metrics.counts
    weights = zip(source_names, sums.source_cross_entropy, sums.source_weight, strict=True)
    row = {"step": facts.step, "tokens": facts.tokens}
    row |= {f"epoch/{name}": epochs for name, epochs in facts.epochs.items()}
    row["loss"] = float(sums.cross_entropy / max(counts.target_weight, 1))
    row |= {f"loss/{name}": float(total / weight) for name, total, weight in weights if weight > 0}
    if sums.idle_slots is not None:
        row["pipeline/idle_fraction"] = float(sums.idle_slots[0] / sums.idle_slots[1])
    if sums.spelling is not None:
        row["spelling_loss"] = float(sums.spelling / max(counts.target_weight, 1))
    row["load_balance_loss"] = float(np.mean(sums.load_balance))
    row["router_z_loss"] = float(np.mean(sums.moe.router_z) / max(counts.tokens, 1))
    row["grad_norm"] = float(metrics.grad_norm)
    row["learning_rate"] = float(metrics.learning_rate)
    row["batch_tokens"] = facts.batch_tokens
    row["skipped_steps"] = int(metrics.skipped_steps)
    row["moe/expert_grad_norm"] = metrics.expert_grad_norm_LE.tolist()
    if metrics.gates_2L is not None:
        row |= zip(("vision/attention_gate", "vision/feed_forward_gate"), metrics.gates_2L.tolist(), strict=True)
    return row | _routing(sums.moe, float(counts.tokens))


def _routing(moe: MoeOut, tokens: float) -> dict[str, Any]:
    """Load as fractions [L][E], and per layer: busiest over mean, entropy of the load over ln E, drops, router."""
    assignments_L1 = np.maximum(moe.load_E.sum(-1, keepdims=True), 1)
    load_LE = moe.load_E / assignments_L1
    num_experts = load_LE.shape[-1]
    entropy_L = -(load_LE * np.log(np.maximum(load_LE, TINY))).sum(-1) / max(np.log(num_experts), TINY)
    return {
        "moe/load": load_LE.tolist(),
        "moe/load_max_over_mean": (load_LE.max(-1) * num_experts).tolist(),
        "moe/load_entropy": entropy_L.tolist(),
        "moe/dropped_fraction": (moe.dropped / assignments_L1[:, 0]).tolist(),
        "moe/router_entropy": (moe.router_entropy / max(tokens, 1)).tolist(),
        "moe/router_largest_logit": (moe.largest_logit / max(tokens, 1)).tolist(),
    }


def _summary(row: Mapping[str, Any]) -> str:
    """The end of the progress bar: what a person watches."""
    return (
        f"step {row['step']} loss {row['loss']:.3f} {row['tokens_per_second']:,.0f} tok/s "
        f"MFU {row['model_flops_utilization']:.1%} load {max(row['moe/load_max_over_mean']):.2f}x"
    )
