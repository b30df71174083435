"""The `gpt4moe` command: parse gin, build one configuration, check it, save it, call.

The only file that imports gin. Exit codes: 0 done, 2 the caller's mistake (one line on stderr), 1 a fault of ours or
of the machine, 3 stopped on request and resumable.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import importlib.util  # noqa: F401  gin 0.5.0 uses importlib.util without importing it
import json
import logging
import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from gpt4moe import flags, process
from gpt4moe.config.check import CallerError, RunError, require
from gpt4moe.config.sampling import SamplingConfig

DONE, FAULT, CALLER_MISTAKE, STOPPED = 0, 1, flags.CALLER_MISTAKE, 3
MISTAKES = (CallerError, FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)
FAULTS = (OSError, RunError)
ROOT = pathlib.Path(__file__).resolve().parent.parent


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    args = flags.parse(sys.argv[1:] if argv is None else argv)
    if argv is None:
        process.restart_with_huge_pages()
    process.quiet(getattr(args, "cpu_devices", None))
    try:
        code = COMMANDS[args.command](args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except (Exception, KeyboardInterrupt) as error:
        return _explain(args.command, error)


def _explain(command: str, error: BaseException) -> int:
    """Prints a foreseen error in one line and returns the exit code; raises any other."""
    if isinstance(error, KeyboardInterrupt):
        print(f"gpt4moe {command}: interrupted", file=sys.stderr)
        return STOPPED
    if not isinstance(error, (*MISTAKES, *FAULTS)) or os.environ.get("GPT4MOE_TRACEBACK"):
        raise error
    print(f"gpt4moe {command}: {_one_line(error)}", file=sys.stderr)
    return CALLER_MISTAKE if isinstance(error, MISTAKES) else FAULT


def load(workdir: str | os.PathLike, *, step: int | None = None):
    """Returns the model, tokenizer and configuration of a trained run.

    Args:
      workdir: the run's work directory, local or in an object store.
      step: which checkpoint (None: the latest).

    Returns:
      A `gpt4moe.infer.trained.Trained` with `model`, `tokenizer`, `config`, `step`.
    """
    from gpt4moe.infer import trained

    run, _ = _saved_run(workdir)
    return trained.restore(run, workdir, step=step)


# ---------------------------------------------------------------------------------------------------- gin


def build_run(gin_files: Sequence[str], overrides: Sequence[str] = (), search_paths: Sequence[str] = ()) -> tuple:
    """Returns (`RunConfig`, operative gin text) of a run file; raises on macros and overrides that nothing reads."""
    import gin

    from gpt4moe.config.run import RunConfig

    _parse(gin_files, overrides, search_paths)
    config = _construct(RunConfig, gin_files)
    _refuse_unread(_names(overrides), _is_operative)
    return config, gin.operative_config_str()


def build_model(gin_files: Sequence[str], overrides: Sequence[str] = (), search_paths: Sequence[str] = ()):
    """Returns the `ModelConfig` of a model file, or of the run file that includes one."""
    from gpt4moe.config.model import ModelConfig

    _parse(gin_files, overrides, search_paths)
    config = _construct(ModelConfig, gin_files)
    _refuse_unread(_names(overrides), _is_referenced)
    return config


def _parse(gin_files: Sequence[str], overrides: Sequence[str], search_paths: Sequence[str]) -> None:
    import gin

    require(bool(gin_files), "--gin_file", None, "must be given", "e.g. --gin_file=gin_configs/run/quickstart.gin")
    gin.clear_config()
    for path in (*search_paths, os.getcwd(), str(ROOT)):
        if path not in gin.config._LOCATION_PREFIXES:
            gin.add_config_file_search_path(path)
        if path not in sys.path:  # the user's own routers, sources and optimizers are imported from there
            sys.path.append(path)
    logging.getLogger().addFilter(_not_gin_search)
    for gin_file in gin_files:
        try:
            gin.parse_config_file(gin_file)
        except Exception as error:
            raise CallerError(f"--gin_file={gin_file}: {_one_line(error)}") from error
    _refuse_unread(_macros(), _is_referenced)
    for override in overrides:
        _parse_override(gin, override)


def _parse_override(gin, override: str) -> None:
    name, equals, value = override.partition("=")
    require(bool(equals and name), "--gin", override, "must have the form --gin.NAME=VALUE")
    try:
        gin.parse_config(f"{name} = {value}")
    except SyntaxError as error:
        mend = f"quote strings: --gin.{name}=\"'{value}'\""
        raise CallerError(f"--gin.{name}={value} is not a Python literal; {mend}") from error
    except Exception as error:
        raise CallerError(f"--gin.{override}: {_one_line(error)}{_near(name)}") from error


def _construct(config_type: type, gin_files: Sequence[str]) -> Any:
    import gin

    require(_is_bound(config_type), "--gin_file", gin_files, f"configure no {config_type.__name__}", "give a run file")
    try:
        return gin.get_configurable(config_type)()
    except Exception as error:
        raise CallerError(_one_line(error)) from error


def _names(overrides: Sequence[str]) -> list[str]:
    return [override.partition("=")[0].strip() for override in overrides]


def _refuse_unread(names: Sequence[str], is_read: Callable[[str], bool]) -> None:
    """gin takes a misspelt macro for a new one that nothing uses, and says nothing: we refuse it."""
    for name in names:
        if not is_read(name):
            raise CallerError(f"{name} is set but read by nothing in this configuration{_near(name)}")


def _is_operative(name: str) -> bool:
    """Whether building the configuration used this macro or parameter."""
    import gin

    operative = gin.config._OPERATIVE_CONFIG
    if "." not in name:
        return (name, "gin.macro") in operative
    scoped, _, parameter = name.rpartition(".")
    scope, _, selector = scoped.rpartition("/")
    return any(
        parameter in values and used.endswith(selector) and used_scope == (scope or used_scope)
        for (used_scope, used), values in operative.items()
    )


def _is_referenced(name: str) -> bool:
    """Whether any binding of the gin files refers to this macro (an override may have cut it off since)."""
    import gin

    return "." in name or re.search(rf"%{re.escape(name)}\b", gin.config_str()) is not None


def _near(name: str) -> str:
    """`; did you mean ...?` with the macros and parameters whose names are near."""
    import gin

    known = set(_macros())
    for _, selector in gin.config._CONFIG:
        config_type = _library_type(selector)
        fields = dataclasses.fields(config_type) if config_type else ()
        known.update(f"{selector.removeprefix('gpt4moe.config.')}.{field.name}" for field in fields)
    close = difflib.get_close_matches(name, sorted(known - {name}), n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(close)}?" if close else f"; known macros: {', '.join(_macros())}"


def _library_type(selector: str) -> type | None:
    """The configuration class behind a gin selector; None for a macro or a function of the user's."""
    module, _, name = selector.rpartition(".")
    return getattr(sys.modules[module], name) if module.startswith("gpt4moe.config.") else None


