"""The best layouts of a job: each is given its bytes and seconds, those that fit are ranked.

In: a `Job` and what its trainer can run. Out: `Found`, ranked by seconds or dollars a token, with the nearest misses.
Of what is computed again, and how often a pipeline is filled, each layout has the least that fits.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from gpt4moe.config.check import CallerError, require
from gpt4moe.plan.money import goodput
from gpt4moe.plan.money.goodput import HOUR_SECONDS, Reliability
from gpt4moe.plan.search.layouts import OUR_SCHEDULE, SPACES, Candidate, Job, Space, rounder_chips
from gpt4moe.plan.training import memory, own_memory, step_time
from gpt4moe.plan.training.layout import Layout
from gpt4moe.plan.training.memory import MemoryEstimate
from gpt4moe.plan.training.step_time import StepTime

OBJECTIVES = ("time", "dollars")
# With a price, half the chips may be the cheaper way to the same tokens, and so on.
FEWER_CHIPS = (1, 2, 4, 8)


@dataclasses.dataclass(frozen=True)
class Costed:
    """A layout of a job with its bytes and seconds. dollars: of a billion tokens, None without a price."""

    job: Job
    layout: Layout
    batch_rows: int
    memory: MemoryEstimate
    known: dict = dataclasses.field(default_factory=dict, repr=False, compare=False)

    @functools.cached_property
    def step(self) -> StepTime:
        """The predicted step; reckoned when it is asked for, which it is not of most that do not fit."""
        job = self.job
        return step_time.estimate(
            job.shape, self.layout, job.chip, self.batch_tokens, job.sequence_length, job.stack, self.known
        )

    @property
    def batch_tokens(self) -> int:
        """Tokens of its step."""
        return self.batch_rows * self.job.sequence_length

    @property
    def seconds_per_token(self) -> float:
        """Of the whole job."""
        return self.step.seconds / self.batch_tokens

    @property
    def dollars_per_token(self) -> float | None:
        """Of all chips of the job, idle ones too, and of the hours that failures cost."""
        price = self.job.dollars_per_hour
        if price is None:
            return None
        return price * self.job.num_chips * self.seconds_per_token / HOUR_SECONDS / self.goodput

    @property
    def idle_chips(self) -> int:
        """Chips of the job that the layout leaves out."""
        return self.job.num_chips - self.layout.chips

    @property
    def model_flops_utilization(self) -> float:
        """Of the peak of all chips of the job."""
        return self.step.model_flops_utilization * self.layout.chips / self.job.num_chips

    @property
    def reliability(self) -> Reliability | None:
        """Of the chips in use together."""
        one = self.job.reliability
        return one and dataclasses.replace(one, job_mtbf_seconds=one.job_mtbf_seconds / self.layout.chips)

    @property
    def goodput(self) -> float:
        """The share of time in which the job gets ahead, at the best interval of saves."""
        return goodput.goodput(self.reliability) if self.reliability else 1.0

    def cost(self, objective: str) -> float:
        """Returns what it is ranked by."""
        return self.seconds_per_token if objective == "time" else self.dollars_per_token

    @property
    def family(self) -> str:
        """Kinds of parallelism that it has."""
        layout = self.layout
        degrees = (("tensor", layout.tensor), ("context", layout.context), ("stage", layout.stage))
        names = [name for name, degree in degrees if degree > 1] + (["expert"] if layout.expert > 1 else [])
        return " + ".join([*names, "FSDP" if layout.zero == 3 else "data"])


@dataclasses.dataclass(frozen=True)
class Found:
    """ranked: what fits, best first. missed: what does not, the nearest to it first. families: the best of each, or the
    nearest to fitting where none does.

    left_out: choices that were not followed, by reason. examined: layouts that were given bytes.
    """

    job: Job
    ranked: tuple[Costed, ...]
    families: dict[str, Costed]
    left_out: dict[str, int]
    examined: int
    seconds: float
    missed: tuple[Costed, ...] = ()


def search(job: Job, space: Space = SPACES["megatron"], objective: str = "time") -> Found:
    """Returns the ranked layouts; raises `CallerError` where none divides, or the objective has no price."""
    require(objective in OBJECTIVES, "--objective", objective, f"must be in {OBJECTIVES}")
    priced = objective == "time" or job.dollars_per_hour is not None
    require(priced, "--objective", objective, f"needs a price, {job.chip.name} has none", "give --price")
    started, left_out = time.perf_counter(), Counter()
    costed: list[Costed] = []
    for smaller in FEWER_CHIPS if objective == "dollars" else FEWER_CHIPS[:1]:
        if job.num_chips % smaller == 0:
            part = dataclasses.replace(job, num_chips=job.num_chips // smaller)
            costed += cost_all(part, _candidates(part, space, left_out), several_passes=space.several_passes)
    if not costed:
        raise CallerError(_none(job, left_out))
    ranked = rank(costed, objective)
    missed = (item for item in costed if not item.memory.fits)
    missed = tuple(sorted(missed, key=lambda item: -item.memory.spare_bytes))
    families = _families(ranked, missed)
    return Found(job, ranked, families, dict(left_out), len(costed), time.perf_counter() - started, missed)


def _candidates(job: Job, space: Space, left_out: Counter) -> Iterator[Candidate]:
    """Layouts of all chips, and of the number a little smaller that divides better, where there is one."""
    yield from space.layouts(job, left_out)
    rounder = rounder_chips(job) if job.most_idle else None
    if rounder:
        yield from space.layouts(dataclasses.replace(job, num_chips=rounder), Counter())


def cost_all(job: Job, candidates: Iterable[Candidate], *, several_passes: bool = False) -> list[Costed]:
    """Returns every candidate with bytes and seconds, with each way of computing again that is worth it."""
    known: dict = {}
    return [costed for candidate in candidates for costed in _ways(job, candidate, several_passes, known)]


def cost_one(job: Job, layout: Layout, batch_rows: int, known: dict | None = None) -> Costed:
    """Returns one layout with its bytes and seconds, as it is."""
    microbatches, length = layout.microbatches(batch_rows), job.sequence_length
    reserved = None
    if layout.schedule == OUR_SCHEDULE:
        reserved = own_memory.kept_free_bytes(job.chip)
        reserved += own_memory.beside_bytes(job.shape, layout, job.numerics, length, microbatches)
    there = memory.estimate(
        job.shape, layout, job.chip, sequence_length=length, microbatches=microbatches // layout.passes,
        numerics=job.numerics, reserved_bytes=reserved,
    )  # fmt: skip
    return Costed(job, layout, batch_rows, there, {} if known is None else known)


def rank(costed: Iterable[Costed], objective: str = "time") -> tuple[Costed, ...]:
    """Returns what fits, best first; of equal ones the one with most bytes to spare."""
    fitting = [item for item in costed if item.memory.fits]
    return tuple(sorted(fitting, key=lambda item: (item.cost(objective), -item.memory.spare_bytes)))


def _ways(job: Job, candidate: Candidate, several_passes: bool, known: dict) -> Iterator[Costed]:
    """The least recomputation that fits in one pass; more of it where that needs several; the last where none fits."""
    for remat in _remats(job, candidate.layout):
        found = None
        for passes in _passes(job, candidate) if several_passes else (1,):
            layout = candidate.layout
            if (remat, passes) != (layout.remat, layout.passes):
                layout = dataclasses.replace(layout, remat=remat, passes=passes)
            found = cost_one(job, layout, candidate.batch_rows, known)
            if found.memory.fits:
                break
        if found is None:  # no number of passes goes with the smaller batches of a ramp
            return
        if found.memory.fits:
            yield found
            if found.layout.passes == 1:
                return
    if not found.memory.fits:
        yield found


def _remats(job: Job, layout: Layout) -> tuple[str, ...]:
    """What may be computed again, the least first; a fused core computes its scores again by itself."""
    if layout.schedule == OUR_SCHEDULE:
        return "selective", "dots", "full"
    return ("selective", "full") if job.stack.flash else ("none", "selective", "full")


def _passes(job: Job, candidate: Candidate) -> Iterator[int]:
    """Times that a step may fill the pipeline; where chunks are several, with as many microbatches as stages."""
    layout = candidate.layout
    if layout.stage == 1:  # any batch of a ramp is so many microbatches, one after the other
        yield 1
        return
    least = layout.stage if layout.virtual_stages > 1 else 1
    for passes in range(1, candidate.microbatches // least + 1):
        whole = candidate.microbatches % passes == 0
        if whole and all(rows % (candidate.batch_rows // passes) == 0 for rows in job.ramp_rows):
            yield passes


def _families(ranked: Sequence[Costed], missed: Sequence[Costed]) -> dict[str, Costed]:
    best: dict[str, Costed] = {}
    for item in (*ranked, *missed):
        best.setdefault(item.family, item)
    return best


def _none(job: Job, left_out: Counter) -> str:
    reasons = ", ".join(f"{reason} ({count})" for reason, count in left_out.most_common(3)) or "ramp and batch differ"
    batch = f"a batch of {job.batch_rows:,} sequences (within {job.tolerance:.0%})"
    mend = "change --num_chips, --batch_tokens or --batch_tolerance"
    return f"--num_chips={job.num_chips} divides into no layout of {job.shape.name} with {batch}: {reasons}; {mend}"
