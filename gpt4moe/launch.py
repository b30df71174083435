"""The `gpt4moe` command: build one configuration, check it, call, print what came of it.

Exit codes: 0 done, 2 the caller's mistake (one line on stderr), 1 a fault of ours or of the machine, 3 stopped on
request and resumable.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from gpt4moe import flags, process
from gpt4moe.config.check import CallerError, RunError, one_line, require
from gpt4moe.config.mesh import MeshConfig
from gpt4moe.config.model import ModelConfig
from gpt4moe.config.optimizer import OptimizerConfig
from gpt4moe.config.sampling import SamplingConfig
from gpt4moe.configure import build_compile, build_model, build_parts, build_run, build_sweep, saved_run

DONE, FAULT, CALLER_MISTAKE, STOPPED = 0, 1, flags.CALLER_MISTAKE, 3
MISTAKES = (CallerError, FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)
FAULTS = (OSError, RunError)
_plain = dataclasses.asdict


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
    print(f"gpt4moe {command}: {one_line(error)}", file=sys.stderr)
    return CALLER_MISTAKE if isinstance(error, MISTAKES) else FAULT


def load(workdir: str | os.PathLike, *, step: int | None = None, mesh: MeshConfig | None = None):
    """Returns the model, tokenizer and configuration of a trained run.

    Args:
      workdir: the run's work directory, local or in an object store.
      step: which checkpoint (None: the latest).
      mesh: devices to lay the model over, whatever it was trained on (None: the default device).

    Returns:
      A `gpt4moe.infer.trained.Trained` with `model`, `tokenizer`, `config`, `step`.
    """
    from gpt4moe.infer import trained

    run, _ = saved_run(workdir)
    return trained.restore(run, workdir, step=step, mesh=mesh)


def _train(args: argparse.Namespace) -> int:
    run, text = build_run(args.gin_file, args.overrides, args.gin_search_paths)
    from gpt4moe.parallel import cluster, multihost

    together = cluster.find_cluster(args.coordinator, args.num_processes, args.process_id)
    explain = functools.partial(_explain, "train")
    limits = {"heartbeat_seconds": args.heartbeat_seconds, "stall_seconds": args.stall_seconds}
    with multihost.job(together, prefix="gpt4moe train: ", explain=explain, **limits):
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

    generations, read, wanted = [], {}, run.train.sample_prompts or run.data.images
    if wanted and jax.process_count() == 1:
        generations, read = _final_samples(args.workdir, run)
    elif wanted:
        _progress(f"no samples by several processes; see gpt4moe generate --workdir={args.workdir}")
    page = report.write_report(args.workdir)
    document = {"step": result.step, "tokens": result.tokens, "data_ended": result.data_ended, "report": str(page)}
    document |= {"evaluation": to_document(result.evaluation), "samples": [_plain(item) for item in generations]}
    document |= {"read": {source: _plain(result) for source, result in read.items()}} if run.data.images else {}

    def to_text(_: dict) -> str:
        samples = [f"--- {item.prompt!r}\n{item.prompt}{item.text}" for item in generations]
        tables = [format_evaluation(result.evaluation), *_read_table(read)]
        return "\n".join([*tables, *samples, "", f"report: {page}"])

    _print(args, document, to_text)


def _final_samples(workdir: str, run) -> tuple[list, dict]:
    """Continuations of the sample prompts, and how well held-out images are read."""
    from gpt4moe.infer import trained
    from gpt4moe.infer.generate import generate, write_samples

    model = trained.restore(run, workdir)
    sampling = SamplingConfig(temperature=0.8, max_new_tokens=run.train.sample_tokens, seed=run.train.seed)
    generations, _ = generate(model.model, model.tokenizer, run.train.sample_prompts, sampling)
    if generations:
        write_samples(workdir, generations)
    return generations, _transcribe(model, run)


def _transcribe(model, run) -> dict:
    """How well held-out images are read, by source, also into `evaluation.json`; empty of a run without any."""
    if run.data.images is None:
        return {}
    from gpt4moe.infer.transcribe import transcribe
    from gpt4moe.train.evaluate import add_read, trained_store

    read = transcribe(model, trained_store(run, model.workdir, model.step), progress=_progress)
    add_read(model.workdir, {source: _plain(result) for source, result in read.items()}, step=model.step)
    return read


def _read_table(read: dict) -> list[str]:
    from gpt4moe.infer.transcribe import format_transcriptions

    return ["", format_transcriptions(read)] if read else []


def _evaluate(args: argparse.Namespace) -> int:
    if args.golden:
        return _foreign(args)
    from gpt4moe.analysis.quantized_loss import add_quantized
    from gpt4moe.infer import trained
    from gpt4moe.train import evaluate

    run, _ = saved_run(args.workdir)
    require(not (args.quantize and run.model.vision), "--quantize", args.quantize, "is for models that read no images")
    mesh = _mesh(args).for_generation()
    run = dataclasses.replace(run, mesh=mesh)  # evaluation lays its batches over it
    model = trained.restore(run, args.workdir, step=args.step, mesh=mesh)
    _progress("computing the loss of held-out text")
    evaluation = evaluate.evaluate_trained(model.model, run, args.workdir, step=model.step)
    read = _transcribe(model, run)
    document = evaluate.to_document(evaluation)
    for source, result in read.items():
        document[source] |= {"read": _plain(result)}
    lines = [evaluate.format_evaluation(evaluation), *_read_table(read)]
    if args.quantize:
        lines.append(add_quantized(document, model, run, args.quantize, _progress))
    _print(args, document, lambda _: "\n".join(lines))
    return DONE


def _generate(args: argparse.Namespace) -> int:
    from gpt4moe.infer import command

    answer = command.answer(args, load, _progress)
    if answer is not None:
        _print(args, *answer)
    return DONE


def _foreign(args: argparse.Namespace) -> int:
    """What has to do with weights of other frameworks: import, export, evaluate --golden."""
    from gpt4moe.interop import command

    _print(args, *command.answer(args, build_run, saved_run, _progress))
    return DONE


def _serve(args: argparse.Namespace) -> int:
    from gpt4moe.serve import command as serving

    mesh = _mesh(args)
    return serving.run(args, mesh, functools.partial(load, mesh=mesh), _progress)


def _mesh(args: argparse.Namespace) -> MeshConfig:
    return MeshConfig(args.mesh, stage_layers=args.stage_layers)


def _prepare(args: argparse.Namespace) -> int:
    run, _ = build_run(args.gin_file, args.overrides, args.gin_search_paths)
    from gpt4moe.data.prepare import format_report, prepare

    if run.train.init_from is not None:  # only then: a checkpoint is looked into with JAX
        from gpt4moe.train.resume import inherit_tokenizer

        run = inherit_tokenizer(run)
    directory = run.data.store or os.path.join(args.workdir, "data")
    done = prepare(run.data, directory, workers=args.workers, progress=_progress)
    _print(args, _plain(done), lambda _: format_report(done))
    return DONE


def _report(args: argparse.Namespace) -> int:
    return _report_sweep(args) if args.sweep else _report_run(args)


def _report_sweep(args: argparse.Namespace) -> int:
    of_a_run = {"--step": args.step, "--text": args.text, "--prompt": args.prompt, "--mesh": args.mesh}
    given = [name for name, value in of_a_run.items() if value not in (None, [], ())]
    require(not given, "--sweep", args.sweep, f"takes no {given}", "those are for the report of a run, --workdir")
    from gpt4moe.analysis.sweeps.report import write_sweep_report

    report = write_sweep_report(args.sweep)
    _print(args, {"report": str(report)}, lambda _: f"report: {report}")
    return DONE


def _report_run(args: argparse.Namespace) -> int:
    from gpt4moe.analysis.given_texts import given_texts
    from gpt4moe.analysis.history import read_history
    from gpt4moe.analysis.report import write_report

    read_history(args.workdir)  # a folder without a run is refused before anything slow
    given = given_texts(args.prompt, args.text)
    require(not (given and args.no_capture), "--no_capture", True, "leaves no model to read texts", "leave it out")
    page, choices, reading, document, lines = None, None, "", {}, []
    if not args.no_capture and (trained := _to_examine(args, given)):
        from gpt4moe.analysis import choice_figures, expert_page
        from gpt4moe.analysis.experts import examine, format_document, to_document
        from gpt4moe.analysis.reading import read_held_out
        from gpt4moe.analysis.reading_section import reading_section

        experts = examine(trained, given, max_tokens=args.tokens, mesh=_mesh(args))
        reading = reading_section(read_held_out(trained))
        page = expert_page.write_expert_page(args.workdir, experts)
        choices = choice_figures.choices(experts, has_page=page is not None)
        document = to_document(experts)
        lines = [format_document(document), f"text by expert: {page}"] if page else [format_document(document)]
    report = write_report(args.workdir, choices, reading)
    document = {"report": str(report), "experts": str(page) if page else None} | document
    _print(args, document, lambda _: "\n".join([*lines, f"report: {report}"]))
    return DONE


def _sweep(args: argparse.Namespace) -> int:
    config, build = build_sweep(args.gin_file, args.overrides, args.gin_search_paths)
    from gpt4moe.sweep import engine, results

    sweep = engine.plan(config, build, args.workdir, _progress)
    if args.dry_run or args.executor == "list":
        return _list_sweep(args, sweep)
    executor = engine.Executor(sweep.folder, args.executor, args.parallel, dict(args.job_parameters))
    rows = engine.run(sweep, executor, _progress, show_table=not args.json)
    from gpt4moe.analysis.sweeps.report import write_sweep_report

    _progress("drawing the report")
    report = write_sweep_report(sweep.folder)
    document = {"folder": str(sweep.folder), "report": str(report), "rows": rows}
    _print(args, document, lambda _: f"{results.format_rows(rows, sweep.folder)}\nreport: {report}")
    return FAULT if any(row["state"] != "done" for row in rows) else DONE


def _list_sweep(args: argparse.Namespace, sweep) -> int:
    """Shows a command for each cell; only --executor=list, which means them to be run, leaves a manifest."""
    from gpt4moe.sweep import engine

    commands = engine.launch_list(sweep, args.gin_file, args.overrides, args.gin_search_paths)
    for cell in sweep.cells:
        if cell.refused is not None:
            _progress(f"cannot be built, {dict(cell.point)}: {cell.refused}")
    if not args.dry_run:
        engine.write_manifest(sweep)
    _print(args, {"cells": engine.manifest(sweep), "commands": commands}, lambda _: "\n".join(commands))
    return DONE


def _to_examine(args: argparse.Namespace, given: dict[str, str]):
    """The run's model; None where no checkpoint is there and none is needed."""
    from gpt4moe import checkpoint

    if not given and args.step is None and not checkpoint.saved_steps(args.workdir):
        _progress("no checkpoint: the figures are those of the log alone")
        return None
    return load(args.workdir, step=args.step, mesh=_mesh(args))


