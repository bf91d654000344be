"""Diffuser and Decision Diffuser: plans of a point on a line, whose data wander."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dprl.agents import (
    IDQL,
    BCConfig,
    DecisionDiffuser,
    Diffuser,
    DiffuserConfig,
    IDQLConfig,
    OutcomeConfig,
)
from dprl.agents.prospects import prospects
from dprl.errors import ConfigError
from dprl.guidance import CommandGuide, DiffuserGuide, ValueGuide
from dprl.networks import MLPConfig
from dprl.policy import (
    ChunkValueConfig,
    DiffusionConfig,
    DiffusionPolicy,
    Planner,
    PlannerConfig,
)
from dprl.seeding import torch_generator
from tests.agents.walks import critics, walks

H = 4
PLANS = PlannerConfig(horizon=H, n_action_steps=2, num_train_timesteps=10, denoiser=MLPConfig(hidden_size=64))
STATES = replace(PLANS, denoised="states", inverse_size=32, command="return")
BC = BCConfig(batch_size=128, learning_rate=3e-3, final_learning_rate=3e-4, ema_decay=0.98)
VALUE = OutcomeConfig(critic=ChunkValueConfig(64, 2, n_networks=1), batch_size=128, learning_rate=3e-3, ema_decay=0.98)


def share_to_the_right(plans: Tensor) -> float:
    return float((plans[:, 0, 0] > 0).float().mean())


START = torch.zeros(1_000, 1, 1)


def test_diffuser_plans_what_earns_most() -> None:
    data = walks()
    policy = Planner.for_dataset(data, PLANS)
    Diffuser(policy, DiffuserConfig(BC, VALUE)).fit(data, 500)
    plain = policy.sample(START, generator=torch_generator(0))
    assert 0.35 < share_to_the_right(plain) < 0.65, "both ways are kept"
    assert ((plain[:, 0, 0] > 0) == (plain[:, 1:, 1].mean(1) > 0)).float().mean() > 0.95, "actions lead to the states"
    best = policy.sample(START, generator=torch_generator(0), candidates=16)
    assert share_to_the_right(best) > 0.99
    for guide in (DiffuserGuide(policy.scorer, 1.0), ValueGuide(policy.scorer, 1.0, "noisy", "score")):
        steered = policy.sample(START, generator=torch_generator(0), guide=guide)
        assert share_to_the_right(steered) > share_to_the_right(plain) + 0.2


def test_decision_diffuser_plans_what_it_is_told() -> None:
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


# ---------------------------------------------------------------------------------------------------- what plans earn


def test_discounts_are_the_critics() -> None:
    policy = Planner.for_dataset(walks(4), PLANS)
    for changes in ({"gamma": 0.5}, {"termination_penalty": 1.0}):
        with pytest.raises(ConfigError, match="must be left out: critics have their own"):
            Diffuser(policy, DiffuserConfig(value=OutcomeConfig(**changes)), critics=critics())


def test_plans_are_told_apart_by_what_critics_say() -> None:
    """Where the data's own returns say the opposite."""
    data = walks(200)
    data = replace(data, rewards=-data.rewards, terminated=~data.terminated)
    says = critics(gamma=1.0, scale=1e-6)
    policy = Planner.for_dataset(data, PLANS)
    Diffuser(policy, DiffuserConfig(BC, VALUE), critics=says).fit(data, 200)
    assert share_to_the_right(policy.sample(START, generator=torch_generator(0), candidates=16)) > 0.95
    told = Planner.for_dataset(data, STATES)
    agent = DecisionDiffuser(told, BC, critics=says)
    agent.fit(data, 2)
    better = prospects(data, H - 1, says)
    expected = better.clip(*np.quantile(better, (0.05, 0.95)))
    assert expected.max() < better.max()
    commands = agent.commands(data)[:, 0]
    np.testing.assert_allclose(
        commands, 2 * (expected - expected.min()) / (expected.max() - expected.min()) - 1, atol=1e-5
    )


# ----------------------------------------------------------------------------------------------------------- to resume


def agents(kind: str) -> Diffuser | DecisionDiffuser:
    if kind == "diffuser":
        return Diffuser(Planner.for_dataset(walks(20), PLANS), DiffuserConfig(BC, VALUE), seed=3)
    return DecisionDiffuser(Planner.for_dataset(walks(20), STATES), BC, seed=3)


@pytest.mark.parametrize("kind", ["diffuser", "decision-diffuser"])
def test_resumed_equals_uninterrupted(kind: str, tmp_path: Path) -> None:
    data, small = walks(20), []
    whole, stopped = agents(kind), agents(kind)
    for agent in (whole, stopped):
        agent.set_data(data, 200)
        small.append(agent.update(agent.collect()))
    assert {k: v for k, v in small[0].items() if "time" not in k} == {
        k: v for k, v in small[1].items() if "time" not in k
    }
    stopped.save(tmp_path / "saved")
    resumed = agents(kind)
    resumed.set_data(data, 200)
    resumed.load_state(tmp_path / "saved")
    assert resumed.timesteps == 100
    for agent in (whole, resumed):
        agent.update(agent.collect())
    ours, theirs = whole.policy.state_dict(), resumed.policy.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    if kind == "diffuser":
        ours, theirs = whole.policy.scorer.state_dict(), resumed.policy.scorer.state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_other_policies_and_settings_are_refused() -> None:
    data = walks(4)
    plain = DiffusionPolicy.for_dataset(data, DiffusionConfig(num_train_timesteps=2))
    for make in (Diffuser, DecisionDiffuser):
        with pytest.raises(ConfigError, match="must be a planner that denoises"):
            make(plain)
    with pytest.raises(ConfigError, match="must be a planner that denoises rows"):
        Diffuser(Planner.for_dataset(data, STATES))
    with pytest.raises(ConfigError, match="must be a planner that denoises states"):
        DecisionDiffuser(Planner.for_dataset(data, PLANS))
    with pytest.raises(ConfigError, match=r"policy\.command = None: must be return"):
        DecisionDiffuser(Planner.for_dataset(data, replace(STATES, command=None)))
    with pytest.raises(ConfigError, match=r"value\.of = 'success'"):
        DiffuserConfig(value=OutcomeConfig("success"))
    with pytest.raises(ConfigError, match=r"value\.validation_share = 0\.3"):
        DiffuserConfig(value=OutcomeConfig(validation_share=0.3))
    with pytest.raises(ConfigError, match="steps = 0"):
        Diffuser(Planner.for_dataset(data, PLANS)).fit(data, 0)


def test_it_learns_with_critics_of_idql() -> None:
    data = walks(20)
    judge = DiffusionPolicy.for_dataset(data, DiffusionConfig(num_train_timesteps=2, horizon=1))
    IDQL(judge, IDQLConfig()).fit(data, 2)
    policy = Planner.for_dataset(data, PLANS)
    agent = Diffuser(policy, DiffuserConfig(BC, replace(VALUE, ema_decay=0.5)), critics=judge)
    agent.fit(data, 2)
    shown, _ = data.split(BC.validation_share, agent.seed)
    ahead = prospects(shown, H, judge)
    assert policy.scorer.mean == pytest.approx(ahead.mean(), rel=1e-4)
    assert policy.scorer.std == pytest.approx(ahead.std(), rel=1e-4)
