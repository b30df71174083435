"""The whole path from the command line: train, resume, evaluate, generate, report, load, and mistakes on the way."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading

import httpx2
import jax
import pytest
from flax import nnx

import gpt4moe
from gpt4moe import flags
from gpt4moe.accounting import parameters
from gpt4moe.config.check import CallerError
from gpt4moe.config.engine import EngineConfig
from gpt4moe.config.mesh import MeshConfig
from gpt4moe.infer.trained import Trained
from gpt4moe.launch import main
from gpt4moe.serve import command as serve_command

ROOT = pathlib.Path(__file__).resolve().parent.parent
METRIC_KEYS = """step tokens epoch/files loss loss/files load_balance_loss router_z_loss grad_norm learning_rate
    batch_tokens tokens_per_second model_flops_utilization step_seconds data_wait_fraction goodput moe/load
    moe/load_max_over_mean moe/load_entropy moe/dropped_fraction moe/router_entropy moe/router_largest_logit
    moe/expert_grad_norm skipped_steps"""
SENTENCE = "The quick brown fox number {0} jumps over {0} lazy dogs and writes down what it saw.\n"


def train_words(corpus, workdir, *more):
    paths = f"--gin.DATA_PATHS=['{corpus}']"
    return ["train", "--gin_file=gin_configs/run/tiny.gin", paths, f"--workdir={workdir}", "--json", *more]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(200):
        (folder / f"{number}.txt").write_text(SENTENCE.format(number) * 3)
    return folder


@pytest.fixture(scope="module")
def workdir(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert main(train_words(corpus, folder)) == 0
    return folder


def document_of(capsys, words) -> dict:
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refusal_of(capsys, words) -> str:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


def test_a_work_directory_holds_what_the_design_names(workdir):
    names = {path.name for path in workdir.iterdir()}
    files = {"config.gin", "metrics.jsonl", "environment.json", "evaluation.json", "samples.json", "tokenizer.json"}
    assert names >= files | {"report.html", "checkpoints", "events", "data"}
    assert {path.name for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()} >= {"4", "8"}


def test_every_logged_step_has_every_metric(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 9))
    for row in steps:
        assert set(METRIC_KEYS.split()) <= set(row)
        assert [len(layer) for layer in row["moe/load"]] == [4, 4]
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert any("eval/files/loss" in row and "eval/files/bits_per_byte" in row for row in rows)


def test_the_same_command_again_has_nothing_left_to_do(corpus, workdir, capsys):
    before = (workdir / "metrics.jsonl").read_text()
    document = document_of(capsys, train_words(corpus, workdir)[:-1])
    assert document["step"] == 8
    losses = [json.loads(line)["loss"] for line in before.splitlines() if '"loss"' in line]
    after = (workdir / "metrics.jsonl").read_text()
    assert [json.loads(line)["loss"] for line in after.splitlines() if '"loss"' in line] == losses


def test_a_longer_run_goes_on_from_the_last_step(corpus, tmp_path, capsys):
    short, long = train_words(corpus, tmp_path / "run", "--gin.TRAIN_STEPS=4"), train_words(corpus, tmp_path / "run")
    assert document_of(capsys, short[:-2] + short[-1:])["step"] == 4
    first = [line for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    assert document_of(capsys, long[:-1])["step"] == 8
    both = [line for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    assert len(first) == 4
    assert both[:4] == first  # with their times: the first steps were not taken again
    assert [json.loads(line)["step"] for line in both] == list(range(1, 9))


def test_a_run_that_is_asked_to_stop_exits_with_3_and_the_same_command_finishes_it(corpus, tmp_path, capsys):
    words = train_words(corpus, tmp_path / "run", "--gin.TRAIN_STEPS=40", "--gin.CHECKPOINT_EVERY=100")
    log, ended = tmp_path / "run/metrics.jsonl", threading.Event()

    def ask():
        while not ended.wait(0.005):
            if log.exists() and log.read_bytes().count(b"\n"):
                return os.kill(os.getpid(), signal.SIGTERM)

    watcher = threading.Thread(target=ask)
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # a signal after the run must not end the tests
    try:
        watcher.start()
        assert main(words) == 3
    finally:
        ended.set()
        watcher.join()
        signal.signal(signal.SIGTERM, before)
    assert "the same command goes on from there" in capsys.readouterr().err
    assert not (tmp_path / "run/report.html").exists()
    assert main(words) == 0
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines() if '"loss"' in line]
    assert steps == list(range(1, 41))


def test_a_profile_is_written(corpus, tmp_path):
    """In a process of its own: the profiler loads libtpu where it is installed, which ends a process over flags of
    XLA:CPU, and where its interface is newer than jaxlib's, a process that has also used it as a compiler."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    words = [sys.executable, "-m", "gpt4moe.launch", *train_words(corpus, tmp_path / "run", "--profile=1")]
    subprocess.run(words, cwd=ROOT, env=environment, check=True, timeout=300)
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


