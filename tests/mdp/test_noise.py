"""Chains with every kind of noise: their log-probs are those of the density, and what is learned really is."""

import math
from dataclasses import replace

import pytest
import torch

from dprl.diffusion import SolverConfig, normal_kl
from dprl.errors import ConfigError
from dprl.mdp import DenoisingMDP, ExplorationConfig
from dprl.networks.noise import LearnedNoiseConfig
from dprl.schedules import Anneal
from tests.mdp.test_denoising import DIFFUSION, FLOW, MARKOV, declared, make_policy, phi
from tests.networks.test_noise import shaken

STD = ExplorationConfig(learned=LearnedNoiseConfig("std", 0.1, 0.3, hidden_size=8))
ETA = ExplorationConfig(0.02, 0.06, learned=LearnedNoiseConfig("eta", 0.3, 1.0, hidden_size=8))
KINDS = {
    **{name: (config, solver, ExplorationConfig()) for name, (config, solver) in MARKOV.items()},
    "flow-std": (FLOW, SolverConfig("euler", 4), STD),
    "ddpm-std": (DIFFUSION, SolverConfig(), STD),
    "ddim-eta": (DIFFUSION, SolverConfig("ddim", 4, 1.0), ETA),
    "v-eta": (replace(DIFFUSION, prediction_type="v_prediction"), SolverConfig("ddim", 4, 0.0), ETA),
}


def make(kind: str, tuned: int = 3) -> DenoisingMDP:
    config, solver, exploration = KINDS[kind]
    mdp = DenoisingMDP(make_policy(config), tuned, exploration, solver)
    shaken(mdp.policy.tuned)
    shaken(mdp.noise)
    return mdp


@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_that_come_with_a_chain_are_those_of_its_steps(kind: str) -> None:
    mdp = make(kind)
    obs = torch.randn(7, 1, 2, generator=torch.Generator().manual_seed(0))
    chain = mdp.sample(obs, generator=torch.Generator().manual_seed(1))
    assert chain.log_probs.shape == (7, 3, 2, 1)
    condition = mdp.policy.condition(obs)
    for i in range(3):
        k = torch.full((7,), 2 - i)
        again = mdp.log_prob(condition, chain.steps[:, i], chain.steps[:, i + 1], k)
        rounding = 1e-4 * max(1.0, float(chain.steps.abs().max()))
        torch.testing.assert_close(chain.log_probs[:, i], again, atol=rounding, rtol=1e-4)


@pytest.mark.parametrize("kind", ["flow-std", "ddpm-std", "ddim-eta"])
def test_steps_follow_the_gaussian_that_is_declared(kind: str) -> None:
    """Kolmogorov-Smirnov, for every tuned k; without the clamp of the noise accounted for, and with it."""
    n = 10_000
    for clip in (100.0, 1.5):
        config, solver, exploration = KINDS[kind]
        mdp = DenoisingMDP(make_policy(config), 3, replace(exploration, noise_clip=clip), solver)
        shaken(mdp.noise)
        floors = mdp.noise.std if kind == "ddim-eta" else None
        obs = torch.zeros(n, 1, 2)
        chain = mdp.sample(obs, generator=torch.Generator().manual_seed(0))
        condition = mdp.policy.condition(obs)
        for k in range(3):
            if floors is not None and float(floors[-1 - k]) < 0.06:
                continue  # two floors: what is drawn with is not what the density has
            x, x_next = chain.steps[:, 2 - k], chain.steps[:, 3 - k]
            mean, std = declared(mdp, condition, x, x_next, torch.full((n,), k))
            z = ((x_next - mean) / std).flatten().sort().values
            inside = z.abs() < clip - 1e-3
            empirical = torch.arange(1, len(z) + 1) / len(z)
            assert float((empirical - phi(z))[inside].abs().max()) < 1.63 / math.sqrt(len(z)), (k, clip)
            assert z.abs().max() <= clip * 1.001


