"""`gpt4moe plan calibrate`: constants that are known are found, noise is refused, our own runs are read."""

import dataclasses
import json
import random

import pytest

from gpt4moe.config.check import CallerError
from gpt4moe.configure import build_run
from gpt4moe.launch import main
from gpt4moe.plan.published import calibrate, calibration, own_runs
from gpt4moe.plan.published.calibrate import Sample
from gpt4moe.plan.published.comparison import compare_all
from gpt4moe.plan.published.measurements import PUBLISHED_RUNS, read_rows
from gpt4moe.plan.search import gin_export
from gpt4moe.plan.training import step_time
from gpt4moe.plan.training.layout import Layout
from gpt4moe.plan.training.stacks import Stack
from tests.plan.published.test_measurements import write


def _samples(truth, rows=16, noise=0.0, seed=0):
    """Steps whose parts differ and whose measured times are the parts times the true factors."""
    chance = random.Random(seed)
    found = []
    for index in range(rows):
        kinds = {kind: chance.uniform(0.2, 1) for kind in step_time.KINDS}
        seconds = sum(kinds[kind] * truth[kind] for kind in kinds) * (1 + noise * chance.gauss(0, 1))
        found.append(Sample(f"row {index}", "mine/h100", kinds, seconds, index))
    return found


def test_one_slow_stack_is_one_scalar():
    found = calibrate.examine(_samples(dict.fromkeys(step_time.KINDS, 1.3)))["stacks"]["mine/h100"]
    assert (found["constants"], found["rows"]) == (1, 16)
    assert found["seconds_scale"] == pytest.approx(1.3)
    assert found["left_out_error"] == pytest.approx(0, abs=1e-9)
    assert found["error_before"] == pytest.approx(1 - 1 / 1.3)


def test_a_slow_network_is_told_from_slow_arithmetic():
    truth = {"compute": 1.1, "memory": 1.1, "idle": 1.1, "communication": 3.0}
    found = calibrate.examine(_samples(truth))["stacks"]["mine/h100"]
    assert found["constants"] == 2
    assert found["communication_scale"] == pytest.approx(3.0, rel=0.05)
    assert found["compute_scale"] == pytest.approx(1.1, rel=0.05)
    assert found["left_out_error"] < 0.01 < found["error_before"]


def test_noise_is_not_fitted():
    found = calibrate.examine(_samples(dict.fromkeys(step_time.KINDS, 1.3), noise=0.1))["stacks"]["mine/h100"]
    assert found["constants"] == 1 and set(found["refused"]) == {"2", "3", "4"}
    assert "with fewer constants" in found["refused"]["2"]


def test_what_is_asked_for_and_is_too_much():
    few = _samples(dict.fromkeys(step_time.KINDS, 1.3), rows=7)
    with pytest.raises(
        CallerError, match="--constants=2 is refused for mine/h100: 2 constants need 8 rows, 7 are there"
    ):
        calibrate.examine(few, constants=2)
    noisy = _samples(dict.fromkeys(step_time.KINDS, 1.3), noise=0.1)
    with pytest.raises(CallerError, match=r"--constants=4 is refused .* rows left out are .* off"):
        calibrate.examine(noisy, constants=4)
    with pytest.raises(CallerError, match=r"--stack='no/such' must be in \['mine/h100'\]"):
        calibrate.examine(few, stack="no/such")
    with pytest.raises(CallerError, match="measured training steps=0 must be at least one"):
        calibrate.examine([])


def test_one_row_tells_no_error():
    (sample,) = _samples(dict.fromkeys(step_time.KINDS, 2.0), rows=1)
    document = calibrate.examine([sample]) | {"source": "here"}
    found = document["stacks"]["mine/h100"]
    assert found["seconds_scale"] == pytest.approx(2.0) and found["left_out_error"] is None
    assert "one row" in calibrate.format_document(document)


def test_one_job_told_twice_is_one_row():
    one, two = _samples(dict.fromkeys(step_time.KINDS, 1.3), rows=2)
    twice = [one, Sample("again", one.stack, one.predicted_seconds, one.measured_seconds, one.job)]
    assert calibrate.examine(twice)["stacks"]["mine/h100"]["left_out_error"] is None
    assert calibrate.examine([*twice, two])["stacks"]["mine/h100"]["left_out_error"] is not None


