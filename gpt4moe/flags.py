"""The words and flags of the `gpt4moe` command line; knows neither JAX nor gin, so that --help answers at once."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import NoReturn

from gpt4moe import flags_plan
from gpt4moe.config.compile import PROGRAMS
from gpt4moe.config.engine import EngineConfig
from gpt4moe.config.sampling import SamplingConfig
from gpt4moe.config.serve import ServeConfig

CALLER_MISTAKE = 2
EXECUTORS = ("local", "slurm", "list")
HEARTBEAT_SECONDS, STALL_SECONDS = 30, 1800
REPORT_TOKENS = 16_384
QUANTIZED = ("int8", "fp8")
STORED_DTYPES = ("float32", "bfloat16")
SHARD_MEGABYTES = 5000


@dataclasses.dataclass(frozen=True)
class Flags:
    """One word after `gpt4moe`: what its help says, and its own flags."""

    summary: str
    add_flags: Callable[[argparse.ArgumentParser], None]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Returns the command and its flags, with every --gin.NAME=VALUE as "NAME=VALUE" in `overrides`.

    Leaves with exit code 2 and one line on stderr where the words cannot be understood.
    """
    parser = _parser()
    words = [word for word in argv if not word.startswith("--gin.")]
    args, unknown = parser.parse_known_args(flags_plan.with_default_word(words))
    if unknown:
        command = f"gpt4moe {args.command}"
        parser.exit(CALLER_MISTAKE, f"{command}: has no {' '.join(unknown)}; see {command} --help\n")
    args.overrides = [word.removeprefix("--gin.") for word in argv if word.startswith("--gin.")]
    if args.overrides and not hasattr(args, "gin_file"):
        parser.error(f"--gin.{args.overrides[0]}: {args.command} takes its configuration from --workdir")
    return args


def _gin_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gin_file",
        action="append",
        default=[],
        metavar="F",
        help="gin file; may be repeated; --gin.NAME=VALUE overrides any macro or field of it",
    )
    paths = "folders of gin files and of your own modules"
    parser.add_argument("--gin_search_paths", type=_comma_list, default=[], metavar="A,B", help=paths)
    _cpu_devices_flag(parser)


def _cpu_devices_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cpu_devices", type=_positive, metavar="N", help="emulate N CPU devices, per process")


def _workdir_flag(
    parser: argparse._ActionsContainer, required: bool = True, what: str = "work directory, local or gs://"
) -> None:
    parser.add_argument("--workdir", required=required, type=_folder, metavar="DIR", help=what)


def _train_flags(parser: argparse.ArgumentParser) -> None:
    _gin_flags(parser)
    _workdir_flag(parser)
    change = "resume although settings differ from those the run was started with"
    parser.add_argument("--allow_config_change", action="store_true", help=change)
    trace = "write a profiler trace of N steps into DIR/profile"
    parser.add_argument("--profile", type=_positive, default=0, nargs="?", const=3, metavar="N", help=trace)
    _job_flags(parser)


def _job_flags(parser: argparse.ArgumentParser) -> None:
    """Several processes; under Slurm, in a Kubernetes job and on a TPU pod they find each other without flags."""
    address = "where process 0 listens, of a job of several processes"
    parser.add_argument("--coordinator", type=_folder, metavar="HOST:PORT", help=address)
    parser.add_argument("--num_processes", type=_positive, metavar="N", help="processes of the job; 1: alone")
    parser.add_argument("--process_id", type=_not_negative, metavar="I", help="which of them this is, from 0")
    silence = "end the job when a process has been silent for so long (default: %(default)s)"
    parser.add_argument("--heartbeat_seconds", type=_positive, default=HEARTBEAT_SECONDS, metavar="S", help=silence)
    stall = "end the job when a process lives but its work stands still for so long (default: %(default)s)"
    parser.add_argument("--stall_seconds", type=_positive, default=STALL_SECONDS, metavar="S", help=stall)


def _trained_flags(parser: argparse.ArgumentParser) -> None:
    _workdir_flag(parser)
    _checkpoint_flags(parser)


def _checkpoint_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint to use (default: the latest)")
    mesh = "lay the model over devices, e.g. tensor=4,stage=2; -1: the rest of them (default: one device)"
    parser.add_argument("--mesh", type=_axis_sizes, default=(), metavar="AXIS=N,...", help=mesh)
    uneven = "superblocks of each pipeline stage, e.g. 7,8, where they are not equal"
    parser.add_argument("--stage_layers", type=_counts, metavar="N,...", help=uneven)
    _cpu_devices_flag(parser)