@pytest.mark.parametrize("eta", [0.31, 0.65, 0.99])
def test_a_learned_eta_makes_the_steps_of_ddim_with_that_eta(eta: float) -> None:
    solver = SolverConfig("ddim", 4, eta)
    fixed = DenoisingMDP(make_policy(DIFFUSION), 4, ExplorationConfig(0.02, 0.06), solver)
    learned = DenoisingMDP(make_policy(DIFFUSION), 4, ETA, solver)
    with torch.no_grad():
        share = (eta - 0.3) / 0.7
        learned.noise.net.net.net[-1].bias.fill_(math.log(share / (1 - share)))
    obs = torch.randn(5, 1, 2, generator=torch.Generator().manual_seed(0))
    chains = [mdp.sample(obs, generator=torch.Generator().manual_seed(1)) for mdp in (fixed, learned)]
    torch.testing.assert_close(chains[0].steps, chains[1].steps, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(chains[0].log_probs, chains[1].log_probs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["flow-std", "ddpm-std", "ddim-eta", "v-eta"])
def test_noise_that_is_learned_gets_a_gradient_at_every_step(kind: str) -> None:
    """Also at the last step of DDIM, which has no noise of its own."""
    mdp = make(kind)
    obs = torch.randn(6, 1, 2, generator=torch.Generator().manual_seed(0))
    chain = mdp.sample(obs, generator=torch.Generator().manual_seed(1))
    condition = mdp.policy.condition(obs)
    for k in range(3):
        mdp.noise.zero_grad()
        steps = torch.full((6,), k)
        mdp.log_prob(condition, chain.steps[:, 2 - k], chain.steps[:, 3 - k], steps).sum().backward()
        gradients = [p.grad for p in mdp.noise.parameters()]
        assert all(g is None or g.isfinite().all() for g in gradients)
        if not (kind.endswith("eta") and k == 0):
            assert any(g is not None and g.abs().sum() > 0 for g in gradients), k


def test_a_floor_can_be_annealed() -> None:
    mdp = DenoisingMDP(make_policy(DIFFUSION), 3, ExplorationConfig(0.5, anneal=Anneal(0.1, 4)))
    noise = torch.zeros(9, 1, 2, 1)
    noise[-1] = 1.0
    spread = []
    for iteration in (0, 2, 4, 9):
        mdp.begin_iteration(iteration)
        rest = mdp.sample(torch.zeros(1, 1, 2), noise=torch.zeros_like(noise)).steps[:, -1]
        spread.append(float((mdp.sample(torch.zeros(1, 1, 2), noise=noise).steps[:, -1] - rest).max()))
    assert spread == pytest.approx([0.5, 0.3, 0.1, 0.1], abs=1e-6)


def test_the_densitys_floor_is_never_below_that_of_sampling() -> None:
    mdp = DenoisingMDP(make_policy(DIFFUSION), 3, ExplorationConfig(0.5, 0.2, anneal=Anneal(0.1, 4)))
    for iteration, floor in ((0, 0.5), (2, 0.3), (4, 0.2), (9, 0.2)):
        mdp.begin_iteration(iteration)
        obs, k = torch.zeros(1, 1, 2), torch.tensor([0])
        std = mdp.gaussian(mdp.condition(obs), torch.zeros(1, 2, 1), k).std
        assert float(std) == pytest.approx(floor)
        chain = mdp.sample(obs, noise=torch.zeros(9, 1, 2, 1))
        assert float(chain.log_probs[0, -1].max()) == pytest.approx(-math.log(floor) - 0.5 * math.log(2 * math.pi))


@pytest.mark.parametrize("kind", ["ddpm-std", "ddim-eta"])
def test_the_pretrained_policys_noise_is_not_the_learned_one(kind: str) -> None:
    """Else nothing would hold learned noise near it."""
    mdp = make(kind)
    condition, x, k = torch.zeros(3, 1, 2), torch.ones(3, 2, 1), torch.tensor([0, 1, 2])
    gaussian = mdp.gaussian(condition, x, k)
    pretrained = mdp.gaussian(condition, x, k, pretrained=True)
    parameters = list(mdp.noise.parameters())
    divergence = normal_kl(*gaussian, *(value.detach() for value in pretrained)).mean()
    assert any(g.abs().sum() > 0 for g in torch.autograd.grad(divergence, parameters, retain_graph=True))
    expected = mdp.noise.solver_std[-3:].flip(0).clamp(min=mdp.exploration.min_log_prob_std)
    torch.testing.assert_close(pretrained.std, expected.view(-1, 1, 1))


def test_an_eta_that_no_floor_lets_through_is_refused() -> None:
    high = ExplorationConfig(0.02, 0.9, learned=LearnedNoiseConfig("eta"))
    with pytest.raises(ConfigError, match=r"exploration\.min_log_prob_std = 0\.9: must be below 0\.\d+, which no"):
        DenoisingMDP(make_policy(DIFFUSION), 3, high, SolverConfig("ddim", 4, 1.0))


def test_what_the_policy_was_can_still_be_drawn() -> None:
    config, solver, exploration = KINDS["ddpm"]
    before = DenoisingMDP(make_policy(config), 3, exploration, solver)
    obs = torch.randn(5, 1, 2, generator=torch.Generator().manual_seed(0))
    expected = before.sample(obs, generator=torch.Generator().manual_seed(1))
    tuned = make("ddpm")
    torch.testing.assert_close(
        tuned.sample(obs, generator=torch.Generator().manual_seed(1), pretrained=True).steps, expected.steps
    )
    assert not torch.allclose(tuned.sample(obs, generator=torch.Generator().manual_seed(1)).steps, expected.steps)


def test_eta_is_ddims() -> None:
    with pytest.raises(ConfigError, match="solver = 'ddpm': has no eta to learn"):
        DenoisingMDP(make_policy(DIFFUSION), 3, ETA)


def test_a_floor_cannot_be_annealed_to_nothing() -> None:
    with pytest.raises(ConfigError, match=r"anneal\.final = 0: must be above 0"):
        ExplorationConfig(anneal=Anneal(0, 3))
