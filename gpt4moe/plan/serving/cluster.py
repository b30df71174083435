"""Discrete-event simulation of a serving cluster: requests queue, are batched, go round the stages, end.

In: a server, a policy, requests in order of arrival. Out: `SimulatedService`: latencies, throughput, dollars, what idle
replicas lent to training. Every random draw comes from the one generator that is given: the same seed, the same result.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from gpt4moe.config.check import require, require_count, require_not_negative
from gpt4moe.plan.serving.cost import SECONDS_PER_HOUR, dollars_per_1k_tokens
from gpt4moe.plan.serving.layout import max_sequences
from gpt4moe.plan.serving.lending import Lender
from gpt4moe.plan.serving.replica import Lane, Policy, Replica, Step
from gpt4moe.plan.serving.rooflines import Server, prefill_step
from gpt4moe.plan.serving.routing_draws import RoutingDraws
from gpt4moe.plan.serving.traffic import Request

PERCENTILES = (50, 90, 99)
ARRIVE, BACK, OPEN, CLOSE = range(4)


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Equal replicas of a server and how they take requests in.

    prefill_replicas: servers that read prompts where the policy says `elsewhere`; 0: prompts come already read.
    expert_weights: how much the router likes each expert, relative to the others; sample_routing: whether steps take as
    long as sampled routing says, rather than expected routing.
    """

    server: Server
    policy: Policy = dataclasses.field(default_factory=Policy)
    replicas: int = 1
    prefill_replicas: int = 0
    sample_routing: bool = False
    expert_weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        require_count("replicas", self.replicas)
        require_count("prefill_replicas", self.prefill_replicas, least=0)

    @property
    def chips(self) -> int:
        """Chips of all replicas, those that read prompts too."""
        return (self.replicas + self.prefill_replicas) * self.server.layout.chips


@dataclasses.dataclass(frozen=True)
class SimulatedService:
    """What a simulation found. Percentiles are dicts, 50, 90, 99: seconds.

    refused: requests longer than the whole cache. waiting_tokens_per_second: of the time in which requests waited,
    which is full load. utilization: share of the stages' time in which they worked, of replicas not lent.
    mean_wait_seconds: until a request's prompt, or its first step, is begun. lent_chip_hours: to training, of
    `elapsed_hours`; in hours of the day that is simulated. dollars_per_1k_tokens: of generated tokens, all chips paid
    but those lent.
    """

    completed: int
    refused: int
    tokens: int
    elapsed_hours: float
    tokens_per_second: float
    waiting_tokens_per_second: float | None
    utilization: float
    mean_wait_seconds: float
    first_token_seconds: dict[int, float]
    token_gap_seconds: dict[int, float]
    dollars_per_1k_tokens: float
    lent_chip_hours: float
    lent_fraction: float


def simulate(
    cluster: Cluster,
    requests: Sequence[Request],
    dollars_per_hour: float,
    generator: Any,
    lender: Lender | None = None,
    progress: Callable[[float], None] | None = None,
) -> SimulatedService:
    """Returns what a cluster does with the requests, from the first's arrival to the last's end.

    Args:
      cluster: replicas and policy.
      requests: in order of arrival.
      dollars_per_hour: of one chip.
      generator: numpy random generator, for sampled routing.
      lender: closes and opens replicas by the hour and lends them to training; None keeps all open.
      progress: told the share of the requests that have come, ten times.
    """
    require(bool(requests), "requests", 0, "must be at least one")
    require_not_negative("price", dollars_per_hour)
    simulation = _Simulation(cluster, requests, generator, lender)
    simulation.run(progress)
    return simulation.report(dollars_per_hour)


