"""Images in prompts: a run that reads images, generation and transcription from it, and what is refused."""

import dataclasses
import io
import json
import pathlib

import numpy as np
import pytest
from PIL import Image

import gpt4moe
from gpt4moe.analysis.reading import read_held_out
from gpt4moe.config.check import CallerError
from gpt4moe.config.data import ImageConfig
from gpt4moe.config.sampling import SamplingConfig
from gpt4moe.infer.generate import generate, generate_ids
from gpt4moe.infer.pictures import fitted_picture, read_picture, split_at_images, stack_pictures
from gpt4moe.infer.spelled import spell
from gpt4moe.infer.transcribe import Transcription, edit_distance, transcribe
from gpt4moe.launch import main
from gpt4moe.train.evaluate import trained_store

READ_FIELDS = {field.name for field in dataclasses.fields(Transcription)}
GREEDY = SamplingConfig(temperature=0.0, max_new_tokens=6)
# The quickstart of vision, small enough to be trained in a test.
SMALL = {
    "INIT_FROM": "None", "FROZEN": "[]", "NUM_IMAGES": "60",
    "TRAIN_STEPS": "2", "BATCH_TOKENS": "512", "NUM_LAYERS": "2",
    "VOCAB_SIZE": "300", "model.ModelConfig.model_dim": "32", "attention.AttentionConfig.num_heads": "2",
    "ENCODER_DIM": "16", "ENCODER_LAYERS": "1", "model.ModelConfig.compute_dtype": "'float32'", "NUM_EXPERTS": "2",
    "data.DataConfig.sources": "[@digits/data.SourceConfig()]", "EVALUATE_EVERY": "None", "CHECKPOINT_EVERY": "2",
    "data.DataConfig.held_out_fraction": "0.3", "SPELLING": "@vision.SpellingConfig()",
}  # fmt: skip


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("vision") / "run"
    flags = [f"--gin.{name}={value}" for name, value in SMALL.items()]
    given = ["--gin_file=gin_configs/run/vision_quickstart.gin", *flags, f"--workdir={path}"]
    assert main(["train", *given]) == 0
    return path


@pytest.fixture(scope="module")
def trained(workdir):
    return gpt4moe.load(workdir)


def _png(shade=200, size=(48, 16)) -> bytes:
    out = io.BytesIO()
    Image.new("L", size, shade).save(out, "PNG")
    return out.getvalue()


def _noise(seed: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 48, 3)).astype(np.uint8)).save(out, "PNG")
    return out.getvalue()


def test_evaluation_reports_the_loss_without_images_and_how_much_was_read(workdir, trained, capsys):
    of_training = json.loads((workdir / "evaluation.json").read_text())
    assert of_training["step"] == 2 and of_training["sets"]["digits"]["read"].keys() == READ_FIELDS
    assert main(["evaluate", f"--workdir={workdir}", "--json"]) == 0
    captured = capsys.readouterr()
    assert "loss of held-out text" in captured.err and "reading digits: 0 of" in captured.err
    digits = json.loads(captured.out)["digits"]
    assert digits["loss_without_image"] == pytest.approx(digits["loss"], rel=0.2)
    assert digits["loss_without_image"] != digits["loss"]
    read = digits["read"]
    store = trained_store(trained.config, workdir, trained.step)
    assert read["documents"] == len(store.offsets("digits", "held_out")) - 1 > 5
    assert read["character_error_rate"] > 0 and 0 <= read["exact_match"] <= 1
    assert json.loads((workdir / "evaluation.json").read_text())["sets"]["digits"]["read"] == read


def test_the_log_has_the_gates_of_the_parameters_saved_with_it(workdir):
    log = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in log if "loss" in row]  # those of steps, not of evaluation
    block = gpt4moe.load(workdir).model.cross_attention
    for key, gate in (("attention", block.attention_gate), ("feed_forward", block.feed_forward_gate)):
        first, last = (row[f"vision/{key}_gate"] for row in rows)
        np.testing.assert_allclose(last, np.tanh(gate[...]), rtol=1e-5)
        assert len(last) == 2 and last != first


