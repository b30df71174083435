"""The words after `gpt4moe plan` and their flags; knows neither JAX nor gin, so that --help answers at once."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable

DEFAULT_WORD = "search"


@dataclasses.dataclass(frozen=True)
class Word:
    """One word after `gpt4moe plan`: what its help says, its own flags, and whether it reads gin files."""

    summary: str
    add_flags: Callable[[argparse.ArgumentParser], None]
    reads_gin: bool = False


def with_default_word(argv: list[str]) -> list[str]:
    """Returns the command line with the word that `gpt4moe plan` means when none is given."""
    if argv[:1] != ["plan"] or (len(argv) > 1 and (not argv[1].startswith("-") or argv[1] in ("-h", "--help"))):
        return argv
    return ["plan", DEFAULT_WORD, *argv[1:]]


def add_words(parser: argparse.ArgumentParser, add_gin_flags: Callable[[argparse.ArgumentParser], None]) -> None:
    """Gives `gpt4moe plan` its words; `add_gin_flags` are those that every command with a configuration has."""
    subparsers = parser.add_subparsers(dest="word", required=True, metavar="WORD")
    for name, word in WORDS.items():
        summary = f"gpt4moe plan {name}: {word.summary}."
        subparser = subparsers.add_parser(name, help=word.summary, description=summary, allow_abbrev=False)
        subparser.add_argument("--json", action="store_true", help="print one JSON document on stdout and nothing else")
        if word.reads_gin:
            add_gin_flags(subparser)
        word.add_flags(subparser)


def _validate_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--csv", metavar="FILE", help="measurements to compare with (default: the published ones)")
    parser.add_argument("--calibration", metavar="FILE", help="constants by stack and chip, of gpt4moe plan calibrate")


def _calibrate_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--csv", metavar="FILE", help="measurements to fit to (default: the published ones)")
    parser.add_argument("--workdir", action="append", default=[], metavar="DIR", help="a run of ours; may be repeated")
    parser.add_argument("--constants", type=int, choices=(1, 2, 3, 4), help="how many a stack (default: what pays)")
    parser.add_argument("--stack", metavar="STACK/CHIP", help="this one alone")
    parser.add_argument("--out", metavar="FILE", help="write the constants here, for --calibration")


def _article_flags(parser: argparse.ArgumentParser) -> None:
    premise = "move a premise or a width of the model, e.g. gpu_memory_gb=80, num_experts=64; may be repeated"
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help=premise)
    page = "also write the audit with its figures as one HTML page"
    parser.add_argument("--report", metavar="FILE.html", help=page)


def _run_flags(parser: argparse.ArgumentParser) -> None:
    """A training run: model, chips, tokens, price, failures."""
    shape = "a published model instead of a gin file, e.g. gpt4_1p8t, llama3_405b"
    parser.add_argument("--shape", metavar="NAME", help=shape)
    parser.add_argument("--chip", required=True, metavar="NAME", help="e.g. a100_40, h100, tpu_v5p")
    parser.add_argument("--tokens", type=float, required=True, metavar="N", help="tokens of the whole run")
    price = "dollars of a chip-hour (default: the chip's on-demand price)"
    parser.add_argument("--price", type=float, metavar="D", help=price)
    _failure_flags(parser)


def _failure_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num_chips", type=int, required=True, metavar="N", help="chips of the job")
    _reliability_flags(parser)


def _reliability_flags(parser: argparse.ArgumentParser) -> None:
    mtbf = "hours between failures of one chip (default: %(default)s, Llama 3 on 16,384 H100)"
    parser.add_argument("--chip_mtbf_hours", type=float, default=50_700, metavar="H", help=mtbf)
    save = "seconds for which a save stops the steps (default: %(default)s)"
    parser.add_argument("--save_seconds", type=float, default=30, metavar="S", help=save)
    write = "seconds after that until an asynchronous save is safe (default: %(default)s)"
    parser.add_argument("--write_seconds", type=float, default=0, metavar="S", help=write)
    restart = "seconds from a failure until steps run again (default: %(default)s)"
    parser.add_argument("--restart_seconds", type=float, default=600, metavar="S", help=restart)


def _layout_flags(parser: argparse.ArgumentParser) -> None:
    """How a training run lies over its chips, and on which software."""
    axes = ("tensor", "context", "stage", "virtual_stages", "expert", "microbatch_rows")
    for axis in axes:
        parser.add_argument(f"--{axis}", type=int, default=1, metavar="N", help="of the layout (default: 1)")
    cut = "chips that share one expert (default: those of --tensor)"
    parser.add_argument("--expert_tensor", type=int, metavar="N", help=cut)
    zero = "0 to 3: what replicas shard of optimizer, gradients, weights (default: %(default)s)"
    parser.add_argument("--zero", type=int, default=1, metavar="N", help=zero)
    parser.add_argument(
        "--remat", default="full", metavar="POLICY", help="none, selective, full (default: %(default)s)"
    )
    schedule = "of the pipeline, e.g. zb_h1 (default: 1f1b, or interleaved)"
    parser.add_argument("--schedule", metavar="NAME", help=schedule)
    length = "tokens of a sequence (default: the context of the gin file's model, 8192 of --shape)"
    parser.add_argument("--sequence_length", type=int, metavar="T", help=length)
    parser.add_argument("--batch_tokens", type=float, metavar="N", help="tokens of a step")
    imbalance = "rows of the fullest expert over their mean (default: that of the stack)"
    parser.add_argument("--imbalance", type=float, metavar="X", help=imbalance)
    stack = "software, by its name in gpt4moe plan validate (default: megatron-core, maxtext on TPUs)"
    parser.add_argument("--stack", metavar="NAME", help=stack)
    parser.add_argument("--calibration", metavar="FILE", help="constants by stack and chip, of gpt4moe plan calibrate")


def _cost_flags(parser: argparse.ArgumentParser) -> None:
    _run_flags(parser)
    _layout_flags(parser)
    mfu = "model FLOPs over the peak, e.g. 0.4 (default: as predicted of the layout and --batch_tokens)"
    parser.add_argument("--mfu", type=float, metavar="U", help=mfu)
    measured = "measured, of a step of --batch_tokens, instead of --mfu"
    parser.add_argument("--step_seconds", type=float, metavar="S", help=measured)
    ramp = "batch of so many tokens from so many tokens on, e.g. 0:4e6,252e6:8e6; the last has the utilisation given"
    parser.add_argument("--ramp", type=_ramp, default=(), metavar="FROM:BATCH,...", help=ramp)
    owned = "what a chip with its server costs, for the value that the run uses up"
    parser.add_argument("--chip_dollars", type=float, metavar="D", help=owned)
    parser.add_argument("--kwh_price", type=float, default=0.08, metavar="D", help="(default: %(default)s)")
    free = "share of the electricity without emissions (default: %(default)s)"
    parser.add_argument("--carbon_free", type=float, default=0.0, metavar="X", help=free)
    repair = "hours until a failed chip is back (default: %(default)s)"
    parser.add_argument("--repair_hours", type=float, default=24, metavar="H", help=repair)


def _simulate_flags(parser: argparse.ArgumentParser) -> None:
    _failure_flags(parser)
    parser.add_argument("--days", type=float, required=True, metavar="N", help="of work, without failures")
    interval = "seconds of work between saves (default: Young's)"
    parser.add_argument("--interval_seconds", type=float, metavar="S", help=interval)
    spares = "chips that stand by (default: as many as fail)"
    parser.add_argument("--spares", type=int, metavar="N", help=spares)
    repair = "hours until a failed chip stands by again (default: %(default)s)"
    parser.add_argument("--repair_hours", type=float, default=24, metavar="H", help=repair)
    parser.add_argument("--runs", type=int, default=20, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the first run (default: %(default)s)")


def _explain_flags(parser: argparse.ArgumentParser) -> None:
    _run_flags(parser)
    _layout_flags(parser)
    numerics = "bytes of a parameter's state, e.g. mixed_adam_16, fp8_adam (default: %(default)s)"
    parser.add_argument("--numerics", default="mixed_adam", metavar="NAME", help=numerics)
    _plot_flag(parser)


def _what_if_flags(parser: argparse.ArgumentParser) -> None:
    _run_flags(parser)
    parser.add_argument("--mfu", type=float, required=True, metavar="U", help="model FLOPs over the peak, e.g. 0.4")
    parser.add_argument("--change", type=float, default=0.2, metavar="X", help="of each assumption (default: 0.2)")
    serving = (("serve_tensor", 8, "chips that share a layer"), ("serve_stages", 16, "such groups in a row"))
    for name, default, what in (*serving, ("sequences", 4096, "in flight")):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{what} (default: %(default)s)")
    formats = "of served weights: bfloat16, int8 or fp8 (default: %(default)s)"
    parser.add_argument("--weights", default="bfloat16", metavar="FORMAT", help=formats)
    context = "tokens in the cache of a sequence (default: %(default)s)"
    parser.add_argument("--context", type=float, default=2048, metavar="T", help=context)
    experts = "counts of experts to compare (default: 2,4,...,128)"
    parser.add_argument("--experts", type=_counts, default=(2, 4, 8, 16, 32, 64, 128), metavar="N,...", help=experts)
    saving = "share of the training tokens that each doubling of the experts saves (default: %(default)s)"
    parser.add_argument("--saving", type=float, default=0.1, metavar="X", help=saving)
    _plot_flag(parser)


def _plot_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plot", metavar="FILE.png", help="also draw it")


def _counts(text: str) -> tuple[int, ...]:
    if not all(item.isdigit() for item in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} must have the form N,N")
    return tuple(int(item) for item in text.split(","))


def _ramp(text: str) -> tuple[tuple[float, float], ...]:
    try:
        pairs = [tuple(map(float, item.split(":"))) for item in text.split(",")]
    except ValueError:
        pairs = [()]
    if not all(len(pair) == 2 for pair in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} must have the form FROM:BATCH,FROM:BATCH")
    return tuple(pairs)


def _served_flags(parser: argparse.ArgumentParser) -> None:
    """What the words about serving share: the model, the chip, the layout's fixed parts, shares of the peaks."""
    add = parser.add_argument
    add("--shape", metavar="NAME", help="a published shape instead of --gin_file, such as mixtral_8x7b")
    add("--chip", default="h100", metavar="NAME", help="such as a100_40, h100, tpu_v5p; default %(default)s")
    add("--context", type=int, default=2048, metavar="TOKENS", help="mean tokens of a row's cache; default %(default)s")
    add("--matmul_efficiency", type=float, default=0.6, metavar="SHARE", help="of the peak FLOP/s; default %(default)s")
    add("--memory_efficiency", type=float, default=0.8, metavar="SHARE", help="of the bandwidth; default %(default)s")
    add("--link_efficiency", type=float, default=0.75, metavar="SHARE", help="of fast links; default %(default)s")
    for axis, meaning in (("tensor", "chips that share each matrix"), ("stage", "stages"), ("expert", "expert groups")):
        add(f"--{axis}", type=int, metavar="SIZE", help=f"fix this axis of the layout: {meaning}")


