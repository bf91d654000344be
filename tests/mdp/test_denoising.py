"""The density of a denoising step is the sampler's own."""

import copy
import math
import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dprl.diffusion import SolverConfig, n_draws, posterior_steps, solve, solver_steps
from dprl.errors import ConfigError
from dprl.mdp import DenoisingMDP, ExplorationConfig
from dprl.networks import Denoiser, MLPConfig
from dprl.policy import DiffusionConfig, DiffusionPolicy, Features
from tests.toys import toy_policy

K = 8
DIFFUSION = DiffusionConfig(horizon=2, num_train_timesteps=K, denoiser=MLPConfig(hidden_size=16))
FLOW = replace(DIFFUSION, schedule="rectified_flow", prediction_type="velocity")
MARKOV = {
    "ddpm": (DIFFUSION, SolverConfig()),
    "ddpm-4": (DIFFUSION, SolverConfig("ddpm", 4)),
    "ddim-eta-1": (DIFFUSION, SolverConfig("ddim", 4, 1.0)),
    "ddim-eta-0.5": (replace(DIFFUSION, prediction_type="v_prediction"), SolverConfig("ddim", 5, 0.5, "linspace")),
    "ddim": (replace(DIFFUSION, prediction_type="sample"), SolverConfig("ddim", timestep_spacing="trailing")),
    "unclipped": (replace(DIFFUSION, prediction_type="v_prediction", clip_sample=None), SolverConfig("ddim", 4, 1.0)),
    "euler": (FLOW, SolverConfig()),
    "euler-4": (FLOW, SolverConfig("euler", 4)),
}  # fmt: skip


def make_policy(config: DiffusionConfig) -> DiffusionPolicy:
    policy = DiffusionPolicy(Features(2, 1), config)
    policy.action_normalizer.fit(torch.tensor([[-0.5], [1.5]]))
    return policy


