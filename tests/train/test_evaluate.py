"""Held-out loss against a slow sum over every target, whatever the batch, the mesh and the capacity."""

import dataclasses
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gpt4moe.checkpoint import Checkpoints
from gpt4moe.config.attention import AttentionConfig
from gpt4moe.config.data import DataConfig, SourceConfig
from gpt4moe.config.mesh import MeshConfig
from gpt4moe.config.model import ModelConfig
from gpt4moe.config.moe import MoeConfig
from gpt4moe.config.optimizer import OptimizerConfig
from gpt4moe.config.rules import ShardingRules
from gpt4moe.config.run import RunConfig
from gpt4moe.config.tokenizer import TokenizerConfig
from gpt4moe.config.train import TrainConfig
from gpt4moe.data.pipeline import held_out_batches, open_store
from gpt4moe.model.transformer import Transformer
from gpt4moe.parallel.mesh import make_mesh
from gpt4moe.parallel.sharding import state_shardings
from gpt4moe.train.evaluate import (
    EvalResult,
    Evaluation,
    add_read,
    evaluate,
    evaluate_trained,
    format_evaluation,
    to_document,
    write_evaluation,
)
from gpt4moe.train.state import model_definition

LENGTH = 32


def write_documents(path, word):
    """Sixty short documents of one vocabulary."""
    generator = np.random.default_rng(len(word))
    words = [f"{word}{number}" for number in range(20)]
    texts = [" ".join(generator.choice(words, size=generator.integers(2, 12))) for _ in range(60)]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sources")
    for name in ("code", "prose"):
        write_documents(directory / f"{name}.jsonl", name)
    sources = tuple(SourceConfig(name, paths=(str(directory / f"{name}.jsonl"),)) for name in ("code", "prose"))
    tokenizer = TokenizerConfig(vocab_size=272, byte_level_only=True)
    return RunConfig(
        model=ModelConfig(
            num_layers=2,
            model_dim=16,
            vocab_size=272,
            context_length=LENGTH,
            attention=AttentionConfig(num_heads=2),
            moe=MoeConfig(num_experts=4, experts_per_token=2, hidden_dim=16, capacity_factor=0.5),
            compute_dtype="float32",
        ),
        data=DataConfig(sources, LENGTH, tokenizer, held_out_fraction=0.2, store=str(directory / "store")),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        train=TrainConfig(steps=1, token_budget=10**6, batch_tokens=8 * LENGTH, seed=0, checkpoint_every=1),
    )


@pytest.fixture(scope="module")
def store(run):
    return open_store(run.data, run.data.store)


@pytest.fixture(scope="module")
def model(run):
    definition = model_definition(run.model)
    return nnx.merge(definition, jax.jit(lambda: parameters(run.model))())


def parameters(config):
    return nnx.split(Transformer(config, rngs=nnx.Rngs(0)))[1]


@pytest.fixture(scope="module")
def evaluation(run, store, model):
    return evaluate(run, store, nnx.split(model)[1])


def slow_sums(model, store, config):
    """(nats, targets, bytes) by source, one target at a time in float64."""
    definition, params = nnx.split(model)

    @jax.jit
    def logits(params, batch):
        whole = nnx.merge(definition, params)
        return whole.logits(whole(batch.tokens, batch.positions, batch.segment_ids, dropless=True)[0])

    sums = {}
    for source, batch in held_out_batches(store, config, rows=3):
        logits_BTV = np.asarray(logits(params, batch), np.float64)
        for row, column in zip(*np.nonzero(batch.loss_weights), strict=True):
            logits_V, target = logits_BTV[row, column], int(batch.targets[row, column])
            nats = math.log(np.exp(logits_V - logits_V.max()).sum()) + logits_V.max() - logits_V[target]
            num_bytes = len(store.tokenizer.decode_bytes([target]))
            sums.setdefault(source, np.zeros(3))
            sums[source] += (nats, 1, num_bytes)
    return sums


def test_loss_and_bits_per_byte_equal_a_slow_sum_over_targets(run, store, model, evaluation):
    expected = slow_sums(model, store, run.data)
    assert list(evaluation.sets) == list(expected) == ["code", "prose"]
    for source, (nats, targets, num_bytes) in expected.items():
        result = evaluation.sets[source]
        assert result.tokens == targets
        np.testing.assert_allclose(result.loss, nats / targets, rtol=1e-5)
        np.testing.assert_allclose(result.bits_per_byte, nats / num_bytes / math.log(2), rtol=1e-5)
        assert targets > num_bytes > 0  # the ends of documents are targets without bytes


def test_batch_size_and_padding_do_not_matter(run, store, model, evaluation):
    other = dataclasses.replace(run, train=dataclasses.replace(run.train, batch_tokens=5 * LENGTH))
    again = evaluate(other, store, nnx.split(model)[1])
    for source, result in evaluation.sets.items():
        np.testing.assert_allclose(again.sets[source].loss, result.loss, rtol=1e-5)


def test_nothing_is_dropped_although_training_would(run, store, model, evaluation):
    roomy = dataclasses.replace(run.model, moe=dataclasses.replace(run.model.moe, capacity_factor=None))
    again = evaluate(dataclasses.replace(run, model=roomy), store, nnx.split(model)[1])
    np.testing.assert_allclose(again.mean_loss, evaluation.mean_loss, rtol=1e-6)