def _serve_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    _served_flags(parser)
    add("--num_chips", type=int, default=128, metavar="N", help="chips there are; default %(default)s")
    add("--price", type=float, metavar="DOLLARS", help="of a chip's hour; default: on demand, from the table")
    add("--weights", default="bfloat16", metavar="FORMATS", help="of bfloat16, int8, fp8, with commas between")
    add("--cache", choices=("heads", "batch"), help="how keys and values lie over the tensor axis; default: the better")
    add("--batch", type=int, metavar="ROWS", help="rows of one pipeline microbatch; default: all that fit are tried")
    add("--prompt_tokens", type=int, default=1024, metavar="TOKENS", help="mean prompt; default %(default)s")
    add("--new_tokens", type=int, default=256, metavar="TOKENS", help="mean answer; default %(default)s")
    add("--utilization", type=float, default=1.0, metavar="SHARE", help="mean load over full load; default %(default)s")
    add("--min_speed", type=float, metavar="TOKENS", help="tokens a second that every user must get")
    add("--plot", metavar="FILE.png", help="draw the frontier")
    add("--simulate", action="store_true", help="simulate the cheapest layout (of at least --min_speed) under traffic")
    simulated = parser.add_argument_group("simulation")
    add = simulated.add_argument
    add("--requests", type=int, metavar="N", help="how many come; default: 1000, with --day what its hours bring")
    add("--requests_per_second", type=float, metavar="RATE", help="default: 70 %% of what the replicas serve")
    add("--lengths", default="exponential", metavar="KIND", help="fixed, uniform, exponential, lognormal")
    add("--batching", default="continuous", choices=("continuous", "static"), help="default %(default)s")
    add(
        "--prefill_chips",
        type=int,
        metavar="N",
        help="chips that read prompts only; default: all do, in chunks",
    )
    add("--expected_routing", action="store_true", help="steps of expected routing, not of sampled tokens")
    add("--day", metavar="RATES", help="'cosine' or 24 relative rates with commas: a day, its trough lent to training")
    add("--hour_seconds", type=float, default=120.0, metavar="S", help="of a simulated hour; default %(default)s")
    add("--seed", type=int, default=0, help="default %(default)s")


