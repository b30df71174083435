"""One replica of a simulated serving cluster: lanes of rows that go round its pipeline stages, and its cache.

In: requests and the time of each call. Out: when each step of a lane ends, and what it brought. A replica has a lane
for each stage, so that every stage has work; a stage works on one lane at a time, in the order in which they come.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections import deque

from gpt4moe.config.check import require, require_count
from gpt4moe.plan.serving.rooflines import Server, StageTime, decode_step, prefill_step
from gpt4moe.plan.serving.routing_draws import RoutingDraws
from gpt4moe.plan.serving.traffic import Request

BATCHINGS = ("continuous", "static")
PREFILLS = ("mixed", "elsewhere")


@dataclasses.dataclass(frozen=True)
class Policy:
    """How a replica takes requests in.

    rows: of a lane at most. batching: `continuous` fills a row as soon as it ends, `static` waits for the lane's
    longest and computes ended rows along. prefill: prompts `mixed` into decode steps, or read `elsewhere`.
    prompt_tokens_per_step: of prompts that a mixed step reads, which cuts long ones into chunks (Sarathi, Agrawal et
    al. 2023): a step much longer than others would hold up every stage behind it. A static batch reads all at once.
    """

    rows: int = 256
    batching: str = "continuous"
    prefill: str = "mixed"
    prompt_tokens_per_step: int = 512

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
        self.steps = 0
        self.slots = 0  # rows that a static batch began with: those that ended are computed too
        self.unread: deque[tuple[Request, int]] = deque()  # with the tokens of its prompt that are read
        self.ends: list[tuple[int, int, Request]] = []  # heap: the step after which a row has ended, a number, the row
        self.first: tuple[Request, ...] = ()  # rows that get their first token in this step
        self.cached_tokens = 0
        self.last_end_seconds = 0.0

    @property
    def rows(self) -> int:
        """Rows that have not ended."""
        return len(self.ends) + len(self.unread)


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
        self._layers = max(1, round(server.shape.num_layers / server.layout.stage))

    @property
    def rows(self) -> int:
        """Rows that have not ended."""
        return sum(lane.rows for lane in self.lanes)

    def admit(self, lane: Lane, waiting: deque[Request]) -> list[Request]:
        """Moves requests from the head of the queue into a lane that stands, as far as rows and cache have room."""
        joined: list[Request] = []
        may = self.is_open and not lane.is_moving and (self.policy.batching == "continuous" or not lane.rows)
        while may and waiting and self._has_room(lane, waiting[0]):
            request = waiting.popleft()
            self.kept_tokens += request.cache_tokens
            lane.unread.append((request, 0))
            joined.append(request)
        return joined

    def start(self, lane: Lane, now: float) -> float | None:
        """Sends a lane with rows once round the stages and returns when it is back; None where it has no rows."""
        if not lane.rows:
            return None
        chunks = self._read_prompts(lane)
        fresh = lane.first if chunks else ()  # rows whose prompt ends in this step get their token from it
        decoding = len(lane.ends) - len(fresh)
        cached = lane.cached_tokens - sum(request.prompt_tokens for request in fresh)
        if self.policy.batching == "static":
            lane.slots = len(lane.first) or lane.slots
            decoding = 0 if chunks else lane.slots
        lane.is_moving = True
        back = now
        for stage, seconds in enumerate(self._stage_seconds(decoding, cached, chunks)):
            begin = max(back, self._free[stage])
            back = self._free[stage] = begin + seconds
            self.busy_seconds += seconds
        return back

    def finish(self, lane: Lane, now: float) -> Step:
        """Takes a lane that is back: every row whose prompt is read has one more token, some have their last."""
        lane.is_moving = False
        lane.steps += 1
        tokens, first = len(lane.ends), lane.first
        lane.cached_tokens += tokens
        ended = []
        while lane.ends and lane.ends[0][0] <= lane.steps:
            request = heapq.heappop(lane.ends)[2]
            ended.append(request)
            lane.cached_tokens -= request.cache_tokens
            self.kept_tokens -= request.cache_tokens
        gap, lane.last_end_seconds, lane.first = now - lane.last_end_seconds, now, ()
        return Step(tokens, first, tuple(ended), tokens - len(first), gap)

    def ever_fits(self, request: Request) -> bool:
        """Whether an empty cache has room for the request."""
        return request.cache_tokens <= self.cache_tokens

    def _has_room(self, lane: Lane, request: Request) -> bool:
        """Whether the cache and the lane have room for one more, and the next step for the first of its prompt."""
        unread = sum(item.prompt_tokens - before for item, before in lane.unread)
        has_cache = self.kept_tokens + request.cache_tokens <= self.cache_tokens
        return has_cache and lane.rows < self.policy.rows and unread < self._prompt_room()

    def _prompt_room(self) -> float:
        """Tokens of prompts that one step reads."""
        at_once = self.policy.prefill == "elsewhere" or self.policy.batching == "static"
        return math.inf if at_once else self.policy.prompt_tokens_per_step

    def _read_prompts(self, lane: Lane) -> list[tuple[int, int]]:
        """Reads of the lane's prompts what this step may; returns the chunks, tokens before each and tokens of each."""
        room, chunks, read = self._prompt_room(), [], []
        while lane.unread and room:
            request, before = lane.unread.popleft()
            tokens = min(room, request.prompt_tokens - before)
            room -= tokens
            chunks.append((before, tokens))
            if before + tokens < request.prompt_tokens:
                lane.unread.appendleft((request, before + tokens))
            else:
                read.append(request)
        for request in read:
            self._count += 1
            heapq.heappush(lane.ends, (lane.steps + request.new_tokens, self._count, request))
            lane.cached_tokens += request.prompt_tokens
        lane.first = tuple(read)
        return [] if self.policy.prefill == "elsewhere" else chunks

    def _stage_seconds(self, decoding: int, cached_tokens: int, chunks: list[tuple[int, int]]) -> list[float]:
        """Seconds of a lane's step on every stage: rows that decode, and chunks of prompts beside them."""
        reading = [prefill_step(self.server, 1, tokens, before) for before, tokens in chunks]
        stages = self.server.layout.stage
        if not decoding:
            return [_together(reading)] * stages
        context = cached_tokens / decoding
        if self.draws is None:
            return [_together([*reading, decode_step(self.server, decoding, context)])] * stages
        sampled = self.draws.sample(decoding, stages, self._layers)
        steps = (decode_step(self.server, decoding, context, distinct=d, imbalance=i) for d, i in sampled)
        return [_together([*reading, step]) for step in steps]


def _together(steps: list[StageTime]) -> float:
    """Seconds of a stage for rows that decode and chunks of prompts in one step, for which weights are read once."""
    weights = max(step.weights_seconds for step in steps)
    return weights + sum(step.seconds - step.weights_seconds for step in steps)
