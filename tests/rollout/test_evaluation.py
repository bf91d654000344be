"""Evaluation is a function of policy, task and seed."""

from dataclasses import replace

import pytest
import torch

from dprl.errors import ConfigError, EnvError
from dprl.guidance import Reward, ValueGuide
from dprl.networks import MLPConfig
from dprl.observations import Camera
from dprl.policy import DiffusionConfig, DiffusionPolicy, Features, InferenceConfig
from dprl.rollout import Evaluation, evaluate, evaluation
from dprl.rollout.evaluation import LATENCY_CALLS, wilson
from dprl.rollout.pool import require_fit
from dprl.spec import EnvOptions, EnvSpec, resolve

pytest.importorskip("envpool")


class Recorder(DiffusionPolicy):
    """A policy that keeps what it saw."""

    def draw(self, obs, *args, **kwargs):
        self.__dict__.setdefault("seen", []).append(obs.clone())
        return super().draw(obs, *args, **kwargs)


def make_policy(spec: EnvSpec, n_obs_steps: int = 1) -> Recorder:
    config = DiffusionConfig(
        horizon=4,
        n_action_steps=3,
        n_obs_steps=n_obs_steps,
        num_train_timesteps=3,
        denoiser=MLPConfig(hidden_size=8),
    )
    return Recorder(Features(spec.observation_size, spec.action_size), config)


def hopper(max_episode_steps: int = 20) -> EnvSpec:
    return resolve("Hopper-v5", EnvOptions(max_episode_steps=max_episode_steps))


def without_latency(result: Evaluation) -> Evaluation:
    return replace(result, policy_latency_ms_p50=0.0)


def starts(episodes: int, seed: int = 0) -> torch.Tensor:
    """What each episode starts from: one decision an episode, then those calls that measure the latency."""
    policy = make_policy(hopper())
    evaluate(policy, hopper(max_episode_steps=3), episodes, seed)
    return torch.cat(policy.seen[:-LATENCY_CALLS])[:episodes]


def test_twice_with_one_seed_is_equal_but_for_latency():
    policy, spec = make_policy(hopper()), hopper()
    one, other = evaluate(policy, spec, 6, seed=1), evaluate(policy, spec, 6, seed=1)
    assert without_latency(one) == without_latency(other)
    assert one.policy_latency_ms_p50 > 0


def test_seed_matters():
    policy, spec = make_policy(hopper()), hopper()
    assert evaluate(policy, spec, 3, seed=1).return_mean != evaluate(policy, spec, 3, seed=2).return_mean


def test_it_leaves_the_random_state_alone():
    state = torch.random.get_rng_state()
    evaluate(make_policy(hopper()), hopper(), 2, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_start_does_not_depend_on_how_many_episodes_there_are(monkeypatch):
    for max_envs in (50, 2):  # each episode in an environment of its own, and several one after the other
        monkeypatch.setattr(evaluation, "MAX_ENVS", max_envs)
        five = starts(5)
        assert len(torch.unique(five, dim=0)) == 5, "episodes should start differently"
        assert all(torch.equal(starts(n), five[:n]) for n in (1, 2, 3))
        assert not torch.equal(starts(5, seed=1), five)


@pytest.mark.parametrize(
    "inference",
    [
        InferenceConfig("ddim", 2),
        InferenceConfig("dpmsolver++", 3),
        InferenceConfig(temperature=0.0),
        InferenceConfig(temporal_ensembling=0.1),
        InferenceConfig(warm_start_steps=2),
    ],
    ids=lambda i: str({name: value for name, value in vars(i).items() if value != getattr(InferenceConfig(), name)}),
)
def test_how_the_policy_acts_is_chosen_here(inference):
    policy, spec = make_policy(hopper()), hopper()
    plain = evaluate(policy, spec, 4, seed=1)
    one, other = (evaluate(policy, spec, 4, seed=1, inference=inference) for _ in range(2))
    assert without_latency(one) == without_latency(other)
    assert one.return_mean != plain.return_mean
    assert without_latency(evaluate(policy, spec, 4, seed=1)) == without_latency(plain)


def test_a_setting_that_the_policy_does_not_have_is_refused():
    with pytest.raises(ConfigError, match=r"solver = 'euler'"):
        evaluate(make_policy(hopper()), hopper(), 1, seed=0, inference=InferenceConfig("euler"))
    with pytest.raises(ConfigError, match=r"warm_start_steps = 4: must be at most .* 3"):
        evaluate(make_policy(hopper()), hopper(), 1, seed=0, inference=InferenceConfig(warm_start_steps=4))


def test_result_is_of_every_episode_once(monkeypatch):
    monkeypatch.setattr(evaluation, "MAX_ENVS", 2)
    policy, spec = make_policy(hopper()), hopper(max_episode_steps=40)
    returns = [evaluate(policy, spec, n, seed=0).return_mean * n for n in (2, 3, 4)]
    assert returns[0] < returns[1] < returns[2], "Hopper pays at every step, so more episodes pay more"


def test_history_is_the_policys():
    policy = make_policy(hopper(), n_obs_steps=2)
    evaluate(policy, hopper(), 2, seed=0)
    assert policy.seen[0].shape == (2, 2, 11)


def test_hopper_reports_no_success():
    result = evaluate(make_policy(hopper()), hopper(), 3, seed=0)
    assert result.success_rate is None
    assert result.success_ci95 is None
    assert result.score == result.return_mean
    assert set(result.metrics()) == {"eval/return_mean", "eval/episode_length_mean"}
    assert 0 < result.episode_length_mean <= 20


def test_push_reports_success():
    spec = resolve("metaworld/push-v3", EnvOptions(max_episode_steps=6))
    result = evaluate(make_policy(spec), spec, 3, seed=0)
    assert result.success_rate == result.score == 0
    assert result.success_ci95 == wilson(0, 3)
    assert result.metrics()["eval/success_high"] == wilson(0, 3)[1]
    assert (result.return_mean, result.episode_length_mean) == (0, 6)
    assert (result.env, result.episodes, result.seed) == ("metaworld/push-v3", 3, 0)


def test_interval_of_the_return_is_of_the_mean():
    policy = make_policy(hopper())
    assert evaluate(policy, hopper(), 1, seed=0).return_ci95 is None
    result = evaluate(policy, hopper(), 4, seed=0)
    low, high = result.return_ci95
    assert low < result.return_mean < high
    assert (low + high) / 2 == pytest.approx(result.return_mean)


def test_progress_counts_every_episode():
    done: list[int] = []
    evaluate(make_policy(hopper()), hopper(), 5, seed=0, on_progress=done.append)
    assert sum(done) == 5


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962)],
)
def test_wilson_against_known_values(successes, n, low, high):
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)
    assert 0 <= wilson(successes, n)[0] <= wilson(successes, n)[1] <= 1


