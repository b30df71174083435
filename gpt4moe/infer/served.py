"""A trained run made an engine: by flags, over a mesh, with another run that proposes tokens to it."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable

from gpt4moe.config.check import require
from gpt4moe.config.data import ImageConfig
from gpt4moe.config.engine import EngineConfig
from gpt4moe.config.mesh import MeshConfig
from gpt4moe.data.store import TOKENIZER_FILE
from gpt4moe.data.tokenizer import Tokenizer
from gpt4moe.infer import stages
from gpt4moe.infer.codec import required
from gpt4moe.infer.decoder import Decoder
from gpt4moe.infer.engine.engine import Engine
from gpt4moe.infer.trained import Trained

# As many as the reference is said to propose.
DRAFT_TOKENS = 4


@dataclasses.dataclass(frozen=True)
class Served:
    """An engine, and of its run the tokenizer, how images are fitted (None: it reads none) and the step."""

    engine: Engine
    tokenizer: Tokenizer
    images: ImageConfig | None
    step: int


def given(args: argparse.Namespace, kind: type) -> dict:
    """The fields of a configuration that flags of their names set."""
    names = [field.name for field in dataclasses.fields(kind)]
    return {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """The engine that the flags ask for."""
    fields = given(args, EngineConfig)
    if args.draft_workdir is not None:
        fields.setdefault("draft_tokens", DRAFT_TOKENS)
    return EngineConfig(**fields)


def prepare(load: Callable[..., Trained], args: argparse.Namespace, config: EngineConfig, mesh: MeshConfig) -> Served:
    """The run of `args.workdir`, ready to serve, and nothing kept of its parameters in float32.

    load: the trained model of a work directory at a step, laid over the mesh. Raises `CallerError` for what does not go
    together, before anything is loaded where that is known by then.
    """
    stages.check_axes(mesh)
    alone = args.draft_workdir is None or not mesh.axes
    require(alone, "--draft_workdir", args.draft_workdir, "does not go with --mesh", "leave one out")
    as_decoded = {"dtype": "float32" if config.deterministic else None, "quantize": args.quantize}
    trained = load(args.workdir, step=args.step)
    tokenizer, images, step = required(trained.tokenizer), trained.config.data.images, trained.step
    decoders = stages.cut(Decoder.of(trained.model, **as_decoded), mesh)
    del trained  # pages need the room
    draft = None
    if args.draft_workdir is not None:
        smaller = load(args.draft_workdir)
        same = smaller.tokenizer is not None and smaller.tokenizer.serialized == tokenizer.serialized
        mend = f"train it with --gin.TokenizerConfig.path=\"'{args.workdir}/{TOKENIZER_FILE}'\""
        require(same, "--draft_workdir", args.draft_workdir, "must have the tokenizer of --workdir", mend)
        draft = Decoder.of(smaller.model, **as_decoded)
    return Served(Engine(decoders, tokenizer, config, draft=draft), tokenizer, images, step)
