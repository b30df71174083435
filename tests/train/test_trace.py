"""Where tokens went in one run, recorded and forced on another."""

import dataclasses
import shutil

import numpy as np
import pytest
from etils import epath

from gpt4moe import checkpoint
from gpt4moe.config.check import CallerError
from gpt4moe.train import loop, trace
from tests.train import tiny
from tests.train.test_loop import rows, train, without_clock

STEPS = 4


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    directory = tmp_path_factory.mktemp("corpus")
    tiny.write_corpus(directory)
    return directory


@pytest.fixture(scope="module")
def recorded(corpus, tmp_path_factory):
    """(run, work directory) of steps of one and of two microbatches, recorded."""
    run = tiny.run_config(corpus, steps=STEPS, record_routing=True)
    workdir = tmp_path_factory.mktemp("recorded") / "run"
    train(run, workdir)
    return run, workdir


def other_router(run):
    """A model whose router would choose otherwise, and `run`'s records forced on it."""
    model = dataclasses.replace(run.model, moe=dataclasses.replace(run.model.moe, router=backwards))
    return dataclasses.replace(run, model=model)


def backwards(logits_UE, inputs, config):
    from gpt4moe.model.router import top_k

    return top_k(-logits_UE, inputs, config)


def test_every_choice_of_every_step_is_recorded(recorded):
    _, workdir = recorded
    logged = [row for row in rows(workdir) if "loss" in row]
    assert len(logged) == STEPS
    for row in logged:
        ids_WBTLK = trace.read(workdir, row["step"]).expert_ids_WBTLK
        assert ids_WBTLK.shape == (row["batch_tokens"] // (4 * tiny.LENGTH), 4, tiny.LENGTH, 2, 2)
        load_LE = [np.bincount(ids_WBTLK[..., layer, :].ravel() + 1, minlength=5)[1:] for layer in range(2)]
        np.testing.assert_allclose(row["moe/load"], load_LE / np.sum(load_LE, axis=1, keepdims=True), rtol=1e-6)


def test_a_run_replays_its_own_choices_and_changes_nothing(recorded, tmp_path):
    run, workdir = recorded
    again = tiny.with_train(run, record_routing=False, replay_routing=str(workdir))
    train(again, tmp_path / "again")
    for mine, theirs in zip(rows(tmp_path / "again"), rows(workdir), strict=True):
        mine, theirs = (without_clock([row])[0] for row in (mine, theirs))
        for key, value in theirs.items():
            np.testing.assert_allclose(mine[key], value, rtol=2e-5, atol=1e-7, err_msg=key)


def test_another_router_is_forced(recorded, tmp_path):
    run, workdir = recorded
    forced = tiny.with_train(other_router(run), record_routing=True, replay_routing=str(workdir))
    train(forced, tmp_path / "forced")
    for step in range(1, STEPS + 1):
        forced_ids, ids = (trace.read(folder, step).expert_ids_WBTLK for folder in (tmp_path / "forced", workdir))
        np.testing.assert_array_equal(forced_ids, ids)


def test_a_replay_ends_where_the_records_do(recorded, tmp_path, capsys):
    run, workdir = recorded
    longer = tiny.with_train(run, steps=STEPS + 3, record_routing=False, replay_routing=str(workdir))
    result = train(longer, tmp_path / "longer")
    assert (result.step, result.data_ended) == (STEPS, True)
    assert "no further step was recorded" in capsys.readouterr().err
    progress = checkpoint.restore_progress(tmp_path / "longer", STEPS)
    assert progress["data"]["next_row"] * tiny.LENGTH == progress["tokens"], "no batch is drawn and lost"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"replay_routing": "{corpus}"}, "has no routing/STEP.npz"),
        ({"replay_routing": "{workdir}", "microbatch_rows": 2}, "rows, tokens and layers"),
    ],
)
def test_what_cannot_be_replayed_is_refused(recorded, corpus, tmp_path, change, message):
    run, workdir = recorded
    change = {k: v.format(corpus=corpus, workdir=workdir) if isinstance(v, str) else v for k, v in change.items()}
    with pytest.raises(CallerError, match=message):
        train(tiny.with_train(run, record_routing=False, **change), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": 2}, "was recorded of 4 experts a layer; this run has 2; set NUM_EXPERTS to 4"),
        ({"num_experts": 8}, "was recorded of 4 experts a layer; this run has 8; set NUM_EXPERTS to 4"),
        ({"experts_per_token": 3}, "was recorded with 2 experts a token; this run has 3; set EXPERTS_PER_TOKEN to 2"),
    ],
)
def test_records_of_other_experts_are_refused(recorded, tmp_path, change, message):
    run, workdir = recorded
    model = dataclasses.replace(run.model, moe=dataclasses.replace(run.model.moe, **change))
    other = tiny.with_train(dataclasses.replace(run, model=model), record_routing=False, replay_routing=str(workdir))
    with pytest.raises(CallerError, match=message):
        train(other, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_a_later_record_that_does_not_fit_is_refused(recorded, tmp_path):
    run, workdir = recorded
    shutil.copytree(workdir / trace.FOLDER, tmp_path / "mended" / trace.FOLDER)
    record = trace.read(workdir, 2)
    ids_WLBTK = np.moveaxis(record.expert_ids_WBTLK, 3, 1)
    trace.write(epath.Path(tmp_path / "mended"), 2, ids_WLBTK, len(ids_WLBTK), record.tokens_crc, 64)
    other = tiny.with_train(run, record_routing=False, replay_routing=str(tmp_path / "mended"))
    with pytest.raises(CallerError, match="was recorded of 64 experts"):
        train(other, tmp_path / "stops")


def test_choices_of_other_tokens_are_refused(recorded, tmp_path):
    run, workdir = recorded
    other = tiny.with_train(run, record_routing=False, replay_routing=str(workdir))
    other = dataclasses.replace(other, data=dataclasses.replace(run.data, seed=run.data.seed + 1))
    with pytest.raises(CallerError, match="other tokens"):
        loop.train(other, tmp_path / "other", config_text="", show_progress=False)
    assert not (tmp_path / "other" / "config.gin").exists(), "refused before anything is compiled"
