"""The document of compiled programs says what the results say, and the results what their runs are."""

import re

import pytest

from benchmarks import scale
from gpt4moe.configure import build_run

RESULTS = scale.read_results()


def test_the_document_shows_the_results():
    document = scale.DOCUMENT.read_text()
    assert scale.with_tables(document, scale.tables(RESULTS)) == document, "run python benchmarks/scale.py --write"


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_is_of_its_run_as_it_stands_and_keeps_the_bounds(name):
    result, (run, _) = RESULTS[name], build_run([f"gin_configs/run/{name}.gin"])
    assert result["mesh"] == {axis: size for axis, size in run.mesh.sizes(result["chips"]).items() if size > 1}
    assert result["fits"] and result["total_bytes"] <= result["memory_bytes"]
    assert result["compiled_over_executed"] == pytest.approx(1, abs=0.05)
    assert {"jax", "libtpu"} <= result["versions"].keys()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", result["date"])


def test_the_reference_trains_on_at_most_2048_chips_and_decodes_on_128():
    assert RESULTS["gpt4_1p8t_v5p"]["chips"] <= 2048
    assert RESULTS["gpt4_1p8t_v5p_decode"]["chips"] == 128
