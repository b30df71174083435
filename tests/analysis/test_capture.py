"""What is captured of a pass: every token of held-out and of given text once, with the choices the model reports."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from gpt4moe.analysis import capture as capture_module
from gpt4moe.analysis.capture import capture, given_text, held_out_text
from gpt4moe.config.mesh import MeshConfig
from gpt4moe.config.rules import ShardingRules
from gpt4moe.data.pipeline import open_store
from gpt4moe.data.rows import PackedRows
from gpt4moe.model.transformer import Transformer
from gpt4moe.parallel.layout import make_layout
from gpt4moe.parallel.mesh import make_mesh
from gpt4moe.parallel.sharding import state_shardings
from tests.train.tiny import LENGTH, MODEL, run_config, write_corpus

ROWS = 4


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    corpus = tmp_path_factory.mktemp("corpus")
    write_corpus(corpus)
    return run_config(corpus)


@pytest.fixture(scope="module")
def store(run):
    return open_store(run.data, run.data.store)


def parameters():
    """Routers ten times as sharp as at the start, so that no two choices are close to a tie."""
    params = nnx.split(Transformer(MODEL, rngs=nnx.Rngs(0)))[1]
    return jax.tree.map_with_path(
        lambda path, leaf: leaf * 10 if "router" in jax.tree_util.keystr(path) else leaf, params
    )


@pytest.fixture(scope="module")
def model():
    return nnx.merge(nnx.split(nnx.eval_shape(lambda: Transformer(MODEL, rngs=nnx.Rngs(0))))[0], jax.jit(parameters)())


@pytest.fixture(scope="module")
def batches(run, store):
    return list(held_out_text(store, run.data, rows=ROWS, max_tokens=300))


@pytest.fixture(scope="module")
def seen(model, batches):
    return capture(model, batches)


def test_held_out_text_is_shared_by_the_sources_and_bounded(store, batches, seen):
    held_out = [store.num_tokens(source, "held_out") for source in store.source_names]
    assert min(held_out) > 100
    assert np.bincount(seen.source_ids_U).tolist() == [min(number, 150) for number in held_out]
    assert {batch.tokens.shape for batch in batches} == {(ROWS, LENGTH)}
    ends = np.flatnonzero(seen.token_ids_U == store.tokenizer.end_of_text)
    assert len(ends) > 1 and (seen.positions_U[ends] == 0).all()  # documents begin with it


def test_no_more_rows_are_read_than_shown(run, store, batches, monkeypatch):
    read = []
    one_row = PackedRows.__getitem__
    monkeypatch.setattr(PackedRows, "__getitem__", lambda rows, number: read.append(number) or one_row(rows, number))
    list(held_out_text(store, run.data, rows=1, max_tokens=2))
    assert len(read) == len(store.source_names)


def test_choices_are_ordered_by_their_gates(monkeypatch, model, batches):
    """A model may report them in any order: here the other way round, some of them none."""

    def reversed_choices(*given):
        found = _choices(*given)
        ids, gates = found.expert_ids_BTK[..., ::-1], found.gates_BTK[..., ::-1]
        some = ids[..., 1:] != 0
        ids = np.concatenate([ids[..., :1], np.where(some, ids[..., 1:], -1)], axis=-1)
        return dataclasses.replace(found, expert_ids_BTK=ids, gates_BTK=np.where(ids < 0, 0, gates))

    _choices = capture_module._choices
    monkeypatch.setattr(capture_module, "_choices", reversed_choices)
    seen = capture(model, batches)
    assert (seen.expert_ids_LUK < 0).any() and (seen.expert_ids_LUK[..., 0] >= 0).all()
    assert (np.diff(seen.gates_LUK) <= 0).all()
    np.testing.assert_array_equal(seen.gates_LUK > 0, seen.expert_ids_LUK >= 0)


def test_every_token_has_the_choices_of_its_own_pass(model, batches, seen):
    """A row alone, without jit, is the reference; `seen` holds its tokens from where the rows before it end."""
    assert seen.expert_ids_LUK.shape == (2, len(seen.token_ids_U), 2) == seen.gates_LUK.shape
    np.testing.assert_allclose(seen.gates_LUK.sum(-1), 1, atol=1e-5)
    assert (np.diff(seen.gates_LUK) <= 0).all()
    before, batch = int((batches[0].segment_ids[:1] > 0).sum()), batches[0]
    row = [field[1:2] for field in (batch.tokens, batch.positions, batch.segment_ids)]
    choices = model(*row, dropless=True, with_choices=True)[1].moe.choices
    length = int((row[2] > 0).sum())
    np.testing.assert_array_equal(seen.token_ids_U[before : before + length], row[0][0, :length])
    for layer in range(2):
        for place in range(length):
            np.testing.assert_array_equal(
                seen.expert_ids_LUK[layer, before + place], choices.expert_ids_BTK[layer, 0, place]
            )
            np.testing.assert_allclose(
                seen.gates_LUK[layer, before + place], choices.gates_BTK[layer, 0, place], atol=1e-5
            )


def test_nothing_is_dropped_although_training_would(model, batches, seen):
    tight = dataclasses.replace(MODEL, moe=dataclasses.replace(MODEL.moe, capacity_factor=0.3))
    definition = nnx.split(nnx.eval_shape(lambda: Transformer(tight, rngs=nnx.Rngs(0))))[0]
    again = capture(nnx.merge(definition, nnx.split(model)[1]), batches)
    np.testing.assert_array_equal(again.expert_ids_LUK, seen.expert_ids_LUK)


def test_a_mesh_gives_the_choices_of_one_device(batches, seen):
    over = MeshConfig({"data": 2, "expert": 2, "tensor": 2}).for_generation()
    mesh = make_mesh(over)
    layout = make_layout(MODEL, over, ShardingRules(), mesh)
    blank = nnx.split(nnx.eval_shape(lambda: Transformer(MODEL, rngs=nnx.Rngs(0), layout=layout)))[0]
    shardings = state_shardings(jax.eval_shape(parameters), mesh, ShardingRules())
    laid_out = nnx.merge(blank, jax.jit(parameters, out_shardings=shardings)())
    again = capture(laid_out, batches)
    assert (again.expert_ids_LUK == seen.expert_ids_LUK).mean() > 0.999
    np.testing.assert_allclose(again.gates_LUK, seen.gates_LUK, atol=1e-4)


def test_a_model_in_stages_is_refused():
    over = MeshConfig({"stage": 2, "data": 4})
    layout = make_layout(MODEL, over, ShardingRules(), make_mesh(over))
    staged = nnx.eval_shape(lambda: Transformer(MODEL, rngs=nnx.Rngs(0), layout=layout))
    with pytest.raises(ValueError, match=r"^--mesh='stage' .*; use other axes$"):
        capture(staged, [])


def test_a_text_longer_than_a_row_goes_on_afresh_and_the_order_is_kept(model):
    texts = [np.arange(5, 5 + LENGTH + 3), np.arange(70, 74)]
    seen = capture(model, given_text(texts, rows=ROWS, length=LENGTH))
    np.testing.assert_array_equal(seen.token_ids_U, np.concatenate(texts))
    assert seen.source_ids_U.tolist() == [0] * (LENGTH + 3) + [1] * 4
    assert seen.positions_U.tolist() == [*range(LENGTH), *range(3), *range(4)]
    alone = capture(model, given_text([texts[0][LENGTH:]], rows=ROWS, length=LENGTH))
    np.testing.assert_array_equal(seen.part(np.arange(LENGTH, LENGTH + 3)).expert_ids_LUK, alone.expert_ids_LUK)
