"""The energy of noisy actions: contrast finds log E[exp(α Q) | x_t], regression the mean of α Q, which is not that."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from dprl.agents.energy import Energy, EnergyConfig, contrast
from dprl.data import Episodes
from dprl.errors import ConfigError
from dprl.guidance import Reward, ValueGuide
from dprl.networks.denoiser import Denoiser
from dprl.policy import ChunkValueConfig, DiffusionConfig, DiffusionPolicy, Features
from dprl.seeding import torch_generator

MODES, WEIGHTS, STD = torch.tensor([-0.7, 0.7]), torch.tensor([0.9, 0.1]), 0.1
WORTH = 3.0
"""α Q of the rare mode; of the other it is 0."""
EXACT = 0.1 * math.exp(WORTH) / (0.9 + 0.1 * math.exp(WORTH))
"""Share of the rare mode in μ exp(α Q)."""
K = 20


class TwoModes(Denoiser):
    """The best prediction of x_0 for the mixture."""

    def __init__(self, policy: DiffusionPolicy) -> None:
        super().__init__()
        self.levels = [policy.schedule.level(t) for t in range(K)]

    def embed(self, timestep: Tensor) -> Tensor:
        return timestep[:, None].float()

    def prepare(self, time: Tensor, condition: Tensor) -> Tensor:
        return time.expand(len(condition), 1)

    def denoise(self, noisy_actions: Tensor, prepared: Tensor) -> Tensor:
        signal, noise = self.levels[int(prepared[0, 0])]
        variance = signal**2 * STD**2 + noise**2
        away = noisy_actions - signal * MODES
        share = (WEIGHTS.log() - 0.5 * away**2 / variance).softmax(-1)
        return (share * (MODES + signal * STD**2 / variance * away)).sum(-1, keepdim=True)


def two_modes() -> DiffusionPolicy:
    config = DiffusionConfig(num_train_timesteps=K, horizon=1, prediction_type="sample", clip_sample=None)
    policy = DiffusionPolicy(Features(1, 1), config)
    policy.base = TwoModes(policy)
    return policy


def rare_is_better(obs: Tensor, actions: Tensor) -> Tensor:
    return (actions[:, 0, 0] > 0).float()


def nothing_seen(n: int) -> Episodes:
    """Data whose n observations are all 0."""
    zeros, one = np.zeros((n, 1), np.float32), np.ones(1, np.bool_)
    return Episodes(zeros, zeros, zeros[:, 0], zeros[:1], np.array([n]), one, one, np.zeros(1, np.int64))


def share_of_rare(policy: DiffusionPolicy, guide: object = None) -> float:
    sampled = policy.sample(torch.zeros(4_000, 1, 1), generator=torch_generator(0, "test"), guide=guide)
    return float((sampled > 0).float().mean())


def shares(batch_size: int, steps: int, learning_rate: float) -> tuple[float, float]:
    """Of samples guided by what contrast and what regression learned."""
    policy, found = two_modes(), []
    for loss in ("contrast", "regression"):
        network = ChunkValueConfig(64, 2, n_networks=1)
        config = EnergyConfig(network, WORTH, loss, 64, batch_size=batch_size, learning_rate=learning_rate)
        energy = Energy(policy, Reward(rare_is_better), config).fit(nothing_seen(64), steps)
        found.append(share_of_rare(policy, ValueGuide(energy, 1.0, "noisy", "score")))
    return found[0], found[1]


def test_contrast_comes_nearer_to_the_modes_weights_than_regression() -> None:
    by_contrast, by_regression = shares(16, 1_000, 2e-3)
    assert abs(by_contrast - EXACT) < abs(by_regression - EXACT) - 0.1


@pytest.mark.full
def test_contrast_gives_the_modes_their_weights_and_regression_does_not() -> None:
    """The mean of α Q would give the rare mode 0.42 of the samples, and its exact energy 0.70, in 20 steps of ddpm."""
    policy = two_modes()
    assert share_of_rare(policy) == pytest.approx(0.1, abs=0.03)
    assert pytest.approx(0.69, abs=0.01) == EXACT
    by_contrast, by_regression = shares(64, 4_000, 3e-3)
    assert by_contrast == pytest.approx(EXACT, abs=0.06)
    assert by_regression == pytest.approx(0.42, abs=0.08)


def test_contrast_is_least_where_energy_is_worth_up_to_a_constant() -> None:
    worth = torch.tensor([[0.0, 1.0, 3.0], [2.0, 2.0, -1.0]])
    entropy = -(worth.softmax(1) * worth.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(contrast(worth + torch.tensor([[5.0], [-7.0]]), worth), entropy)
    assert contrast(torch.zeros(2, 3), worth) == pytest.approx(math.log(3))
    for _ in range(20):
        assert contrast(torch.randn(2, 3), worth) > entropy


def test_it_is_the_same_of_one_seed_and_leaves_the_policy() -> None:
    config = EnergyConfig(ChunkValueConfig(hidden_size=8, n_layers=1), samples=4, batch_size=4)
    found = []
    for _ in range(2):
        policy = DiffusionPolicy(Features(1, 1), DiffusionConfig(num_train_timesteps=4, horizon=1))
        before = [p.clone() for p in policy.parameters()]
        energy = Energy(policy, Reward(rare_is_better), config, seed=3).fit(nothing_seen(8), 3)
        assert all(a.equal(b) for a, b in zip(before, policy.parameters(), strict=True))
        found.append([p.detach().clone() for p in energy.parameters()])
    assert all(a.equal(b) for a, b in zip(*found, strict=True))


def test_a_policy_without_critics_needs_a_scorer() -> None:
    with pytest.raises(ConfigError, match="must be given: the policy has no critics"):
        Energy(two_modes())


def test_a_scorer_that_says_the_same_of_all_is_refused() -> None:
    with pytest.raises(ConfigError, match="says the same of every chunk"):
        Energy(two_modes(), Reward(lambda obs, actions: obs.sum((1, 2)))).fit(nothing_seen(8), 1)


def test_scores_that_are_none_are_refused() -> None:
    for wrong in (lambda obs, a: a[:, 0], lambda obs, a: a[:, 0, 0] * torch.nan):
        with pytest.raises(ConfigError, match="scorer = "):
            Energy(two_modes(), Reward(wrong)).fit(nothing_seen(8), 1)


@pytest.mark.parametrize("changes", [{"noised": False}, {"worth": "log_probability"}])
def test_networks_that_cannot_be_an_energys_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"critic.{next(iter(changes))}"):
        EnergyConfig(ChunkValueConfig(**changes))


def test_it_is_a_value_of_clean_chunks_too() -> None:
    """Up to what the observation alone decides: α Q of the better chunk is larger by α."""
    policy = two_modes()
    config = EnergyConfig(ChunkValueConfig(32, 1), WORTH, batch_size=16, learning_rate=1e-2)
    energy = Energy(policy, Reward(rare_is_better), config).fit(nothing_seen(64), 400)
    chunks = MODES.view(2, 1, 1)
    worse, better = energy.score(torch.zeros(2, 1, 1), chunks)
    assert better - worse == pytest.approx(WORTH, abs=0.5)
