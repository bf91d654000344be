"""Diffuser: plans of a point on a line, whose data wander."""

from pathlib import Path

import pytest
import torch

from dprl.agents import Diffuser, DiffuserConfig, OutcomeConfig
from dprl.errors import ConfigError
from dprl.guidance import DiffuserGuide, ValueGuide
from dprl.policy import ChunkValueConfig, DiffusionConfig, DiffusionPolicy, Planner
from dprl.seeding import torch_generator
from tests.agents.walks import (
    BC,
    PLANS,
    START,
    STATES,
    require_resumed_equals_uninterrupted,
    share_to_the_right,
    walks,
)

VALUE = OutcomeConfig(critic=ChunkValueConfig(64, 2, n_networks=1), batch_size=128, learning_rate=3e-3, ema_decay=0.98)


def test_it_plans_what_earns_most() -> None:
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


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    def make() -> Diffuser:
        return Diffuser(Planner.for_dataset(walks(20), PLANS), DiffuserConfig(BC, VALUE), seed=3)

    whole, resumed = require_resumed_equals_uninterrupted(make, tmp_path)
    ours, theirs = whole.policy.scorer.state_dict(), resumed.policy.scorer.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_other_policies_and_settings_are_refused() -> None:
    data = walks(4)
    with pytest.raises(ConfigError, match="must be a planner that denoises"):
        Diffuser(DiffusionPolicy.for_dataset(data, DiffusionConfig(num_train_timesteps=2)))
    with pytest.raises(ConfigError, match="must be a planner that denoises rows"):
        Diffuser(Planner.for_dataset(data, STATES))
    with pytest.raises(ConfigError, match=r"value\.of = 'success'"):
        DiffuserConfig(value=OutcomeConfig("success"))
    with pytest.raises(ConfigError, match=r"value\.validation_share = 0\.3"):
        DiffuserConfig(value=OutcomeConfig(validation_share=0.3))
    with pytest.raises(ConfigError, match="steps = 0"):
        Diffuser(Planner.for_dataset(data, PLANS)).fit(data, 0)
