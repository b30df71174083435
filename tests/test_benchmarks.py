"""What benchmarks answer at once; their numbers are measured by hand (benchmarks/results/, experiments/LOG.md)."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


def answer(script, *words):
    command = [sys.executable, f"benchmarks/{script}", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


SCRIPTS = [
    *("train_step.py", "moe_layer.py", "vision_data.py", "decode.py", "decode_gpu.py", "serve.py", "speculative.py"),
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_says_what_is_measured(script):
    said = answer(script, "--help")
    assert said.returncode == 0
    assert "python benchmarks/" in said.stdout and "--json" in said.stdout


@pytest.mark.parametrize(
    ("flag", "message"),
    [("--digits=0", "at least 1"), ("--pages=-1", "at least 1"), ("--steps=-1", "at least 0")]
    + [(f"--seconds={value}", "above 0") for value in ("0", "-1", "nan", "inf")],
)
def test_counts_of_images_that_cannot_be_meant_are_one_line(flag, message):
    said = answer("vision_data.py", flag)
    assert said.returncode == 2
    assert said.stderr.strip().splitlines()[-1].partition(": error: ")[2].startswith(f"{flag.partition('=')[0]}=")
    assert message in said.stderr


def test_images_are_measured_however_few():
    said = answer("vision_data.py", "--digits=1", "--pages=1", "--seconds=0.001", "--steps=0", "--json")
    assert said.returncode == 0, said.stderr
    assert json.loads(said.stdout)["digits/images_per_second/0_threads"] > 0


@pytest.mark.parametrize("script", ["train_step.py", "decode.py"])
def test_peers_that_are_not_installed_are_one_line(script):
    if importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
        pytest.skip("the extra [bench] is installed")
    said = answer(script, "--peers")
    assert said.returncode == 2
    assert said.stderr.strip().splitlines()[-1].endswith("pip install -e '.[bench]'")


def test_a_backend_that_is_not_here_is_one_line():
    said = answer("moe_layer.py", "--backend=gpu")
    assert said.returncode == 2
    assert "--backend=gpu: JAX sees cpu here" in said.stderr
