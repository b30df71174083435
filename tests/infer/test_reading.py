"""Reading with a tiny model: decoding against a full forward pass, row by row; transcriptions counted by hand."""

import dataclasses
import types

import jax
import numpy as np
import pytest
from flax import nnx

from gpt4moe.config.attention import AttentionConfig
from gpt4moe.config.model import ModelConfig
from gpt4moe.config.moe import MoeConfig
from gpt4moe.config.sampling import SamplingConfig
from gpt4moe.config.vision import CrossAttentionConfig, EncoderConfig, VisionConfig
from gpt4moe.data.documents import Document
from gpt4moe.data.pipeline import open_store
from gpt4moe.data.tokenizer import byte_tokenizer
from gpt4moe.infer import transcribe
from gpt4moe.infer.generate import generate, generate_ids
from gpt4moe.infer.pictures import Picture
from gpt4moe.infer.transcribe import Transcription, edit_distance, format_transcriptions, held_out_images, read
from gpt4moe.model.transformer import Transformer
from tests.data.image_documents import IMAGES, config_of, picture

CONTEXT = 32
HEIGHT, WIDTH = IMAGES.height, IMAGES.width
TOKENIZER = byte_tokenizer()
PROMPT = [TOKENIZER.end_of_text, TOKENIZER.image]
READ = 7


def _model(sees="latest"):
    """Two layers with open gates, their matrices larger than as drawn: what is written depends on images and text."""
    encoder = EncoderConfig(HEIGHT, WIDTH, 2, dim=8, num_layers=1, num_heads=2, hidden_dim=8, norm_after=False)
    cross = CrossAttentionConfig(every=1, num_heads=2, head_dim=8, hidden_dim=8, gate_init=1.5, sees=sees)
    config = ModelConfig(
        num_layers=2,
        model_dim=16,
        vocab_size=TOKENIZER.vocab_size,
        context_length=CONTEXT,
        attention=AttentionConfig(num_heads=2),
        moe=MoeConfig(num_experts=2, experts_per_token=1, hidden_dim=8, normalize_gates=False),
        compute_dtype="float32",
        vision=VisionConfig(encoder, cross),
    )
    model = nnx.jit(lambda: Transformer(config, rngs=nnx.Rngs(0)))()
    definition, params = nnx.split(model)
    return nnx.merge(definition, jax.tree.map(lambda leaf: leaf * 4 if leaf.ndim > 2 else leaf, params))


@pytest.fixture(scope="module")
def model():
    return _model()


def _pictures(count):
    rng = np.random.default_rng(0)
    shape = (count, 1, HEIGHT, WIDTH, 3)
    return [Picture(pixels.astype(np.uint8), np.ones(1, bool)) for pixels in rng.integers(0, 256, shape)]


def _after_each(model, ids, pictures):
    """Log-probabilities [T, V] after every token of one row, all of its images looked at in one pass, nothing kept."""
    tokens = np.zeros((1, CONTEXT), np.int32)
    tokens[0, : len(ids)] = ids
    index = np.cumsum(tokens == TOKENIZER.image, axis=1) - 1
    pixels = np.stack([one.pixels[0] for one in pictures])[None]
    media = model.look(pixels, np.ones(pixels.shape[:2], bool), index, np.minimum(index, 0))
    present = (np.arange(CONTEXT) < len(ids)).astype(np.int32)[None]
    x, _ = model(tokens, np.arange(CONTEXT)[None], present, dropless=True, media=media)
    return np.asarray(jax.nn.log_softmax(model.logits(x)))[0]


@pytest.mark.parametrize("sees", ["latest", "all"])
def test_every_token_that_is_decoded_sees_the_images_of_its_own_row_as_in_a_full_pass(sees):
    model, (one, other, third) = _model(sees), _pictures(3)
    prompts, pictures = ["ab<image>c<image>d", "<image>xyzuvw"], [[one, other], [third]]
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=6)
    made, _ = generate(model, TOKENIZER, prompts, sampling, pictures)
    prompt_ids = [[TOKENIZER.end_of_text], [TOKENIZER.end_of_text]]
    for ids, prompt in zip(prompt_ids, prompts, strict=True):
        before, *behind = prompt.split("<image>")
        ids += TOKENIZER.encode(before)
        for text in behind:
            ids += [TOKENIZER.image, *TOKENIZER.encode(text)]

    def logprobs_of(row, seen):
        ids, new = prompt_ids[row], made[row].token_ids
        after = _after_each(model, [*ids, *new], seen)[len(ids) - 1 :]
        return np.array([after[place, token] for place, token in enumerate(new)])

    for row in range(2):
        assert len(made[row].token_ids) == 6 and TOKENIZER.image not in made[row].token_ids
        np.testing.assert_allclose(made[row].logprobs, logprobs_of(row, pictures[row]), atol=1e-4)
    # With another image the tokens behind the first one would be others.
    for row, seen in ((0, [one, third]), (1, [one])):
        assert np.abs(logprobs_of(row, seen) - logprobs_of(row, pictures[row]))[1:].max() > 0.01


