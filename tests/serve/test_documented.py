"""docs/serving.md: its examples run as they stand, and it names what there is."""

import json
import pathlib
import re
import shlex

from gpt4moe import flags
from gpt4moe.serve import monitor, requests

from .conftest import MODEL

TEXT = (pathlib.Path(__file__).resolve().parents[2] / "docs/serving.md").read_text()


def test_the_examples_run(url, post, capsys):
    def here(example):
        return example.replace("http://127.0.0.1:8000", url).replace("quickstart", MODEL)

    (example,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    exec(compile(here(example), "docs/serving.md", "exec"), {})
    assert len(capsys.readouterr().out) > 32
    start, curl = re.findall(r"```bash\n(.*?)\n```", TEXT, re.DOTALL)
    assert flags.parse(shlex.split(start)[1:]).command == "serve"
    words = shlex.split(curl)
    made = post(words[1].removeprefix("http://127.0.0.1:8000"), here(words[-1])).json()
    assert len(made["choices"][0]["expert_ids"]) == json.loads(words[-1])["max_tokens"]


def test_every_parameter_flag_and_metric_is_told_of():
    told = set(re.findall(r"`(?:--)?([a-z_]+)", TEXT))
    asked = {name for kind in (requests.CompletionRequest, requests.ChatRequest) for name in kind.model_fields}
    assert asked <= told
    assert not {name.removesuffix("_seconds") for name in monitor.HISTOGRAMS} - {
        name[: -len("_seconds")] for name in told
    }
    assert {*monitor.GAUGES, *(f"{name}_total" for name in monitor.COUNTERS)} <= told
    assert {name for name in re.findall(r"`--([a-z_]+)", TEXT)} <= set(vars(flags.parse(["serve", "--workdir=x"])))
