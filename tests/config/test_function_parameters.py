"""Functions of one's own take parameters from gin, which are part of what a run is."""

import pytest

from gpt4moe.configure import build_run
from gpt4moe.data import sources
from gpt4moe.sweep.cells import address
from gpt4moe.train.resume import differences, settings

MODULE = """
def router(logits_UE, inputs, config, temperature=1.0):
    return temperature


def plain(logits_UE, inputs, config):
    return None
"""
GIN = """from __gin__ import dynamic_registration
import my_own_router
include "gin_configs/run/tiny.gin"
ROUTER = @my_own_router.router
my_own_router.router.temperature = 2.0
"""


@pytest.fixture
def gin_file(tmp_path, monkeypatch):
    (tmp_path / "my_own_router.py").write_text(MODULE)
    (tmp_path / "run.gin").write_text(GIN)
    monkeypatch.syspath_prepend(tmp_path)
    return str(tmp_path / "run.gin")


def test_parameters_stay_with_the_run_they_were_bound_for(gin_file):
    first, _ = build_run([gin_file])
    second, _ = build_run([gin_file], ["my_own_router.router.temperature=3.0"])
    assert (first.model.moe.router(0, 0, 0), second.model.moe.router(0, 0, 0)) == (2.0, 3.0)
    assert first.model.moe.router.__name__ == "router"


def test_a_saved_configuration_has_the_parameters(gin_file, tmp_path):
    run, text = build_run([gin_file], ["my_own_router.router.temperature=3.0"])
    (tmp_path / "config.gin").write_text(text)
    again, same = build_run([str(tmp_path / "config.gin")])
    assert again.model.moe.router(0, 0, 0) == 3.0 and same == text
    assert address(again) == address(run)


def test_a_saved_configuration_reads_the_macros_of_parameters(gin_file, tmp_path):
    with open(gin_file, "a") as file:
        file.write("TEMPERATURE = 2.0\nmy_own_router.router.temperature = %TEMPERATURE\n")
    _, text = build_run([gin_file], ["TEMPERATURE=3.0"])
    (tmp_path / "config.gin").write_text(text)
    again, same = build_run([str(tmp_path / "config.gin")], ["TEMPERATURE=4.0"])
    assert again.model.moe.router(0, 0, 0) == 4.0 and "temperature = %TEMPERATURE" in same


def test_another_parameter_is_another_run(gin_file):
    first, _ = build_run([gin_file])
    second, _ = build_run([gin_file], ["my_own_router.router.temperature=3.0"])
    assert address(first) != address(second)
    (change,) = differences(settings(first), second)
    assert "router(temperature=2.0)" in change and "router(temperature=3.0)" in change
    plain, _ = build_run([gin_file], ["ROUTER=@my_own_router.plain"])
    assert settings(plain)["model.moe.router"] == "my_own_router.plain"


def test_two_uses_of_a_function_have_the_parameters_of_their_scopes(tmp_path):
    text = """from __gin__ import dynamic_registration
from gpt4moe.config import data
from gpt4moe.data import rendered
from gpt4moe.data import sources
include "gin_configs/run/tiny.gin"
include "gin_configs/variant/vision.gin"
data.DataConfig.sources = [@first/data.SourceConfig(), @prose/data.SourceConfig(), @plain/data.SourceConfig()]
data.SourceConfig.paths = ()
rendered.lines.width = 64
first/data.SourceConfig.name = "code"
first/data.SourceConfig.documents = @first/rendered.lines
first/rendered.lines.texts = @sources.stdlib_code
first/rendered.lines.count = 7
prose/data.SourceConfig.name = "prose"
prose/data.SourceConfig.documents = @prose/rendered.lines
prose/rendered.lines.texts = @sources.stdlib_manual
plain/data.SourceConfig.name = "plain"
plain/data.SourceConfig.documents = @rendered.lines
"""
    (tmp_path / "run.gin").write_text(text)
    run, saved = build_run([str(tmp_path / "run.gin")])
    code, prose, plain = (source.documents.keywords for source in run.data.sources)
    assert code == {"width": 64, "texts": sources.stdlib_code, "count": 7}
    assert prose == {"width": 64, "texts": sources.stdlib_manual} and plain == {"width": 64}
    (tmp_path / "config.gin").write_text(saved)
    assert address(build_run([str(tmp_path / "config.gin")])[0]) == address(run)


def test_a_decorator_of_ones_own_stays(tmp_path, monkeypatch):
    cold = """
import functools
def cold(function):
    @functools.wraps(function)
    def colder(*args, **kwargs):
        return -function(*args, **kwargs)
    return colder
router = cold(router)
"""
    (tmp_path / "my_cold_router.py").write_text(MODULE + cold)
    (tmp_path / "run.gin").write_text(GIN.replace("my_own_router", "my_cold_router"))
    monkeypatch.syspath_prepend(tmp_path)
    run, _ = build_run([str(tmp_path / "run.gin")])
    assert run.model.moe.router(0, 0, 0) == -2.0
