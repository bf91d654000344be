"""The density of what an ODE makes of noise, where it is known."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from dprl.diffusion import SolverConfig
from dprl.errors import ConfigError
from dprl.mdp import ExactMDP, ExplorationConfig
from dprl.networks import MLPConfig
from dprl.networks.noise import LearnedNoiseConfig
from dprl.policy import DiffusionConfig, DiffusionPolicy, Features
from tests.networks.test_noise import shaken

MEAN, STD = 0.3, 0.4
DIFFUSION = {"schedule": "squaredcos_cap_v2", "prediction_type": "epsilon"}
KINDS = {
    "epsilon": (DIFFUSION, "ddim"),
    "v_prediction": (DIFFUSION | {"prediction_type": "v_prediction"}, "ddim"),
    "velocity": ({"schedule": "rectified_flow", "prediction_type": "velocity"}, "euler"),
}


def make(kind: str, steps: int, horizon: int = 1) -> ExactMDP:
    settings, solver = KINDS[kind]
    config = DiffusionConfig(
        horizon=horizon, num_train_timesteps=400, denoiser=MLPConfig(hidden_size=16), clip_sample=None, **settings
    )
    policy = DiffusionPolicy(Features(2, 1), config)
    policy.action_normalizer.fit(torch.tensor([[-0.5], [1.5]]))
    return ExactMDP(policy, ExplorationConfig(), SolverConfig(solver, steps))


def know_the_data(mdp: ExactMDP) -> None:
    """Let the network predict what is best for data from N(MEAN, STD²)."""
    signal, noise = (table.float() for table in mdp.policy.schedule.config.levels())
    kind = mdp.policy.schedule.config.prediction_type

    def forward(x: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        s, n = signal[timestep].view(-1, 1, 1), noise[timestep].view(-1, 1, 1)
        eps = n * (x - s * MEAN) / (s**2 * STD**2 + n**2)
        clean = MEAN + s * STD**2 * (x - s * MEAN) / (s**2 * STD**2 + n**2)
        return {"epsilon": eps, "v_prediction": s * eps - n * clean, "velocity": clean - eps}[kind]

    tuned = mdp.policy.tuned
    tuned.forward = forward

    def prepare_steps(timesteps: Tensor, condition: Tensor) -> list[Tensor]:
        return [t.expand(len(condition)) for t in timesteps]

    tuned.prepare_steps = prepare_steps
    tuned.denoise = lambda x, prepared: forward(x, prepared, x)


@pytest.mark.parametrize("kind", KINDS)
def test_the_density_of_gaussian_data_is_theirs(kind: str) -> None:
    mdp = make(kind, 200)
    know_the_data(mdp)
    x = torch.linspace(MEAN - 2 * STD, MEAN + 2 * STD, 21).view(-1, 1, 1)
    log_prob = mdp.log_prob(torch.zeros(21, 1, 2), x, x, torch.zeros(21, dtype=torch.long)).detach()
    torch.testing.assert_close(log_prob, Normal(MEAN, STD).log_prob(x), atol=0.05, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_trained_is_what_the_policy_does(kind: str) -> None:
    settings, solver = KINDS[kind]
    config = DiffusionConfig(horizon=2, num_train_timesteps=10, denoiser=MLPConfig(hidden_size=16), **settings)
    policy = DiffusionPolicy(Features(2, 1), config)
    shaken(policy.base)
    mdp = ExactMDP(policy, ExplorationConfig(), SolverConfig())
    assert (policy.config.sampling.solver, policy.config.clip_sample) == (solver, None)
    obs, noise = torch.randn(5, 1, 2), 2 * torch.randn(1, 5, 2, 1)
    acts, trained = policy.sample(obs, noise=noise), mdp.sample(obs, noise=noise).actions
    torch.testing.assert_close(acts, trained, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_are_drawn_from_it(kind: str) -> None:
    mdp = make(kind, 200)
    know_the_data(mdp)
    chain = mdp.sample(torch.zeros(4_000, 1, 2), generator=torch.Generator().manual_seed(0))
    z = ((chain.steps[:, 1] - MEAN) / STD).flatten().sort().values
    distance = (torch.arange(1, 4_001) / 4_000 - Normal(0, 1).cdf(z)).abs().max()
    assert float(distance) < 1.63 / math.sqrt(4_000) + 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_any_networks_density_integrates_to_one(kind: str) -> None:
    mdp = make(kind, 10)
    shaken(mdp.policy.tuned)
    with torch.no_grad():
        for parameter in mdp.policy.tuned.parameters():
            parameter.mul_(0.2)  # steps that a grid can follow
    x = torch.linspace(-60, 60, 20_001).view(-1, 1, 1)  # untrained, it contracts by what signal the noisiest level has
    log_prob = mdp.log_prob(torch.ones(20_001, 1, 2), x, x, torch.zeros(20_001, dtype=torch.long)).detach().flatten()
    assert float(torch.trapezoid(log_prob.exp(), x.flatten())) == pytest.approx(1, abs=0.02)


def test_the_determinant_is_that_of_the_whole_way() -> None:
    """Against the Jacobian of the composed map, by torch."""
    mdp = make("epsilon", 5, horizon=3)
    shaken(mdp.policy.tuned)
    mdp.policy.double()
    generator = torch.Generator().manual_seed(0)
    condition, x = torch.ones(1, 1, 2).double(), 0.3 * torch.randn(1, 3, 1, generator=generator).double()
    whole = torch.autograd.functional.jacobian(lambda y: mdp.noise_of(condition, y)[0].flatten(), x).view(3, 3)
    torch.testing.assert_close(mdp.noise_of(condition, x)[1].detach()[0], torch.linalg.slogdet(whole).logabsdet)


def test_what_the_policy_was_can_still_be_drawn_with_its_density() -> None:
    mdp, obs = make("epsilon", 3), torch.randn(4, 1, 2)
    before = mdp.sample(obs, generator=torch.Generator().manual_seed(0))
    shaken(mdp.policy.tuned)
    again = mdp.sample(obs, generator=torch.Generator().manual_seed(0), pretrained=True)
    torch.testing.assert_close(again.steps, before.steps)
    torch.testing.assert_close(again.log_probs, before.log_probs)
    assert not torch.allclose(mdp.sample(obs, generator=torch.Generator().manual_seed(0)).steps, before.steps)


def test_each_number_has_an_equal_share() -> None:
    mdp = make("epsilon", 5, horizon=3)
    x = torch.randn(4, 3, 1)
    log_prob = mdp.log_prob(torch.ones(4, 1, 2), x, x, torch.zeros(4, dtype=torch.long))
    start, log_det = mdp.noise_of(torch.ones(4, 1, 2), x)
    torch.testing.assert_close(log_prob.sum((1, 2)), Normal(0, 1).log_prob(start).sum((1, 2)) + log_det)
    assert (log_prob == log_prob[:, :1]).all()


@pytest.mark.parametrize(
    ("changes", "solver", "exploration", "message"),
    [
        ({}, SolverConfig("ddpm"), ExplorationConfig(), "solver = 'ddpm': draws noise or looks back"),
        ({}, SolverConfig("ddim", 5, 0.5), ExplorationConfig(), "solver = 'ddim': draws noise or looks back"),
        ({}, SolverConfig("dpmsolver++", 5), ExplorationConfig(), "draws noise or looks back"),
        ({"horizon": 65}, None, ExplorationConfig(), r"horizon \* action_size = 65: must be at most 64"),
        ({"prediction_type": "sample"}, None, ExplorationConfig(), "prediction_type = 'sample': says nothing of"),
        (
            {},
            None,
            ExplorationConfig(learned=LearnedNoiseConfig("std")),
            "learned.what = 'std': must be none",
        ),
    ],
)
def test_what_it_cannot_follow_is_refused(changes, solver, exploration, message) -> None:
    settings = {"horizon": 2, "num_train_timesteps": 20, "denoiser": MLPConfig(hidden_size=8)} | changes
    policy = DiffusionPolicy(Features(2, 1), DiffusionConfig(**settings))
    with pytest.raises(ConfigError, match=message):
        ExactMDP(policy, exploration, solver)
