"""A run that is killed, once while it saves, ends with bitwise the losses of one that was not.

The long campaign: `python -m tests.train.kill_campaign --kills 8 --steps 60`.
"""

from tests.train import kill_campaign


def test_killed_runs_give_the_same_losses(tmp_path):
    result = kill_campaign.campaign(tmp_path, kills=3, steps=12)
    assert result["same"], result
    assert all(kill["code"] == -9 for kill in result["kills"]), result
    assert any(kill["half_written"] for kill in result["kills"]), result
