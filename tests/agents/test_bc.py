"""Behaviour cloning keeps what a Gaussian would average away."""

import numpy as np
import pytest
import torch

from dprl.agents import BC, BCConfig
from dprl.data import Episodes
from dprl.errors import DatasetError
from dprl.networks import MLPConfig, polyak_update
from dprl.policy import DiffusionPolicy
from dprl.seeding import torch_generator


def two_modes(n: int = 400) -> Episodes:
    """One-step episodes; the action is -1 or 1 with equal chance."""
    rng = np.random.default_rng(0)
    actions = rng.choice([-1.0, 1.0], (n, 1)).astype(np.float32)
    zeros, no = np.zeros((n, 1), np.float32), np.zeros(n, np.bool_)
    return Episodes(zeros, actions, zeros[:, 0], zeros, np.arange(1, n + 1), no, no, np.arange(n))


def fit(seed: int, steps: int = 1000) -> DiffusionPolicy:
    policy = DiffusionPolicy.for_dataset(two_modes(), MLPConfig(hidden_size=64), horizon=1, seed=seed)
    return BC(policy, BCConfig(batch_size=128), seed=seed).fit(two_modes(), steps)


def test_both_modes_are_kept() -> None:
    actions = fit(seed=0).sample(torch.zeros(500, 1, 1), generator=torch_generator(0))
    positive = float((actions > 0).float().mean())
    assert 0.4 < positive < 0.6
    assert float((actions.abs() > 0.5).float().mean()) > 0.9, "a Gaussian would put 38 % between the modes"


def test_same_seed_same_policy() -> None:
    first, second, other = fit(0, 20), fit(0, 20), fit(1, 20)
    for a, b, c in zip(first.parameters(), second.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


def test_saved_weights_are_the_averaged_ones() -> None:
    policy = DiffusionPolicy.for_dataset(two_modes(), MLPConfig(hidden_size=8), horizon=1)
    agent = BC(policy, BCConfig(steps_per_iteration=1, batch_size=8, ema_decay=0.9))
    agent.set_data(two_modes(), 10)
    before = [p.clone() for p in policy.base.parameters()]
    agent.update(agent.collect())
    for average, old, online in zip(policy.base.parameters(), before, agent._online.base.parameters(), strict=True):
        torch.testing.assert_close(average, 0.9 * old + 0.1 * online)


def test_polyak_moves_towards_the_online_network() -> None:
    online, target = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    start = float((online.weight - target.weight).detach().abs().sum())
    polyak_update(online, target, 0.005)
    assert float((online.weight - target.weight).detach().abs().sum()) == pytest.approx(0.995 * start, rel=1e-4)


def test_learning_rate_decays_to_its_end() -> None:
    policy = DiffusionPolicy.for_dataset(two_modes(), MLPConfig(hidden_size=8), horizon=1)
    agent = BC(policy, BCConfig(steps_per_iteration=10, learning_rate=1e-2, final_learning_rate=1e-3))
    agent.set_data(two_modes(), 20)
    rates = [agent.update(agent.collect())["bc/learning_rate"] for _ in range(2)]
    assert 1e-3 < rates[1] < rates[0] < 1e-2
    assert agent.timesteps == 20


def test_data_shorter_than_the_horizon_is_refused() -> None:
    policy = DiffusionPolicy.for_dataset(two_modes(), horizon=2)
    with pytest.raises(DatasetError, match="horizon of 2: the longest has 1 steps"):
        BC(policy).fit(two_modes(), 10)