@pytest.mark.parametrize("axes", [{"data": 8}, {"fsdp": 2, "expert": 2, "tensor": 2}], ids=str)
def test_a_mesh_gives_the_loss_of_one_device(run, store, evaluation, axes):
    mesh = make_mesh(MeshConfig(axes))
    shardings = state_shardings(jax.eval_shape(lambda: parameters(run.model)), mesh, ShardingRules())
    again = evaluate(run, store, jax.jit(lambda: parameters(run.model), out_shardings=shardings)())
    for source, result in evaluation.sets.items():
        np.testing.assert_allclose(again.sets[source].loss, result.loss, rtol=1e-5)


def test_zero_parameters_cost_the_logarithm_of_the_vocabulary(run, store, model):
    silent = jax.tree.map(jnp.zeros_like, nnx.split(model)[1])
    for source, result in evaluate(run, store, silent).sets.items():
        np.testing.assert_allclose(result.loss, math.log(272), rtol=1e-5)
        assert 0 < result.unigram_loss < result.loss
        np.testing.assert_allclose(
            result.unigram_bits_per_byte / result.bits_per_byte, result.unigram_loss / result.loss, rtol=1e-5
        )
        assert result.tokens == store.num_tokens(source, "held_out")


def save_checkpoint(workdir, step, store):
    """What a trainer leaves that names the tokens it was trained on."""
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(step, {"nothing": jnp.zeros(1)}, {"store": store.content_hash})


def test_a_restored_model_leaves_its_results_for_the_report(run, store, model, evaluation, tmp_path):
    save_checkpoint(tmp_path, 7, store)
    again = evaluate_trained(model, run, tmp_path, step=7)
    assert again.mean_loss == pytest.approx(evaluation.mean_loss)
    document = json.loads((tmp_path / "evaluation.json").read_text())
    assert document["step"] == 7
    assert document["sets"]["code"]["loss"] == pytest.approx(evaluation.sets["code"].loss)


def test_how_images_are_read_is_added_to_the_results_of_its_step(evaluation, tmp_path):
    read, path = {"code": {"character_error_rate": 0.25, "exact_match": 0.5}}, tmp_path / "evaluation.json"
    add_read(tmp_path, {}, step=7)
    add_read(tmp_path, read, step=7)
    assert not path.exists(), "no results to add to"
    write_evaluation(tmp_path, evaluation, step=7)
    plain = json.loads(path.read_text())
    add_read(tmp_path, read, step=6)
    assert json.loads(path.read_text()) == plain, "those are of another step"
    add_read(tmp_path, read, step=7)
    document = json.loads(path.read_text())
    assert document["sets"]["code"].pop("read") == read["code"] and document == plain


def test_a_restored_model_is_evaluated_on_its_own_held_out_text_or_not_at_all(run, tmp_path):
    """Its sources are gone, then they are back with other text: the first does not matter, the second is refused."""
    source = SourceConfig("code", paths=(str(tmp_path / "code.jsonl"),))
    data = dataclasses.replace(run.data, sources=(source,), store=None, tokenizer=TokenizerConfig(vocab_size=280))
    run = dataclasses.replace(run, data=data, model=dataclasses.replace(run.model, vocab_size=280))
    params = jax.jit(lambda: parameters(run.model))()
    model = nnx.merge(model_definition(run.model), params)
    path = tmp_path / "code.jsonl"
    write_documents(path, "code")
    store = open_store(data, tmp_path / "data")
    save_checkpoint(tmp_path, 1, store)
    path.unlink()
    first = evaluate_trained(model, run, tmp_path, step=1)
    assert first.sets["code"].tokens == store.num_tokens("code", "held_out")
    shutil.rmtree(tmp_path / "data")
    write_documents(path, "prose")
    with pytest.raises(ValueError, match=r"^data='.*' was made of other text than the model's; restore"):
        evaluate_trained(model, run, tmp_path, step=1)


def test_rows_and_table_of_two_sources():
    results = {
        "code": EvalResult(2.0, 1.5, 6.0, 4.5, tokens=3000),
        "prose": EvalResult(3.0, 2.5, 7.0, 5.5, tokens=1000),
    }
    evaluation = Evaluation(results)
    assert evaluation.mean_loss == pytest.approx(2.25)
    assert Evaluation(results, frozenset({"prose"})).mean_loss == pytest.approx(2.0)
    assert evaluation.row()["eval/prose/bits_per_byte"] == pytest.approx(2.5)
    assert evaluation.row()["eval/code/unigram_loss"] == pytest.approx(6.0)
    header, code, prose = format_evaluation(evaluation).splitlines()
    assert len(header) == len(code) == len(prose)
    assert code.split() == ["code", "2.000", "6.000", "1.500", "4.500", "3,000"]
    assert "no held-out" in format_evaluation(None)


def test_what_is_not_finite_is_null_in_json():
    document = to_document(Evaluation({"code": EvalResult(math.nan, math.inf, 6.0, 4.5, tokens=3000)}))
    assert (document["code"]["loss"], document["code"]["bits_per_byte"], document["code"]["tokens"]) == (
        None,
        None,
        3000,
    )
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert to_document(None) == {}


def test_a_mean_of_nothing_is_not_a_number():
    assert math.isnan(Evaluation({}).mean_loss)
