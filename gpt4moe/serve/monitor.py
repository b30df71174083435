"""GET /metrics: the engine's counts and the answers given, in the text format of Prometheus; GET /healthz."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gpt4moe.infer.engine.engine import Engine
from gpt4moe.infer.engine.request import EngineMetrics, Histogram
from gpt4moe.serve.errors import DRAIN_RETRY_SECONDS
from gpt4moe.serve.responses import Health
from gpt4moe.serve.service import Service

PREFIX = "gpt4moe_"
KNOWN_PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/models")
GAUGES = {
    "queued": "continuations that wait for a slot",
    "running": "continuations that are made now",
    "slots": "continuations that can be made at once",
    "num_pages": "pages of keys and values",
    "pages_used": "pages that running continuations hold",
    "pages_cached": "pages that ended ones left for prompts that begin alike",
}
COUNTERS = {
    "submitted": "requests taken",
    "rejected": "requests refused because the queue was full",
    "prompt_tokens": "tokens of prompts",
    "cached_prompt_tokens": "those of them whose keys and values were there already",
    "new_tokens": "tokens drawn",
    "prefill_steps": "steps that read a chunk of prompts",
    "decode_steps": "steps that drew a token for all rows",
    "preemptions": "continuations that had to give way for want of pages",
    "proposed_tokens": "tokens proposed by speculation",
    "accepted_tokens": "those of them that were accepted",
    "late_compilations": "programs compiled while serving; more than 0 is a fault",
}
HISTOGRAMS = {
    "time_to_first_token": "seconds from submission to the first token",
    "inter_token": "seconds between two tokens of a continuation",
    "queue_wait": "seconds from submission to a slot",
}


class Traffic:
    """Counts answers by path and status, in a registry of this server."""

    def __init__(self, registry: prometheus_client.CollectorRegistry):
        self._answers = prometheus_client.Counter(
            f"{PREFIX}http_responses", "answers by path and status", ["path", "status"], registry=registry
        )

    def count(self, path: str, status: int) -> None:
        """One more; paths that nobody serves are counted together."""
        self._answers.labels(path if path in KNOWN_PATHS else "other", str(status)).inc()


class EngineCollector(Collector):
    """Reads the engine's own counts whenever somebody asks."""

    def __init__(self, engine: Engine):
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """One family a count."""
        metrics = self._engine.metrics()
        for name, said in GAUGES.items():
            yield GaugeMetricFamily(PREFIX + name, said, value=getattr(metrics, name))
        for name, said in COUNTERS.items():
            yield CounterMetricFamily(PREFIX + name, said, value=getattr(metrics, name))
        for name, said in HISTOGRAMS.items():
            yield _histogram(f"{PREFIX}{name}_seconds", said, getattr(metrics, name))
        finished = CounterMetricFamily(f"{PREFIX}finished", "continuations by how they ended", labels=["reason"])
        for reason, count in metrics.finished.items():
            finished.add_metric([reason], count)
        yield finished
        yield from _experts(metrics)


def _experts(metrics: EngineMetrics) -> Iterator[Metric]:
    load = CounterMetricFamily(f"{PREFIX}expert_tokens", "tokens that each expert got", labels=["layer", "expert"])
    for layer, load_E in enumerate(metrics.expert_load_LE.tolist()):
        for expert, tokens in enumerate(load_E):
            load.add_metric([str(layer), str(expert)], tokens)
    yield load
    for name, said, values in (
        ("distinct_experts_mean", "experts that a decode step touched, mean of all steps", metrics.distinct_experts_L),
        ("distinct_experts", "experts that the last decode step touched", metrics.last_distinct_experts_L),
    ):
        family = GaugeMetricFamily(PREFIX + name, said, labels=["layer"])
        for layer, value in enumerate(values.tolist()):
            family.add_metric([str(layer)], value)
        yield family


def _histogram(name: str, said: str, histogram: Histogram) -> Metric:
    bounds = [*map(str, histogram.bounds), "+Inf"]
    buckets = list(zip(bounds, itertools.accumulate(histogram.counts), strict=True))
    return HistogramMetricFamily(name, said, buckets=buckets, sum_value=histogram.total_seconds)


def show_metrics(registry: prometheus_client.CollectorRegistry) -> Response:
    """GET /metrics."""
    return Response(
        prometheus_client.generate_latest(registry), headers={"Content-Type": prometheus_client.CONTENT_TYPE_LATEST}
    )


async def show_health(request: Request, service: Service) -> Response:
    """GET /healthz: 200 while requests are taken, 503 once the server is ending."""
    if service.draining or not service.engine.accepting:
        return JSONResponse(Health(status="draining").model_dump(), 503, {"Retry-After": str(DRAIN_RETRY_SECONDS)})
    return JSONResponse(Health(status="ok").model_dump())
