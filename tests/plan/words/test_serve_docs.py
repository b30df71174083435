"""The commands of docs/plan_serving.md run as they stand, but for fewer requests."""

import pathlib
import shlex

from gpt4moe.launch import main

TEXT = (pathlib.Path(__file__).resolve().parents[3] / "docs/plan_serving.md").read_text()


def test_the_commands_run(capsys, tmp_path):
    commands = [line for line in TEXT.splitlines() if line.startswith("gpt4moe plan ")]
    assert len(commands) >= 5
    for command in commands:
        words = shlex.split(command.replace("--plot=", f"--plot={tmp_path}/"))[1:]
        simulated = ["--hour_seconds=2", "--expected_routing"] if "--simulate" in words else []
        assert main([*words, *simulated]) == 0, command
        out = capsys.readouterr().out
        assert ("simulated:" in out) == bool(simulated) and len(out.splitlines()) > 5
    assert (tmp_path / "frontier.png").exists()
