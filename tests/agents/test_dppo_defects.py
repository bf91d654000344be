"""What went wrong in earlier code of DPPO, and must not here. What other files test is not repeated:

traces across resets, the reward scale and its variance (tests/test_returns.py), one tuned step and all of them
(test_dppo.py, tests/mdp), the density that is sampled (tests/mdp), learning rates that climb (tests/test_schedules.py),
evaluations that disturb training and runs that cannot go on (tests/training/test_resume.py), updates that wait for
a GPU (test_dppo_options.py).
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from dprl.agents import DPPO, DPPOConfig
from dprl.errors import ConfigError
from dprl.mdp import ExplorationConfig
from dprl.networks.mlp import ResidualBlock
from dprl.returns import RunningReturnStd
from dprl.rollout import Rollout
from tests.toys import make_toy, reach_spec, toy_policy

SMALL = DPPOConfig(tuned_steps=3, n_steps=6, n_epochs=2, batch_size=40, critic_hidden_size=16)


def agent(**changes: object) -> DPPO:
    return DPPO(toy_policy(), make_toy(reach_spec(), 4), replace(SMALL, **changes))


def counted(module: nn.Module) -> list[int]:
    """Rows of every call of a denoiser."""
    rows: list[int] = []
    denoise = module.denoise

    def spy(noisy: torch.Tensor, prepared: torch.Tensor) -> torch.Tensor:
        rows.append(len(noisy))
        return denoise(noisy, prepared)

    module.denoise = spy
    return rows


def test_an_update_evaluates_the_tuned_network_once_for_each_pair_and_the_frozen_one_never() -> None:
    dppo = agent()
    rollout = dppo.collect()
    base, tuned = counted(dppo.policy.base), counted(dppo.policy.tuned)
    dppo.update(rollout)
    assert base == []
    assert sum(tuned) == SMALL.n_epochs * 6 * 4 * 3


def test_log_probs_of_the_rollout_are_not_computed_again() -> None:
    dppo = agent()
    rollout = dppo.collect()
    tuned = counted(dppo.policy.tuned)
    dppo._prepare(rollout)
    assert tuned == []


def test_what_belongs_to_denoising_steps_is_looked_up_on_the_learners_device() -> None:
    dppo = agent()
    for table in (dppo._discounts, dppo._clip_ranges):
        assert isinstance(table, torch.Tensor)
        assert table.shape[-1] == 3
        assert table.device == dppo.policy.device
    assert dppo._discounts.tolist() == pytest.approx([1, 0.99, 0.99**2])


@pytest.mark.parametrize(("gamma", "per", "discount"), [(0.5, "decision", 0.5), (0.5, "step", 0.25)])
def test_rewards_are_scaled_by_returns_of_the_same_discount(gamma: float, per: str, discount: float) -> None:
    dppo = agent(gamma=gamma, gamma_per=per, n_steps=60)
    rollout = dppo.collect()
    rollout = replace(rollout, step_rewards=np.random.default_rng(0).standard_normal((60, 4, 1), np.float32))
    metrics = dppo.update(rollout)
    scaler = RunningReturnStd(4, discount)
    scaler(torch.as_tensor(rollout.rewards), torch.as_tensor(rollout.ended))
    assert metrics["dppo/reward_std"] == pytest.approx(scaler.std)


def test_an_episode_that_was_cut_is_worth_what_its_own_last_observation_is() -> None:
    dppo = agent(n_steps=60, gae_lambda=0.0, normalize_returns=False, bootstrap_truncated=True)
    rollout = dppo.collect()
    cut = rollout.truncated[:-1]
    assert cut.any()
    assert (rollout.final_observations[:-1][cut] != rollout.observations[1:][cut]).any(), "the next episode's differs"
    led_to = torch.as_tensor(rollout.final_observations).flatten(0, 1)
    with torch.no_grad():
        expected = rollout.rewards + 0.99 * dppo.critic(led_to).view(60, 4).numpy() * ~rollout.terminated
    targets, _ = dppo._prepare(rollout)
    np.testing.assert_allclose(targets.returns.view(60, 4), expected, atol=1e-6)


def test_a_critic_of_state_and_action_is_as_residual_as_that_of_the_state() -> None:
    dppo = agent(critic="state_action")
    blocks = [sum(isinstance(m, ResidualBlock) for m in net.modules()) for net in (dppo.critic, dppo.baseline)]
    assert blocks == [1, 1]


def test_the_target_kl_stops_nothing_while_only_the_critic_learns() -> None:
    metrics = agent(critic_warmup=1, target_kl=1e-12).update(agent().collect())
    assert metrics["dppo/gradient_steps"] == SMALL.n_epochs * round(6 * 4 * 3 / 40)


def test_steps_are_counted_that_were_executed() -> None:
    """A chunk has two; some episodes end after the first."""
    dppo = agent(n_steps=60)
    rollout = dppo.collect()
    assert dppo.timesteps == rollout.n_steps.sum() < 60 * 4 * 2


def test_every_episode_that_ends_counts_whenever_it_began() -> None:
    """Those that began before the rollout, and those of a single chunk."""
    dppo = agent(n_steps=200)
    rollout = dppo.collect()
    ended = rollout.ended
    metrics = rollout.episode_metrics()
    assert metrics["rollout/episodes"] == ended.sum()
    first_ends = [int(np.flatnonzero(ended[:, i])[0]) for i in range(4)]
    later = Rollout(**{
        name: array if name in ("environments", "inference_s") else array[min(first_ends) :]
        for name, array in vars(rollout).items()
    })  # fmt: skip
    assert later.episode_metrics()["rollout/episodes"] == ended[min(first_ends) :].sum() == ended.sum()
    lengths = rollout.episode_lengths[ended]
    assert metrics["rollout/episode_length_mean"] == pytest.approx(lengths.mean())


@pytest.mark.parametrize("floor", [1, 0.1])
def test_a_floor_may_be_a_whole_number(floor: float) -> None:
    dppo = agent(exploration=ExplorationConfig(floor, floor))
    dppo.update(dppo.collect())


def test_a_floor_of_nothing_is_refused_and_not_a_crash() -> None:
    with pytest.raises(ConfigError, match="min_sampling_std = 0: must be above 0"):
        ExplorationConfig(0)


def test_updates_use_the_cores_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not as many threads as a node has, of which a container may use few."""
    dppo, used = agent(), []
    rollout = dppo.collect()
    monkeypatch.setattr("dprl.agents.dppo.available_cores", lambda: 2)
    monkeypatch.setattr(dppo, "_update_critic", lambda *_: used.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        dppo.update(rollout)
        assert set(used) == {2}
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
