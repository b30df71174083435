"""A found layout as our trainer's configuration: applied to a run, read back from one, and written as a gin run file.

In: a `RunConfig` and a `search.Costed` of the space "ours". Out: a `RunConfig`, a `Layout`, or the text of a file that
includes the run's own files and sets mesh, microbatches, recomputation, batch and save interval.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re
from collections.abc import Mapping, Sequence

from gpt4moe.accounting.chips import Chip
from gpt4moe.config.check import CallerError
from gpt4moe.config.mesh import MESH_AXES, MeshConfig
from gpt4moe.config.run import RunConfig
from gpt4moe.plan.search.layouts import OUR_SCHEDULE
from gpt4moe.plan.search.ranking import Costed
from gpt4moe.plan.training.layout import Layout

# What `Layout.remat` is called in `ModelConfig.remat`, and the other way: our attention core computes its scores again
# by itself.
REMAT = {"none": "none", "selective": "none", "dots": "dots", "full": "full"}
REMAT_OF_RUN = {"none": "selective", "dots": "dots", "full": "full"}


def applied(run: RunConfig, item: Costed) -> RunConfig:
    """Returns the run with the layout's mesh, microbatches, recomputation and batch; raises where it cannot be one."""
    layout, train = item.layout, run.train
    ramp = (*train.ramp[:-1], (train.ramp[-1][0], item.batch_tokens))
    batch_tokens = ramp if len(ramp) > 1 else item.batch_tokens
    return dataclasses.replace(
        run,
        mesh=mesh_of(item),
        train=dataclasses.replace(train, batch_tokens=batch_tokens, microbatch_rows=rows_of_a_pass(item)),
        model=dataclasses.replace(run.model, remat=REMAT[layout.remat]),
    )


def mesh_of(item: Costed) -> MeshConfig:
    """Returns the mesh of a layout; outer axes lie over the slow links, where the fast ones do not reach all chips."""
    layout = item.layout
    sizes = axis_sizes(layout)
    several = layout.stage > 1
    return MeshConfig(
        axes=tuple((axis, size) for axis, size in sizes.items() if size > 1),
        dcn=tuple(slow_degrees(item.job.chip, sizes).items()),
        virtual_stages=layout.virtual_stages,
        stage_microbatches=_pieces(item) if several else None,
        zero1=layout.zero == 1 and sizes["data"] > 1,
        sequence_parallel=layout.sequence_parallel and layout.tensor > 1,
    )


def axis_sizes(layout: Layout) -> dict[str, int]:
    """Returns the sizes of our mesh's axes: the layout's replicas are data * fsdp * expert."""
    fsdp = layout.zero_group if layout.zero == 3 else 1
    data = layout.data // (layout.expert * fsdp)
    sizes = {"data": data, "fsdp": fsdp, "stage": layout.stage, "expert": layout.expert}
    return sizes | {"context": layout.context, "tensor": layout.tensor}


def slow_degrees(chip: Chip, sizes: Mapping[str, int]) -> dict[str, int]:
    """Returns the degrees that span domains of fast links, one filled by the innermost axes; none where none is."""
    left, slow = chip.network.domain_chips if chip.network else 1, {}
    for axis in reversed(MESH_AXES):
        inside = math.gcd(sizes[axis], left)
        left //= inside
        if sizes[axis] > inside:
            slow[axis] = sizes[axis] // inside
    return dict(reversed(slow.items())) if left == 1 else {}


def rows_of_a_pass(item: Costed) -> int:
    """Returns `MICROBATCH_ROWS`: the rows that go through the model at once, a pipeline's microbatches all together."""
    layout = item.layout
    return layout.data * layout.microbatch_rows * (_pieces(item) if layout.stage > 1 else 1)


def _pieces(item: Costed) -> int:
    return item.layout.microbatches(item.batch_rows) // item.layout.passes