def phi(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def declared(mdp: DenoisingMDP, condition: Tensor, x: Tensor, x_next: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and std of the Gaussian that `log_prob` is the density of, from its derivatives at two points."""

    def slope(y: Tensor) -> Tensor:
        y = y.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(mdp.log_prob(condition, x, y, k).sum(), y)
        return gradient

    precision = slope(x_next) - slope(x_next + 1)
    return x_next + slope(x_next) / precision, precision**-0.5


@pytest.mark.parametrize("floor", [0.1, 0.3])
@pytest.mark.parametrize("clip", [3.0, 1.0])
@pytest.mark.parametrize("name", ["ddpm", "ddim-eta-0.5", "euler"])
def test_sampled_steps_follow_the_declared_gaussian(floor: float, clip: float, name: str) -> None:
    """Kolmogorov-Smirnov, for every k: standardised steps are a normal whose draws are clamped to ±clip."""
    config, solver = MARKOV[name]
    policy = make_policy(config)
    steps = len(solver_steps(policy.schedule.config, solver))
    mdp = DenoisingMDP(policy, steps, ExplorationConfig(floor, floor, clip), solver)
    n = 10_000
    obs = torch.zeros(n, 1, 2)
    chain = mdp.sample(obs, generator=torch.Generator().manual_seed(0))
    condition = policy.condition(obs)
    for k in range(steps):
        x, x_next = chain.steps[:, steps - 1 - k], chain.steps[:, steps - k]
        mean, std = declared(mdp, condition, x, x_next, torch.full((n,), k))
        z = ((x_next - mean) / std).flatten().sort().values
        inside = z.abs() < clip - 1e-3
        empirical = torch.arange(1, len(z) + 1) / len(z)
        distance = float((empirical - phi(z))[inside].abs().max())
        assert distance < 1.63 / math.sqrt(len(z)), k  # 1 % level
        assert z.abs().max() <= clip * 1.001
        clamped = float((~inside).float().mean())
        assert clamped == pytest.approx(2 * float(phi(torch.tensor(-clip))), abs=0.006)


@pytest.mark.parametrize("name", MARKOV)
def test_log_prob_is_that_of_torch(name: str) -> None:
    """Mean and std are those of one solver step, computed for each k by the solver itself."""
    config, solver = MARKOV[name]
    policy = make_policy(config)
    schedule = policy.schedule.config
    steps = solver_steps(schedule, solver)
    if solver.solver == "ddpm" and len(steps) == schedule.num_train_timesteps:
        steps = posterior_steps(schedule)
    mdp = DenoisingMDP(policy, len(steps), ExplorationConfig(), solver)
    with torch.no_grad():
        for parameter in policy.tuned.parameters():
            parameter.add_(0.05)
    n = len(steps)
    x, x_next = torch.randn(2, n, 2, 1, generator=torch.Generator().manual_seed(0))
    k, condition = torch.arange(n), torch.zeros(n, 1, 2)

    def predict(noisy: Tensor, timestep: int) -> Tensor:
        prediction = policy.tuned(noisy, torch.tensor([timestep]), condition[:1])
        return policy.schedule.predict_clean(noisy, prediction, timestep, config.clip_sample)

    for i, step in enumerate(reversed(steps)):
        nothing = torch.zeros(int(step.std > 0), 1, 2, 1)
        mean = solve((step,), predict, x[i : i + 1], nothing)[0]
        expected = torch.distributions.Normal(mean, max(step.std, 0.1)).log_prob(x_next[i])
        torch.testing.assert_close(mdp.log_prob(condition, x, x_next, k)[i], expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("tuned", [1, 3, K])
def test_chains_hold_the_tuned_steps_and_end_in_the_action(tuned: int) -> None:
    policy = make_policy(DIFFUSION)
    mdp = DenoisingMDP(policy, tuned, ExplorationConfig())
    chain = mdp.sample(torch.zeros(4, 1, 2), generator=torch.Generator().manual_seed(0))
    assert chain.steps.shape == (4, tuned + 1, 2, 1)
    assert torch.equal(policy.action_normalizer.unnormalize(chain.steps[:, -1]), chain.actions)


@pytest.mark.parametrize("name", MARKOV)
def test_the_same_noise_gives_the_same_prefix_whatever_is_tuned(name: str) -> None:
    config, solver = MARKOV[name]
    steps = len(solver_steps(config.noise, solver))
    chains = [
        DenoisingMDP(make_policy(config), tuned, ExplorationConfig(), solver).sample(
            torch.zeros(4, 1, 2), generator=torch.Generator().manual_seed(0)
        )
        for tuned in (2, steps)
    ]
    torch.testing.assert_close(chains[0].steps, chains[1].steps[:, -3:], atol=1e-6, rtol=1e-6)


def test_without_floors_it_samples_as_the_policy_does() -> None:
    """With every draw given, a chain's action is the solver's where the std is above the floor."""
    policy = make_policy(DIFFUSION)
    solver = SolverConfig("ddim", 4, 1.0)
    steps = solver_steps(policy.schedule.config, solver)
    chain = DenoisingMDP(policy, 4, ExplorationConfig(1e-9, 0.1, 100.0), solver).sample(
        torch.zeros(3, 1, 2), generator=torch.Generator().manual_seed(0)
    )
    draws = torch.randn(5, 3, 2, 1, generator=torch.Generator().manual_seed(0))  # the MDP draws for every step
    sampled = policy.sample(
        torch.zeros(3, 1, 2), solver="ddim", num_inference_steps=4, eta=1.0, noise=draws[: n_draws(steps)]
    )
    torch.testing.assert_close(chain.actions, sampled, atol=1e-6, rtol=1e-6)


def record_timesteps(network: Denoiser, to: list[int]) -> None:
    """Let a network predict nothing, but write down the timestep of each prediction."""

    def denoise(noisy: Tensor, prepared: Tensor) -> Tensor:
        assert (prepared == prepared[0]).all()
        to.append(int(prepared[0]))
        return torch.zeros_like(noisy)

    network.prepare_steps = lambda timesteps, condition: iter(timesteps[:, None, None].expand(-1, len(condition), 1))
    network.denoise = denoise


@pytest.mark.parametrize("name", MARKOV)
@pytest.mark.parametrize("tuned", [1, 2])
def test_tuned_steps_are_those_of_the_solvers_grid(name: str, tuned: int) -> None:
    config, solver = MARKOV[name]
    policy = make_policy(config)
    grid = [step.timestep for step in solver_steps(policy.schedule.config, solver)]
    seen: dict[str, list[int]] = {"base": [], "tuned": []}
    mdp = DenoisingMDP(policy, tuned, ExplorationConfig(), solver)
    assert policy.tuned_below == grid[-tuned] + 1
    for which, timesteps in seen.items():
        record_timesteps(getattr(policy, which), timesteps)
    mdp.sample(torch.zeros(2, 1, 2), generator=torch.Generator().manual_seed(0))
    assert seen == {"base": grid[:-tuned], "tuned": grid[-tuned:]}


def test_the_policys_own_solver_is_the_default() -> None:
    config = replace(DIFFUSION, sampling=SolverConfig("ddim", 4, 1.0))
    mdp = DenoisingMDP(make_policy(config), 4, ExplorationConfig())
    assert mdp.solver == SolverConfig("ddim", 4, 1.0)
    assert mdp.sample(torch.zeros(2, 1, 2), generator=torch.Generator().manual_seed(0)).steps.shape == (2, 5, 2, 1)
    asked = DenoisingMDP(make_policy(config), 2, ExplorationConfig(), SolverConfig(num_inference_steps=2))
    assert asked.solver == SolverConfig("ddim", 2, 1.0)


@pytest.mark.parametrize("solver", ["dpmsolver++", "sde-dpmsolver++"])
def test_solvers_that_look_back_are_refused(solver: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"solver = '{solver}': cannot be tuned: its steps look back")):
        DenoisingMDP(toy_policy(), 2, ExplorationConfig(), SolverConfig(solver, 4))


@pytest.mark.parametrize("tuned", [0, 5])
def test_more_tuned_steps_than_the_solver_has_are_refused(tuned: int) -> None:
    with pytest.raises(ConfigError, match=rf"tuned_steps = {tuned}: must be from 1 .* 4"):
        DenoisingMDP(toy_policy(), tuned, ExplorationConfig(), SolverConfig("ddim", 4))


@pytest.mark.parametrize(
    ("own", "tuned", "expected"),
    [
        (SolverConfig(), SolverConfig("ddim", 4, 1.0), SolverConfig("ddim", 4)),
        (SolverConfig("ddim", 2), SolverConfig("ddim", 4, 1.0), SolverConfig("ddim", 2)),
        (SolverConfig("dpmsolver++", 4), SolverConfig("ddpm"), SolverConfig("dpmsolver++", 4)),
        (SolverConfig("ddim", 4), SolverConfig(), SolverConfig("ddim", 4)),
        (SolverConfig(), SolverConfig(), SolverConfig()),
    ],
)
def test_a_tuned_policy_samples_by_steps_that_were_tuned(
    own: SolverConfig, tuned: SolverConfig, expected: SolverConfig
) -> None:
    """Its own way stays where it visits no others."""
    policy = make_policy(replace(DIFFUSION, sampling=own))
    DenoisingMDP(policy, 3 if tuned.solver != "ddpm" else 8, ExplorationConfig(), tuned)
    assert policy.config.sampling == expected


@pytest.mark.parametrize(
    ("own", "asked", "eta"),
    [
        (SolverConfig("ddim", 4, 1.0), SolverConfig(None, 2), 1.0),
        (SolverConfig("ddim", 4, 0.5), SolverConfig("ddim", 2, 1.0), 1.0),
        (SolverConfig(), SolverConfig("ddim", 2, 1.0), 1.0),
    ],
)
def test_a_process_that_is_made_again_is_the_same(own: SolverConfig, asked: SolverConfig, eta: float) -> None:
    """As a run is checked before it starts, and when it goes on."""
    policy = make_policy(replace(DIFFUSION, sampling=own))
    first = DenoisingMDP(policy, 2, ExplorationConfig(), asked)
    sampling = policy.config.sampling
    second = DenoisingMDP(policy, 2, ExplorationConfig(), asked)
    assert first.solver == second.solver
    assert first.solver.eta == eta
    assert policy.config.sampling == sampling
    assert sampling.eta == own.eta, "it acts as it did, by the steps that are tuned"


@pytest.mark.full
def test_a_copy_of_a_compiled_process_has_weights_of_its_own() -> None:
    mdp = DenoisingMDP(make_policy(DIFFUSION), 3, ExplorationConfig())
    obs, noise = torch.ones(4, 1, 2), torch.randn(4, *mdp.noise_shape).transpose(0, 1)
    before = mdp.sample(obs, noise=noise).actions
    mdp.compile()
    torch.testing.assert_close(mdp.sample(obs, noise=noise).actions, before)
    copied = copy.deepcopy(mdp)
    assert copied.sample(obs, noise=noise).actions.equal(before)
    with torch.no_grad():
        for parameter in copied.trainable().parameters():
            parameter.add_(1.0)
    assert not copied.sample(obs, noise=noise).actions.allclose(before)
    torch.testing.assert_close(mdp.sample(obs, noise=noise).actions, before)
