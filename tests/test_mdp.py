"""The density of a denoising step is the sampler's own."""

import math

import pytest
import torch

from dprl.mdp import DenoisingMDP, ExplorationConfig
from tests.toys import toy_policy

K = 8


def phi(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))


@pytest.mark.parametrize("floor", [0.1, 0.3])
@pytest.mark.parametrize("clip", [3.0, 1.0])
def test_sampled_steps_follow_the_declared_gaussian(floor: float, clip: float) -> None:
    """Kolmogorov-Smirnov, for every k: standardised steps are a normal whose draws are clamped to ±clip."""
    policy = toy_policy()
    explore = ExplorationConfig(floor, floor, clip)
    mdp = DenoisingMDP(policy, K, explore)
    n = 10_000
    obs = torch.zeros(n, 1, 2)
    chain = mdp.sample(obs, torch.Generator().manual_seed(0))
    condition = policy.condition(obs)
    for k in range(K):
        x, x_next = chain.steps[:, K - 1 - k], chain.steps[:, K - k]
        mean, std = mdp._transition(condition, x, torch.full((n,), k), policy.tuned)
        z = ((x_next - mean) / std.clamp(min=floor)).detach().flatten().sort().values
        inside = z.abs() < clip - 1e-4
        empirical = torch.arange(1, len(z) + 1) / len(z)
        distance = float((empirical - phi(z))[inside].abs().max())
        assert distance < 1.63 / math.sqrt(len(z)), k  # 1 % level
        assert z.abs().max() <= clip * 1.001
        clamped = float((~inside).float().mean())
        assert clamped == pytest.approx(2 * float(phi(torch.tensor(-clip))), abs=0.006)


def test_log_prob_is_that_of_torch() -> None:
    policy = toy_policy()
    mdp = DenoisingMDP(policy, K, ExplorationConfig())
    x, x_next = torch.randn(2, K, 2, 1, generator=torch.Generator().manual_seed(0))
    k, condition = torch.arange(K), torch.zeros(K, 2)
    mean, std = mdp._transition(condition, x, k, policy.tuned)
    expected = torch.distributions.Normal(mean, std.clamp(min=0.1)).log_prob(x_next)
    torch.testing.assert_close(mdp.log_prob(condition, x, x_next, k), expected)


@pytest.mark.parametrize("tuned", [1, 3, K])
def test_chains_hold_the_tuned_steps_and_end_in_the_action(tuned: int) -> None:
    policy = toy_policy()
    mdp = DenoisingMDP(policy, tuned, ExplorationConfig())
    chain = mdp.sample(torch.zeros(4, 1, 2), torch.Generator().manual_seed(0))
    assert chain.steps.shape == (4, tuned + 1, 2, 1)
    assert torch.equal(policy.action_normalizer.unnormalize(chain.steps[:, -1]), chain.actions)


def test_the_same_noise_gives_the_same_prefix_whatever_is_tuned() -> None:
    chains = [
        DenoisingMDP(toy_policy(), tuned, ExplorationConfig()).sample(
            torch.zeros(4, 1, 2), torch.Generator().manual_seed(0)
        )
        for tuned in (2, K)
    ]
    assert torch.equal(chains[0].steps, chains[1].steps[:, -3:])
