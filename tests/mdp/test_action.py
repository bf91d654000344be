"""Explicit policies as decision processes of one step."""

import pytest
import torch
from torch import distributions

from dprl.diffusion import SolverConfig
from dprl.errors import ConfigError
from dprl.mdp import ActionMDP, ExplorationConfig, mdp_of
from dprl.networks.noise import LearnedNoiseConfig
from dprl.policy import Features, MSEPolicy
from tests.policy.small import random_batch, small_policy

KINDS = ("gaussian", "gmm", "lstm_gmm")
EXPLORATION = ExplorationConfig(0.2, 0.2)


def make(kind: str) -> tuple[ActionMDP, torch.Tensor]:
    policy = small_policy(kind)
    obs, _ = random_batch(policy, 2_000)
    mdp = mdp_of(policy, 1, EXPLORATION, SolverConfig())
    assert isinstance(mdp, ActionMDP)
    return mdp, obs


@pytest.mark.parametrize("kind", KINDS)
def test_the_density_is_torchs_and_comes_with_the_chain(kind: str) -> None:
    mdp, obs = make(kind)
    chain = mdp.sample(obs, generator=torch.Generator().manual_seed(0))
    policy, condition = mdp.policy, mdp.policy.condition(obs)
    x = chain.steps[:, 1]
    torch.testing.assert_close(policy.action_normalizer.unnormalize(x), chain.actions)
    log_weight, mean, std = policy.mixture(condition)
    executed = policy.n_action_steps
    chunks = distributions.Independent(distributions.Normal(mean, std.clamp(min=0.2)), 2)
    if kind == "gaussian":
        expected = chunks.base_dist.log_prob(x[:, None])[:, 0]
        torch.testing.assert_close(chain.log_probs[:, 0], expected)
    else:
        first = distributions.Independent(
            distributions.Normal(mean[:, :, :executed], std[:, :, :executed].clamp(min=0.2)), 2
        )
        density = distributions.MixtureSameFamily(distributions.Categorical(logits=log_weight), first)
        torch.testing.assert_close(chain.log_probs[:, 0, :executed].sum((1, 2)), density.log_prob(x[:, :executed]))
    k = torch.zeros(len(x), dtype=torch.long)
    torch.testing.assert_close(mdp.log_prob(condition, torch.zeros_like(x), x, k), chain.log_probs[:, 0])


@pytest.mark.parametrize("kind", KINDS)
def test_modes_and_numbers_are_drawn_as_often_as_they_should(kind: str) -> None:
    """The probability integral transform of every mode's draws is uniform, and the modes have their weights."""
    mdp, obs = make(kind)
    one = obs[:1].expand(len(obs), *obs.shape[1:])
    x = mdp.sample(one, generator=torch.Generator().manual_seed(0)).steps[:, 1]
    with torch.no_grad():
        log_weight, mean, std = (part[0] for part in mdp.policy.mixture(mdp.policy.condition(one)))
    components = distributions.Normal(mean[:, 0, 0], std[:, 0, 0].clamp(min=0.2))
    density = distributions.MixtureSameFamily(distributions.Categorical(logits=log_weight), components)
    u = density.cdf(x[:, 0, 0]).sort().values
    inside = (u > 0.01) & (u < 0.99)  # draws are clamped at three standard deviations
    empirical = torch.arange(1, len(u) + 1) / len(u)
    assert float((empirical - u)[inside].abs().max()) < 1.63 / len(u) ** 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_policy_was_can_still_be_drawn_and_is_saved(kind: str) -> None:
    mdp, obs = make(kind)
    before = mdp.sample(obs, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in mdp.trainable().parameters():
            parameter.add_(0.1)
    again = mdp.sample(obs, generator=torch.Generator().manual_seed(0), pretrained=True)
    assert torch.equal(again.steps, before.steps)
    assert torch.equal(again.log_probs, before.log_probs), "of the policy that drew them"
    assert not torch.equal(mdp.sample(obs, generator=torch.Generator().manual_seed(0)).steps, before.steps)
    other, _ = make(kind)
    with torch.no_grad():
        for parameter in other._pretrained.parameters():
            parameter.zero_()
    other.restore(mdp.state())
    assert torch.equal(
        other.sample(obs, generator=torch.Generator().manual_seed(0), pretrained=True).steps, before.steps
    )


def test_a_mixture_has_no_one_gaussian() -> None:
    mdp, obs = make("gmm")
    assert not mdp.is_gaussian
    x = torch.zeros(len(obs), 3, 2)
    with pytest.raises(ConfigError, match="a gmm policy is a mixture"):
        mdp.gaussian(mdp.policy.condition(obs), x, torch.zeros(len(obs), dtype=torch.long))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tuned_steps": 3}, r"tuned_steps = 3: must be 1: a gaussian policy does not denoise"),
        ({"solver": SolverConfig("ddim")}, r"solver = .*: must be left out: a gaussian policy does not denoise"),
        (
            {"exploration": ExplorationConfig(learned=LearnedNoiseConfig("std"))},
            r"a gaussian policy learns its spread anyway",
        ),
    ],
)
def test_what_such_a_policy_does_not_have_is_refused(settings, message: str) -> None:
    arguments = {"tuned_steps": 1, "exploration": ExplorationConfig(), "solver": SolverConfig()} | settings
    with pytest.raises(ConfigError, match=message):
        mdp_of(small_policy("gaussian"), **arguments)


def test_a_policy_without_a_density_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"policy = 'MSEPolicy': must be a DiffusionPolicy, or a Gaussian"):
        mdp_of(MSEPolicy(Features(2, 1)), 1, ExplorationConfig(), SolverConfig())


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_it_draws_the_same(kind: str) -> None:
    mdp, obs = make(kind)
    plain, compiled = [], []
    for found in (plain, compiled):
        chain = mdp.sample(obs[:7], generator=torch.Generator().manual_seed(0))
        found += [chain.steps, chain.log_probs, chain.actions]
        mdp.compile()
    torch.testing.assert_close(compiled, plain)
