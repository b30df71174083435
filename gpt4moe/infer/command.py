"""`gpt4moe generate`: flags in, a document and its text out; or a file of requests in, its lines out.

What knows gin is handed in: `load` gives a `Trained` of a work directory.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

from gpt4moe.config.check import require
from gpt4moe.config.engine import EngineConfig
from gpt4moe.config.mesh import MeshConfig
from gpt4moe.config.sampling import SamplingConfig
from gpt4moe.infer import requests, served
from gpt4moe.infer.generate import generate
from gpt4moe.infer.pictures import read_picture, require_file
from gpt4moe.infer.served import given
from gpt4moe.infer.spelled import spell

FLAGS = ("temperature", "top_k", "top_p", "max_new_tokens", "seed")


def answer(
    args: argparse.Namespace, load: Callable, progress: Callable[[str], None]
) -> tuple[dict[str, Any], Callable[[Any], str]] | None:
    """Returns what the flags ask for and how it is printed; None where the lines of a file are written already."""
    sampling = SamplingConfig(**{name: getattr(args, name) for name in FLAGS})
    mesh = MeshConfig(args.mesh, stage_layers=args.stage_layers)
    if args.requests:
        return _serve(args, sampling, mesh, load, progress)
    return _continue(args, sampling, mesh, load)


def _continue(args: argparse.Namespace, sampling: SamplingConfig, mesh: MeshConfig, load: Callable) -> tuple:
    engine = given(args, EngineConfig) | {name: getattr(args, name) for name in ("quantize", "draft_workdir")}
    for name, value in {"output": args.output, **engine}.items():
        require(not value, f"--{name}", value, "goes with --requests")
    prompts, pictures = args.prompt or [""], ()
    _check_images(args, prompts)  # before a model is loaded, which takes a while
    trained = load(args.workdir, step=args.step, mesh=mesh)
    if args.image:
        pictures = [[read_picture(path, trained.config.data.images) for path in args.image]]
    if args.spell:
        texts = [trained.tokenizer.decode(ids) for ids in spell(trained.model, pictures[0])]
        return {"step": trained.step, "spelled": texts}, lambda _: "\n\n".join(texts)
    generations, timing = generate(trained.model, trained.tokenizer, prompts, sampling, pictures)
    samples = [dataclasses.asdict(item) for item in generations]
    document = {"step": trained.step, "samples": samples, "timing": dataclasses.asdict(timing)}
    return document, lambda _: "\n\n".join(item.prompt + item.text for item in generations)


def _check_images(args: argparse.Namespace, prompts: list[str]) -> None:
    alone, mend = not args.image or len(prompts) == 1, "give the command once for each"
    require(alone, "--image", args.image, f"goes with one prompt, not {len(prompts)}", mend)
    for path in args.image:
        require_file(path)
    if args.spell:
        require(bool(args.image), "--spell", True, "goes with --image")
        require(prompts == [""], "--prompt", prompts[0], "has no meaning with --spell, which writes what it sees")


def _serve(
    args: argparse.Namespace,
    defaults: SamplingConfig,
    mesh: MeshConfig,
    load: Callable,
    progress: Callable[[str], None],
) -> tuple | None:
    require(not args.image, "--image", args.image, "goes with --prompt", "name images in the lines of --requests")
    require(not args.spell, "--spell", args.spell, "goes with --image, not with --requests")
    folder = pathlib.Path(args.output or "").parent
    require(folder.is_dir(), "--output", args.output, f"lies in {folder}, which is no folder", "make it first")
    asked = requests.read_requests(args.requests, defaults)
    ready = served.prepare(functools.partial(load, mesh=mesh), args, served.engine_config(args), mesh)
    made = requests.run_requests(ready.engine, asked, ready.images, progress)
    if args.json:
        return {"step": ready.step, "requests": list(made)}, str
    requests.write_lines(made, args.output)
    return None
