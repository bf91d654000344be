"""How much better it gets by a plan, where V says what follows: that of critics, and of DPPO's."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dprl.agents import DPPO, DPPOConfig
from dprl.agents.prospects import StateValue, prospects
from dprl.data import Episodes
from dprl.data.transitions import returns_to_go
from dprl.errors import ConfigError, DatasetError
from dprl.policy import DiffusionConfig, DiffusionPolicy
from tests.agents.walks import critics, walks
from tests.policy.small import random_episodes
from tests.toys import make_toy, reach_demonstrations, reach_spec, toy_policy


def cut_walk(terminated: bool) -> Episodes:
    """One episode of three steps from 0 to 3."""
    states = np.arange(3, dtype=np.float32)[:, None]
    no = np.zeros(1, np.bool_)
    rewards = np.array([1, 2, 4], np.float32)
    end = np.array([[3.0]], np.float32)
    return Episodes(states, np.ones((3, 1), np.float32), rewards, end, np.array([3]), no | terminated, no, np.arange(1))


START = [0, 10, 20]
"""V of the states of `cut_walk`."""


def test_prospects_are_rewards_ahead_and_what_critics_say_of_where_they_end_and_start() -> None:
    """γ = 1/2, rewards doubled, V(s) = 10 s."""
    ahead = prospects(cut_walk(terminated=True), 2, critics()) + START
    assert ahead.tolist() == [2 * (1 + 1) + 0.25 * 20, 2 * (2 + 2), 2 * 4]
    ahead = prospects(cut_walk(terminated=False), 2, critics()) + START
    assert ahead.tolist() == [2 * (1 + 1) + 0.25 * 20, 2 * (2 + 2) + 0.25 * 30, 2 * 4 + 0.5 * 30]
    ahead = prospects(cut_walk(terminated=False), 2, critics(bootstrap=False)) + START
    assert ahead.tolist() == [2 * (1 + 1) + 0.25 * 20, 2 * (2 + 2), 2 * 4]


@pytest.mark.filterwarnings("ignore:.*of the rewards are in decisions that are left out")
def test_where_nobody_knows_what_followed_it_gets_no_better() -> None:
    data = replace(cut_walk(terminated=False), final_known=np.zeros(1, np.bool_))
    assert prospects(data, 2, critics()).tolist() == [2 * (1 + 1) + 0.25 * 20, 0.0, 0.0]


def test_as_far_as_the_data_go_they_are_the_returns() -> None:
    data = walks(20)
    ahead = prospects(data, 50, critics(gamma=0.9, scale=1.0)) + 10 * data.observations[:, 0]
    np.testing.assert_allclose(ahead, returns_to_go(data, 0.9), rtol=1e-4, atol=1e-4)


def test_critics_that_cannot_say_are_refused() -> None:
    bare = DiffusionPolicy.for_dataset(walks(4), DiffusionConfig(num_train_timesteps=2))
    with pytest.raises(ConfigError, match="critics: the policy has none that were learned"):
        prospects(walks(4), 2, bare)
    with pytest.raises(ConfigError, match="critics: they are of observations"):
        prospects(random_episodes(), 2, critics())
    with pytest.raises(DatasetError, match="neither rewards nor success"):
        prospects(replace(walks(4), rewards_from="none"), 2, critics())


@pytest.mark.parametrize(("gamma_per", "gamma"), [("decision", 0.9**0.5), ("step", 0.9)])
@pytest.mark.parametrize("critic", ["state", "state_action"])
def test_dppos_value_is_of_rewards_as_it_scales_them(critic: str, gamma_per: str, gamma: float) -> None:
    config = DPPOConfig(2, n_steps=4, n_epochs=1, batch_size=8, gamma=0.9, gamma_per=gamma_per, critic=critic)
    agent = DPPO(toy_policy(), make_toy(replace(reach_spec(), reward="dense"), 4), config)
    agent.learn(64)
    value = StateValue.of_dppo(agent.policy, config, agent.state(), "dense")
    assert agent.policy.n_action_steps == 2
    assert value.terms.gamma == pytest.approx(gamma)
    assert value.terms.bootstrap_truncated
    assert 0 < value.terms.reward_scale != 1
    assert not StateValue.of_dppo(agent.policy, config, agent.state(), "sparse").terms.bootstrap_truncated
    with pytest.raises(ConfigError, match="critics: they are of dense rewards, the data's are sparse"):
        prospects(reach_demonstrations(0, 3), 1, value)
    data = replace(reach_demonstrations(0, 3), reward_kind="dense")
    seen = torch.as_tensor(data.observations[:, None])
    with torch.no_grad():
        np.testing.assert_allclose(value(data.observations[:, None]), agent.critic(seen), rtol=1e-6)
    ahead = prospects(data, 1, value)
    start, following = value(data.observations[:2][:, None])
    expected = value.terms.reward_scale * data.rewards[0] + value.terms.gamma * following - start
    assert ahead[0] == pytest.approx(expected, rel=1e-4, abs=1e-6)