def test_more_documents_than_are_read_at_once_are_each_read_from_their_own_image(model):
    count = transcribe.ROWS + 6
    pictures, references = _pictures(count), [[0] * 3] * count
    trained = types.SimpleNamespace(model=model, tokenizer=TOKENIZER)
    made = read(trained, [PROMPT] * count, references, pictures)
    assert len(made) == count and len({tuple(ids) for ids in made}) > count // 2
    last = range(count - 6, count)
    alone = generate_ids(model, TOKENIZER, [PROMPT] * 6, _sampling(3), [[pictures[row]] for row in last])
    assert made[-6:] == alone


def _sampling(most):
    return SamplingConfig(temperature=0.0, max_new_tokens=most + most // 2 + 1)


def test_without_image_is_what_the_model_writes_where_it_is_given_none(model, tmp_path):
    documents = [Document(f"<image>{text}", images=(picture(20 * red),)) for red, text in enumerate(["a", "bc", "def"])]
    config = config_of(documents, held_out_fraction=0.0)
    source = dataclasses.replace(config.sources[0], weight=0.0, max_epochs=None)  # held out as a whole
    other = dataclasses.replace(source, name="text", documents=lambda: ["text"], weight=1.0, max_epochs=1)
    config = dataclasses.replace(config, sources=(source, other))
    store = open_store(config, tmp_path)
    trained = types.SimpleNamespace(model=model, tokenizer=TOKENIZER, config=types.SimpleNamespace(data=config))
    results = transcribe.transcribe(trained, store)
    assert results.keys() == {"pictures"}
    prompts, references, _ = held_out_images(store, "pictures", 9)
    assert prompts == [PROMPT] * 3 and sorted(map(TOKENIZER.decode, references)) == ["a", "bc", "def"]
    result = results["pictures"]
    (blind,) = generate_ids(model, TOKENIZER, [PROMPT], _sampling(3), [[]])
    texts = [transcribe.normalised(TOKENIZER.decode(ids)) for ids in (blind, *references)]
    edits = sum(edit_distance(texts[0], text) for text in texts[1:])
    assert result.character_error_rate_without_image == pytest.approx(edits / 6)
    assert result.character_error_rate_without_image != result.character_error_rate


@pytest.mark.parametrize(
    ("one", "other", "edits"),
    [
        ("abcd", "bd", 2),
        ("bd", "abcd", 2),
        ("flaw", "lawn", 2),
        ("kitten", "sitting", 3),
        ("abc", "", 3),
        ("", "ab", 2),
    ],
)
def test_edits_by_hand(one, other, edits):
    assert edit_distance(one, other) == edits


def test_a_transcription_counted_by_hand():
    trained = types.SimpleNamespace(tokenizer=TOKENIZER)
    # 3 + 4 + 1 characters; seen: none, one of the accents written apart, two too many; blind: 3, 4 and 0 edits.
    texts = ["123", "caf\u00e9", "x"]
    seen = [" 123\n", "cafe\u0301", "xyz"]
    blind = ["", "", "x"]
    references, seen, blind = ([TOKENIZER.encode(text) for text in each] for each in (texts, seen, blind))
    result = transcribe._scored(trained, references, seen, blind)
    assert result == Transcription(
        documents=3,
        character_error_rate=2 / 8,
        exact_match=2 / 3,
        character_error_rate_without_image=7 / 8,
        exact_match_without_image=1 / 3,
        examples=(("123", "123"), ("caf\u00e9", "caf\u00e9"), ("x", "xyz")),
    )
    line = format_transcriptions({"signs": result}).splitlines()[1]
    assert line.split() == ["signs", "25.0%", "66.7%", "87.5%", "33.3%", "3"]
    alone = transcribe._scored(trained, references, seen, blind, [*references[:2], []])
    added = {"character_error_rate_spelled": 1 / 8, "exact_match_spelled": 2 / 3}
    assert alone == dataclasses.replace(result, **added)
    head, line = format_transcriptions({"signs": alone}).splitlines()
    assert line.split() == ["signs", "25.0%", "66.7%", "87.5%", "33.3%", "12.5%", "66.7%", "3"]
    assert "by the encoder" in head and len(head) == len(line)


def test_errors_are_of_all_characters_and_not_a_mean_over_documents():
    trained = types.SimpleNamespace(tokenizer=TOKENIZER)
    references, seen = ([TOKENIZER.encode(text) for text in each] for each in (["a", "b" * 9], ["", "b" * 9]))
    result = transcribe._scored(trained, references, seen, seen)
    assert result.character_error_rate == pytest.approx(1 / 10)