def test_transcription_counts_the_edits_of_what_generation_writes(workdir, trained):
    store = trained_store(trained.config, workdir, trained.step)
    said = []
    result = transcribe(trained, store, limit=3, progress=said.append)["digits"]
    whats = ("digits", "digits without its images")
    assert said == [f"reading {what}: 0 of 3 held-out documents" for what in whats]
    (reference, read), *_ = result.examples
    images, offsets = store.images("digits", "held_out"), store.offsets("digits", "held_out")
    reference_ids = store.stream("digits", "held_out")[offsets[0] + 2 : offsets[1]]
    assert reference == trained.tokenizer.decode(reference_ids) and reference.isdigit() and 3 <= len(reference) <= 5
    picture = fitted_picture(images[0], trained.config.data.images)
    most = max(len(text) for text, _ in result.examples)  # of single digits here: a token each
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=most + most // 2 + 1)
    (ids,) = generate_ids(
        trained.model,
        trained.tokenizer,
        [[trained.tokenizer.end_of_text, trained.tokenizer.image]],
        sampling,
        [[picture]],
    )
    assert " ".join(trained.tokenizer.decode(ids).split()) == read
    edits = sum(edit_distance(a, b) for a, b in result.examples)
    assert result.character_error_rate == pytest.approx(edits / sum(len(a) for a, _ in result.examples))


def test_the_command_writes_what_the_encoder_spells(workdir, trained, tmp_path, capsys):
    file = tmp_path / "noise.png"
    file.write_bytes(_noise(1))
    (ids,) = spell(trained.model, [fitted_picture(file.read_bytes(), trained.config.data.images)])
    assert main(["generate", f"--workdir={workdir}", f"--image={file}", "--spell", "--json"]) == 0
    spelled = json.loads(capsys.readouterr().out)["spelled"]
    assert spelled == [trained.tokenizer.decode(ids)] and ids
    for flags, line in (
        (["--spell"], "--spell=True goes with --image"),
        (["--spell", f"--image={file}", "--prompt=a"], "--prompt='a' has no meaning with --spell"),
    ):
        assert main(["generate", f"--workdir={workdir}", *flags]) == 2
        assert line in capsys.readouterr().err


def test_the_report_shows_what_was_read_and_where_the_model_looked(workdir, trained):
    readings = read_held_out(trained, examples=2, max_tokens=3)
    examples = transcribe(trained, trained_store(trained.config, workdir, trained.step), limit=2)["digits"].examples
    assert [(reading.text, " ".join(reading.read.split())) for reading in readings] == list(examples)
    for reading in readings:
        grid = trained.config.model.vision.encoder.grid
        assert reading.maps.shape == (len(reading.tokens), 1, *grid) and len(reading.tokens) <= 3
        np.testing.assert_allclose(reading.maps.sum((1, 2, 3)), 1, rtol=1e-4)
    assert any(reading.tokens for reading in readings)
    assert main(["report", f"--workdir={workdir}"]) == 0
    page = (workdir / "report.html").read_text()
    assert "Gates of cross-attention" in page and "<h2>Reading</h2>" in page
    section = page[page.index("<h2>Reading</h2>") :]
    shown = read_held_out(trained)
    assert len(shown) == 4
    assert section.count("<img") == sum(1 + len(reading.tokens) for reading in shown) > 4
    assert all(f"there <b>{reading.text}</b>" in section for reading in shown)


def test_what_is_written_depends_on_the_image_and_not_on_the_neighbours(trained):
    config = trained.config.data.images
    for gate in (trained.model.cross_attention.attention_gate, trained.model.cross_attention.feed_forward_gate):
        gate[...] = gate[...] + 2.0
    one, other = (fitted_picture(_noise(seed), config) for seed in (1, 2))

    def written(pictures, prompts):
        return [made.logprobs for made in generate(trained.model, trained.tokenizer, prompts, GREEDY, pictures)[0]]

    first, second, none = written([[one], [other], []], ["", "", "a"])
    assert not np.allclose(first, second, atol=1e-3)
    np.testing.assert_allclose(written([[one]], [""])[0], first, atol=1e-4)
    np.testing.assert_allclose(written([[]], ["a"])[0], none, atol=1e-4)
    # Where the marker stands counts: behind it a picture is seen, before it not.
    behind, before = written([[one], [one]], ["12<image>", "<image>12"])
    assert not np.allclose(behind, before, atol=1e-3)


