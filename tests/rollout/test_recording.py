"""A recording shows exactly the episodes that an evaluation plays."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dprl.networks import MLPConfig
from dprl.policy import DiffusionConfig, DiffusionPolicy, Features, InferenceConfig
from dprl.rollout import evaluate, evaluation
from dprl.rollout.evaluation import record
from dprl.spec import EnvOptions, EnvSpec, resolve
from tests.toys import SPEED, TOLERANCE, reach_spec

CONFIG = DiffusionConfig(horizon=4, n_action_steps=3, num_train_timesteps=4, denoiser=MLPConfig(hidden_size=8))


class Reacher(DiffusionPolicy):
    """Reaches in most episodes: goes towards the goal, with a noisy hand."""

    def draw(self, obs: Tensor, inference: Any, generator: torch.Generator | None, **_: Any) -> Tensor:
        towards = (2 * (obs[:, -1, 1:] - obs[:, -1, :1])).clamp(-1, 1)
        return towards[:, None] + 0.5 * torch.randn(len(obs), self.config.horizon, 1, generator=generator)


def make_policy(spec: EnvSpec, **changes: Any) -> DiffusionPolicy:
    kind = Reacher if spec.id == "toy/reach" else DiffusionPolicy
    return kind(Features(spec.observation_size, spec.action_size), replace(CONFIG, **changes))


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What each call of `_play` returned: (success, return, length) of every episode."""
    results: list[Any] = []
    original = evaluation._play

    def spy(*args: Any) -> Any:
        results.append(original(*args))
        return results[-1]

    monkeypatch.setattr(evaluation, "_play", spy)
    return results


SPECS = {
    "sparse": lambda: replace(reach_spec(), max_episode_steps=8),
    "dense": lambda: replace(reach_spec(), reward="dense", max_episode_steps=8),
}


@pytest.mark.parametrize("max_envs", [50, 4, 1])
@pytest.mark.parametrize("n_obs_steps", [1, 2])
@pytest.mark.parametrize("inference", [None, InferenceConfig(temporal_ensembling=0.1)], ids=["chunks", "ensembling"])
@pytest.mark.parametrize("name", SPECS)
def test_recorded_episodes_are_those_evaluated(
    name: str, inference: InferenceConfig | None, n_obs_steps: int, max_envs: int, played: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Also where environments play several episodes, and end at different times."""
    monkeypatch.setattr(evaluation, "MAX_ENVS", max_envs)
    spec = SPECS[name]()
    policy = make_policy(spec, n_obs_steps=n_obs_steps)
    result = evaluate(policy, spec, 10, seed=3, inference=inference)
    trajectories = record(policy, spec, 10, seed=3, inference=inference)
    assert played[0] == played[1]
    assert len(trajectories) == 10
    for (success, episode_return, length), trajectory in zip(in_order(played[0]), trajectories, strict=True):
        assert trajectory.success == success
        assert sum(trajectory.rewards) == pytest.approx(episode_return, rel=1e-5)
        assert len(trajectory.actions) == len(trajectory.rewards) == length
        assert trajectory.states().shape == (length + 1, 2)
    assert result.success_rate == np.mean([t.success for t in trajectories])
    assert 0 < result.success_rate < 1, "both should be seen"
    assert result.return_mean == pytest.approx(np.mean([sum(t.rewards) for t in trajectories]), rel=1e-5)
    assert result.episode_length_mean == np.mean([len(t.actions) for t in trajectories])


def test_states_follow_from_the_actions() -> None:
    """The point moves by each action, clipped as the environment does; success is a slow step near the goal."""
    spec = SPECS["sparse"]()
    for trajectory in record(make_policy(spec), spec, 6, seed=0):
        states, actions = trajectory.states(), np.stack(trajectory.actions).clip(-1, 1)
        np.testing.assert_allclose(np.diff(states[:, 0]), SPEED * actions[:, 0], atol=1e-6)
        assert (states[:, 1] == states[0, 1]).all(), "the goal stays"
        near = np.abs(states[1:, 0] - states[1:, 1]) < TOLERANCE
        reached = near & (np.abs(actions[:, 0]) < 0.5)
        assert trajectory.success == reached[-1]
        assert not reached[:-1].any(), "an episode ends with its first success"


def test_progress_counts_every_episode() -> None:
    spec, done = SPECS["sparse"](), []
    record(make_policy(spec), spec, 7, seed=0, on_progress=done.append)
    assert sum(done) == 7


@pytest.mark.parametrize("inference", [None, InferenceConfig("ddim", 2), InferenceConfig(warm_start_steps=2)], ids=str)
def test_of_a_simulator_too(inference: InferenceConfig | None, played: list[Any]) -> None:
    pytest.importorskip("envpool")
    spec = resolve("Hopper-v5", EnvOptions(max_episode_steps=20))
    policy = make_policy(spec)
    evaluate(policy, spec, 4, seed=1, inference=inference)
    trajectories = record(policy, spec, 4, seed=1, inference=inference)
    assert played[0] == played[1]
    returns = [sum(trajectory.rewards) for trajectory in trajectories]
    np.testing.assert_allclose(returns, [outcome.episode_return for outcome in in_order(played[0])], rtol=1e-5)


def in_order(outcomes: dict[int, Any]) -> list[Any]:
    """Outcomes by their episodes' numbers."""
    return [outcomes[episode] for episode in range(len(outcomes))]