class _Simulation:
    """State of one simulation: a heap of events, the queue of requests, the replicas, what was recorded."""

    def __init__(self, cluster: Cluster, requests: Sequence[Request], generator: Any, lender: Lender | None):
        server, policy = cluster.server, cluster.policy
        room = max_sequences(server.shape, server.chip, server.layout, 1, server.efficiency)
        mend = "use more chips or 8-bit weights"
        require(room > 0, "weights", server.layout.weights, "leave no memory for the cache", mend)
        shape, groups = server.shape, server.layout.expert
        draws = RoutingDraws(shape, groups, generator, cluster.expert_weights) if cluster.sample_routing else None
        self.cluster, self.lender, self.record = cluster, lender, _Record()
        self.replicas = [Replica(server, policy, room, draws) for _ in range(cluster.replicas)]
        self.queue: deque[Request] = deque()
        self.events: list[tuple] = []
        self.now, self._order = 0.0, 0
        self._prompt_free = [0.0] * cluster.prefill_replicas
        for request in requests:
            if self.replicas[0].ever_fits(request):
                self._at(self._prompt_read(request), ARRIVE, request)
            else:
                self.record.refused += 1
        for closes, time, index in lender.events() if lender else ():
            self._at(time, CLOSE if closes else OPEN, self.replicas[index])

    def run(self, progress: Callable[[float], None] | None = None) -> None:
        """Works through all events; afterwards every request has ended."""
        come, number = 0, sum(kind == ARRIVE for _, _, kind, _ in self.events)
        while self.events:
            time, _, kind, what = heapq.heappop(self.events)
            self._pass_time(time)
            if kind == ARRIVE:
                self.queue.append(what)
                come += 1
                if progress and 10 * come // number > 10 * (come - 1) // number:
                    progress(come / number)
                if self.events and self.events[0][0] == time and self.events[0][2] == ARRIVE:
                    continue  # requests that come together are batched together
                self._offer()
            elif kind == BACK:
                self._back(*what)
            else:
                self._open_or_close(what, is_open=kind == OPEN)

    def report(self, dollars_per_hour: float) -> SimulatedService:
        record, chips = self.record, self.cluster.server.layout.chips
        scale = SECONDS_PER_HOUR / self.lender.hour_seconds if self.lender else 1.0
        lent = sum(record.lent_seconds(index, self.now) for index in range(len(self.replicas)))
        whole = self.now * len(self.replicas)
        paid_chips = self.cluster.chips - lent / self.now * chips
        return SimulatedService(
            completed=record.completed,
            refused=record.refused,
            tokens=record.tokens,
            elapsed_hours=self.now * scale / SECONDS_PER_HOUR,
            tokens_per_second=record.tokens / self.now,
            waiting_tokens_per_second=record.waiting_tokens / record.waiting_seconds if record.waiting_tokens else None,
            utilization=sum(item.busy_seconds for item in self.replicas)
            / ((whole - lent) * self.cluster.server.layout.stage),
            mean_wait_seconds=sum(record.waits) / len(record.waits),
            first_token_seconds=percentiles(record.first_token_seconds),
            token_gap_seconds=percentiles(*zip(*record.gaps, strict=True)) if record.gaps else {},
            dollars_per_1k_tokens=dollars_per_1k_tokens(paid_chips, dollars_per_hour, record.tokens / self.now),
            lent_chip_hours=lent * chips * scale / SECONDS_PER_HOUR,
            lent_fraction=lent / whole,
        )

    def _at(self, time: float, kind: int, what: Any) -> None:
        self._order += 1
        heapq.heappush(self.events, (time, self._order, kind, what))

    def _prompt_read(self, request: Request) -> float:
        """When the request's prompt is read: by the server elsewhere that is free first, as soon as it comes."""
        if not self._prompt_free:
            return request.arrival_seconds
        server = self.cluster.server
        begin = max(request.arrival_seconds, heapq.heappop(self._prompt_free))
        self.record.waits.append(begin - request.arrival_seconds)
        seconds = prefill_step(server, 1, request.prompt_tokens).seconds
        heapq.heappush(self._prompt_free, begin + seconds)
        return begin + seconds * server.layout.stage

    def _pass_time(self, time: float) -> None:
        if self.queue:
            self.record.waiting_seconds += time - self.now
        self.now = time

    def _offer(self) -> None:
        """Starts standing lanes with what waits, the emptiest replica's first."""
        for replica in sorted(self.replicas, key=lambda item: item.kept_tokens):
            for lane in replica.lanes:
                if not self.queue:
                    return
                if not lane.is_moving:
                    self._start(replica, lane)

    def _start(self, replica: Replica, lane: Lane) -> None:
        joined = replica.admit(lane, self.queue)
        if not self._prompt_free:
            self.record.waits += [self.now - request.arrival_seconds for request in joined]
        back = replica.start(lane, self.now)
        if back is not None:
            self._at(back, BACK, (replica, lane))
        elif not replica.is_open and not replica.rows:
            self.record.lent_since.setdefault(self.replicas.index(replica), self.now)

    def _back(self, replica: Replica, lane: Lane) -> None:
        step = replica.finish(lane, self.now)
        self.record.add(step, self.now, is_waiting=bool(self.queue))
        self._start(replica, lane)
        if step.ended and self.queue:
            self._offer()  # the cache has room again, for other lanes too

    def _open_or_close(self, replica: Replica, *, is_open: bool) -> None:
        replica.is_open = is_open
        index = self.replicas.index(replica)
        if is_open:
            self.record.take_back(index, self.now)
            self._offer()
        elif not replica.rows:
            self.record.lent_since.setdefault(index, self.now)


class _Record:
    """What happened, as it happened."""

    def __init__(self) -> None:
        self.completed = self.refused = self.tokens = self.waiting_tokens = 0
        self.waiting_seconds = 0.0
        self.waits: list[float] = []
        self.first_token_seconds: list[float] = []
        self.gaps: list[tuple[float, int]] = []
        self.lent_since: dict[int, float] = {}
        self._lent: dict[int, float] = {}

    def add(self, step: Step, now: float, *, is_waiting: bool) -> None:
        self.completed += len(step.ended)
        self.tokens += step.tokens
        self.waiting_tokens += step.tokens if is_waiting else 0
        self.first_token_seconds += [now - request.arrival_seconds for request in step.first]
        if step.repeated:
            self.gaps.append((step.gap_seconds, step.repeated))

    def take_back(self, index: int, now: float) -> None:
        if index in self.lent_since:
            self._lent[index] = self._lent.get(index, 0.0) + now - self.lent_since.pop(index)

    def lent_seconds(self, index: int, now: float) -> float:
        """Seconds for which a replica was lent, until now."""
        return self._lent.get(index, 0.0) + (now - self.lent_since[index] if index in self.lent_since else 0.0)


def percentiles(values: Sequence[float], weights: Sequence[float] | None = None) -> dict[int, float]:
    """Returns the 50th, 90th and 99th percentile of values, each counted as often as its weight says."""
    import numpy as np

    if not len(values):
        return {}
    order = np.argsort(values)
    counted = np.cumsum(np.asarray(weights if weights is not None else np.ones(len(values)))[order])
    found = np.searchsorted(counted, [share / 100 * counted[-1] for share in PERCENTILES])
    return {share: float(np.asarray(values)[order][at]) for share, at in zip(PERCENTILES, found, strict=True)}