def _compile(args: argparse.Namespace) -> int:
    given = {"topology": args.topology, "slices": args.slices}
    run, config = build_compile(args.gin_file, args.overrides, args.gin_search_paths, **given)
    from gpt4moe.plan.compiled import compile as compiling

    _print(args, compiling.examine(run, config, args.program, _progress), compiling.format_document)
    return DONE


def _plan(args: argparse.Namespace) -> int:
    given = (getattr(args, "gin_file", ()), args.overrides, getattr(args, "gin_search_paths", ()))
    from gpt4moe.plan.words import command

    builds = command.Build(lambda: build_model(*given), lambda: build_run(*given)[0], saved_run)
    _print(args, *command.answer(args, builds))
    return DONE


def _inspect(args: argparse.Namespace) -> int:
    require(not (args.workdir and args.gin_file), "--workdir", args.workdir, "goes without --gin_file", "give one")
    given = [os.path.join(args.workdir, "config.gin")] if args.workdir else args.gin_file
    model, optimizer, data = build_parts(given, args.overrides, args.gin_search_paths)
    from gpt4moe.accounting import summary

    images = data and data.images
    document = summary.summarize(model, _num_trained(model, optimizer), images.frames if images else None)
    if args.paths:
        from gpt4moe.train import trainable

        document["paths"] = trainable.table(model, optimizer)
    _print(args, document, summary.format_summary)
    return DONE