def _evaluate_flags(parser: argparse.ArgumentParser) -> None:
    _trained_flags(parser)
    instead = parser.add_mutually_exclusive_group()
    quantize = "also with matrices of experts and attention in this format, and by how much the loss is more"
    instead.add_argument("--quantize", choices=QUANTIZED, help=quantize)
    golden = "compare logits and greedy tokens in float32 with those of a foreign model, arrays tokens, logits, greedy"
    instead.add_argument("--golden", type=_folder, metavar="FILE.npz", help=golden)


def _import_flags(parser: argparse.ArgumentParser) -> None:
    source = "folder of a Mixtral checkpoint of Hugging Face: config.json, safetensors, tokenizer.json"
    parser.add_argument("--from", dest="source", required=True, type=_folder, metavar="DIR", help=source)
    _workdir_flag(parser, what="work directory to make")
    stored = "of the parameters on disk (default: that of the checkpoint)"
    parser.add_argument("--dtype", choices=STORED_DTYPES, help=stored)
    _gin_flags(parser)


def _export_flags(parser: argparse.ArgumentParser) -> None:
    _workdir_flag(parser)
    parser.add_argument("--to", dest="target", required=True, type=_folder, metavar="DIR", help="folder to make")
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint to use (default: the latest)")
    parser.add_argument("--dtype", choices=STORED_DTYPES, help="of the tensors (default: as the parameters are stored)")
    shard = "size of a shard (default: %(default)s)"
    parser.add_argument("--shard_megabytes", type=_positive, default=SHARD_MEGABYTES, metavar="N", help=shard)


def _generate_flags(parser: argparse.ArgumentParser) -> None:
    _trained_flags(parser)
    defaults = SamplingConfig()
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prompt", action="append", metavar="TEXT", help="text to continue; may be repeated")
    lines = 'serve a file of lines such as {"prompt": "def f(", "temperature": 0}, a line of JSON out for each'
    what.add_argument("--requests", type=_folder, metavar="FILE", help=lines)
    parser.add_argument("--output", type=_folder, metavar="FILE", help="where the lines go (default: standard output)")
    image = "image that the prompt shows, where it says <image> or before it; may be repeated"
    parser.add_argument("--image", action="append", default=[], type=_folder, metavar="FILE", help=image)
    spelled = "write what the image encoder spells by itself (a run with SPELLING): it never loses its place on a page"
    parser.add_argument("--spell", action="store_true", help=spelled)
    parser.add_argument(
        "--temperature", type=float, default=defaults.temperature, help="0 is greedy (default: %(default)s)"
    )
    parser.add_argument("--top_k", type=int, default=defaults.top_k, help="keep the k likeliest tokens")
    parser.add_argument("--top_p", type=float, default=defaults.top_p, help="keep this much probability (nucleus)")
    parser.add_argument("--max_new_tokens", type=int, default=defaults.max_new_tokens, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="same seed, same text (default: %(default)s)")
    _decode_flags(parser.add_argument_group("engine, for --requests"))


def _serve_flags(parser: argparse.ArgumentParser) -> None:
    _trained_flags(parser)
    _listen_flags(parser.add_argument_group("server"))
    engine = parser.add_argument_group("engine")
    _decode_flags(engine)
    _queue_flags(engine)


def _listen_flags(group: argparse._ArgumentGroup) -> None:
    """Named as the fields of `ServeConfig`."""
    defaults = ServeConfig()

    def add(name: str, help_: str, kind: Callable[[str], object] = _positive, metavar: str = "N") -> None:
        default = getattr(defaults, name)
        shown = "" if default is None else f" (default: {default:,})" if metavar == "N" else f" (default: {default})"
        group.add_argument(f"--{name}", type=kind, metavar=metavar, help=help_ + shown)

    add("host", "address to listen on; 0.0.0.0: all", _folder, "ADDRESS")
    add("port", "port to listen on; 0: any that is free", _not_negative, "PORT")
    group.add_argument("--model_name", type=_folder, metavar="NAME", help="what requests call it (default: DIR's name)")
    add("api_key", "want Authorization: Bearer KEY; better given as GPT4MOE_API_KEY", _folder, "KEY")
    add("max_body_bytes", "refuse larger bodies")
    add("body_seconds", "refuse bodies that come more slowly", float, "S")
    add("max_prompt_tokens", "refuse longer prompts (default: what the context has room for)")
    add("max_choices", "refuse more continuations of one request, prompts times n")
    add("max_concurrent", "answer 429 to more requests at a time")
    add("image_root", "let chats show the images in this folder by path", _folder, "FOLDER")
    add("chat_template", "Jinja template of chats (default: the tokenizer's own, else a plain one)", _folder, "FILE")
    add("drain_seconds", "time that running requests have to end after SIGTERM", float, "S")


