"""The engine of continuous batching: requests of many callers share the slots of one compiled decode step.

In: a decoder, a tokenizer, `EngineConfig`. Out: `submit` gives a handle whose chunks come as the tokens are drawn. A
step reads a chunk of the prompts that are new and draws a token for every row that runs; a row that ends leaves its
slot to the next one that waits.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from gpt4moe.config.check import one_line, require
from gpt4moe.config.engine import EngineConfig
from gpt4moe.infer.codec import Codec, required
from gpt4moe.infer.decoder import Decoder
from gpt4moe.infer.engine import admission
from gpt4moe.infer.engine.batch import Batches, new_tokens, record_prompts
from gpt4moe.infer.engine.constraint import Constraint, Constraints
from gpt4moe.infer.engine.draws import is_remembered, row_memory
from gpt4moe.infer.engine.handle import RequestHandle
from gpt4moe.infer.engine.inputs import StepInputs, StepShape, chunk_tokens, smallest
from gpt4moe.infer.engine.metrics import Record
from gpt4moe.infer.engine.pool import PagePool
from gpt4moe.infer.engine.programs import Programs
from gpt4moe.infer.engine.proposals import Proposals
from gpt4moe.infer.engine.request import Chunk, EngineClosed, EngineMetrics, EngineRequest, QueueFull
from gpt4moe.infer.engine.row import NewToken, Row
from gpt4moe.infer.engine.schedule import Schedule
from gpt4moe.infer.engine.steps import StepOut


class Engine:
    """All methods may be called from any thread; `step` works for one caller at a time.

    Raises `CallerError` without a tokenizer, where pages do not suffice for one row of `max_length`, or where
    `deterministic` is asked of a decoder that is not in float32. `decoder` may be those of a pipeline's stages
    (`gpt4moe.infer.stages.cut`), and `draft` is a smaller model with the same vocabulary that proposes tokens, where
    `config.draft_tokens` says so; without one they are looked up in the row's own text. `clock` gives the seconds that
    deadlines and metrics are in.
    """

    def __init__(
        self,
        decoder: Decoder | Sequence[Decoder],
        tokenizer: Codec,
        config: EngineConfig | None = None,
        *,
        draft: Decoder | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        stages = [decoder] if isinstance(decoder, Decoder) else list(decoder)
        self.decoder, self.tokenizer, self.config = stages[-1], required(tokenizer), config or EngineConfig()
        model = self.decoder.config
        self.max_length = self.config.max_length or model.context_length
        self.num_pages = admission.num_pages(self.decoder, self.config, self.max_length, draft)
        admission.check_draft(draft, model, self.config)
        admission.check_stages(len(stages), self.config, draft)
        self.programs = Programs(stages, self.config, self.num_pages, self.max_length, draft)
        self._proposals = Proposals(self.config, by_model=draft is not None)
        self._batches = Batches(self.config, model)
        self._constraints = Constraints(tokenizer, model.vocab_size)
        self._record = Record(model.num_moe_layers, model.moe.num_experts)
        self._clock, self._arrivals = clock, itertools.count()
        self._lock = threading.Condition()  # of what follows, and of `_schedule` between steps
        self._incoming: list[Row] = []
        self._accepting, self._closed = True, False
        self.fault: str | None = None  # what ended the engine's thread, in a line
        self._stepping = threading.Lock()
        self._thread: threading.Thread | None = None
        self._begin()

    @property
    def accepting(self) -> bool:
        """Whether `submit` takes requests."""
        return self._accepting

    @property
    def shapes(self) -> tuple[StepShape, ...]:
        """The shapes of every program that serving needs."""
        programs = self.programs
        return *programs.decode_shapes, *programs.verify_shapes, *programs.prefill_shapes

    def warm_up(self, progress: Callable[[str], None] | None = None) -> dict[str, float]:
        """Compiles every program and returns their seconds by name; after it no request waits for a compilation.

        progress: called with a line of text for each.
        """
        return {str(shape): seconds for shape, seconds in self.programs.warm_up(progress).items()}

    def submit(self, request: EngineRequest) -> RequestHandle:
        """Takes a request in, to be served from the next step on.

        Raises `CallerError` for one that cannot be served, `QueueFull` where too many wait, `EngineClosed` after
        `drain` or `close`.
        """
        with self._lock:
            self._refuse_beyond(request.sampling.n)  # before the work of checking it
        max_new = self.check(request)
        constraint = self._constraint(request)
        with self._lock:
            self._refuse_beyond(request.sampling.n)
            arrival = next(self._arrivals)
            handle = RequestHandle(request, request.request_id or f"request-{arrival}", self._advance)
            now = self._clock()
            for index in range(request.sampling.n):
                of_row = None if constraint is None else constraint.copy()
                self._incoming.append(Row(handle, index, next(self._arrivals), max_new, self.tokenizer, now, of_row))
            self._record.counts["submitted"] += 1
            self._lock.notify_all()
        return handle

    def check(self, request: EngineRequest) -> int:
        """The most tokens that a continuation of this request may get; `CallerError` where it cannot be served."""
        sizes = self.decoder.config, self.config, self.max_length
        self._constraint(request)
        return admission.check(request, *sizes, self.tokenizer.image)

    def _constraint(self, request: EngineRequest) -> Constraint | None:
        schema = request.sampling.json_schema
        return None if schema is None else self._constraints.of(schema)

    def _refuse_beyond(self, rows: int) -> None:
        """Raises where there is no room for so many rows more."""
        if not self._accepting:
            raise EngineClosed("the engine takes no more requests" + (f": {self.fault}" if self.fault else ""))
        waiting = len(self._schedule.waiting) + len(self._incoming)
        free = self.config.slots - len(self._schedule.running)
        if waiting + rows > self.config.max_queue + max(free, 0):
            self._record.counts["rejected"] += 1
            raise QueueFull(waiting, self._retry_after(waiting))

    def step(self) -> bool:
        """One iteration: rows that have ended or been cancelled leave, others enter, all that run gain a token.

        Returns whether there was anything to do. A fault of the device ends the rows that run with "error"; the engine
        goes on with empty pages.
        """
        with self._stepping:
            self._take_in()
            self._end_stale()
            with self._lock:
                admitted = self._schedule.admit()
            if not self._schedule.running:
                return bool(admitted)
            try:
                self._work(admitted)
            except Exception as error:  # whatever the device or its runtime raises
                logging.getLogger(__name__).exception("a step failed")
                self._fail(one_line(error))
            return True

    def run_in_thread(self) -> None:
        """Steps in a thread of its own from now on, until `close`.

        A fault that a step cannot recover from ends the thread: all requests end with "error", and `fault` says why.
        """
        require(self._thread is None, "engine", "running", "runs in a thread already")
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def drain(self) -> None:
        """Takes no more requests and returns when all that were taken have ended."""
        with self._lock:
            self._accepting = False
        while True:
            with self._lock:
                if not self._busy():
                    return
                if self._thread is not None:
                    self._lock.wait(0.05)
            if self._thread is None:
                self.step()

    def close(self) -> None:
        """Ends all requests with "cancelled", and the thread. Harmless a second time."""
        with self._lock:
            self._accepting, self._closed = False, True
            self._lock.notify_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        with self._stepping:
            self._take_in()
            for row in [*self._schedule.waiting, *self._schedule.running]:
                self._end(row, "cancelled")

    def metrics(self) -> EngineMetrics:
        """A snapshot of counts and of what runs now."""
        with self._lock:
            pool, schedule = self._schedule.pool, self._schedule
            return EngineMetrics(
                queued=len(schedule.waiting) + len(self._incoming),
                running=len(schedule.running),
                slots=self.config.slots,
                num_pages=self.num_pages,
                pages_used=pool.num_used,
                pages_cached=pool.num_cached,
                preemptions=schedule.preemptions,
                late_compilations=self.programs.num_late,
                **self._record.snapshot(),
            )

    def _begin(self) -> None:
        """Nothing waits, nothing runs, all pages are empty."""
        pool = PagePool(self.num_pages, sharing=self.config.prefix_caching)
        self._schedule = Schedule(self.config, pool, chunk_tokens(self.config, self.max_length))

    def _advance(self) -> bool:
        """What a handle does that has no chunk: it works itself where no thread does; False where one does."""
        if self._thread is not None:
            return False
        self.step()
        return True

    def _run(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._closed or self._busy())
                if self._closed:
                    return
            try:
                self.step()
            except Exception as error:  # outside of what a step recovers from: nothing can be served any more
                self._give_up(one_line(error))
                raise  # the thread's end prints where

    def _give_up(self, fault: str) -> None:
        with self._lock:
            self._accepting, self._closed, self.fault = False, True, fault
            self._take_in()
            for row in [*self._schedule.waiting, *self._schedule.running]:
                self._end(row, "error", fault)

    def _busy(self) -> bool:
        return bool(self._incoming or self._schedule.waiting or self._schedule.running)

    def _take_in(self) -> None:
        with self._lock:
            for row in self._incoming:
                self._schedule.add(row)
            self._incoming.clear()

    def _end_stale(self) -> None:
        """Rows whose callers have gone, or whose time is over."""
        now = self._clock()
        for row in [*self._schedule.waiting, *self._schedule.running]:
            deadline = row.request.deadline_seconds
            if row.handle.cancelled:
                self._end(row, "cancelled")
            elif deadline is not None and now - row.submitted_at > deadline:
                self._end(row, "deadline")

    def _work(self, admitted: Sequence[Row]) -> None:
        for row in admitted:
            if not row.has_run:
                row.has_run = True
                with self._lock:
                    self._record.queue_wait.add(self._clock() - row.submitted_at)
            self._batches.enter(row)
            if is_remembered(row.sampling):
                given = row.request.prompt_ids, row.ids[row.num_prompt :], self.decoder.config.vocab_size
                self.programs.remember(row.slot, row_memory(row.sampling, *given))
            if row.request.pictures:
                self.programs.look(row.slot, row.request.pictures)
        self._prefill()
        self._decode()

    def _prefill(self) -> None:
        """A chunk of the prompts that are not read yet."""
        shapes = self.programs.prefill_shapes
        with self._lock:
            chosen = self._schedule.chunks(
                lambda rows, length: any(shape.rows >= rows and shape.length >= length for shape in shapes)
            )
        if not chosen:
            return
        pages, longest = max(len(row.pages) for row, _ in chosen), max(length for _, length in chosen)
        shape = smallest(shapes, len(chosen), longest, pages)
        inputs = self._batches.prefill(chosen, shape)
        out = self.programs.step(shape, inputs)
        load_LE = out.load_LE  # waits for the device, and no caller with it
        with self._lock:
            self._record.add_prefill(load_LE)
        self._take(out, [(place, row, length) for place, (row, length) in enumerate(chosen)], inputs.last_B)

    def _decode(self) -> None:
        """A token for every row whose prompt is read, and those proposals that stand."""
        with self._lock:
            rows = self._schedule.decoding()
        proposed = self._proposals.of(rows)
        number = {row: self._proposals.number(row, proposed) for row in rows}
        with self._lock:
            number = self._schedule.grow_for(number)
        if not rows:
            return
        steps = [self._begin_decode(group, number, proposed) for group in self._groups(rows)]
        with self._lock:
            self._record.counts["proposed_tokens"] += sum(number.values())
        for placed, inputs, out in steps:
            load_LE = out.load_LE  # waits for the device, and no caller with it
            with self._lock:
                self._record.add_decode(load_LE)
            self._take(out, [(place, row, 1) for place, row in placed], inputs.last_B)

    def _groups(self, rows: Sequence[Row]) -> list[list[tuple[int, Row]]]:
        """The rows that are decoded together, each with its place: one group follows another through the stages."""
        together = self.programs.slots_together
        groups: dict[int, list[tuple[int, Row]]] = {}
        for row in rows:
            groups.setdefault(row.slot // together, []).append((row.slot % together, row))
        return [groups[number] for number in sorted(groups)]

    def _begin_decode(
        self, placed: Sequence[tuple[int, Row]], number: Mapping[Row, int], proposed: Mapping[Row, list[int]]
    ) -> tuple[Sequence[tuple[int, Row]], StepInputs, StepOut]:
        """Begins a step of some rows, whose result is on its way."""
        programs = self.programs
        verifies = programs.verify_shapes and (any(number.values()) or not programs.decode_shapes)
        shapes = programs.verify_shapes if verifies else programs.decode_shapes
        shape = smallest(shapes, programs.slots_together, 1, max(len(row.pages) for _, row in placed))
        inputs = self._batches.decode(placed, shape, number, proposed)
        return placed, inputs, programs.step(shape, inputs)

    def _take(self, out: StepOut, read: Sequence[tuple[int, Row, int]], last_B: np.ndarray) -> None:
        """What a step gave to the rows; read: place in the batch, row, and how many of its tokens were read."""
        drawing = [(place, row) for place, row, length in read if length == row.num_unread]
        tokens = new_tokens(out, drawing, last_B)
        record_prompts(out, read)
        now = self._clock()
        with self._lock:
            for _, row, length in read:
                row.num_read += length
            for (_, row), of_row in zip(drawing, tokens, strict=True):
                row.num_read += len(of_row) - 1  # the proposals that stand were read
                self._record.counts["accepted_tokens"] += len(of_row) - 1
            for _, row, length in read:
                if length > 1 or not self.config.deterministic:
                    self._schedule.publish(row)
            for (_, row), of_row in zip(drawing, tokens, strict=True):
                for token in of_row:
                    if row.finish_reason is None:
                        self._add(row, token, now)

    def _add(self, row: Row, token: NewToken, now: float) -> None:
        record = self._record
        record.counts["new_tokens"] += 1
        if row.num_new == 0:
            record.counts["prompt_tokens"] += row.num_prompt
            record.counts["cached_prompt_tokens"] += row.num_cached
            record.time_to_first_token.add(now - row.submitted_at)
        else:
            record.inter_token.add(now - row.last_token_at)
        chunk = row.add(token, now)
        if chunk is not None:
            self._tell(row, chunk)

    def _end(self, row: Row, reason: str, error: str | None = None) -> None:
        with self._lock:
            self._tell(row, row.end(reason, error))

    def _tell(self, row: Row, chunk: Chunk) -> None:
        """Gives a chunk to the caller; a row that has ended is out of its slot before the caller knows."""
        if chunk.finish_reason is not None:
            self._schedule.remove(row)
            self._record.finished[chunk.finish_reason] += 1
            self._record.request_time.add(self._clock() - row.submitted_at)
            self._lock.notify_all()
        row.handle.push(chunk)

    def _fail(self, error: str) -> None:
        """A step raised: donated pages may be gone, and with them everything that ran."""
        with self._lock:
            for row in list(self._schedule.running):
                self._end(row, "error", error)
            waiting, preemptions = self._schedule.waiting, self._schedule.preemptions
            self._begin()
            self._schedule.waiting, self._schedule.preemptions = waiting, preemptions
        self.programs.reset()

    def _retry_after(self, waiting: int) -> float:
        """Seconds until half of those who wait have been served, by how long requests have taken."""
        times = self._record.request_time.snapshot()
        mean = times.total_seconds / times.count if times.count else 1.0
        return max(1.0, mean * waiting / self.config.slots / 2)
