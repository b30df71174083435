"""`gpt4moe serve`: a trained run made an engine and a server of it, by the flags of the command line."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable

from gpt4moe.config.engine import EngineConfig
from gpt4moe.config.mesh import MeshConfig
from gpt4moe.config.serve import ServeConfig
from gpt4moe.data.tokenizer import Tokenizer
from gpt4moe.infer import served
from gpt4moe.infer.engine.compilation import keep_programs
from gpt4moe.infer.served import engine_config, given
from gpt4moe.infer.trained import Trained
from gpt4moe.serve import server
from gpt4moe.serve.chat_template import find_template
from gpt4moe.serve.service import Service

ENGINE_STOPPED = 1
KEY_VARIABLE = "GPT4MOE_API_KEY"


def run(
    args: argparse.Namespace, mesh: MeshConfig, load: Callable[..., Trained], progress: Callable[[str], None]
) -> int:
    """Serves until it is told to end, and returns the exit code; says on standard output where, once it does.

    load: the trained model of a work directory, laid over `mesh`, as this lays the decoder. Raises `CallerError` for
    settings that cannot be, before anything slow where that is known by then.
    """
    config, of_engine = configs(args)
    with server.bind(config) as listening:
        if args.compile_cache:
            keep_programs(args.compile_cache)  # before the first program: JAX takes no other folder later
        ready = served.prepare(load, args, of_engine, mesh)
        engine, tokenizer = ready.engine, ready.tokenizer
        names = [_name_of(tokenizer, token) for token in (tokenizer.begin_of_text, tokenizer.end_of_text)]
        reads_images = ready.images is not None
        template = find_template(args.workdir, config.chat_template, *names, reads_images=reads_images)
        progress("compiling what serving needs")
        engine.warm_up(progress)
        listening.listen()  # who reads the address may call at once
        service = Service(engine, tokenizer, config, template, ready.images)
        _announce(args, service, server.address(listening), ready.step)
        server.serve(service, listening, progress)
    if engine.fault is not None:
        progress(f"the engine has stopped: {engine.fault}")
        return ENGINE_STOPPED
    return 0


def configs(args: argparse.Namespace) -> tuple[ServeConfig, EngineConfig]:
    """What is served, and the engine, each from the flags that bear the names of its fields."""
    folder = os.path.basename(os.path.normpath(args.workdir))
    defaults = {"model_name": folder or ServeConfig.model_name, "api_key": os.environ.get(KEY_VARIABLE)}
    return ServeConfig(**defaults | given(args, ServeConfig)), engine_config(args)


def _announce(args: argparse.Namespace, service: Service, url: str, step: int) -> None:
    name, length = service.config.model_name, service.engine.max_length
    if args.json:
        print(json.dumps({"url": url, "model": name, "step": step, "max_length": length}))
    else:
        print(f"serving {name}, step {step:,}, context {length:,}, at {url}")
    sys.stdout.flush()


def _name_of(tokenizer: Tokenizer, token: int) -> str:
    named = [name for name, index in tokenizer.specials.items() if index == token]
    return named[0] if named else ""