def _decode_flags(group: argparse._ArgumentGroup) -> None:
    """Named as the fields of `EngineConfig`."""
    defaults = EngineConfig()
    for name, what in (
        ("slots", f"continuations that are decoded at once (default: {defaults.slots})"),
        ("max_length", "tokens of prompt and continuation together (default: the model's context)"),
        ("prefill_chunk", f"tokens of a prompt that are read between two steps (default: {defaults.prefill_chunk})"),
        ("cache_bytes", "memory for keys and values (default: enough for every slot at max_length)"),
    ):
        group.add_argument(f"--{name}", type=_positive, metavar="N", help=what)
    drafts = "propose so many tokens a step, found in the row's own text, and judge them in one pass (default: none)"
    group.add_argument("--draft_tokens", type=_not_negative, metavar="N", help=drafts)
    smaller = "the run of a smaller model with the same tokenizer that proposes them instead, 4 where it is not said"
    group.add_argument("--draft_workdir", type=_folder, metavar="DIR", help=smaller)
    same = "float32 in one shape: a request gives the same text whatever else is served; slower"
    group.add_argument("--deterministic", action="store_true", help=same)
    group.add_argument("--quantize", choices=QUANTIZED, help="weights of experts and attention in 8 bits")


def _queue_flags(group: argparse._ArgumentGroup) -> None:
    waiting = f"requests that may wait; one more gets 429 (default: {EngineConfig().max_queue})"
    group.add_argument("--max_queue", type=_positive, metavar="N", help=waiting)
    kept = "keep compiled programs here, where the next start finds them"
    group.add_argument("--compile_cache", type=_folder, metavar="FOLDER", help=kept)


def _report_flags(parser: argparse.ArgumentParser) -> None:
    of_what = parser.add_mutually_exclusive_group(required=True)
    _workdir_flag(of_what, required=False)
    folder = "write the report of a whole sweep instead, with PNG and CSV of its figures in DIR/figures"
    of_what.add_argument("--sweep", type=_folder, metavar="DIR", help=folder)
    _checkpoint_flags(parser)
    text = "colour this text too in experts.html; - reads standard input; may be repeated"
    parser.add_argument("--text", action="append", default=[], type=_folder, metavar="FILE", help=text)
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="the same, of TEXT itself")
    tokens = "held-out tokens that figures of the experts are made of (default: %(default)s)"
    parser.add_argument("--tokens", type=_positive, default=REPORT_TOKENS, metavar="N", help=tokens)
    skip = "make report.html of the run's files alone, which needs no model"
    parser.add_argument("--no_capture", action="store_true", help=skip)


def _prepare_flags(parser: argparse.ArgumentParser) -> None:
    _gin_flags(parser)
    _workdir_flag(parser)
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: by size, at most the cores)")


def _compile_flags(parser: argparse.ArgumentParser) -> None:
    _gin_flags(parser)
    machine = "v5p:8x16x16, v6e:16x16, ...: a TPU and its torus; cpu:8: emulated devices (default: the run file's)"
    parser.add_argument("--topology", type=_folder, metavar="NAME", help=machine)
    parser.add_argument("--slices", type=_positive, metavar="N", help="tori joined by the data-centre network")
    program = "one training step, or the decode loop (default: %(default)s)"
    parser.add_argument("--program", choices=PROGRAMS, default=PROGRAMS[0], help=program)