def test_evaluate_repeats_what_training_found(workdir, capsys):
    document = document_of(capsys, ["evaluate", f"--workdir={workdir}"])
    found = json.loads((workdir / "evaluation.json").read_text())["sets"]
    assert document["files"]["loss"] == pytest.approx(found["files"]["loss"], rel=1e-6)
    assert document["files"]["bits_per_byte"] > 0


def test_generate_is_a_function_of_its_seed(workdir, capsys):
    words = ["generate", f"--workdir={workdir}", "--prompt=The quick", "--prompt=", "--max_new_tokens=8", "--seed=3"]
    first, second = document_of(capsys, words), document_of(capsys, words)
    assert first["samples"] == second["samples"]
    assert [len(sample["token_ids"]) <= 8 for sample in first["samples"]] == [True, True]
    assert main([*words[:-1], "--temperature=0"]) == 0
    assert capsys.readouterr().out.startswith("The quick")


def test_generate_serves_a_file_of_requests(workdir, tmp_path, capsys):
    requests, output = tmp_path / "requests.jsonl", tmp_path / "out.jsonl"
    lines = [{"prompt": text, "temperature": 0, "max_new_tokens": 4} for text in ("a", "bc", "d")]
    requests.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["generate", f"--workdir={workdir}", f"--requests={requests}", "--slots=2"]
    assert main([*command, f"--output={output}"]) == 0
    made = [json.loads(line) for line in output.read_text().splitlines()]
    assert [document["prompt"] for document in made] == ["a", "bc", "d"]
    assert main([*command, f"--output={output}", "--mesh=stage=2,expert=2,tensor=2"]) == 0
    of_mesh = [json.loads(line) for line in output.read_text().splitlines()]
    assert [one["continuations"][0]["text"] for one in of_mesh] == [one["continuations"][0]["text"] for one in made]
    assert main([*command, f"--output={output}", f"--draft_workdir={workdir}", "--deterministic"]) == 0
    assert [json.loads(line)["continuations"][0]["text"] for line in output.read_text().splitlines()] == [
        one["continuations"][0]["text"] for one in made
    ]
    capsys.readouterr()
    assert main([*command, "--quantize=int8", "--draft_tokens=2"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    requests.write_text('{"prompt": "a"}\n{"prompt": "a", "top_q": 1}\n')
    capsys.readouterr()
    assert f"{requests}:2: has no key 'top_q'; there are " in refusal_of(capsys, command)


def test_the_example_of_the_engine_runs(workdir, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/engine.md").read_text(), re.DOTALL)
    exec(example.replace("runs/quickstart", str(workdir)), {})
    *chunks, experts = capsys.readouterr().out.splitlines()
    assert chunks and len(experts.strip("[]").split()) >= 1


def test_load_gives_the_trained_model_with_the_counted_parameters(workdir):
    trained = gpt4moe.load(workdir)
    held = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(trained.model)))
    assert held == parameters.count(trained.config.model).total
    assert trained.step == 8
    assert trained.tokenizer.decode(trained.tokenizer.encode("The quick")) == "The quick"


def test_report_and_doctor_answer(workdir, capsys):
    assert document_of(capsys, ["report", f"--workdir={workdir}", "--no_capture"])["experts"] is None
    document = document_of(capsys, ["doctor", "--gin_file=gin_configs/run/tiny.gin", f"--workdir={workdir}"])
    assert document["model"]["fits"] is True
    assert document["devices"][0]["platform"] == "cpu"


def test_report_shows_the_experts_of_the_run_and_where_the_tokens_of_any_text_went(workdir, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("The quick <b>café</b>\n")
    words = ["report", f"--workdir={workdir}", "--tokens=200", f"--text={text}", "--prompt=lazy dogs"]
    document = document_of(capsys, words)
    assert 0 < document["tokens"] <= 200 and document["step"] == 8
    assert list(document["saturation"]) == ["4"]
    assert all(0.25 < share < 1 for share in document["saturation"]["4"])
    assert [(given["name"], given["tokens"], given["shown"]) for given in document["texts"]] == [
        ("prompt 1", 10, 10),
        (str(text), 24, 24),
    ]
    assert [len(layers) for layers in document["specialization"].values()] == [2, 2, 2]
    page = pathlib.Path(document["experts"]).read_text()
    assert "files, held out" in page and ">é</span>" in page and "<b>caf" not in page
    report = pathlib.Path(document["report"]).read_text()
    for shown in ("Router saturation", "Co-activation", "Specialisation by token class", 'href="experts.html"'):
        assert shown in report


def test_texts_that_cannot_be_coloured_are_refused(workdir, tmp_path, capsys):
    latin, bare = tmp_path / "latin.txt", tmp_path / "bare"
    latin.write_bytes("café".encode("latin-1"))
    bare.mkdir()
    shutil.copy(workdir / "metrics.jsonl", bare)
    shutil.copy(workdir / "config.gin", bare)
    for given, message in (
        ([f"--text={tmp_path / 'missing.txt'}"], "missing.txt"),
        ([f"--text={latin}"], "is not UTF-8; convert it"),
        (["--prompt="], "--prompt='' is empty"),
        (["--prompt=x", "--no_capture"], "leaves no model to read texts"),
        (["--step=99"], "[4, 8]"),
    ):
        assert message in refusal_of(capsys, ["report", f"--workdir={workdir}", *given])
    assert "no complete checkpoint" in refusal_of(capsys, ["report", f"--workdir={bare}", "--prompt=x"])
    assert main(["report", f"--workdir={bare}"]) == 0
    assert "no checkpoint: the figures are those of the log alone" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["evaluate", "generate", "report"])
def test_a_folder_without_a_run_is_refused(command, tmp_path, capsys):
    assert str(tmp_path / "nowhere") in refusal_of(capsys, [command, f"--workdir={tmp_path / 'nowhere'}"])
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("override", ["--gin.NUM_LAYERS=4", "--gin.LEARNING_RATE=0.5", "--gin.SEED=7"])
def test_another_configuration_on_resume_is_refused_with_the_difference(corpus, workdir, capsys, override):
    error = refusal_of(capsys, train_words(corpus, workdir, override))
    assert override.split("=")[1] in error


def test_a_step_that_is_not_saved_is_refused_with_those_that_are(workdir, capsys):
    assert "--step=99 is not saved" in (error := refusal_of(capsys, ["evaluate", f"--workdir={workdir}", "--step=99"]))
    assert "[4, 8]" in error


def test_a_prompt_longer_than_the_context_is_refused(workdir, capsys):
    assert "context_length (64)" in refusal_of(capsys, ["generate", f"--workdir={workdir}", f"--prompt={'x' * 100}"])


def test_a_corpus_that_cannot_be_read_leaves_no_work_directory(tmp_path, capsys):
    empty, blank, broken = tmp_path / "empty", tmp_path / "blank", tmp_path / "broken"
    for folder in (empty, blank, broken):
        folder.mkdir()
    (blank / "a.txt").write_text("")
    (broken / "a.jsonl.gz").write_bytes(b"this is not gzip")
    for folder in (empty, blank, broken, tmp_path / "missing"):
        error = refusal_of(capsys, train_words(folder, tmp_path / "run"))
        assert str(folder) in error or "files" in error
        assert not (tmp_path / "run").exists()


def test_a_broken_record_is_counted_or_stops_the_run(tmp_path, capsys):
    lines = [json.dumps({"text": SENTENCE.format(number)}) for number in range(100)]
    lines[41] = '{"text": broken'
    source = tmp_path / "records.jsonl"
    source.write_text("\n".join(lines))
    words = ["prepare", *train_words(source, tmp_path / "run")[1:-1]]
    document = document_of(capsys, words)
    assert document["sources"][0]["bad_records"] == 1
    assert "records.jsonl:42" in document["sources"][0]["bad_examples"][0]
    stop = refusal_of(capsys, train_words(source, tmp_path / "stop", "--gin.data.DataConfig.bad_records='stop'"))
    assert "records.jsonl:42" in stop
    assert not (tmp_path / "stop").exists()


def test_a_run_goes_on_and_is_evaluated_when_its_sources_have_gone(tmp_path, capsys):
    source = tmp_path / "corpus"
    source.mkdir()
    for number in range(100):
        (source / f"{number}.txt").write_text(SENTENCE.format(number))
    words = train_words(source, tmp_path / "run")[:-1]
    assert document_of(capsys, [*words, "--gin.TRAIN_STEPS=2"])["step"] == 2
    shutil.rmtree(source)
    assert document_of(capsys, [*words, "--gin.TRAIN_STEPS=3"])["step"] == 3
    assert document_of(capsys, ["evaluate", f"--workdir={tmp_path / 'run'}"])["files"]["loss"] > 0


def test_a_run_started_from_another_reads_with_its_tokenizer(corpus, workdir, tmp_path, capsys):
    learns = "--gin.tokenizer.TokenizerConfig.byte_level_only=False"
    one = "--gin.TRAIN_STEPS=1"
    inherits = [*train_words(corpus, tmp_path / "run", f"--gin.INIT_FROM='{workdir}'", one, learns)]
    inherits.remove("--json")
    document_of(capsys, inherits)
    assert (tmp_path / "run/tokenizer.json").read_text() == (workdir / "tokenizer.json").read_text()
    document_of(capsys, [*train_words(corpus, tmp_path / "own")[:-1], learns, one])
    words = train_words(corpus, tmp_path / "ahead", f"--gin.INIT_FROM='{workdir}'", one, learns)
    prepared = document_of(capsys, ["prepare", *words[1:4], *words[5:]])
    words.remove("--json")
    document_of(capsys, words)
    assert [str(path) for path in (tmp_path / "ahead/data").glob("store-*")] == [prepared["directory"]]
    nowhere = f"--gin.INIT_FROM='{tmp_path}/nowhere'"
    assert "has no complete checkpoint" in refusal_of(capsys, ["prepare", *words[1:4], nowhere])
    clashes = train_words(corpus, tmp_path / "other", f"--gin.INIT_FROM='{tmp_path / 'own'}'", one)
    assert "is not the one of INIT_FROM" in refusal_of(capsys, clashes)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--gin_file=gin_configs/run/tiny.gin", "--workdir="], "must not be empty"),
        (["train", "--gin_file=gin_configs/run/tiny.gin", "--workdir=x", "--cpu_devices=-1"], "at least 1"),
        (["evaluate", "--workdir=x", "--gin.NUM_EXPERTS=4"], "takes its configuration from --workdir"),
        (["generate", "--workdir=x", "--seed=one"], "invalid int value"),
    ],
)
def test_flags_that_cannot_be_meant_are_refused(words, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert message in (error := capsys.readouterr().err)
    assert error.count("\n") == 1


@pytest.mark.parametrize("override", ["DATA_PATHS=['']", "DATA_PATHS=[3]", "DATA_PATHS=3", "INIT_FROM=3"])
def test_paths_that_are_no_text_are_refused(override, tmp_path, capsys):
    words = ["train", "--gin_file=gin_configs/run/tiny.gin", f"--gin.{override}", f"--workdir={tmp_path / 'run'}"]
    assert "must be text" in refusal_of(capsys, words)
    assert not (tmp_path / "run").exists()


def test_a_prompt_that_is_not_utf8_is_refused(workdir, capsys):
    assert "not UTF-8" in refusal_of(capsys, ["generate", f"--workdir={workdir}", "--prompt=\udcff"])


def test_a_mesh_that_does_not_fit_is_refused(corpus, tmp_path, capsys):
    words = train_words(corpus, tmp_path / "run", "--gin.MESH={'data': 2}")
    assert "spans 2 devices but there are 8" in refusal_of(capsys, words)
    words = train_words(corpus, tmp_path / "run", "--gin.MESH={'data': 8}")
    assert "microbatch_rows=4 must be divisible" in refusal_of(capsys, words)
    assert not (tmp_path / "run").exists()


def test_a_sharded_run_has_the_losses_of_one_device(corpus, workdir, tmp_path, capsys):
    mesh = "--gin.MESH={'data': 2, 'fsdp': 2, 'tensor': 2}"
    document_of(capsys, [*train_words(corpus, tmp_path / "run")[:-1], mesh])

    def losses(folder):
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [row["loss"] for row in rows if "loss" in row]

    assert losses(tmp_path / "run") == pytest.approx(losses(workdir), rel=1e-4)


@contextlib.contextmanager
def running(words):
    """A process that does not outlive the block."""
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_server_of_the_run_ends_its_streams_on_sigterm_and_refuses_new_requests(workdir, tmp_path):
    """The process ends with 0. There is more to tell than the kernel keeps for a caller who does not read."""
    words = [
        sys.executable,
        "-m",
        "gpt4moe.launch",
        "serve",
        f"--workdir={workdir}",
        "--port=0",
        "--slots=16",
        "--json",
    ]
    words.append(f"--compile_cache={tmp_path}")
    with running(words) as server:
        served = json.loads(server.stdout.readline())
        assert (served["model"], served["step"]) == ("tiny", 8)
        body = {"model": "tiny", "prompt": ["The"] * 8, "max_tokens": 60, "n": 16, "ignore_eos": True}
        body |= {"stream": True, "logprobs": 20, "expert_ids": True}
        narrow = httpx2.HTTPTransport(socket_options=[(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 17)])
        with httpx2.Client(transport=narrow, base_url=served["url"], timeout=60) as client:
            assert client.get("/healthz").json() == {"status": "ok"}
            with client.stream("POST", "/v1/completions", json=body) as stream:
                lines = (line for line in stream.iter_lines() if line)
                chunks = [next(lines)]
                server.send_signal(signal.SIGTERM)
                while client.get("/healthz").status_code == 200:
                    pass
                refused = client.post("/v1/completions", json=body)
                assert refused.status_code == 503 and refused.json()["error"]["code"] == "shutting_down"
                assert int(refused.headers["retry-after"]) > 0
                chunks += lines
        _, said = server.communicate(timeout=60)
    assert chunks.pop() == "data: [DONE]"
    choices = [json.loads(chunk.removeprefix("data: "))["choices"][0] for chunk in chunks]
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["length"] * 128
    assert server.returncode == 0 and "SIGTERM: no new requests; 1 running ones have 120 s to end" in said
    assert any(path.name.startswith("jit") for path in tmp_path.iterdir()), "programs were kept"


def test_flags_of_a_server_are_its_settings_and_those_of_its_engine():
    words = ["serve", "--workdir=runs/one", "--port=0", "--slots=3", "--draft_tokens=2", "--max_choices=5"]
    served, engine = serve_command.configs(flags.parse(words))
    assert (served.model_name, served.port, served.max_choices) == ("one", 0, 5)
    assert (engine.slots, engine.draft_tokens, engine.max_queue) == (3, 2, EngineConfig().max_queue)
    _, engine = serve_command.configs(flags.parse([*words[:4], "--draft_workdir=runs/small"]))
    assert engine.draft_tokens == 4


def test_a_model_without_a_tokenizer_is_not_served():
    args = flags.parse(["serve", "--workdir=none", "--port=0"])
    imported = Trained(model=None, tokenizer=None, config=None, step=0, workdir="none")
    with pytest.raises(CallerError, match="tokenizer=None is missing"):
        serve_command.run(args, MeshConfig(), lambda workdir, step: imported, progress=print)


def test_settings_of_a_server_that_cannot_be_are_refused_at_once(capsys, tmp_path):
    requests = tmp_path / "requests.jsonl"
    requests.write_text('{"prompt": "a"}')
    for words in (["serve", "--port=0"], ["generate", f"--requests={requests}"]):
        said = refusal_of(capsys, [*words, "--workdir=none", "--mesh=data=2"])
        assert "data=2 must be 1 where tokens are served" in said
        said = refusal_of(capsys, [*words, "--workdir=none", "--mesh=tensor=2", "--draft_workdir=none"])
        assert "--draft_workdir='none' does not go with --mesh" in said
    said = refusal_of(capsys, [*words, "--workdir=none", f"--output={tmp_path}/none/out.jsonl"])
    assert f"lies in {tmp_path}/none, which is no folder" in said
    for flag in ("--quantize=int8", "--slots=4", "--draft_workdir=none"):
        assert f"{flag.partition('=')[0]}=" in refusal_of(capsys, ["generate", "--workdir=none", "--prompt=a", flag])
    assert "port=99999 must be at most 65535" in refusal_of(capsys, ["serve", "--workdir=none", "--port=99999"])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refusal_of(capsys, ["serve", "--workdir=none", f"--port={port}"])
        assert f"port={port} cannot be listened on: Address already in use" in said
