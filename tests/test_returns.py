"""GAE, reward scaling and explained variance against their definitions."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dprl.returns import RunningReturnStd, explained_variance, gae


@st.composite
def rollouts(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    steps, envs, seed = draw(st.integers(1, 12)), draw(st.integers(1, 4)), draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    reward, value, next_value = torch.randn(3, steps, envs, generator=generator, dtype=torch.float64)
    terminated = torch.rand(steps, envs, generator=generator) < draw(st.sampled_from([0.0, 0.2, 0.6]))
    truncated = torch.rand(steps, envs, generator=generator) < draw(st.sampled_from([0.0, 0.2, 0.6]))
    return {
        "reward": reward, "value": value, "next_value": next_value, "terminated": terminated,
        "ended": terminated | truncated,
    }  # fmt: skip


@given(rollouts(), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_gae_is_its_defining_sum(rollout: dict[str, torch.Tensor], gamma: float, gae_lambda: float) -> None:
    """A_t = Σ_l (γλ)^l δ_{t+l}, up to and including the first step that ends the episode."""
    reward, value, next_value = rollout["reward"], rollout["value"], rollout["next_value"]
    terminated, ended = rollout["terminated"], rollout["ended"]
    expected = torch.zeros_like(reward)
    for n in range(reward.shape[1]):
        for t in range(reward.shape[0]):
            for step in range(t, reward.shape[0]):
                bootstrap = 0.0 if terminated[step, n] else gamma * next_value[step, n]
                delta = reward[step, n] + bootstrap - value[step, n]
                expected[t, n] += (gamma * gae_lambda) ** (step - t) * delta
                if ended[step, n]:
                    break
    torch.testing.assert_close(gae(**rollout, gamma=gamma, gae_lambda=gae_lambda), expected)


@given(rollouts(), st.floats(0, 1))
@settings(max_examples=50, deadline=None)
def test_lambda_zero_is_the_td_error(rollout: dict[str, torch.Tensor], gamma: float) -> None:
    delta = rollout["reward"] + gamma * rollout["next_value"] * ~rollout["terminated"] - rollout["value"]
    torch.testing.assert_close(gae(**rollout, gamma=gamma, gae_lambda=0.0), delta)


def test_lambda_one_is_the_discounted_return_minus_the_value() -> None:
    reward, value = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([[0.5], [0.25], [0.125]])
    next_value = torch.tensor([[0.25], [0.125], [8.0]])
    no, last = torch.zeros(3, 1, dtype=torch.bool), torch.tensor([[False], [False], [True]])
    terminated = gae(reward, value, next_value, last, last, 0.5, 1.0)
    assert terminated[0, 0] == pytest.approx(1 + 0.5 * 2 + 0.25 * 4 - 0.5)
    truncated = gae(reward, value, next_value, no, last, 0.5, 1.0)
    assert truncated[0, 0] == pytest.approx(1 + 0.5 * 2 + 0.25 * 4 + 0.125 * 8 - 0.5)


def test_no_trace_crosses_a_truncation() -> None:
    reward, zeros = torch.tensor([[0.0], [100.0]]), torch.zeros(2, 1)
    ended = torch.tensor([[True], [False]])
    assert gae(reward, zeros, zeros, torch.zeros(2, 1, dtype=torch.bool), ended, 0.9, 0.9)[0, 0] == 0


def test_reward_scaler_divides_by_the_std_of_the_discounted_return() -> None:
    rng, gamma = np.random.default_rng(0), 0.9
    scaler = RunningReturnStd(3, gamma)
    seen, running = [], np.zeros(3)
    for _ in range(4):  # several calls: accumulators and moments go on
        reward, ended = rng.normal(size=(20, 3)), rng.random((20, 3)) < 0.2
        for t in range(20):
            running = running * gamma + reward[t]
            seen.append(running.copy())
            running[ended[t]] = 0
        scaled = scaler(torch.tensor(reward), torch.tensor(ended))
        assert scaler.std == pytest.approx(np.std(np.concatenate(seen)))
        torch.testing.assert_close(scaled, torch.tensor(reward / scaler.std))


def test_reward_scaler_clips_and_survives_constant_rewards() -> None:
    scaler = RunningReturnStd(1, 0.0)
    zeros, no = torch.zeros(5, 1), torch.zeros(5, 1, dtype=torch.bool)
    assert torch.equal(scaler(zeros, no), zeros)
    assert float(scaler(torch.tensor([[1e-3], [-1e-3], [5.0]]), no[:3]).abs().max()) <= 10


def test_reward_scaler_resumes() -> None:
    reward, ended = torch.randn(10, 2, generator=torch.Generator().manual_seed(0)), torch.zeros(10, 2).bool()
    whole, first, second = (RunningReturnStd(2, 0.9) for _ in range(3))
    whole(reward, ended)
    first(reward, ended)
    second.restore(first.state())
    assert torch.equal(whole(reward, ended), second(reward, ended))


def test_environments_that_are_missing_start_anew() -> None:
    scaler = RunningReturnStd(2, gamma=0.5)
    scaler(torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.bool))
    scaler(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.bool), torch.tensor([1]))
    assert scaler.state()["returns"].tolist() == [0.0, 1.5]


def test_explained_variance() -> None:
    target = torch.tensor([1.0, 2.0, 3.0])
    assert explained_variance(target, target) == 1
    assert explained_variance(torch.full((3,), 2.0), target) == 0
    assert np.isnan(explained_variance(target, torch.ones(3)))