def _sweep_flags(parser: argparse.ArgumentParser) -> None:
    _gin_flags(parser)
    _workdir_flag(parser, what="local folder of the sweep, each run in DIR/runs/ID")
    where = "where runs are started; list: only print one command a run (default: %(default)s)"
    parser.add_argument("--executor", choices=EXECUTORS, default=EXECUTORS[0], help=where)
    parser.add_argument("--parallel", type=_positive, default=1, metavar="N", help="jobs at a time (default: 1)")
    parameters = "of a job, as submitit names them, e.g. partition=gpu,gpus_per_node=8,timeout_min=600"
    parser.add_argument("--job_parameters", type=_settings, default=(), metavar="NAME=VALUE,...", help=parameters)
    parser.add_argument("--dry_run", action="store_true", help="show the cells and stop")


def _inspect_flags(parser: argparse.ArgumentParser) -> None:
    _gin_flags(parser)
    _workdir_flag(parser, required=False, what="count the model of this work directory, instead of a gin file's")
    what = "list the dotted path of every parameter, which FROZEN and RATE_SCALES match"
    parser.add_argument("--paths", action="store_true", help=what)


def _doctor_flags(parser: argparse.ArgumentParser) -> None:
    _gin_flags(parser)
    _workdir_flag(parser, required=False)


def _plan_flags(parser: argparse.ArgumentParser) -> None:
    flags_plan.add_words(parser, _gin_flags)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be an integer of at least 1")
    return int(text)


def _not_negative(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} must be an integer of at least 0")
    return int(text)


def _folder(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def _axis_sizes(text: str) -> tuple[tuple[str, int], ...]:
    pairs = [item.partition("=") for item in _comma_list(text)]
    if not pairs or not all(axis and re.fullmatch(r"-1|\d+", size) for axis, _, size in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} must have the form AXIS=N,AXIS=N")
    return tuple((axis, int(size)) for axis, _, size in pairs)


def _settings(text: str) -> tuple[tuple[str, int | str], ...]:
    pairs = [item.partition("=") for item in _comma_list(text)]
    if not pairs or not all(name and value for name, _, value in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} must have the form NAME=VALUE,NAME=VALUE")
    return tuple((name, int(value) if value.isdigit() else value) for name, _, value in pairs)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(_positive(item) for item in text.split(","))


def _comma_list(text: str) -> list[str]:
    return [item for item in text.split(",") if item]


COMMANDS = {
    "train": Flags("train a run, or go on with it; ends with held-out loss, samples and a report", _train_flags),
    "evaluate": Flags("held-out loss and bits per byte of each source; a foreign model's logits", _evaluate_flags),
    "generate": Flags("continue prompts with a trained model", _generate_flags),
    "serve": Flags("answer OpenAI's HTTP requests with a trained model; has a chat page at /", _serve_flags),
    "prepare": Flags("tokenise the sources of a run ahead of time; resumable", _prepare_flags),
    "import": Flags("make a work directory of a Mixtral checkpoint of Hugging Face", _import_flags),
    "export": Flags("write a run as a Mixtral checkpoint of Hugging Face", _export_flags),
    "report": Flags("write report.html of a run, with text coloured by expert, or of a sweep", _report_flags),
    "sweep": Flags("run a grid of settings and seeds; goes on where it was cut", _sweep_flags),
    "compile": Flags("compile a run for a machine that is not here: bytes, FLOPs, collectives", _compile_flags),
    "plan": Flags("layouts, step time, memory and dollars of runs that are not there yet; audits", _plan_flags),
    "inspect": Flags("count parameters, FLOPs and bytes of a gin file", _inspect_flags),
    "doctor": Flags("look at devices, versions, memory and disk; say whether a model fits", _doctor_flags),
}


class _OneLineParser(argparse.ArgumentParser):
    """argparse prints the usage before its error; ours is one line, like every mistake of the caller's."""

    def error(self, message: str) -> NoReturn:
        self.exit(CALLER_MISTAKE, f"{self.prog}: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _OneLineParser(
        allow_abbrev=False,
        prog="gpt4moe",
        description="Train, evaluate and serve GPT-4-style mixture-of-experts transformers.",
        epilog="Any gin macro or parameter is set with --gin.NAME=VALUE, e.g. --gin.NUM_EXPERTS=16.",
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        summary = f"gpt4moe {name}: {command.summary}."
        subparser = subparsers.add_parser(name, help=command.summary, description=summary, allow_abbrev=False)
        if name != "plan":  # each of its words has its own
            help_ = "print one JSON document on stdout and nothing else"
            subparser.add_argument("--json", action="store_true", help=help_)
        command.add_flags(subparser)
    return parser
