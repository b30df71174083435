"""Where tokens went in one run, recorded and forced on another."""

import dataclasses

import jax
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
        got, want = (trace.read(place, step).expert_ids_WBTLK for place in (tmp_path / "forced", workdir))
        np.testing.assert_array_equal(got, want)


def test_a_replay_ends_where_the_records_do(recorded, tmp_path, capsys):
    run, workdir = recorded
    longer = tiny.with_train(run, steps=STEPS + 3, record_routing=False, replay_routing=str(workdir))
    result = train(longer, tmp_path / "longer")
    assert (result.step, result.data_ended) == (STEPS, True)
    assert "no further step was recorded: the run ends at step 4" in capsys.readouterr().err
    ends = [checkpoint.restore_progress(place, STEPS)["data"] for place in (tmp_path / "longer", workdir)]
    assert ends[0] == ends[1]  # nothing is drawn that is not trained on


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


def with_moe(run, **settings):
    model = dataclasses.replace(run.model, moe=dataclasses.replace(run.model.moe, **settings))
    return dataclasses.replace(run, model=model)


def refuse(run, workdir, place, message):
    """`run` replays what `workdir` holds: refused before anything is compiled or the work directory made."""
    again = tiny.with_train(run, record_routing=False, replay_routing=str(workdir))
    with pytest.raises(CallerError, match=message):
        loop.train(again, place, config_text="", show_progress=False)
    assert not place.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": 2}, "for experts 4; this run has 2; change NUM_EXPERTS"),
        ({"experts_per_token": 3}, "for experts per token 2; this run has 3; change EXPERTS_PER_TOKEN"),
    ],
)
def test_choices_of_another_model_are_refused(recorded, tmp_path, change, message):
    run, workdir = recorded
    refuse(with_moe(run, **change), workdir, tmp_path / "refused", message)


def test_choices_of_other_tokens_are_refused(recorded, tmp_path):
    run, workdir = recorded
    other = dataclasses.replace(run, data=dataclasses.replace(run.data, seed=run.data.seed + 1))
    refuse(other, workdir, tmp_path / "refused", "other tokens")


@pytest.mark.parametrize("damage", ["an expert too many", "a choice too many", "a row too many"])
def test_every_record_is_held_against_the_run(recorded, tmp_path, damage):
    run, workdir = recorded
    source = epath.Path(tmp_path / "source")
    for step in (1, 2):
        ids_WLBTK = np.moveaxis(trace.read(workdir, step).expert_ids_WBTLK, 3, 1).copy()
        if step == 2 and damage == "an expert too many":
            ids_WLBTK[0, 0, 0, 0, 0] = 4
        elif step == 2:
            dim = 4 if damage == "a choice too many" else 2
            ids_WLBTK = np.concatenate([ids_WLBTK, ids_WLBTK.take([0], axis=dim)], axis=dim)
        crc = trace.read(workdir, step).tokens_crc
        trace.write(source, step, ids_WLBTK, len(ids_WLBTK), crc, run.model.moe)
    again = tiny.with_train(run, record_routing=False, replay_routing=str(source))
    trace.check_run(again)
    assert trace.replay(again, 1, 2) is not None
    with pytest.raises(CallerError, match=r"^replay_routing=.* at step 2 "):
        trace.replay(again, 2, 2)


@pytest.mark.parametrize("setting", [{"record_routing": True}, {"record_routing": False, "replay_routing": "there"}])
def test_a_job_of_several_processes_neither_records_nor_replays(recorded, tmp_path, monkeypatch, setting):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(CallerError, match=r"_routing=.* needs a single process; leave it out"):
        trace.check_run(tiny.with_train(recorded[0], **setting))


def test_a_killed_writer_leaves_no_half_record(recorded, tmp_path, monkeypatch):
    """Whatever is written under the name of a record is all of it."""
    run, place = recorded[0], epath.Path(tmp_path)

    def killed(path, data):
        with open(path, "wb") as file:
            file.write(data[: len(data) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(type(place), "write_bytes", killed)
    with pytest.raises(KeyboardInterrupt):
        trace.write(place, 1, np.zeros((1, 2, 4, 32, 2), np.int32), 1, 0, run.model.moe)
    assert trace.read(place, 1) is None