def _speculate_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    _served_flags(parser)
    add("--acceptance", type=float, default=0.7, metavar="CHANCE", help="of each draft token; default %(default)s")
    add("--draft_cost", type=float, default=0.05, metavar="SHARE", help="draft step over a step; default %(default)s")
    add("--draft_tokens", type=int, default=4, metavar="N", help="draft length; default %(default)s")
    add("--batch", default="1,4,8,16,32,64,128,256", metavar="ROWS", help="with commas between; default %(default)s")
    add("--weights", default="bfloat16", metavar="FORMAT", help="bfloat16, int8 or fp8; default %(default)s")


def _search_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", metavar="NAME", help="a published model instead of a gin file, e.g. gpt4_1p8t")
    parser.add_argument("--chip", required=True, metavar="NAME", help="e.g. a100_40, h100, tpu_v5p")
    parser.add_argument("--num_chips", type=int, metavar="N", help="chips of the job (default: the run file's MESH)")
    parser.add_argument("--memory_gb", type=float, metavar="GB", help="of a chip (default: its data sheet's)")
    parser.add_argument("--batch_tokens", type=float, metavar="N", help="of a step (default: the run file's)")
    parser.add_argument("--sequence_length", type=int, metavar="T", help="tokens of a row (default: the run file's)")
    ramp = "batch of so many tokens from so many tokens on, e.g. 0:4194304,252e6:8388608; the last is searched for"
    parser.add_argument("--ramp", type=_ramp, default=(), metavar="FROM:BATCH,...", help=ramp)
    near = "share by which a layout's batch may differ (default: 0 of a run file, 0.05 of --shape)"
    parser.add_argument("--batch_tolerance", type=float, metavar="X", help=near)
    objective = "what to rank by; dollars also tries 1/2, 1/4 and 1/8 of the chips (default: time)"
    parser.add_argument("--objective", choices=("time", "dollars"), default="time", help=objective)
    parser.add_argument("--price", type=float, metavar="D", help="dollars of a chip-hour (default: the chip's)")
    space = "what a trainer can run: ours (default of a gin file), or megatron (default of --shape)"
    parser.add_argument("--space", choices=("ours", "megatron"), help=space)
    parser.add_argument("--ours", action="store_const", const="ours", dest="space", help="the same as --space=ours")
    idle = "share of the chips that may stay idle where fewer divide better (default: %(default)s)"
    parser.add_argument("--most_idle", type=float, default=0.01, metavar="X", help=idle)
    numerics = "bytes of a parameter's state, e.g. mixed_adam, mixed_adam_16, fp8_adam (default: the space's)"
    parser.add_argument("--numerics", metavar="NAME", help=numerics)
    parser.add_argument("--stack", metavar="NAME", help="software of a known source, e.g. megatron, deepseek-v3")
    asked = "also say how this one does and why, e.g. tensor=8,stage=15,zero=1"
    parser.add_argument("--layout", metavar="NAME=N,...", help=asked)
    parser.add_argument("--top", type=int, default=10, metavar="N", help="layouts to show (default: %(default)s)")
    parser.add_argument("--calibration", metavar="FILE", help="constants by stack and chip, of gpt4moe plan calibrate")
    parser.add_argument("--export", metavar="FILE.gin", help="write the best as a run file of our trainer")
    parser.add_argument("--report", metavar="FILE.html", help="also write figures and tables as one HTML page")
    verify = "compile the N best and set what was predicted beside it (default: 1)"
    parser.add_argument("--verify", type=int, nargs="?", const=1, metavar="N", help=verify)
    _reliability_flags(parser)


WORDS: dict[str, Word] = {
    "search": Word("rank all layouts of a model on a cluster, say why the others lose", _search_flags, reads_gin=True),
    "validate": Word("predictions beside published measurements, per source", _validate_flags),
    "calibrate": Word("constants of a stack and chip from measured steps, with left-out error", _calibrate_flags),
    "article": Word("audit the reference article, claim by claim", _article_flags, reads_gin=True),
    "cost": Word("days, dollars, energy and goodput of a training run", _cost_flags, reads_gin=True),
    "simulate": Word("draw the failures of a run at random, beside the formula", _simulate_flags),
    "explain": Word("from the chips' peak to delivered tokens, cause by cause", _explain_flags, reads_gin=True),
    "what-if": Word("which assumption moves days, dollars and prices most", _what_if_flags, reads_gin=True),
    "serve": Word("layouts, speed and dollars of serving a model; simulates it", _serve_flags, reads_gin=True),
    "speculate": Word("what speculative decoding gains, batch by batch", _speculate_flags, reads_gin=True),
}