def layout_of(run: RunConfig, num_chips: int, batch_tokens: int | None = None) -> Layout:
    """Returns the layout of a run on so many chips, for a batch of its ramp, None: the largest.

    Raises where the mesh spans another number of chips.
    """
    sizes = run.mesh.sizes(num_chips)
    run.check_sizes(sizes)
    data = sizes["data"] * sizes["fsdp"] * sizes["expert"]
    several, sharded = sizes["stage"] > 1, sizes["fsdp"] > 1
    pieces = run.stage_microbatches(sizes) if several else 1
    batch_rows = (batch_tokens or run.train.ramp[-1][1]) // run.data.sequence_length
    group = sizes["fsdp"] if sharded else sizes["data"]
    return Layout(
        sizes["tensor"],
        sizes["context"],
        sizes["stage"],
        run.mesh.virtual_stages,
        sizes["expert"],
        sizes["tensor"],
        data,
        3 if sharded else int(run.mesh.zero1),
        group,
        run.microbatch_rows // (data * pieces),
        REMAT_OF_RUN[run.model.remat],
        run.mesh.sequence_parallel,
        OUR_SCHEDULE,
        batch_rows // run.microbatch_rows if several else 1,
        group,
    )


def export_text(
    item: Costed, run: RunConfig, checkpoint_every: int, gin_files: Sequence[str], overrides: Sequence[str] = ()
) -> str:
    """Returns a gin run file that trains `run` in this layout; raises for an override that a file cannot hold."""
    new = applied(run, item)
    batch = new.train.batch_tokens
    mesh = {
        name: getattr(new.mesh, name)
        for name in ("virtual_stages", "stage_microbatches", "zero1", "sequence_parallel")
        if getattr(new.mesh, name) != MeshConfig.__dataclass_fields__[name].default
    }
    mesh |= {"dcn": dict(new.mesh.dcn)} if new.mesh.dcn else {}
    kept = [override.replace("=", " = ", 1) for override in overrides]
    lines = [
        *_heading(item),
        "from __gin__ import dynamic_registration",
        "",
        *sorted({"from gpt4moe.config import model", *_imports(overrides)} | _mesh_import(mesh)),
        "",
        *(f'include "{path}"' for path in (*gin_files, "gin_configs/mesh/reset.gin")),
        "",
        *kept,
        f"MESH = {dict(new.mesh.axes)}".replace("'", '"'),
        f"BATCH_TOKENS = {batch if isinstance(batch, int) else list(batch)}",
        f"MICROBATCH_ROWS = {new.train.microbatch_rows}",
        f"CHECKPOINT_EVERY = {checkpoint_every}",
        "",
        f'model.ModelConfig.remat = "{new.model.remat}"',
        *(f"mesh.MeshConfig.{name} = {value}".replace("'", '"') for name, value in mesh.items()),
    ]
    return "\n".join(lines) + "\n"


def _heading(item: Costed) -> list[str]:
    there, machine = item.memory, f"{item.layout.chips:,} x {item.job.chip.name}"
    return [
        f"# Question: what does a step cost in the layout that gpt4moe plan search found for {machine}?",
        "#   gpt4moe train --gin_file=THIS_FILE --workdir=runs/planned",
        f"# Hardware: {machine}. Expect, predicted and not measured: {item.step.seconds:.3g} s a step of",
        f"# {item.batch_tokens:,} tokens, {item.step.model_flops_utilization:.1%} of the peak,"
        f" {there.total_bytes / 1e9:.1f} of {there.chip_bytes / 1e9:.1f} GB a chip.",
    ]


def _mesh_import(mesh: Mapping[str, object]) -> set[str]:
    return {"from gpt4moe.config import mesh"} if mesh else set()


def _imports(overrides: Sequence[str]) -> set[str]:
    """What the overrides name: modules of configurations, and routers."""
    found = set()
    for override in overrides:
        name, _, value = override.partition("=")
        names = [name.rpartition("/")[2], *re.findall(r"@([\w./]+)", value)]
        for module in {each.partition(".")[0] for each in names if "." in each}:
            folder = next((folder for folder in ("config", "model") if _exists(f"gpt4moe.{folder}.{module}")), None)
            if folder is None:
                mend = "bind it in a gin file of your own and give that"
                raise CallerError(f"--gin.{override} names {module!r}, which an exported file does not import; {mend}")
            found.add(f"from gpt4moe.{folder} import {module}")
    return found


def _exists(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
