"""IQL and Diffusion-QL: what they learn on the bandit that IDQL is tested on, and that runs go on exactly."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dprl.agents import IQL, BCConfig, DiffusionQL, DiffusionQLConfig, IDQLConfig
from dprl.data import Episodes
from dprl.diffusion import SolverConfig
from dprl.errors import ConfigError
from dprl.networks import MLPConfig
from dprl.policy import (
    CriticConfig,
    DiffusionConfig,
    DiffusionPolicy,
    GaussianConfig,
    GaussianPolicy,
    GMMConfig,
    GMMPolicy,
)
from dprl.seeding import torch_generator
from tests.agents.test_idql import SMALL, bandit, in_better_mode, iterate
from tests.policy.small import random_episodes, small_config

BC_PART = BCConfig(batch_size=128)
CRITIC = CriticConfig(hidden_size=64)
NETWORK = DiffusionConfig(horizon=1, num_train_timesteps=10, denoiser=MLPConfig(hidden_size=64))


def slope(n: int = 2_000) -> Episodes:
    """One decision an episode: actions around 0, worth as much as they are large."""
    actions = (0.3 * np.random.default_rng(0).standard_normal(n)).clip(-1, 1).astype(np.float32)[:, None]
    no, zeros = np.zeros(n, np.bool_), np.zeros((n, 1), np.float32)
    return Episodes(zeros, actions, actions[:, 0], zeros, np.arange(1, n + 1), ~no, no, np.arange(n))


@pytest.mark.parametrize("improvement", ["one_step", pytest.param("chain", marks=pytest.mark.full)])
def test_diffusion_ql_goes_where_q_is_larger(improvement: str) -> None:
    """And nowhere else without Q: η = 0 is cloning."""
    data, generator, means = slope(), torch_generator(1), []
    for eta in (0.0, 1.0):
        config = DiffusionQLConfig(BC_PART, critic=CRITIC, eta=eta, improvement=improvement)  # type: ignore[arg-type]
        policy = DiffusionQL(DiffusionPolicy.for_dataset(data, NETWORK), config).fit(data, 400)
        means.append(float(policy.sample(torch.zeros(500, 1, 1), generator=generator).mean()))
    assert abs(means[0]) < 0.06
    assert means[1] > 0.12


@pytest.mark.full
def test_diffusion_ql_leaves_the_worse_mode() -> None:
    data = bandit()
    config = DiffusionQLConfig(BC_PART, critic=CRITIC, improvement="chain", eta=3.0)
    policy = DiffusionQL(DiffusionPolicy.for_dataset(data, NETWORK), config).fit(data, 1_500)
    cloned = (data.actions[:, 0] > 0).mean()
    assert in_better_mode(policy.sample(torch.zeros(500, 1, 1), generator=torch_generator(1))) > cloned + 0.2


def test_what_follows_is_the_least_target_q_of_the_averaged_policys_own_actions() -> None:
    data = random_episodes()
    agent = DiffusionQL(DiffusionPolicy.for_dataset(data, small_config("diffusion")), DiffusionQLConfig(critic=CRITIC))
    with torch.no_grad():
        for parameter in agent.critic.parameters():
            parameter.add_(1.0)  # so that the targets are others
    obs = torch.randn(6, agent.policy.config.n_obs_steps, 3)
    before = agent._generator.get_state()
    found = agent.future(obs)
    actions = agent.policy.rsample(obs, agent._generator.set_state(before))
    torch.testing.assert_close(found, agent.target.score(obs, actions))
    assert found.abs().max() > 0


def test_the_size_of_q_does_not_count() -> None:
    """Only where it grows, and η."""
    moved = []
    for factor in (1.0, 1_000.0):
        data = random_episodes()
        policy = DiffusionPolicy.for_dataset(data, small_config("diffusion"))
        agent = DiffusionQL(policy, DiffusionQLConfig(SMALL.bc, critic=SMALL.critic, batch_size=16))
        agent.set_data(data, 100)
        with torch.no_grad():
            for last in (agent.target.q_net.weights[-1], agent.target.q_net.biases[-1]):
                last.mul_(factor)
        agent.update_actor(next(iter(agent.actor.read(agent.collect().chunks))))
        moved.append(torch.cat([p.grad.flatten() for p in agent.actor._online.base.parameters()]))
    torch.testing.assert_close(*moved, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("improvement", ["one_step", "chain"])
def test_the_mean_of_the_targets_is_climbed(improvement: str) -> None:
    data = random_episodes()
    policy = DiffusionPolicy.for_dataset(data, small_config("diffusion"))
    agent = DiffusionQL(policy, DiffusionQLConfig(SMALL.bc, critic=SMALL.critic, improvement=improvement))
    agent.set_data(data, 100)
    with torch.no_grad():
        for parameter in agent.critic.parameters():
            parameter.add_(1.0)  # so that the targets are others
        agent.target.q_net.biases[-1].copy_(torch.tensor([1.0, 5.0]).view(2, 1, 1))
    (chunks,) = agent.actor.read(torch.arange(6)[None])
    state, terms = agent._generator.get_state(), []
    agent.actor.step = lambda batch, weight=None, more=None: terms.append(more(policy)) or torch.zeros(())
    agent.update_actor(chunks)
    agent._generator.set_state(state)
    if improvement == "chain":
        actions = policy.rsample(chunks.obs, agent._generator)
    else:
        actions = policy.denoise_once(chunks.obs, chunks.actions, agent._generator)
    q = agent.target.q(agent.target.see(chunks.obs), actions)
    torch.testing.assert_close(agent._climbed[0], q.mean())
    torch.testing.assert_close(terms[0], -q.mean() / q.abs().mean())


def test_imitation_and_q_are_logged_apart() -> None:
    """Of the same first minibatch imitation is the same, however much Q counts."""
    rows = []
    for eta in (0.0, 5.0):
        data = random_episodes()
        bc = replace(SMALL.bc, steps_per_iteration=1)
        config = DiffusionQLConfig(bc, critic=SMALL.critic, batch_size=16, eta=eta)
        agent = DiffusionQL(DiffusionPolicy.for_dataset(data, small_config("diffusion")), config)
        agent.set_data(data, 100)
        rows.append(iterate(agent)[0])
    without, with_q = rows
    assert without["bc/loss"] == with_q["bc/loss"] > 0
    assert without["diffusion-ql/policy_q_mean"] == with_q["diffusion-ql/policy_q_mean"]


@pytest.mark.full
def test_iql_weighs_what_a_gaussian_clones() -> None:
    """By exp(2 A): the mean of a Gaussian, moved by twice its variance."""
    data = slope()
    gaussian = GaussianPolicy.for_dataset(data, GaussianConfig(horizon=1, hidden_size=64))
    objective = replace(CRITIC.objective, level=0.5)
    config = IDQLConfig(BC_PART, critic=replace(CRITIC, objective=objective), advantage_scale=2.0)
    policy = IQL(gaussian, config).fit(data, 1_000)
    mean = float(policy.sample(torch.zeros(1, 1, 1), temperature=0.0))
    assert mean == pytest.approx(2 * data.actions.var(), abs=0.06)


@pytest.mark.parametrize("improvement", ["one_step", "chain"])
def test_a_resumed_run_goes_on_exactly(improvement: str, tmp_path: Path) -> None:
    config = DiffusionQLConfig(SMALL.bc, critic=SMALL.critic, batch_size=16, improvement=improvement)  # type: ignore[arg-type]

    def make() -> DiffusionQL:
        data = random_episodes()
        agent = DiffusionQL(DiffusionPolicy.for_dataset(data, small_config("diffusion")), config)
        agent.set_data(data, 20)
        return agent

    whole, first, second = make(), make(), make()
    rows = iterate(whole, 3)
    assert iterate(first) == rows[:1]
    first.save(tmp_path / "saved")
    second.load_state(tmp_path / "saved")
    assert iterate(second, 2) == rows[1:]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda data: IQL(DiffusionPolicy.for_dataset(data, NETWORK)), "policy = 'diffusion': must be gaussian"),
        (lambda data: IQL(GMMPolicy.for_dataset(data, GMMConfig())), "policy = 'gmm': must be gaussian"),
        (
            lambda data: IQL(GaussianPolicy.for_dataset(data, GaussianConfig()), IDQLConfig(actor_objective="soft")),
            "actor_objective = 'soft': must be left out",
        ),
        (lambda data: DiffusionQL(GaussianPolicy.for_dataset(data, GaussianConfig())), "policy = 'gaussian': must be"),
        (lambda data: DiffusionQLConfig(actor_objective="soft"), "actor_objective = 'soft': must be bc"),
        (lambda data: DiffusionQLConfig(eta=-1.0), "eta = -1"),
    ],
)
def test_what_does_not_fit_is_refused(make: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(bandit(20))  # type: ignore[operator]


@pytest.mark.parametrize("solver", [None, SolverConfig("ddim", 3, 0.0)])
def test_rsample_is_sample_with_gradients(solver: SolverConfig | None) -> None:
    policy = DiffusionPolicy.for_dataset(random_episodes(), small_config("diffusion"))
    if solver is not None:
        policy.set_sampling(solver, 1.0)
    obs = torch.randn(4, policy.config.n_obs_steps, 3)
    drawn = policy.rsample(obs, torch_generator(0))
    torch.testing.assert_close(drawn.detach(), policy.sample(obs, generator=torch_generator(0)))
    drawn.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in policy.base.parameters())


def test_denoising_once_recovers_what_the_network_predicts() -> None:
    """A network that predicts the noise exactly gives the actions back."""
    policy = DiffusionPolicy.for_dataset(random_episodes(), small_config("diffusion"))
    actions = 0.2 * torch.rand(6, 3, 2)
    clean = policy.action_normalizer.normalize(actions)

    seen = []

    def exact(noisy: torch.Tensor, timesteps: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        seen.extend(timesteps.tolist())
        signal, noise = (level[timesteps].view(-1, 1, 1) for level in policy.config.noise.levels())
        return ((noisy - signal * clean) / noise).float()

    policy.base.forward = exact  # type: ignore[method-assign]
    obs = torch.randn(6, policy.config.n_obs_steps, 3)
    for seed in range(5):
        found = policy.denoise_once(obs, actions, torch_generator(seed))
        torch.testing.assert_close(found, actions, atol=1e-3, rtol=1e-3)
    assert set(seen) == set(range(policy.config.num_train_timesteps))


def test_shapes_that_do_not_fit_are_refused() -> None:
    policy = DiffusionPolicy.for_dataset(random_episodes(), small_config("diffusion"))
    with pytest.raises(ConfigError, match="obs = "):
        policy.rsample(torch.zeros(3, 2))
    with pytest.raises(ConfigError, match="actions = "):
        policy.denoise_once(torch.zeros(3, 2, 3), torch.zeros(2, 3, 2))
