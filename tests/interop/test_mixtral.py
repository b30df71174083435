"""Mixtral checkpoints in and out: logits and greedy tokens of the original, every bit back, and what is refused."""

import dataclasses
import json
import pathlib
import pickle
import shutil
import tracemalloc

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer as Reference
from tokenizers import models, processors

import gpt4moe
from gpt4moe import checkpoint
from gpt4moe.config.check import CallerError
from gpt4moe.config.tokenizer import TokenizerConfig
from gpt4moe.configure import build_model, build_run
from gpt4moe.data.tokenizer import byte_tokenizer, load_tokenizer
from gpt4moe.interop import mixtral, mixtral_config
from gpt4moe.interop.foreign_checkpoint import token_names
from gpt4moe.launch import main
from gpt4moe.model.transformer import Transformer

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "mixtral"
EXPERT = "model.layers.{}.block_sparse_moe.experts.{}.w{}.weight"


def document_of(capsys, *words) -> dict:
    assert main([*map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refusal_of(capsys, *words) -> str:
    """The one line with which a command is refused."""
    assert main([*map(str, words)]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


def tensors_of(folder) -> dict[str, np.ndarray]:
    return {name: array for file in folder.glob("*.safetensors") for name, array in load_file(file).items()}


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    """The work directories of the golden checkpoints."""
    folder = tmp_path_factory.mktemp("imported")
    for name in ("gqa", "mqa_tied"):
        assert main(["import", f"--from={GOLDEN / name}", f"--workdir={folder / name}", "--json"]) == 0
    return folder


@pytest.fixture
def source(tmp_path):
    """A copy of the smaller golden checkpoint, to be spoilt."""
    return shutil.copytree(GOLDEN / "mqa_tied", tmp_path / "source")


def change(folder, **keys):
    """Sets keys of config.json; ... takes one away."""
    config = json.loads((folder / "config.json").read_text()) | keys
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def rewrite(folder, **tensors):
    """Sets tensors of model.safetensors; None takes one away."""
    there = load_file(folder / "model.safetensors") | tensors
    save_file({name: array for name, array in there.items() if array is not None}, folder / "model.safetensors")


@pytest.mark.parametrize("name", ["gqa", "mqa_tied"])
def test_logits_and_greedy_tokens_are_those_of_the_original(workdirs, capsys, name):
    words = "evaluate", f"--workdir={workdirs / name}", f"--golden={GOLDEN / name / 'golden.npz'}"
    document = document_of(capsys, *words)
    assert document["max_logit_error"] < 1e-5
    assert document["greedy_match"] is True and document["tokens"] == 26
    # The second row of mqa_tied ends at its first new token, which is end-of-text.
    assert document["greedy_tokens"] == {"gqa": 40, "mqa_tied": 21}[name]


def test_a_golden_file_tells_other_weights_apart(workdirs, tmp_path, capsys):
    with np.load(GOLDEN / "mqa_tied" / "golden.npz") as stored:
        arrays = dict(stored)
    arrays["logits"][1, 7, 3] += 0.5
    arrays["greedy"][0, -1] += 1
    np.savez(tmp_path / "golden.npz", **arrays)
    words = "evaluate", f"--workdir={workdirs / 'mqa_tied'}", f"--golden={tmp_path / 'golden.npz'}"
    document = document_of(capsys, *words)
    assert document["max_logit_error"] == pytest.approx(0.5, abs=1e-4)
    assert (document["greedy_match"], document["greedy_equal"]) == (False, document["greedy_tokens"] - 1)


def test_an_import_keeps_every_dtype_and_a_model_has_float32(workdirs):
    dtypes = checkpoint.saved_dtypes(workdirs / "mqa_tied", 0)
    assert {dtype.name for dtype in dtypes.values()} == {"bfloat16"}
    trained = gpt4moe.load(workdirs / "mqa_tied")
    assert trained.tokenizer is None and trained.step == 0
    assert trained.config.model.compute_dtype == "bfloat16"
    leaves = {leaf.get_value().dtype.name for _, leaf in nnx.to_flat_state(nnx.state(trained.model))}
    assert leaves == {"float32"}
    assert gpt4moe.load(workdirs / "gqa").config.model.compute_dtype == "float32"


@pytest.mark.parametrize("name", ["gqa", "mqa_tied"])
def test_an_export_gives_every_bit_back_under_the_released_names(workdirs, tmp_path, capsys, name):
    shards = ["--shard_megabytes=1"]
    document = document_of(capsys, "export", f"--workdir={workdirs / name}", f"--to={tmp_path / 'out'}", *shards)
    written, wanted = tensors_of(tmp_path / "out"), tensors_of(GOLDEN / name)
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1
    assert document["tensors"] == len(written)
    if name == "mqa_tied":
        for layer in range(2):
            both = wanted.pop(f"model.layers.{layer}.mlp.experts.gate_up_proj")
            down = wanted.pop(f"model.layers.{layer}.mlp.experts.down_proj")
            for expert in range(3):
                matrices = zip((1, 3, 2), (*np.split(both[expert], 2), down[expert]), strict=True)
                wanted |= {EXPERT.format(layer, expert, number): matrix for number, matrix in matrices}
        wanted = {key.replace(".mlp.", ".block_sparse_moe."): array for key, array in wanted.items()}
    assert written.keys() == wanted.keys()
    for key, array in wanted.items():
        assert written[key].dtype == array.dtype and written[key].tobytes() == array.tobytes(), key
    theirs, ours = (json.loads((folder / "config.json").read_text()) for folder in (GOLDEN / name, tmp_path / "out"))
    same = set(mixtral_config.SIZES) | {"model_type", "num_local_experts", "num_experts_per_tok", "rms_norm_eps"}
    same |= {"num_key_value_heads", "tie_word_embeddings", "eos_token_id", "bos_token_id", "max_position_embeddings"}
    assert {key: ours[key] for key in same} == {key: theirs[key] for key in same}
    assert ours["rope_theta"] == 1e6 and ours["torch_dtype"] == document["dtypes"][0]


def test_shards_hold_no_more_than_they_may_and_are_read_again(workdirs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("gpt4moe.interop.command.MEGABYTE", 2**14)
    words = "export", f"--workdir={workdirs / 'gqa'}", f"--to={tmp_path / 'out'}", "--shard_megabytes=1"
    files = [file for file in document_of(capsys, *words, "--dtype=bfloat16")["files"] if "-of-" in file]
    assert len(files) > 2
    assert all((tmp_path / "out" / file).stat().st_size < 2**14 + 4096 for file in files)
    document = document_of(capsys, "import", f"--from={tmp_path / 'out'}", f"--workdir={tmp_path / 'again'}")
    assert document["dtypes"] == ["bfloat16"] and document["tensors"] == len(tensors_of(GOLDEN / "gqa"))


def test_one_parameter_at_a_time_is_in_memory(tmp_path, capsys):
    """Of some 51 MB of float32 in shards never more than the largest stack of ours and a tensor of theirs is held."""
    layers, dim, hidden, experts, vocab = 4, 128, 1024, 8, 512
    keys = {"hidden_size": dim, "intermediate_size": hidden, "num_hidden_layers": layers, "vocab_size": vocab}
    keys |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": experts, "head_dim": ...}
    source = shutil.copytree(GOLDEN / "mqa_tied", tmp_path / "source")
    change(source, **keys, num_experts_per_tok=2, max_position_embeddings=64)
    (source / "model.safetensors").unlink()
    config = build_model(["gin_configs/model/mixtral.gin"], overrides_of(source))
    shapes = {p.name: p.shape for parts in mixtral.places(config, mixtral.Naming()).values() for p in parts}
    index = {}
    for number in range(5):
        part = {name: np.ones(shapes[name], np.float32) for name in sorted(shapes)[number::5]}
        save_file(part, source / f"{number}.safetensors")
        index |= dict.fromkeys(part, f"{number}.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    largest, whole = 4 * layers * experts * dim * hidden, 4 * sum(np.prod(shape) for shape in shapes.values())
    assert whole > 3 * largest
    peaks = []
    for words in (["import", f"--from={source}"], ["export", f"--to={tmp_path / 'out'}", "--shard_megabytes=1"]):
        tracemalloc.start()
        document_of(capsys, *words, f"--workdir={tmp_path / 'work'}")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # Beyond it a tensor or a shard, and what the first call of anything allocates.
    assert all(largest < peak < whole for peak in peaks)


def overrides_of(folder) -> list[str]:
    """The macros of config.json that a model file reads."""
    found = mixtral_config.macros(json.loads((folder / "config.json").read_text()))
    run_only = ("SEQUENCE_LENGTH", "BATCH_TOKENS")
    return [f"{name}={value}" for name, value in found.items() if name not in run_only]


def test_our_own_tied_model_exports_with_its_scale_in_the_final_norm(tmp_path, capsys):
    """Divided by 0.02, the final norm times 0.02, the embedding gives the same model."""
    run, text = build_run(["gin_configs/run/tiny.gin"])
    flat = nnx.to_flat_state(nnx.state(Transformer(run.model, rngs=nnx.Rngs(0))))
    arrays = {".".join(("params", *path)): np.asarray(leaf.get_value()) for path, leaf in flat}
    unmade = {name: checkpoint.Unmade(a.shape, a.dtype, lambda a=a: a) for name, a in arrays.items()}
    checkpoint.save_one_by_one(tmp_path / "ours", 8, unmade, {"step": 8})
    (tmp_path / "ours" / "config.gin").write_text(text)
    (tmp_path / "ours" / "tokenizer.json").write_text(byte_tokenizer().serialized)
    document_of(capsys, "export", f"--workdir={tmp_path / 'ours'}", f"--to={tmp_path / 'out'}")
    document_of(capsys, "import", f"--from={tmp_path / 'out'}", f"--workdir={tmp_path / 'again'}")
    ours, theirs = gpt4moe.load(tmp_path / "ours"), gpt4moe.load(tmp_path / "again")
    assert theirs.config.model.embedding_std == 1.0 and ours.config.model.tie_embeddings
    tokens = np.arange(24)[None] + 20
    given = tokens, np.arange(24)[None], np.ones((1, 24), int)
    run = nnx.jit(lambda model: model.logits(model(*given, dropless=True)[0]))
    np.testing.assert_allclose(run(theirs.model), run(ours.model), atol=1e-5)
    text = theirs.tokenizer
    assert (text.serialized, text.end_of_text) == (ours.tokenizer.serialized, ours.tokenizer.end_of_text)


def test_imported_weights_are_trained_on_and_exported_again(workdirs, tmp_path, capsys):
    """With a tokenizer whose end of text config.json names, and data of one's own; the first step is the import's."""
    source = shutil.copytree(GOLDEN / "gqa", tmp_path / "source")
    change(source, eos_token_id=8)
    (source / "tokenizer.json").write_text(byte_tokenizer().serialized)
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 200)
    work, tuned = f"--workdir={tmp_path / 'work'}", f"--workdir={tmp_path / 'tuned'}"
    files = ["--gin_file=gin_configs/data/files.gin", f"--gin.DATA_PATHS=['{tmp_path / 'text.txt'}']"]
    own = ["--gin_file=gin_configs/run/imported.gin", *files]
    assert document_of(capsys, "import", f"--from={source}", work, *own)["has_tokenizer"]
    assert document_of(capsys, "inspect", work)["total"] == sum(a.size for a in tensors_of(GOLDEN / "gqa").values())
    sample = document_of(capsys, "generate", work, "--prompt=a", "--max_new_tokens=4", "--temperature=0")["samples"][0]
    assert sample["num_prompt_tokens"] == 2
    trained = gpt4moe.load(tmp_path / "work")
    assert trained.tokenizer.specials["<|im_end|>"] == trained.tokenizer.end_of_text == 8
    before = document_of(capsys, "evaluate", work)["files"]["loss"]
    run_file, start = f"--gin_file={tmp_path / 'work' / 'config.gin'}", f"--gin.INIT_FROM='{tmp_path / 'work'}'"
    short = ["--gin.TRAIN_STEPS=1", "--gin.BATCH_TOKENS=128", "--gin.LEARNING_RATE=1e-9"]
    after = document_of(capsys, "train", run_file, start, *short, tuned)["evaluation"]["files"]["loss"]
    assert after == pytest.approx(before, rel=1e-3)
    assert "holds imported weights" in refusal_of(capsys, "train", run_file, work)
    assert document_of(capsys, "export", tuned, f"--to={tmp_path / 'out'}")["step"] == 1
    written, wanted = tensors_of(tmp_path / "out"), tensors_of(GOLDEN / "gqa")
    assert written.keys() == wanted.keys()
    for key, array in wanted.items():
        np.testing.assert_allclose(written[key], array, atol=1e-6, err_msg=key)


def test_begin_and_end_of_text_are_those_of_the_original(tmp_path):
    """The end is config.json's; a prompt follows what the tokenizer itself puts first."""
    theirs = Reference(models.BPE({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "<|im_end|>": 4}, []))
    theirs.add_special_tokens(["<unk>", "<s>", "</s>", "<|im_end|>"])
    path = tmp_path / "tokenizer.json"
    theirs.save(str(path))
    assert token_names(path, {"eos_token_id": 2}) == token_names(path, {}) == {}
    theirs.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    theirs.save(str(path))
    named = token_names(path, {"eos_token_id": [4, 2]})
    assert named == {"BEGIN_OF_TEXT": "<s>", "END_OF_TEXT": "<|im_end|>"}
    config = TokenizerConfig(path=str(path), begin_of_text="<s>", end_of_text="<|im_end|>")
    tokenizer = pickle.loads(pickle.dumps(load_tokenizer(path, config)))
    assert (tokenizer.begin_of_text, tokenizer.end_of_text) == (1, 4)
    assert load_tokenizer(path).begin_of_text == load_tokenizer(path).end_of_text == 2
    with pytest.raises(CallerError, match=r"tokenizer\.end_of_text='<eot>' is not in the vocabulary"):
        load_tokenizer(path, dataclasses.replace(config, end_of_text="<eot>"))
    with pytest.raises(CallerError, match="has no tokens of other names"):
        TokenizerConfig(end_of_text="</s>")


@pytest.mark.parametrize(
    ("given", "read"),
    [({}, "8"), ({"num_key_value_heads": 4}, "4"), ({"num_key_value_heads": None}, "16")],
    ids=["not there", "a number", "null"],
)
def test_key_value_heads_are_the_originals_default_or_as_many_as_heads(source, given, read):
    """null is what MixtralConfig takes for one key/value head a query head; 8 is what it has where nothing is said."""
    keys = json.loads((source / "config.json").read_text()) | {"num_attention_heads": 16}
    del keys["num_key_value_heads"]
    assert mixtral_config.macros(keys | given)["NUM_KV_HEADS"] == read


REFUSED_KEYS = [
    ({"model_type": "mistral"}, "model_type='mistral' must be 'mixtral'"),
    ({"sliding_window": 16}, "config.json: sliding_window=16 must be None; our model has none"),
    ({"hidden_act": "gelu"}, "config.json: hidden_act='gelu' must be 'silu'"),
    ({"attention_bias": True}, "config.json: attention_bias=True must be False"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "config.json: rope_scaling="),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "must be of rope_type 'default'"),
    ({"hidden_size": ...}, "config.json: hidden_size=None must be an integer of at least 1"),
    ({"num_experts_per_tok": 4}, "config.json: num_experts_per_tok=4 must be at most num_local_experts (3)"),
    ({"quantization_config": {"bits": 4}}, "config.json: quantization_config="),
    ({"num_key_value_heads": 2}, "self_attn.k_proj.weight has shape (8, 16), config.json (16, 16)"),
    ({"vocab_size": 60}, "model.embed_tokens.weight has shape (61, 16), config.json (60, 16)"),
    ({"eos_token_id": "x"}, "config.json: eos_token_id='x' must be a token id below vocab_size (61)"),
    ({"eos_token_id": []}, "config.json: eos_token_id=[] must be a token id"),
    ({"eos_token_id": [1, 61]}, "config.json: eos_token_id=[1, 61] must be a token id"),
    ({"tie_word_embeddings": False}, "missing are lm_head.weight"),
    ({"num_hidden_layers": 1}, "unknown are model.layers.1."),
    ({"num_hidden_layers": 3}, "missing are model.layers.2."),
]


@pytest.mark.parametrize(("keys", "message"), REFUSED_KEYS, ids=[message for _, message in REFUSED_KEYS])
def test_a_configuration_that_is_not_of_our_model_is_refused(source, tmp_path, capsys, keys, message):
    change(source, **keys)
    assert message in refusal_of(capsys, "import", f"--from={source}", f"--workdir={tmp_path / 'work'}")
    assert not (tmp_path / "work").exists()


def test_more_experts_than_anybody_would_list_are_refused_at_once(tmp_path, capsys):
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / "gqa", source)
    change(source, num_local_experts=10**9)
    said = refusal_of(capsys, "import", f"--from={source}", f"--workdir={tmp_path / 'work'}")
    assert "are too few for num_hidden_layers=2 of num_local_experts=1000000000 in config.json" in said


def test_tensors_that_are_not_the_models_are_listed(source, tmp_path, capsys):
    words = "import", f"--from={source}", f"--workdir={tmp_path / 'work'}"
    rewrite(source, **{"model.norm.weight": None, "model.layers.0.self_attn.q_proj.bias": np.zeros(16, np.float32)})
    said = refusal_of(capsys, *words)
    assert "missing are model.norm.weight; unknown are model.layers.0.self_attn.q_proj.bias" in said
    shutil.copy(GOLDEN / "mqa_tied" / "model.safetensors", source)
    rewrite(source, **{"lm_head.weight": tensors_of(source)["model.embed_tokens.weight"] + 1})
    assert "tie_word_embeddings=True but lm_head.weight is not model.embed_tokens.weight" in refusal_of(capsys, *words)
    rewrite(source, **{"lm_head.weight": tensors_of(source)["model.embed_tokens.weight"]})
    assert document_of(capsys, *words)["tensors"] == 21


def test_files_that_are_not_whole_are_refused(tmp_path, capsys):
    source = shutil.copytree(GOLDEN / "gqa", tmp_path / "source")
    words = "import", f"--from={source}", f"--workdir={tmp_path / 'work'}"
    shard, index = source / "model-00002-of-00002.safetensors", source / "model.safetensors.index.json"
    whole, listed = shard.read_bytes(), json.loads(index.read_text())
    shard.write_bytes(whole[:-100])
    assert "model-00002-of-00002.safetensors is no whole safetensors file" in refusal_of(capsys, *words)
    shard.write_bytes(whole[:5])
    assert "is no whole safetensors file" in refusal_of(capsys, *words)
    shard.unlink()
    assert "names files that are not there: model-00002-of-00002" in refusal_of(capsys, *words)
    shard.write_bytes(whole)
    listed["weight_map"]["model.extra"] = shard.name
    index.write_text(json.dumps(listed))
    assert "names tensors that are not in their files: model.extra" in refusal_of(capsys, *words)
    index.write_text("{")
    assert "is not JSON" in refusal_of(capsys, *words)
    (source / "config.json").unlink()
    assert "holds no config.json" in refusal_of(capsys, *words)
    assert "holds no config.json" in refusal_of(capsys, "import", "--from=/nowhere", words[2])


def test_folders_that_hold_something_are_left_alone(workdirs, tmp_path, capsys):
    taken = f"--workdir={workdirs / 'gqa'}"
    assert "already holds a run" in refusal_of(capsys, "import", f"--from={GOLDEN / 'gqa'}", taken)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert "exists and is not an empty folder" in refusal_of(capsys, "export", taken, f"--to={tmp_path / 'out'}")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    assert "holds no run" in refusal_of(capsys, "export", f"--workdir={tmp_path}", f"--to={tmp_path / 'other'}")
    assert "--step=7 is not saved" in refusal_of(capsys, "export", taken, "--step=7", f"--to={tmp_path / 'other'}")
    assert "tokenizer=None is missing" in refusal_of(capsys, "generate", taken, "--prompt=a")


GOLDEN_FAULTS = [
    ({"greedy": None}, "lacks greedy"),
    ({"logits": np.zeros((2, 13, 9), np.float32)}, "vocabulary=9 must be 61; it is of another model"),
    ({"logits": np.zeros((2, 12, 61), np.float32)}, "logits=(2, 12, 61) must be of the tokens, (2, 13)"),
    ({"tokens": np.full((2, 13), 61)}, "ids='61..61' must lie below vocab_size (61)"),
    ({"tokens": np.zeros(3, int)}, "tokens='int64[3]' must be 2-dimensional integers"),
    ({"greedy": np.zeros((2, 65), int)}, "length=65 must be at most context_length (64)"),
]


@pytest.mark.parametrize(("arrays", "message"), GOLDEN_FAULTS, ids=[message for _, message in GOLDEN_FAULTS])
def test_a_golden_file_of_something_else_is_refused(workdirs, tmp_path, capsys, arrays, message):
    with np.load(GOLDEN / "mqa_tied" / "golden.npz") as stored:
        spoilt = {name: array for name, array in (dict(stored) | arrays).items() if array is not None}
    np.savez(tmp_path / "golden.npz", **spoilt)
    golden = f"--golden={tmp_path / 'golden.npz'}"
    assert message in refusal_of(capsys, "evaluate", f"--workdir={workdirs / 'mqa_tied'}", golden)


def test_a_golden_file_that_is_none_is_refused(workdirs, tmp_path, capsys):
    (tmp_path / "golden.npz").write_text("no zip")
    words = "evaluate", f"--workdir={workdirs / 'mqa_tied'}"
    assert "cannot be read as .npz" in refusal_of(capsys, *words, f"--golden={tmp_path / 'golden.npz'}")
    assert "is not a file" in refusal_of(capsys, *words, "--golden=/nowhere.npz")


NO_MIXTRAL = ["attention.AttentionConfig.qk_norm=True", "moe.MoeConfig.gated=False", "ROUTER=@routers.sigmoid_top_k"]
NO_MIXTRAL += [
    "moe.MoeConfig.shared_hidden_dim=8",
    "moe.MoeConfig.normalize_gates=False",
    "moe.MoeConfig.gate_scale=2.",
]


@pytest.mark.parametrize("override", NO_MIXTRAL)
def test_a_model_that_no_mixtral_can_be_is_not_exported(override):
    model = build_model(["gin_configs/model/tiny.gin"], [override])
    setting = override.partition("=")[0].rpartition(".")[2].lower()
    with pytest.raises(CallerError, match=f"{setting}=.* must be"):
        mixtral_config.foreign_config(model, "float32")


def test_the_parameters_are_those_of_the_model():
    for overrides in ([], ["TIE_EMBEDDINGS=True", "NUM_KV_HEADS=1", "HEAD_DIM=6"]):
        config = build_model(["gin_configs/model/mixtral.gin"], [*overrides, "VOCAB_SIZE=7", "EXPERT_DIM=5"])
        model = nnx.eval_shape(lambda config=config: Transformer(config, rngs=nnx.Rngs(0)))
        flat = nnx.to_flat_state(nnx.state(model))
        shapes = {".".join(map(str, path)): leaf.get_value().shape for path, leaf in flat}
        assert mixtral.parameter_shapes(config) == shapes