def test_the_file_goes_round(tmp_path, capsys):
    """Constants fitted to a file bring its errors down, and a stack takes them."""
    rows = [
        {"name": f"mine-{index}", "dp": dp, "gpus": 8 * dp, "value": 300 / dp} for index, dp in enumerate((1, 2, 4))
    ]
    csv, out = write(tmp_path / "rows.csv", *rows), tmp_path / "constants.json"
    assert main(["plan", "calibrate", "--csv", str(csv), "--out", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["stacks"]["mine/a100_80"]
    entries = calibration.read_calibration(out)
    assert entries["mine/a100_80"].seconds_scale == pytest.approx(told["seconds_scale"]) != 1.0
    scaled = calibration.calibrated(Stack("mine"), "a100_80", entries)
    assert scaled.seconds_scale == told["seconds_scale"]
    assert calibration.calibrated(Stack("other"), "a100_80", entries) == Stack("other")
    errors = []
    for flags in ([], ["--calibration", str(out)]):
        assert main(["plan", "validate", "--csv", str(csv), "--json", *flags]) == 0
        errors.append(json.loads(capsys.readouterr().out)["overall"]["bias"])
    assert abs(errors[1]) < 0.1 * abs(errors[0])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("no", "is not JSON"),
        ("{}", "has no format 'gpt4moe calibration 1'"),
        (
            '{"format": "gpt4moe calibration 1", "stacks": {"a/b": {"seconds_scale": "much"}}}',
            "a/b: seconds_scale='much' must be a number of at least 0",
        ),
    ],
)
def test_a_file_that_is_no_calibration(tmp_path, text, says):
    path = tmp_path / "constants.json"
    path.write_text(text)
    with pytest.raises(CallerError, match=says) as caught:
        calibration.read_calibration(path)
    assert "\n" not in str(caught.value)


