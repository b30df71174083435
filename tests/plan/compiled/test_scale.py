"""The document of compiled programs says what the results say, and the results what their runs are."""

import re
import types

import numpy as np
import pytest

from benchmarks import scale
from gpt4moe.configure import build_compile
from gpt4moe.plan.compiled import expected, work

RESULTS = scale.read_results()


def test_the_document_shows_the_results():
    document = scale.DOCUMENT.read_text()
    assert scale.with_tables(document, scale.tables(RESULTS)) == document, "run python benchmarks/scale.py --write"


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_keeps_the_bounds(name):
    result = RESULTS[name]
    assert result["fits"] and result["total_bytes"] <= result["memory_bytes"]
    assert result["compiled_over_executed"] == pytest.approx(1, abs=0.05)
    assert {"jax", "libtpu"} <= result["versions"].keys()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", result["date"])


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_is_of_its_run_as_it_stands(name):
    """Its mesh, and every number that the analysis of the run file sets beside the compiled products."""
    result, (run, config) = RESULTS[name], build_compile([f"gin_configs/run/{name}.gin"])
    assert (result["topology"], result["slices"]) == (config.topology, config.slices)
    sizes = run.mesh.sizes(result["chips"])
    assert result["mesh"] == {axis: size for axis, size in sizes.items() if size > 1}
    # What the analysis asks of a mesh, where there is no compiler that knows the machine.
    chip = types.SimpleNamespace(platform="tpu")
    mesh = types.SimpleNamespace(shape=sizes, size=result["chips"], devices=np.array([chip]))
    counted = work.Work(tuple(work.Products(**item) for item in result["products"]), (), 0.0, ())
    beside = expected.beside(run, config, mesh, result["program"], counted)
    parts = beside.pop("executed_flops")
    assert result["executed_flops"] == pytest.approx(parts, rel=1e-9)
    assert {key: result[key] for key in beside} == pytest.approx(beside, rel=1e-9)


def test_the_reference_trains_on_at_most_2048_chips_and_decodes_on_128():
    assert RESULTS["gpt4_1p8t_v5p"]["chips"] <= 2048
    assert RESULTS["gpt4_1p8t_v5p_decode"]["chips"] == 128
