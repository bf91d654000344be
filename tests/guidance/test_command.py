"""Telling a policy what shall come of its chunks: training, guiding, and what is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dprl.agents import BC, BCConfig
from dprl.data import Episodes
from dprl.data.transitions import returns_to_go
from dprl.diffusion import Level, SolverConfig
from dprl.errors import ConfigError, DatasetError
from dprl.guidance import CommandGuide, DenoisingStep, Guides, Reward, ValueGuide
from dprl.guidance.spec import GuidanceConfig, steering
from dprl.mdp import ExplorationConfig, mdp_of
from dprl.networks import DENOISERS, MLPConfig, commanded
from dprl.policy import DiffusionConfig, DiffusionPolicy, Policy
from dprl.seeding import numpy_generator, torch_generator
from tests.policy.small import random_episodes, small_policy

OBS = torch.linspace(-1, 2, 24).view(4, 2, 3)


def a_step(**changes: object) -> DenoisingStep:
    """Whose network says 2 x_t, and told c x_t + c."""
    step = DenoisingStep(
        OBS, torch.full((4, 3, 2), 0.1), 2, 5, Level(0.6, 0.8), Level(0.8, 0.6), lambda x: 2 * x, lambda x: x,
        told=lambda x, c: x + c.view(-1, 1, 1),
    )  # fmt: skip
    return replace(step, **changes)


def sampled(policy: DiffusionPolicy, guide: object = None) -> Tensor:
    return policy.sample(OBS, generator=torch_generator(0, "test"), guide=guide)


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.2, 3.0])
def test_predictions_are_mixed(scale: float) -> None:
    step = CommandGuide(0.5, scale).shift(a_step())
    torch.testing.assert_close(step.clean, torch.full((4, 3, 2), 0.2 + scale * (0.6 - 0.2)))


def test_a_scale_of_nothing_changes_no_bit() -> None:
    for command, value in (("return", 0.9), ("goal", (0.1, 0.2, 0.3))):
        policy = small_policy("diffusion", command=command)
        assert sampled(policy, CommandGuide(value, 0.0)).equal(sampled(policy))
        assert not sampled(policy, CommandGuide(value, 1.2)).equal(sampled(policy))


def test_a_value_climbs_from_what_was_told() -> None:
    guide = Guides((CommandGuide(0.5, 1.0), ValueGuide(Reward(lambda obs, a: a.sum((1, 2))), 0.1, scaling="constant")))
    torch.testing.assert_close(guide.shift(a_step()).clean, torch.full((4, 3, 2), 0.6 + 0.1 / 0.6))
    with pytest.raises(ConfigError, match="out of order"):
        Guides(guide.guides[::-1]).shift(a_step())


def test_a_command_for_each_observation() -> None:
    step = CommandGuide(lambda obs: obs[:, -1, :1], 1.0).shift(a_step())
    torch.testing.assert_close(step.clean[:, 0, 0], 0.1 + OBS[:, -1, 0])


@pytest.mark.parametrize("kind", list(DENOISERS))
def test_every_denoiser_can_be_told(kind: str) -> None:
    policy = small_policy("diffusion", command="return", denoiser=DENOISERS[kind].config(), horizon=4)
    assert not sampled(policy, CommandGuide(0.9)).equal(sampled(policy, CommandGuide(0.1)))


def test_being_told_nothing_is_zeros_and_a_flag() -> None:
    policy = small_policy("diffusion", command="return")
    noisy, time, condition = torch.randn(4, 3, 2), torch.tensor([1]), policy.condition(OBS)
    untold = commanded(condition, torch.ones(4, 1), torch.zeros(4, dtype=torch.bool))
    torch.testing.assert_close(policy.base(noisy, time, condition), policy.base(noisy, time, untold))
    told = commanded(condition, torch.zeros(4, 1))
    assert not torch.allclose(policy.base(noisy, time, condition), policy.base(noisy, time, told))


def test_what_data_would_have_commanded() -> None:
    data = random_episodes()
    data = replace(data, rewards=data.actions[:, 0].copy())
    of_return = DiffusionPolicy.for_dataset(data, DiffusionConfig(command="return", command_gamma=0.9))
    found, returns = of_return.commands(data), returns_to_go(data, 0.9)
    assert found.shape == (len(data.actions), 1)
    assert (found.min(), found.max()) == (-1.0, 1.0)
    assert np.argmax(found) == np.argmax(returns)
    of_goal = DiffusionPolicy.for_dataset(data, DiffusionConfig(command="goal"))
    normal = of_goal.observation_normalizer.normalize(torch.as_tensor(data.final_observations))
    assert torch.as_tensor(of_goal.commands(data)[[0, -1]]).equal(normal[[0, -1]])
    assert DiffusionPolicy.for_dataset(data).commands(data).shape == (len(data.actions), 0)
    with pytest.raises(DatasetError, match="neither rewards nor success"):
        DiffusionPolicy.for_dataset(replace(data, rewards_from="none"), DiffusionConfig(command="return"))


def two_ways(n: int = 2_000) -> Episodes:
    """Left earns 0, right earns 1, as often."""
    rng = numpy_generator(0, "test")
    right = rng.random(n) < 0.5
    actions = (np.where(right, 0.6, -0.6) + 0.1 * rng.standard_normal(n)).astype(np.float32)[:, None]
    seen, whole = rng.uniform(-1, 1, (n, 1)).astype(np.float32), np.ones(n, np.bool_)
    return Episodes(seen, actions, right.astype(np.float32), seen, np.arange(1, n + 1), whole, right, np.arange(n))


def test_it_does_what_it_is_told(tmp_path: Path) -> None:
    data = two_ways()
    config = DiffusionConfig(num_train_timesteps=8, horizon=1, denoiser=MLPConfig(64), command="return")
    policy = DiffusionPolicy.for_dataset(data, config)
    policy = BC(policy, BCConfig(learning_rate=3e-3, ema_decay=0.98)).fit(data, 400)
    policy.save_pretrained(tmp_path / "policy")
    policy, obs = Policy.from_pretrained(tmp_path / "policy"), torch.zeros(500, 1, 1)

    def share_of_right(guide: object) -> float:
        drawn = policy.sample(obs, generator=torch_generator(0, "test"), guide=guide)
        return float((drawn > 0).float().mean())

    assert share_of_right(None) == pytest.approx(0.5, abs=0.12)
    assert share_of_right(CommandGuide(1.0, 1.0)) > 0.95
    assert share_of_right(CommandGuide(0.0, 1.0)) < 0.05
    guide, _ = steering(GuidanceConfig(command=(1.0,)), policy)
    assert guide == CommandGuide((1.0,), 1.2)


def test_commands_beyond_the_data_are_known_as_such() -> None:
    policy = small_policy("diffusion", command="return")
    assert [policy.known((share,)) for share in (-0.1, 0.0, 0.5, 1.0, 1.1)] == [False, True, True, True, False]
    goal = small_policy("diffusion", command="goal")
    goal.command_normalizer.fit(torch.tensor([[-2.0, 0, 0], [2.0, 1, 1]]))
    assert goal.known((-2.0, 0.5, 1.0))
    assert not goal.known((0.0, 1.2, 0.0))


def test_commands_that_are_none_are_refused() -> None:
    for command, scale, message in (
        ((), 1.0, "must be finite numbers"),
        (0.5, "1", "scale = '1'"),
        (0.5, None, "scale"),
    ):
        with pytest.raises(ConfigError, match=message):
            CommandGuide(command, scale)
    policy = small_policy("diffusion", command="return")
    with pytest.raises(ConfigError, match="command = 'float': must return a tensor"):
        policy.sample(torch.zeros(2, 2, 3), guide=CommandGuide(lambda obs: 0.9))


def test_dropout_keeps_commands_from_the_network() -> None:
    """Where it is dropped the loss is that of being told nothing."""
    data = random_episodes()
    obs, actions = torch.as_tensor(data.observations[:6]).view(3, 2, 3), torch.as_tensor(data.actions[:9]).view(3, 3, 2)
    policy, command = small_policy("diffusion", command="return", command_dropout=0.9999), torch.ones(3, 1)
    losses = [policy.loss(obs, actions, generator=torch_generator(0, "t"), command=c) for c in (command, -command)]
    torch.testing.assert_close(losses[0], losses[1])
    policy = small_policy("diffusion", command="return", command_dropout=1e-4)
    told = [policy.loss(obs, actions, generator=torch_generator(0, "t"), command=c) for c in (command, -command)]
    assert told[0] != told[1]


def test_what_cannot_be_told_is_refused() -> None:
    plain, told = small_policy("diffusion"), small_policy("diffusion", command="goal")
    with pytest.raises(ConfigError, match="the policy was trained without"):
        sampled(plain, CommandGuide(0.9))
    with pytest.raises(
        ConfigError, match="must be 3 numbers, or as many for each observation: the policy is told its goal"
    ):
        sampled(told, CommandGuide(0.9))
    for policy, config, complaint in (
        (plain, GuidanceConfig(command=(0.9,)), "the policy was trained without"),
        (told, GuidanceConfig(command=(0.9,)), "must have 3 numbers"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            steering(config, policy)
    for wrong in (lambda obs: torch.zeros(()), lambda obs: torch.zeros(2, 3)):
        with pytest.raises(ConfigError, match="must be 3 numbers, or as many for each observation"):
            sampled(told, CommandGuide(wrong))
    for command, scale in ((float("nan"), 1.0), (0.5, float("inf")), ((0.1, float("nan"), 0.2), 1.0)):
        with pytest.raises(ConfigError, match=r"must be .*finite"):
            CommandGuide(command, scale)
    for changes in ({"command_dropout": 0.5}, {"command": "goal", "command_gamma": 0.5}):
        with pytest.raises(ConfigError, match="needs a command that has it"):
            DiffusionConfig(**changes)
    data = random_episodes()
    agent = BC(DiffusionPolicy.for_dataset(data, DiffusionConfig(command="return")))
    with pytest.raises(DatasetError, match="every return of the data is 0: there is nothing to command"):
        agent.set_data(data, 1)
    for nothing in ("much", None):
        with pytest.raises(ConfigError, match="must be numbers, or a function of observations"):
            CommandGuide(nothing)
    with pytest.raises(ConfigError, match="must be one without a command"):
        mdp_of(told, 1, ExplorationConfig(), SolverConfig())
    with pytest.raises(ConfigError, match="needs a command"):
        GuidanceConfig(command_scale=2.0)
    with pytest.raises(ConfigError, match="command_dropout"):
        DiffusionConfig(command_dropout=1.5)