def _workdir(folder, seconds=(90.0, 2.0, 2.2, 2.4), utilization=0.5):
    """A work directory as the trainer leaves it: the first step compiles."""
    run, text = build_run(["gin_configs/run/tiny.gin"])
    folder.mkdir()
    (folder / "config.gin").write_text(text)
    (folder / "environment.json").write_text(json.dumps({"devices": ["cpu"]}))
    tokens = run.train.ramp[0][1]
    rows = [
        {"step": step, "batch_tokens": tokens, "step_seconds": each, "tokens_per_second": tokens / each}
        | {"model_flops_utilization": utilization * 2.2 / each}
        for step, each in enumerate(seconds, 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def test_a_run_of_ours_is_a_measurement(tmp_path, capsys):
    run = _workdir(tmp_path / "run")
    sample = own_runs.read_sample(tmp_path / "run", run)
    assert (sample.stack, sample.measured_seconds) == ("gpt4moe/cpu", 2.2)
    assert main(["plan", "calibrate", "--workdir", str(tmp_path / "run"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["stacks"]["gpt4moe/cpu"]
    assert found["seconds_scale"] == pytest.approx(2.2 / sum(sample.predicted_seconds.values()))


def test_twice_as_slow_a_run_has_twice_the_scalar(tmp_path):
    """The peak is the machine's, which utilisation was told against: half as fast at half the utilisation."""
    run = _workdir(tmp_path / "run")
    _workdir(tmp_path / "slow", seconds=(90.0, 4.4), utilization=0.5)
    fast, slow = (own_runs.read_sample(tmp_path / name, run) for name in ("run", "slow"))
    assert (1 + fast.error) / (1 + slow.error) == pytest.approx(2, rel=1e-6)


def test_work_directories_that_tell_nothing(tmp_path, capsys):
    run = _workdir(tmp_path / "run", seconds=(90.0,))
    with pytest.raises(CallerError, match="logs 1 steps with times; train at least two steps"):
        own_runs.read_sample(tmp_path / "run", run)
    (tmp_path / "run/metrics.jsonl").write_text("{\n")
    with pytest.raises(CallerError, match=r"metrics.jsonl, line 1: is not JSON"):
        own_runs.read_sample(tmp_path / "run", run)
    assert main(["plan", "calibrate", "--workdir", str(tmp_path / "none")]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert main(["plan", "calibrate", "--workdir", str(tmp_path / "run"), "--csv", "a.csv"]) == 2
    assert "goes without --workdir" in capsys.readouterr().err


def test_the_mesh_of_a_run_is_a_layout():
    """Rows lie over data, fsdp and expert; parameters that are no expert's over fsdp (config/rules.py)."""
    small = ["TRAIN_STEPS=2", "BATCH_TOKENS=4096", "SEQUENCE_LENGTH=64"]
    run, _ = build_run(["gin_configs/run/tiny.gin"], [*small, "MESH={'fsdp': 2, 'expert': 2, 'data': 2}"])
    layout = gin_export.layout_of(run, 8, 4096)
    assert layout == Layout(
        data=8,
        expert=2,
        zero=3,
        zero_group=2,
        expert_zero_group=2,
        microbatch_rows=8,
        remat="selective",  # the core computes its scores again by itself
        schedule="circular",
        sequence_parallel=False,
    )


def test_a_scalar_that_helps_no_other_row_is_refused():
    """One row is told too slow, one as much too fast: each would pull the other the wrong way."""
    slow = [
        dataclasses.replace(item, measured_seconds=item.measured_seconds * (1.1 if index else 1 / 1.2))
        for index, item in enumerate(_samples(dict.fromkeys(step_time.KINDS, 1.0), rows=2))
    ]
    found = calibrate.examine(slow)["stacks"]["mine/h100"]
    assert found["constants"] == 0 and found["seconds_scale"] == 1 and "without one" in found["refused"]["1"]
    assert found["left_out_error"] == found["error_before"]
    asked = calibrate.examine(slow, constants=1)["stacks"]["mine/h100"]
    assert asked["constants"] == 1 and asked["seconds_scale"] != 1


def test_a_part_far_from_the_whole_is_noise():
    truth = {"compute": 1.0, "memory": 0.1, "communication": 1.0, "idle": 1.0}
    found = calibrate.examine(_samples(truth))["stacks"]["mine/h100"]
    assert any("more than 4 times from the one scalar" in why for why in found["refused"].values())
    assert found["constants"] < 3


def test_rows_of_one_job_tell_no_constants():
    alike = [dataclasses.replace(item, job="one") for item in _samples(dict.fromkeys(step_time.KINDS, 1.3))]
    with pytest.raises(CallerError, match="all rows are of one job: none can be left out"):
        calibrate.examine(alike, constants=2)


def test_hours_of_whole_runs_are_no_steps():
    compared, _ = compare_all(read_rows(PUBLISHED_RUNS))
    assert sum(item.is_whole_run for item in compared) > 10
    names = {sample.name for sample in calibrate.samples_of(compared)}
    assert names == {item.row.name for item in compared if item.measured_seconds and not item.is_whole_run}


def test_a_constant_that_gains_little_is_refused():
    """Communication somewhat slower than the rest, under noise of 2 %: less than a twentieth of the error goes."""
    truth = dict.fromkeys(step_time.KINDS, 1.3) | {"communication": 1.34}
    samples = _samples(truth, rows=24, noise=0.02, seed=2)
    found = calibrate.examine(samples)["stacks"]["mine/h100"]
    errors = [calibrate._judged(samples, number)[1] for number in (1, 2)]
    assert 0.95 * errors[0] < errors[1] < errors[0]
    assert found["constants"] == 1 and "with fewer constants" in found["refused"]["2"]


@pytest.mark.parametrize(("number", "slow"), [(2, "communication"), (3, "memory"), (4, "idle")])
def test_each_group_of_kinds_is_found(number, slow):
    groups = calibrate.MODELS[number]
    assert len(groups) == number and sorted(kind for group in groups for kind in group) == sorted(step_time.KINDS)
    truth = dict.fromkeys(step_time.KINDS, 1.0) | {slow: 2.0}
    found = calibrate.examine(_samples(truth), constants=number)["stacks"]["mine/h100"]
    assert found[f"{slow}_scale"] == pytest.approx(2, rel=0.02) and found["compute_scale"] == pytest.approx(1, rel=0.02)


def test_errors_before_and_after():
    found = calibrate.examine(_samples(dict.fromkeys(step_time.KINDS, 1.3)))["stacks"]["mine/h100"]
    assert found["error_before"] == pytest.approx(1 - 1 / 1.3) and found["error_in_sample"] == pytest.approx(
        0, abs=1e-9
    )


def test_a_run_of_four_devices_with_a_ramp(tmp_path):
    """The steps of the last batch count; each device is a quarter of the machine, and they reach each other."""
    run = _workdir(tmp_path / "run")
    alone = own_runs.read_sample(tmp_path / "run", run)
    path = tmp_path / "run/metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    ramp = [row | {"batch_tokens": row["batch_tokens"] // 2, "step_seconds": 40.0} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in (*ramp, *rows[1:])))
    assert own_runs.read_sample(tmp_path / "run", run).measured_seconds == 2.2
    (tmp_path / "run/environment.json").write_text(json.dumps({"devices": ["cpu"] * 4}))
    four = dataclasses.replace(run, mesh=dataclasses.replace(run.mesh, axes=(("data", 4),)))
    spread = own_runs.read_sample(tmp_path / "run", four)
    assert spread.predicted_seconds["compute"] == pytest.approx(alone.predicted_seconds["compute"], rel=0.3)
    assert spread.predicted_seconds["communication"] > 0