def _macros() -> list[str]:
    import gin

    return sorted(scope for scope, selector in gin.config._CONFIG if selector == "gin.macro")


def _is_bound(config_type: type) -> bool:
    import gin

    name = f"{config_type.__module__}.{config_type.__name__}"
    return any(selector == name for _, selector in gin.config._CONFIG)


def _saved_run(workdir: str | os.PathLike) -> tuple:
    from etils import epath

    saved = epath.Path(os.fspath(workdir)) / "config.gin"
    require(saved.exists(), "--workdir", os.fspath(workdir), "holds no run (no config.gin)", "train there first")
    with tempfile.TemporaryDirectory() as folder:  # gin opens local files only
        local = pathlib.Path(folder) / "config.gin"
        local.write_text(saved.read_text())
        return build_run([str(local)])


def _not_gin_search(record: logging.LogRecord) -> bool:
    """gin logs every folder in which a file was not found, before it raises the error that says so."""
    return not record.getMessage().startswith("Path not found")


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


# ----------------------------------------------------------------------------------------------- commands


def _train(args: argparse.Namespace) -> int:
    run, text = build_run(args.gin_file, args.overrides, args.gin_search_paths)
    from gpt4moe.parallel import cluster, multihost

    together = cluster.find_cluster(args.coordinator, args.num_processes, args.process_id)
    explain = functools.partial(_explain, "train")
    with multihost.job(together, prefix="gpt4moe train: ", heartbeat_seconds=args.heartbeat_seconds, explain=explain):
        return _train_here(args, run, text, is_first=together is None or together.process_id == 0)


def _train_here(args: argparse.Namespace, run, text: str, *, is_first: bool) -> int:
    """The part of this process in a run; the first one shows what came of it."""
    from gpt4moe.train import loop

    result = loop.train(
        run,
        args.workdir,
        config_text=text,
        allow_config_change=args.allow_config_change,
        profile_steps=args.profile,
        show_progress=not args.json,
    )
    if result.stopped and is_first:
        print(f"stopped at step {result.step:,}; the same command goes on from there", file=sys.stderr)
    elif is_first:
        _show_finished(args, run, result)
    return STOPPED if result.stopped else DONE


