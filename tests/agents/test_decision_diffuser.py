"""Decision Diffuser: plans of a point on a line, whose data wander."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dprl.agents import IDQL, DecisionDiffuser, IDQLConfig
from dprl.agents.prospects import prospects
from dprl.errors import ConfigError
from dprl.guidance import CommandGuide
from dprl.policy import DiffusionConfig, DiffusionPolicy, Planner
from dprl.seeding import torch_generator
from tests.agents.walks import (
    BC,
    PLANS,
    START,
    STATES,
    critics,
    require_resumed_equals_uninterrupted,
    share_to_the_right,
    walks,
)


def test_it_plans_what_it_is_told() -> None:
    data = walks()
    policy = Planner.for_dataset(data, STATES)
    DecisionDiffuser(policy, BC).fit(data, 600)
    shares = {}
    for told in (0.0, 1.0):
        plans = policy.sample(START, generator=torch_generator(0), guide=CommandGuide(told, 1.5))
        shares[told] = share_to_the_right(plans)
        led = (plans[:, 1:, 1] - plans[:, :-1, 1] - plans[:, :-1, 0]).abs()
        assert led.mean() < 0.25, "actions lead from state to state"
    assert shares[0.0] < 0.1
    assert shares[1.0] > 0.9
    assert 0.3 < share_to_the_right(policy.sample(START, generator=torch_generator(0))) < 0.7


# ----------------------------------------------------------------------------------------------- what critics say of it


def test_discounts_are_the_critics() -> None:
    other = Planner.for_dataset(walks(4), replace(STATES, command_gamma=0.5))
    with pytest.raises(ConfigError, match="must be left out: critics have their own"):
        DecisionDiffuser(other, critics=critics())


def test_commands_are_what_critics_say_where_the_datas_own_returns_say_the_opposite() -> None:
    data = walks(200)
    data = replace(data, rewards=-data.rewards, terminated=~data.terminated)
    says = critics(gamma=1.0, scale=1e-6)
    agent = DecisionDiffuser(Planner.for_dataset(data, STATES), BC, critics=says)
    agent.fit(data, 2)
    better = prospects(data, STATES.horizon - 1, says)
    expected = better.clip(*np.quantile(better, (0.05, 0.95)))
    assert expected.max() < better.max()
    commands = agent.commands(data)[:, 0]
    np.testing.assert_allclose(
        commands, 2 * (expected - expected.min()) / (expected.max() - expected.min()) - 1, atol=1e-5
    )


def test_it_learns_with_critics_of_idql() -> None:
    data = walks(20)
    judge = DiffusionPolicy.for_dataset(data, DiffusionConfig(num_train_timesteps=2, horizon=1))
    IDQL(judge, IDQLConfig()).fit(data, 2)
    agent = DecisionDiffuser(Planner.for_dataset(data, STATES), BC, critics=judge)
    agent.fit(data, 2)
    shown, _ = data.split(BC.validation_share, agent.seed)
    ahead = prospects(shown, STATES.horizon - 1, judge)
    low, high = np.quantile(ahead, (0.05, 0.95))
    known = agent.policy.command_normalizer
    np.testing.assert_allclose([float(known.low), float(known.high)], [low, high], rtol=1e-3, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------- to resume


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    def make() -> DecisionDiffuser:
        return DecisionDiffuser(Planner.for_dataset(walks(20), STATES), BC, seed=3)

    require_resumed_equals_uninterrupted(make, tmp_path)


def test_other_policies_are_refused() -> None:
    data = walks(4)
    with pytest.raises(ConfigError, match="must be a planner that denoises"):
        DecisionDiffuser(DiffusionPolicy.for_dataset(data, DiffusionConfig(num_train_timesteps=2)))
    with pytest.raises(ConfigError, match="must be a planner that denoises states"):
        DecisionDiffuser(Planner.for_dataset(data, PLANS))
    with pytest.raises(ConfigError, match=r"policy\.command = None: must be return"):
        DecisionDiffuser(Planner.for_dataset(data, replace(STATES, command=None)))
