"""Agents are saved and taken up again."""

import pytest

from dprl.agents import BC
from dprl.errors import CheckpointError
from tests.policy.small import random_episodes, small_policy


def test_a_policy_of_other_settings_is_refused(tmp_path):
    """Its weights would fit, and mean something else."""
    data = random_episodes()
    agent = BC(small_policy("diffusion", schedule="linear"))
    agent.fit(data, 2)
    agent.save(tmp_path / "agent")
    with pytest.raises(CheckpointError, match=r"other settings.*schedule='linear'.*not.*squaredcos_cap_v2"):
        BC(small_policy("diffusion")).load_state(tmp_path / "agent")
    again = BC(small_policy("diffusion", schedule="linear"))
    again.load_state(tmp_path / "agent")
    assert again.timesteps == 2