def _show_finished(args: argparse.Namespace, run, result) -> None:
    """Samples, report and the closing table of a finished run; no samples where other processes hold the parameters."""
    import jax

    from gpt4moe.analysis import report
    from gpt4moe.train.evaluate import format_evaluation, to_document

    generations = []
    if run.train.sample_prompts and jax.process_count() == 1:
        generations = _final_samples(args.workdir, run)
    elif run.train.sample_prompts:
        _progress(f"no samples by several processes; see gpt4moe generate --workdir={args.workdir}")
    page = report.write_report(args.workdir)
    document = {"step": result.step, "tokens": result.tokens, "data_ended": result.data_ended, "report": str(page)}
    document |= {"evaluation": to_document(result.evaluation), "samples": [_plain(item) for item in generations]}

    def to_text(_: dict) -> str:
        samples = [f"--- {item.prompt!r}\n{item.prompt}{item.text}" for item in generations]
        return "\n".join([format_evaluation(result.evaluation), *samples, "", f"report: {page}"])

    _print(args, document, to_text)


def _final_samples(workdir: str, run) -> list:
    from gpt4moe.infer import trained
    from gpt4moe.infer.generate import generate, write_samples

    model = trained.restore(run, workdir)
    sampling = SamplingConfig(temperature=0.8, max_new_tokens=run.train.sample_tokens, seed=run.train.seed)
    generations, _ = generate(model.model, model.tokenizer, run.train.sample_prompts, sampling)
    write_samples(workdir, generations)
    return generations


def _evaluate(args: argparse.Namespace) -> int:
    from gpt4moe.infer import trained
    from gpt4moe.train import evaluate

    run, _ = _saved_run(args.workdir)
    model = trained.restore(run, args.workdir, step=args.step)
    evaluation = evaluate.evaluate_trained(model.model, run, args.workdir, step=model.step)
    _print(args, evaluate.to_document(evaluation), lambda _: evaluate.format_evaluation(evaluation))
    return DONE


def _generate(args: argparse.Namespace) -> int:
    names = [field.name for field in dataclasses.fields(SamplingConfig)]
    sampling = SamplingConfig(**{name: getattr(args, name) for name in names})
    from gpt4moe.infer.generate import generate

    trained = load(args.workdir, step=args.step)
    generations, timing = generate(trained.model, trained.tokenizer, args.prompt or [""], sampling)
    document = {"step": trained.step, "samples": [_plain(item) for item in generations], "timing": _plain(timing)}
    _print(args, document, lambda _: "\n\n".join(item.prompt + item.text for item in generations))
    return DONE


def _prepare(args: argparse.Namespace) -> int:
    run, _ = build_run(args.gin_file, args.overrides, args.gin_search_paths)
    from gpt4moe.data.prepare import format_report, prepare

    directory = run.data.store or os.path.join(args.workdir, "data")
    done = prepare(run.data, directory, workers=args.workers, progress=_progress)
    _print(args, _plain(done), lambda _: format_report(done))
    return DONE


def _report(args: argparse.Namespace) -> int:
    from gpt4moe.analysis.report import write_report

    page = write_report(args.workdir)
    _print(args, {"report": str(page)}, lambda _: f"report: {page}")
    return DONE


def _inspect(args: argparse.Namespace) -> int:
    from gpt4moe.accounting import summary

    document = summary.summarize(build_model(args.gin_file, args.overrides, args.gin_search_paths))
    _print(args, document, summary.format_summary)
    return DONE


def _doctor(args: argparse.Namespace) -> int:
    model = build_model(args.gin_file, args.overrides, args.gin_search_paths) if args.gin_file else None
    from gpt4moe.plan import doctor

    _print(args, doctor.examine(model, args.workdir or "."), doctor.format_findings)
    return DONE


def _print(args: argparse.Namespace, document: Any, to_text: Callable[[Any], str]) -> None:
    print(json.dumps(document, indent=2) if args.json else to_text(document))


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _plain(struct: Any) -> dict:
    return dataclasses.asdict(struct)


COMMANDS = {
    "train": _train,
    "evaluate": _evaluate,
    "generate": _generate,
    "prepare": _prepare,
    "report": _report,
    "inspect": _inspect,
    "doctor": _doctor,
}


if __name__ == "__main__":
    sys.exit(main())
