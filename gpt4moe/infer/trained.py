"""A trained model from its work directory: parameters, tokenizer and configuration, ready to generate or evaluate."""

from __future__ import annotations

import dataclasses
import os

from etils import epath
from flax import nnx

from gpt4moe import checkpoint
from gpt4moe.config.check import require
from gpt4moe.config.mesh import MeshConfig
from gpt4moe.config.run import RunConfig
from gpt4moe.data.store import TOKENIZER_FILE
from gpt4moe.data.tokenizer import Tokenizer, named_tokenizer
from gpt4moe.model.transformer import Transformer
from gpt4moe.parallel.layout import make_layout
from gpt4moe.parallel.mesh import make_mesh
from gpt4moe.parallel.sharding import laid_out_shapes, state_shardings


@dataclasses.dataclass(frozen=True)
class Trained:
    """What `gpt4moe.load` returns: the model with the parameters of `step`, its tokenizer and its configuration.

    The tokenizer is None where weights were imported without one.
    """

    model: Transformer
    tokenizer: Tokenizer | None
    config: RunConfig
    step: int
    workdir: str


def restore(
    config: RunConfig, workdir: str | os.PathLike, *, step: int | None = None, mesh: MeshConfig | None = None
) -> Trained:
    """Returns the model of a run at `step` (None: the latest checkpoint), on the default device or over `mesh`.

    Raises `CallerError` where the work directory holds no such checkpoint, or one of another model.
    """
    workdir = os.fspath(workdir)
    step = checkpoint.latest_step(workdir) if step is None else step
    saved = checkpoint.saved_steps(workdir)
    require(step in saved, "--step", step, f"is not saved in {workdir}", f"choose one of {saved}")
    over = mesh.for_generation() if mesh else MeshConfig()
    devices = make_mesh(over)
    config.check_dims(dict(devices.shape))
    layout = make_layout(config.model, over, config.rules, devices)
    blank = nnx.eval_shape(lambda: Transformer(config.model, rngs=nnx.Rngs(0), layout=layout))
    definition, shapes = nnx.split(blank)
    abstract = laid_out_shapes(shapes, state_shardings(shapes, devices, config.rules))
    params = checkpoint.restore(workdir, step, {"params": abstract}, layer_order=layout.slots)["params"]
    path = epath.Path(workdir) / TOKENIZER_FILE
    tokenizer = named_tokenizer(path.read_text(), config.data.tokenizer) if path.exists() else None
    return Trained(nnx.merge(definition, params), tokenizer, config, step, workdir)
