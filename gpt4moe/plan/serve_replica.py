"""One replica of a simulated serving cluster: lanes of rows that go round its pipeline stages, and its cache.

In: requests and the time of each call. Out: when each step of a lane ends, and what it brought. A replica has a lane
for each stage, so that every stage has work; a stage works on one lane at a time, in the order in which they come.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
from collections import deque

from gpt4moe.config.check import require, require_count
from gpt4moe.plan.rooflines import Server, StageTime, decode_step, prefill_step
from gpt4moe.plan.routing_draws import RoutingDraws
from gpt4moe.plan.serve_traffic import Request

BATCHINGS = ("continuous", "static")
PREFILLS = ("mixed", "elsewhere")


@dataclasses.dataclass(frozen=True)
class Policy:
    """How a replica takes requests in.

    rows: of a lane at most. batching: `continuous` fills a row as soon as it ends, `static` waits for the lane's
    longest and computes ended rows along. prefill: prompts `mixed` into decode steps, or read `elsewhere`.
    prompt_tokens_per_step: of prompts that join one mixed step together; a longer one joins alone. Steps of many prompts
    hold up the stages for all other lanes.
    """

    rows: int = 256
    batching: str = "continuous"
    prefill: str = "mixed"
    prompt_tokens_per_step: int = 2048

    def __post_init__(self) -> None:
        require_count("rows", self.rows)
        require_count("prompt_tokens_per_step", self.prompt_tokens_per_step)
        require(self.batching in BATCHINGS, "batching", self.batching, f"must be in {BATCHINGS}")
        require(self.prefill in PREFILLS, "prefill", self.prefill, f"must be in {PREFILLS}")


@dataclasses.dataclass(frozen=True)
class Step:
    """What a lane's step brought: tokens, requests that got their first one and that ended, seconds between tokens.

    repeated: rows that already had a token, for which `gap_seconds` passed since the one before.
    """

    tokens: int
    first: tuple[Request, ...]
    ended: tuple[Request, ...]
    repeated: int
    gap_seconds: float


class Lane:
    """Rows that go through the stages together: one token each time round."""

    def __init__(self) -> None:
        self.is_moving = False
        self.slots = 0  # rows that are computed: with static batching those that ended too
        self.steps = 0
        self.cached_tokens = 0
        self.ends: list[tuple[int, int, Request]] = []  # heap: the step after which a row has ended, a number, the row
        self.joined: tuple[Request, ...] = ()
        self.last_end_seconds = 0.0


class Replica:
    """A server's lanes, the times at which its stages are free, and the tokens for which its cache keeps room."""

    def __init__(self, server: Server, policy: Policy, cache_tokens: float, draws: RoutingDraws | None = None):
        """cache_tokens: room of the whole replica; draws: samples of routing, None for the expected one."""
        self.server, self.policy, self.cache_tokens, self.draws = server, policy, cache_tokens, draws
        self.lanes = [Lane() for _ in range(server.layout.stage)]
        self.is_open = True
        self.kept_tokens = 0
        self.busy_seconds = 0.0
        self._free = [0.0] * server.layout.stage
        self._count = 0
        self._prefill = functools.cache(lambda tokens: prefill_step(server, 1, tokens))
        self._layers = max(1, round(server.shape.num_layers / server.layout.stage))

    @property
    def rows(self) -> int:
        """Rows that have not ended."""
        return sum(len(lane.ends) for lane in self.lanes)

    def admit(self, lane: Lane, waiting: deque[Request]) -> None:
        """Moves requests from the head of the queue into a lane that stands, as far as rows and cache have room."""
        joined: list[Request] = []
        may = self.is_open and not lane.is_moving and (self.policy.batching == "continuous" or not lane.ends)
        while may and waiting and self._has_room(lane, joined, waiting[0]):
            request = waiting.popleft()
            self.kept_tokens += request.cache_tokens
            joined.append(request)
        lane.joined = tuple(joined)

    def start(self, lane: Lane, now: float) -> float | None:
        """Sends a lane with rows once round the stages and returns when it is back; None where it has no rows."""
        decoding = lane.slots if self.policy.batching == "static" and lane.ends else len(lane.ends)
        for request in lane.joined:
            self._count += 1
            heapq.heappush(lane.ends, (lane.steps + request.new_tokens, self._count, request))
            lane.cached_tokens += request.prompt_tokens
        if not lane.ends:
            return None
        lane.slots = decoding + len(lane.joined)
        lane.is_moving = True
        prompts = lane.joined if self.policy.prefill == "mixed" else ()
        back = now
        for stage, seconds in enumerate(self._stage_seconds(lane, lane.slots - len(prompts), prompts)):
            begin = max(back, self._free[stage])
            back = self._free[stage] = begin + seconds
            self.busy_seconds += seconds
        return back

    def finish(self, lane: Lane, now: float) -> Step:
        """Takes a lane that is back: every row has one more token, some have their last."""
        lane.is_moving = False
        lane.steps += 1
        tokens, first = len(lane.ends), lane.joined
        lane.cached_tokens += tokens
        ended = []
        while lane.ends and lane.ends[0][0] <= lane.steps:
            request = heapq.heappop(lane.ends)[2]
            ended.append(request)
            lane.cached_tokens -= request.cache_tokens
            self.kept_tokens -= request.cache_tokens
        gap, lane.last_end_seconds, lane.joined = now - lane.last_end_seconds, now, ()
        return Step(tokens, first, tuple(ended), tokens - len(first), gap)

    def ever_fits(self, request: Request) -> bool:
        """Whether an empty cache has room for the request."""
        return request.cache_tokens <= self.cache_tokens

    def _has_room(self, lane: Lane, joined: list[Request], request: Request) -> bool:
        """Whether lane, cache and step have room for one more request beside those that join."""
        policy, prompts = self.policy, request.prompt_tokens + sum(item.prompt_tokens for item in joined)
        is_mixed = policy.prefill == "mixed" and policy.batching == "continuous"
        is_short = not joined or not is_mixed or prompts <= policy.prompt_tokens_per_step
        has_row = len(lane.ends) + len(joined) < policy.rows
        return has_row and is_short and self.kept_tokens + request.cache_tokens <= self.cache_tokens

    def _stage_seconds(self, lane: Lane, decoding: int, prompts: tuple[Request, ...]) -> list[float]:
        """Seconds of the lane's step on every stage: rows that decode, and prompts that join them."""
        reading = [self._prefill(request.prompt_tokens) for request in prompts]
        cached = lane.cached_tokens - sum(request.prompt_tokens for request in prompts)
        stages = self.server.layout.stage
        if self.draws is None:
            return [self._seconds(decoding, cached, reading)] * stages
        return [self._seconds(decoding, cached, reading) for _ in range(stages)]

    def _seconds(self, decoding: int, cached_tokens: int, reading: list[StageTime]) -> float:
        """One stage's seconds; weights are read once for rows that decode and for prompts."""
        steps = [*reading, *([self._decode(decoding, cached_tokens)] if decoding else [])]
        weights = max(step.weights_seconds for step in steps)
        return weights + sum(step.seconds - step.weights_seconds for step in steps)

    def _decode(self, rows: int, cached_tokens: int) -> StageTime:
        if self.draws is None:
            return decode_step(self.server, rows, cached_tokens / rows)
        distinct, imbalance = self.draws.sample(rows, self._layers)
        return decode_step(self.server, rows, cached_tokens / rows, distinct=distinct, imbalance=imbalance)