def _doctor(args: argparse.Namespace) -> int:
    given = args.gin_file, args.overrides, args.gin_search_paths
    model, optimizer, _ = build_parts(*given) if args.gin_file else (None, None, None)
    from gpt4moe.plan.compiled import doctor

    trained = _num_trained(model, optimizer)
    _print(args, doctor.examine(model, args.workdir or ".", trained), doctor.format_findings)
    return DONE


def _num_trained(model: ModelConfig | None, optimizer: OptimizerConfig | None) -> int | None:
    """None where nothing is frozen: counting by path needs JAX, without which `inspect` answers at once."""
    if optimizer is None or not optimizer.frozen:
        return None
    from gpt4moe.train import trainable

    return trainable.count(model, optimizer)


def _print(args: argparse.Namespace, document: Any, to_text: Callable[[Any], str]) -> None:
    print(json.dumps(document, indent=2) if args.json else to_text(document))


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


COMMANDS = {
    "train": _train,
    "evaluate": _evaluate,
    "generate": _generate,
    "serve": _serve,
    "prepare": _prepare,
    "import": _foreign,
    "export": _foreign,
    "report": _report,
    "sweep": _sweep,
    "compile": _compile,
    "plan": _plan,
    "inspect": _inspect,
    "doctor": _doctor,
}


if __name__ == "__main__":
    sys.exit(main())
