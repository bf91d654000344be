"""Guides and scorers by name."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dprl.errors import CheckpointError, ConfigError
from dprl.guidance import Reward, ValueGuide
from dprl.guidance.spec import GuidanceConfig, steering
from dprl.policy import ChunkCritic, ChunkValue, ChunkValueConfig, CriticConfig, Features, Policy
from tests.policy.small import small_policy

OBS = torch.linspace(-1, 2, 24).view(4, 2, 3)


def far(obs: Tensor, actions: Tensor) -> Tensor:
    return actions.abs().sum((1, 2))


class Near:
    def at(self, obs: Tensor):
        return lambda actions: -far(obs, actions)


def with_critics(**changes: object) -> Policy:
    policy = small_policy("diffusion", **changes)
    policy.scorer = ChunkCritic(policy, CriticConfig(hidden_size=32))
    return policy


def test_nothing_named_is_nothing() -> None:
    assert steering(GuidanceConfig(), small_policy("diffusion")) == (None, None)


def test_the_policys_own_critics() -> None:
    policy = with_critics()
    guide, scorer = steering(GuidanceConfig("critic", 0.5, "through", "noise", 2, 1, scorer="critic"), policy)
    assert guide == ValueGuide(policy.scorer, 0.5, "through", "noise", 2, 1)
    assert scorer is policy.scorer
    assert steering(GuidanceConfig("critic"), policy).guide == ValueGuide(policy.scorer)


def test_a_function_and_a_class() -> None:
    policy = small_policy("diffusion")
    guide, scorer = steering(
        GuidanceConfig("tests.guidance.test_spec:Near", scorer="tests.guidance.test_spec:far"), policy
    )
    assert isinstance(guide.of, Near)
    assert scorer == Reward(far)
    actions = torch.ones(4, 3, 2)
    assert scorer.score(OBS, actions).tolist() == [6.0] * 4


def test_another_policys_critics_see_by_its_own_normalisation(tmp_path: Path) -> None:
    other = with_critics()
    other.observation_normalizer.fit(torch.tensor([[-9.0, -9, -9], [9, 9, 9]]))
    other.save_pretrained(tmp_path / "other")
    scorer = steering(GuidanceConfig(scorer=str(tmp_path / "other")), small_policy("diffusion")).scorer
    actions = torch.rand(4, 3, 2)
    assert scorer.score(OBS, actions).equal(other.scorer.score(OBS, actions))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GuidanceConfig("critic"), "guide = 'critic': the policy has no critics"),
        (GuidanceConfig(scorer="critic"), "scorer = 'critic': the policy has no critics"),
        (GuidanceConfig("critics"), "guide = 'critics': must be 'critic', a folder with critics, or 'module:function'"),
        (GuidanceConfig("tests.guidance.test_spec:none"), "cannot be loaded"),
        (GuidanceConfig("tests.guidance.test_spec:OBS"), "must name a function"),
        (GuidanceConfig(scorer="tests.guidance.test_spec:Near"), r"has no method score\(obs, actions\)"),
        (GuidanceConfig("tests.guidance.test_spec:far", gradient="noisy"), "is not of noisy actions"),
    ],
)
def test_what_names_nothing_that_fits_is_refused(config: GuidanceConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        steering(config, small_policy("diffusion"))


def test_critics_of_clean_actions_have_no_gradient_at_noisy_ones() -> None:
    with pytest.raises(ConfigError, match="guide = 'critic': is not of noisy actions: its gradient must be held or "):
        steering(GuidanceConfig("critic", gradient="noisy"), with_critics())


def test_one_gradient_at_noisy_actions_is_all_there_is() -> None:
    with pytest.raises(ConfigError, match="guide_steps = 2: must be 1 with gradient = noisy"):
        GuidanceConfig("critic", gradient="noisy", guide_steps=2)


def test_folders_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    policy = small_policy("diffusion")
    policy.save_pretrained(tmp_path / "without")
    with pytest.raises(ConfigError, match="holds no critics"):
        steering(GuidanceConfig(str(tmp_path / "without")), policy)
    for name, other, message in (
        ("sizes", small_policy("diffusion", Features(4, 2)), "its critics are of observations"),
        ("actions", small_policy("diffusion", Features(3, 1)), "its critics are of actions 1, the policy's are 2"),
        ("history", small_policy("diffusion", n_obs_steps=3), "its critics are of n_obs_steps 3, the policy's are 2"),
        ("longer", small_policy("diffusion", horizon=5, n_action_steps=5), "its critics are of 5 actions"),
    ):
        other.scorer = ChunkCritic(other, CriticConfig(hidden_size=8))
        other.save_pretrained(tmp_path / name)
        with pytest.raises(ConfigError, match=message):
            steering(GuidanceConfig(str(tmp_path / name)), policy)
    for name, other, message in (
        ("horizon", small_policy("diffusion", horizon=4), "of horizon 4, the policy's are 3"),
        ("noise", small_policy("diffusion", schedule="linear"), "its critics are of noise"),
    ):
        other.scorer = ChunkValue.of(other, ChunkValueConfig(hidden_size=8))
        other.save_pretrained(tmp_path / name)
        with pytest.raises(ConfigError, match=message):
            steering(GuidanceConfig(str(tmp_path / name), gradient="noisy"), policy)
    assert steering(GuidanceConfig(str(tmp_path / "noise")), policy).guide.gradient == "held"
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError):
        steering(GuidanceConfig(str(tmp_path / "empty")), policy)


@pytest.mark.parametrize(
    "setting", [{"scale": 2.0}, {"gradient": "through"}, {"scaling": "noise"}, {"guide_steps": 2}, {"skip_last": 1}]
)
def test_settings_without_a_guide_are_refused(setting: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(setting))} = .*: needs a guide"):
        GuidanceConfig(**setting)