def test_wrong_observation_size_is_refused_with_both_sizes():
    policy = make_policy(hopper())
    with pytest.raises(EnvError, match=r"observation_size = 11, but metaworld/push-v3 has 39"):
        evaluate(policy, resolve("metaworld/push-v3"), 1, seed=0)


def test_wrong_action_size_is_refused_with_both_sizes():
    policy = make_policy(replace(hopper(), action_low=(-1.0,) * 5, action_high=(1.0,) * 5))
    with pytest.raises(EnvError, match=r"action_size = 5, but Hopper-v5 has 3"):
        evaluate(policy, hopper(), 1, seed=0)


@pytest.mark.parametrize(
    ("episodes", "sizes"), [(7, [7]), (100, [25, 25]), (40, [20, 20]), (47, [23, 24]), (37, [18, 19])]
)
def test_slices_are_few(episodes, sizes):
    """A prime number's are of unequal size, rather than of one."""
    slices = evaluation.seats(episodes)
    assert [s.stop - s.start for s in slices] == sizes
    assert [s.start for s in slices[1:]] == [s.stop for s in slices[:-1]]


@pytest.mark.parametrize("episodes", [0, -1])
def test_no_episodes_are_refused(episodes):
    with pytest.raises(ConfigError, match=f"episodes = {episodes}: must be a whole number, at least 1"):
        evaluate(make_policy(hopper()), hopper(), episodes, seed=0)


def test_the_latency_of_a_warm_start_is_that_of_warm_starts(monkeypatch):
    spec = hopper(4)
    policy = make_policy(spec)
    plans = []
    draw = Recorder.draw
    monkeypatch.setattr(
        Recorder, "draw", lambda self, *args, plan=None, **kwargs: (plans.append(plan), draw(self, *args, **kwargs))[1]
    )
    evaluate(policy, spec, 1, seed=0, inference=InferenceConfig(warm_start_steps=1))
    assert sum(plan is None for plan in plans[-LATENCY_CALLS:]) == 1


def test_cameras_may_come_in_any_order():
    cameras = (Camera("a", 24, 24), Camera("b", 24, 24))
    spec = replace(hopper(), cameras=cameras)
    policy = DiffusionPolicy(Features(spec.observation_size, spec.action_size, cameras[::-1]), DiffusionConfig())
    require_fit(policy, spec)
    with pytest.raises(EnvError, match="cameras"):
        require_fit(policy, replace(spec, cameras=cameras[:1]))


def test_what_guides_and_what_chooses_are_given_to_the_evaluation() -> None:
    policy, spec = make_policy(hopper()), hopper()
    strongest = Reward(lambda obs, actions: (actions**2).sum((1, 2)))
    plain, still, guided, chosen = (
        without_latency(evaluate(policy, spec, 3, seed=1, **how))
        for how in (
            {},
            {"guide": ValueGuide(strongest, 0.0)},
            {"guide": ValueGuide(strongest, 1.0)},
            {"inference": InferenceConfig(candidates=4), "scorer": strongest},
        )
    )
    assert plain == still
    assert len({plain.return_mean, guided.return_mean, chosen.return_mean}) == 3
    assert policy.scorer is None
    with pytest.raises(ConfigError, match=r"guide = 'Reward': must have a method shift\(step\)"):
        evaluate(policy, spec, 3, seed=1, guide=strongest)
    with pytest.raises(ConfigError, match=r"scorer = 'ValueGuide': must have a method score"):
        evaluate(policy, spec, 3, seed=1, scorer=ValueGuide(strongest))