def test_which_picture_a_token_of_a_prompt_sees():
    class Config:
        height, width, frames, fit = 16, 48, 1, "squash"

    pictures = [fitted_picture(_png(shade), Config) for shade in (10, 20, 30)]
    tokens = np.array([[0, 7, 5, 5, 7, 5], [0, 5, 7, 5, 0, 0], [0, 5, 0, 0, 0, 0]])
    stacked = stack_pictures([pictures[:2], pictures[2:], []], tokens, image_token=7)
    assert stacked.image_index_BT.tolist() == [[-1, 0, 0, 0, 1, 1], [-1, -1, 0, 0, 0, 0], [-1] * 6]
    assert stacked.first_image_BT.tolist() == [[-1, 0, 0, 0, 0, 0], [-1, -1, 0, 0, 0, 0], [-1] * 6]
    assert stacked.image_valid[..., 0].tolist() == [[True, True], [True, False], [False, False]]
    assert [stacked.images[0, 0].mean(), stacked.images[0, 1].mean(), stacked.images[1, 0].mean()] == [10, 20, 30]


@pytest.mark.parametrize(
    ("prompt", "count", "texts"),
    [("a", 0, ("a",)), ("a<image>", 0, ("a<image>",)), ("a", 2, ("", "", "a")), ("a<image>b", 1, ("a", "b"))],
)
def test_a_prompt_is_split_at_its_images(prompt, count, texts):
    assert split_at_images(prompt, count) == texts


def test_markers_and_images_must_agree():
    with pytest.raises(ValueError, match="has 1 <image> markers and 2 images; write one <image> for each"):
        split_at_images("a<image>b", 2)


@pytest.mark.parametrize(
    ("one", "other", "edits"),
    [("", "", 0), ("123", "123", 0), ("123", "", 3), ("kitten", "sitting", 3), ("12", "21", 2)],
)
def test_edit_distance(one, other, edits):
    assert edit_distance(one, other) == edit_distance(other, one) == edits


BAD_FILES = {"corrupt": _noise(0)[:900], "empty": b"", "text": b"hello", "huge": None}


@pytest.mark.parametrize("name", BAD_FILES)
def test_images_that_cannot_be_taken_are_one_line(name, workdir, tmp_path, capsys):
    data = BAD_FILES[name]
    if data is None:
        out = io.BytesIO()
        Image.new("1", (10_000, 10_000)).save(out, "PNG")
        data = out.getvalue()
    path = tmp_path / "image.png"
    path.write_bytes(data)
    assert main(["generate", f"--workdir={workdir}", f"--image={path}"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and str(path) in said[0], said
    mend = "; scale it down, or raise ImageConfig.max_pixels" if name == "huge" else "; give a PNG, JPEG, WebP, GIF or"
    assert mend in said[0] and said[0].count(";") == 1


def test_a_page_of_more_lines_than_frames_is_one_line(tmp_path):
    page, file = Image.new("L", (120, 100), 255), tmp_path / "page.png"
    for row in range(3):
        page.paste(0, (10, 10 + row * 30, 100, 22 + row * 30))
    page.save(file)
    config = ImageConfig(height=16, width=128, per_row=1, frames=2, fit="lines")
    constraint = (
        r"has more lines of text, or parts of long ones, than the 2 that .* \(ImageConfig.frames\); give a part of it$"
    )
    with pytest.raises(CallerError, match=rf"^--image='{file}' {constraint}"):
        read_picture(str(file), config)
    assert read_picture(str(file), dataclasses.replace(config, frames=3)).valid.all()
    assert read_picture(str(file), dataclasses.replace(config, fit="tile")).valid.any()


def test_a_missing_image_and_one_for_many_prompts_are_one_line(workdir, tmp_path, capsys):
    assert main(["generate", f"--workdir={workdir}", f"--image={tmp_path / 'none.png'}"]) == 2
    assert "is not a file" in capsys.readouterr().err
    path = tmp_path / "image.png"
    path.write_bytes(_png())
    assert main(["generate", f"--workdir={workdir}", f"--image={path}", "--prompt=a", "--prompt=b"]) == 2
    assert "goes with one prompt, not 2" in capsys.readouterr().err
    assert main(["generate", f"--workdir={workdir}", f"--image={path}", "--max_new_tokens=2", "--json"]) == 0


def test_a_text_model_refuses_images(tmp_path):
    path = pathlib.Path(tmp_path / "image.png")
    path.write_bytes(_png())
    with pytest.raises(
        ValueError, match=r"image.png' but the run was trained without images \(DataConfig.images\); give"
    ):
        read_picture(str(path), None)
