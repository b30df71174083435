"""What benchmarks answer at once; their numbers are measured by hand (benchmarks/results/, experiments/LOG.md)."""

import importlib.util
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


def answer(script, *words):
    command = [sys.executable, f"benchmarks/{script}", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("script", ["train_step.py", "moe_layer.py", "vision_data.py"])
def test_help_says_what_is_measured(script):
    said = answer(script, "--help")
    assert said.returncode == 0
    assert "python benchmarks/" in said.stdout and "--json" in said.stdout


def test_peers_that_are_not_installed_are_one_line():
    if importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
        pytest.skip("the extra [bench] is installed")
    said = answer("train_step.py", "--peers")
    assert said.returncode == 2
    assert said.stderr.strip().splitlines()[-1].endswith("pip install -e '.[bench]'")


def test_a_backend_that_is_not_here_is_one_line():
    said = answer("moe_layer.py", "--backend=gpu")
    assert said.returncode == 2
    assert "--backend=gpu: JAX sees cpu here" in said.stderr
