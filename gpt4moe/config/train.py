"""How long and in what batches a run trains, what it saves and when it gives up."""

from __future__ import annotations

import dataclasses
import itertools

from gpt4moe.config.check import require, require_count, require_flag, require_seed, require_text, require_texts


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Length, batch ramp, checkpoints and logging of a training run.

    The run ends at `steps` or `token_budget`, whichever comes first. `batch_tokens` is a number, or a ramp
    ((tokens seen, batch tokens), ...) that starts at 0 and grows. A batch is accumulated from microbatches of
    `microbatch_rows` rows (None: the smallest batch of the ramp in one piece); the step compiles once for all
    batch sizes. `checkpoint_every`, `evaluate_every` and `log_every` count steps. `keep_last` and `keep_best`
    count checkpoints. `max_skipped_steps` in a row with a non-finite loss or gradient stop the run.
    `init_from` is a work directory or imported weights to start from. `record_routing` keeps where every token went
    in every step under `routing/`; `replay_routing` is a work directory whose records are forced on this run.
    """

    steps: int
    token_budget: int
    batch_tokens: int | tuple[tuple[int, int], ...]
    seed: int
    checkpoint_every: int
    microbatch_rows: int | None = None
    evaluate_every: int | None = None
    log_every: int = 1
    keep_last: int = 2
    keep_best: int = 1
    max_skipped_steps: int = 10
    init_from: str | None = None
    sample_prompts: tuple[str, ...] = ()
    sample_tokens: int = 64
    record_routing: bool = False
    replay_routing: str | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "token_budget", "checkpoint_every", "log_every", "keep_last", "max_skipped_steps"):
            require_count(name, getattr(self, name))
        for name in ("microbatch_rows", "evaluate_every"):
            if getattr(self, name) is not None:
                require_count(name, getattr(self, name))
        require_count("keep_best", self.keep_best, least=0)
        require_seed("seed", self.seed)
        require_count("sample_tokens", self.sample_tokens)
        object.__setattr__(self, "sample_prompts", require_texts("sample_prompts", self.sample_prompts))
        for name in ("init_from", "replay_routing"):
            require_text(name, getattr(self, name))
        require_flag("record_routing", self.record_routing)
        self._check_ramp()

    def _check_ramp(self) -> None:
        if not isinstance(self.batch_tokens, (list, tuple)):
            require_count("batch_tokens", self.batch_tokens)
            return
        pairs = all(isinstance(entry, (list, tuple)) and len(entry) == 2 for entry in self.batch_tokens)
        require(pairs, "batch_tokens", self.batch_tokens, "must be a number or pairs (tokens seen, batch tokens)")
        ramp = tuple((start, size) for start, size in self.batch_tokens)
        for start, size in ramp:
            require_count("batch_tokens", start, least=0)
            require_count("batch_tokens", size)
        object.__setattr__(self, "batch_tokens", ramp)
        require(bool(ramp) and ramp[0][0] == 0, "batch_tokens", ramp, "must start with (0, tokens)")
        starts, sizes = zip(*ramp, strict=True)
        ascending = all(a < b for a, b in itertools.pairwise(starts))
        growing = all(a <= b for a, b in itertools.pairwise(sizes))
        require(ascending and growing, "batch_tokens", ramp, "must rise in both numbers")

    @property
    def ramp(self) -> tuple[tuple[int, int], ...]:
        """The batch schedule as ((tokens seen, batch tokens), ...), one entry where it is constant."""
        return ((0, self.batch_tokens),) if isinstance(self.batch_tokens, int) else self.batch_tokens
