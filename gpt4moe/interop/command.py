"""`gpt4moe import`, `export` and `evaluate --golden`: flags in, a document and its text out.

What knows gin is handed in: `build` makes (`RunConfig`, its text) of gin files, `saved` of a work directory.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from gpt4moe.config.mesh import MeshConfig
from gpt4moe.interop import foreign_checkpoint, golden, mixtral_config

RUN_FILE = "gin_configs/run/imported.gin"
MEGABYTE = 10**6
Answer = tuple[dict[str, Any], Callable[[Mapping[str, Any]], str]]


def answer(args: argparse.Namespace, build: Callable, saved: Callable, progress: Callable[[str], None]) -> Answer:
    """Returns what the command's flags ask for, and how it is printed."""
    if args.command == "import":
        return _import(args, build, progress)
    run, _ = saved(args.workdir)
    if args.command == "export":
        shard_bytes = args.shard_megabytes * MEGABYTE
        given = {"step": args.step, "dtype": args.dtype, "shard_bytes": shard_bytes}
        made = foreign_checkpoint.export_checkpoint(run, args.workdir, args.target, **given)
        return dataclasses.asdict(made), format_exported
    mesh = MeshConfig(args.mesh, stage_layers=args.stage_layers)
    result = golden.compare(run, args.workdir, args.golden, step=args.step, mesh=mesh)
    return dataclasses.asdict(result), golden.format_comparison


def _import(args: argparse.Namespace, build: Callable, progress: Callable[[str], None]) -> Answer:
    foreign_checkpoint.require_free(args.workdir)
    foreign = foreign_checkpoint.read_config(args.source)
    macros = mixtral_config.macros(foreign) | foreign_checkpoint.macros(foreign, args.source, args.workdir)
    overrides = [f"{name}={value}" for name, value in macros.items()]
    run, text = build(args.gin_file or [RUN_FILE], [*overrides, *args.overrides], args.gin_search_paths)
    made = foreign_checkpoint.import_checkpoint(run, text, args.source, args.workdir, args.dtype)
    for note in made.notes:
        progress(note)
    return dataclasses.asdict(made), format_imported


def format_imported(document: Mapping[str, Any]) -> str:
    """Returns what `import` prints."""
    counts = f"{document['tensors']:,} tensors, {document['parameters']:,} parameters, stored in"
    return f"{counts} {', '.join(document['dtypes'])}\nwork directory: {document['workdir']}"


def format_exported(document: Mapping[str, Any]) -> str:
    """Returns what `export` prints."""
    counts = f"step {document['step']:,}: {document['tensors']:,} tensors, {document['parameters']:,} parameters in"
    return f"{counts} {', '.join(document['dtypes'])}\n{document['folder']}: {', '.join(document['files'])}"
