"""IDQL in an environment: what it executes, what it keeps and mixes, that it goes on exactly, and that it learns."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dprl.agents import IDQL, BCConfig, IDQLConfig, OnlineIDQL, OnlineIDQLConfig
from dprl.agents.online_idql import CandidateActor
from dprl.errors import ConfigError, DatasetError, EnvError
from dprl.networks import MLPConfig
from dprl.policy import CriticConfig, DiffusionConfig, DiffusionPolicy, Features, GaussianPolicy, InferenceConfig
from dprl.rollout import InProcessPool, evaluate
from dprl.seeding import torch_generator
from tests.toys import make_toy, reach_demonstrations, reach_spec, toy_policy

IDQL_SMALL = IDQLConfig(BCConfig(batch_size=8), critic=CriticConfig(hidden_size=8, n_layers=1), batch_size=16)
SMALL = OnlineIDQLConfig(
    IDQL_SMALL, candidates=3, n_steps=5, updates_per_decision=0.5, start_decisions=20, capacity=300
)


def agent(data: bool = False, policy: DiffusionPolicy | None = None, **changes: object) -> OnlineIDQL:
    config, shown = replace(SMALL, **changes), reach_demonstrations(0) if data else None
    return OnlineIDQL(policy or toy_policy(), make_toy(reach_spec(), 4), config, data=shown)


def weights(online: OnlineIDQL) -> list[torch.Tensor]:
    learner = online.learner
    modules = (learner.critic, learner.target, online.policy, learner.actor._online)
    return [value for module in modules for value in module.state_dict().values()]


def test_the_best_candidate_is_executed() -> None:
    online = agent()
    actor, policy = online._actor, online.policy
    obs = torch.rand(4, 1, 2)
    noise = torch.randn(actor.noise_shape[0], 4, *actor.noise_shape[1:], generator=torch_generator(0))
    chain = actor.sample(obs, noise=noise)
    draws = noise[:-1].view(policy.n_draws(), 3, 4, *noise.shape[2:])
    every = torch.stack([policy.sample(obs, noise=draws[:, i]) for i in range(3)], dim=1)
    scores = torch.stack([policy.scorer.score(obs, every[:, i]) for i in range(3)], dim=1)
    torch.testing.assert_close(chain.actions, every[torch.arange(4), scores.argmax(1)])
    assert chain.steps.shape == (4, 1, *noise.shape[2:])


@pytest.mark.parametrize("selection", ["argmax", "implicit", "softmax"])
def test_the_same_noise_makes_the_same_choice(selection: str) -> None:
    actor = CandidateActor(agent().policy, 4, selection, 1.0)
    obs = torch.rand(6, 1, 2)
    noise = torch.randn(actor.noise_shape[0], 6, *actor.noise_shape[1:])
    assert actor.sample(obs, noise=noise).actions.equal(actor.sample(obs, noise=noise).actions)


def test_decisions_are_those_of_the_rollout() -> None:
    online = agent(n_steps=60)
    rollout = online.collect()
    assert rollout.truncated.any()
    batch = online._decisions(rollout)
    n = rollout.rewards.size
    np.testing.assert_array_equal(batch.obs.view(60, 4, 1, 2), rollout.observations)
    np.testing.assert_array_equal(batch.next_obs.view(60, 4, 1, 2), rollout.final_observations)
    cut = rollout.n_steps == 1
    assert cut.any()
    executed = rollout.chains[:, :, 0].copy()
    executed[cut, 1] = executed[cut, 0]  # what was not executed repeats the last that was, as in data
    np.testing.assert_array_equal(batch.actions.view(60, 4, 2, 1), executed)
    np.testing.assert_array_equal(batch.n_steps.view(60, 4), rollout.n_steps)
    first, second = rollout.step_rewards[..., 0], rollout.step_rewards[..., 1]
    assert second.any()
    np.testing.assert_allclose(batch.reward.view(60, 4), first + 0.99 * second, rtol=1e-6)
    np.testing.assert_allclose(batch.discount, np.where(rollout.ended, 0.0, 0.99**rollout.n_steps).flatten(), rtol=1e-6)
    assert len(batch.reward) == n
    bootstrapping = agent(n_steps=60, learner=replace(IDQL_SMALL, bootstrap_truncated=True))
    discount = bootstrapping._decisions(rollout).discount.view(60, 4)
    assert bool((discount[torch.as_tensor(rollout.truncated)] > 0).all())


def test_no_updates_before_there_is_enough() -> None:
    online = agent(start_decisions=40)
    before = [value.clone() for value in weights(online)]
    first = online.update(online.collect())
    assert "idql/q_loss" not in first
    assert first["idql/buffer"] == 20
    assert all(a.equal(b) for a, b in zip(before, weights(online), strict=True))
    second = online.update(online.collect())
    assert {"idql/q_loss", "idql/value_loss"} <= second.keys()
    assert not all(a.equal(b) for a, b in zip(before, weights(online), strict=True))


def test_minibatches_are_mixed_from_data_and_buffer() -> None:
    online = agent(data=True, data_share=0.25)
    online._buffer.add(online._decisions(online.collect()))
    online.learner.decisions._numbers[0].fill_(7.0)  # rewards of the data
    for batch in online._mixed(3):
        assert int((batch.reward == 7).sum()) == 4
        assert len(batch.reward) == 16
    alone = agent(data=True, data_share=0.0)
    alone._buffer.add(alone._decisions(alone.collect()))
    assert all(len(batch.reward) == 16 for batch in alone._mixed(2))


def test_a_frozen_policy_stays_and_one_that_continues_does_not() -> None:
    for actor in ("frozen", "continues"):
        online = agent(actor=actor)
        before = [value.clone() for value in online.policy.state_dict().values()]
        metrics = online.update(online.collect())
        stays = all(a.equal(b) for a, b in zip(before, online.policy.state_dict().values(), strict=True))
        assert stays == (actor == "frozen")
        assert ("bc/loss" in metrics) == (actor == "continues")
        assert online._actor.selection == ("argmax" if actor == "frozen" else "implicit")


OPTIONS = {
    "frozen": {},
    "with data": {"data": True},
    "continues": {"actor": "continues"},
    "softmax": {"selection": "softmax"},
    "a small buffer": {"capacity": 25},
    "scaled rewards": {"data": True, "learner": replace(IDQL_SMALL, return_range=0.5)},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_resumed_run_goes_on_exactly(name: str, tmp_path: Path) -> None:
    options = OPTIONS[name]
    whole = agent(**options)
    for _ in range(3):
        whole.update(whole.collect())
    whole.save(tmp_path / "saved")
    rows = [whole.update(whole.collect()) for _ in range(2)]
    saved = DiffusionPolicy.from_pretrained(tmp_path / "saved")  # as a command resumes: it has critics already
    resumed = agent(policy=saved, **options)
    resumed.load_state(tmp_path / "saved")
    again = [resumed.update(resumed.collect()) for _ in range(2)]
    for ours, theirs in zip(again, rows, strict=True):
        assert all(value == theirs[key] for key, value in ours.items() if not key.startswith("time/"))
    assert all(a.equal(b) for a, b in zip(weights(resumed), weights(whole), strict=True))
    assert resumed.timesteps == whole.timesteps


def test_critics_that_were_learned_from_data_go_on() -> None:
    policy, data = toy_policy(), reach_demonstrations(0)
    IDQL(policy, IDQL_SMALL).fit(data, 5)
    learned = {name: value.clone() for name, value in policy.scorer.state_dict().items()}
    online = OnlineIDQL(policy, make_toy(reach_spec(), 4), replace(SMALL, learner=IDQLConfig()), data=data)
    assert online.config.learner.critic == IDQL_SMALL.critic
    for critic in (online.learner.critic, online.learner.target):
        assert all(value.equal(learned[name]) for name, value in critic.state_dict().items())


def test_they_go_on_with_the_terms_that_they_were_learned_on(tmp_path: Path) -> None:
    policy, data = toy_policy(), reach_demonstrations(0)
    offline = replace(IDQL_SMALL, gamma=0.9, return_range=0.5)
    IDQL(policy, offline).fit(data, 5)
    policy.save_pretrained(tmp_path)
    loaded = DiffusionPolicy.from_pretrained(tmp_path)
    terms = loaded.scorer.terms
    assert terms == policy.scorer.terms
    assert (terms.gamma, terms.bootstrap_truncated) == (0.9, True)
    env = make_toy(reach_spec(), 4)
    for kept in (data, None):
        online = OnlineIDQL(loaded, env, replace(SMALL, learner=IDQLConfig(), n_steps=60), data=kept)
        rollout = online.collect()
        batch = online._decisions(rollout)
        earned = rollout.step_rewards @ np.array([1, 0.9], np.float32)
        torch.testing.assert_close(batch.reward.view(60, 4), terms.reward_scale * torch.as_tensor(earned))
        alive = ~torch.as_tensor(rollout.terminated)
        expected = 0.9 ** torch.as_tensor(rollout.n_steps).float() * alive
        torch.testing.assert_close(batch.discount.view(60, 4), expected)
        assert online.learner.target.terms == terms
    for changes, message in (
        ({"gamma": 0.5}, "^gamma = 0.5: must be left out: the policy's critics were learned with 0.9"),
        ({"bootstrap_truncated": False}, "^bootstrap_truncated = False: must be left out"),
        (
            {"return_range": 3.0},
            "^return_range = 3.0: must be left out: the policy's critics were learned with 0.5",
        ),
        ({"critic": CriticConfig(hidden_size=16)}, "^critic.hidden_size = 16: must be left out: .* with 8"),
    ):
        with pytest.raises(ConfigError, match=message):
            OnlineIDQL(loaded, env, replace(SMALL, learner=replace(IDQLConfig(), **changes)), data=data)


@pytest.mark.parametrize("asked", [None, True])
def test_a_cut_episode_is_worth_as_much_in_the_data_as_in_the_buffer(asked: bool | None) -> None:
    """The task's reward is sparse, so that by default nothing follows, in either."""
    online = agent(data=True, n_steps=60, learner=replace(IDQL_SMALL, bootstrap_truncated=asked))
    rollout = online.collect()
    buffered = online._decisions(rollout).discount.view(60, 4)[torch.as_tensor(rollout.truncated)]
    every = torch.arange(len(online.learner.decisions))[None]
    (batch,) = online.learner.decisions.read(every)
    data = reach_demonstrations(0)
    finals = torch.as_tensor(data.final_observations)
    cut = torch.stack([(batch.next_obs[:, 0] == finals[i]).all(1) for i in np.flatnonzero(~data.terminated)]).any(0)
    assert cut.any()
    assert len(buffered)
    assert bool((buffered > 0).all()) == bool((batch.discount[cut] > 0).all()) == (asked is True)


def test_a_policy_that_goes_on_clones_what_was_executed_by_its_objective_at_a_constant_rate() -> None:
    learner = replace(IDQL_SMALL, actor_objective="exponential")
    online = agent(data=True, actor="continues", learner=learner, n_steps=30, capacity=200)
    seen = []
    step = online.learner.actor.step
    online.learner.actor.step = lambda batch, weight=None: seen.append((batch.valid, weight)) or step(batch, weight)
    online.update(online.collect())
    assert all(weight is not None for _, weight in seen)
    assert not all(bool(valid.all()) for valid, _ in seen)
    assert online.learner.actor._optimizer.param_groups[0]["lr"] == IDQL_SMALL.bc.learning_rate


@pytest.mark.full
@pytest.mark.timeout(180)
def test_it_learns() -> None:
    """Critics that start from nothing make a half-trained reacher better, which itself stays as it is."""
    from dprl.agents import BC

    data = reach_demonstrations(0)
    small = DiffusionConfig(horizon=2, num_train_timesteps=8, denoiser=MLPConfig(hidden_size=64))
    policy = DiffusionPolicy.for_dataset(data, small)
    BC(policy).fit(data, steps=300)
    before = evaluate(policy, reach_spec(), 100, seed=1_000).success_rate
    config = OnlineIDQLConfig(
        IDQLConfig(critic=CriticConfig(hidden_size=64), learning_rate=1e-3, tau=0.02), candidates=16, n_steps=20
    )
    online = OnlineIDQL(policy, InProcessPool(make_toy(reach_spec(), 16)), config, data=data)
    online.learn(12_000)
    after = evaluate(policy, reach_spec(), 100, seed=1_000, inference=InferenceConfig(candidates=16)).success_rate
    assert before is not None
    assert after is not None
    assert after > before + 0.15, (before, after)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"actor": "melts"}, "actor = 'melts': must be one of frozen, continues"),
        ({"data_share": 1.0}, "data_share = 1.0: must be at least 0 and below 1"),
        ({"candidates": 0}, "candidates = 0"),
        ({"updates_per_decision": 0.0}, "updates_per_decision = 0.0"),
        ({"start_decisions": 301}, "start_decisions = 301: must be at most capacity, which is 300"),
        ({"candidates": 1, "selection": "argmax"}, "selection = 'argmax': needs candidates, more than 1"),
        (
            {"learner": IDQLConfig(actor_objective="soft")},
            "learner.actor_objective = 'soft': must be bc: a frozen policy",
        ),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(SMALL, **changes)


def test_what_cannot_go_on_is_refused() -> None:
    env = make_toy(reach_spec(), 4)
    with pytest.raises(ConfigError, match="policy = 'GaussianPolicy': must be a diffusion policy or flow"):
        OnlineIDQL(GaussianPolicy(Features(2, 1)), env, SMALL)
    with pytest.raises(EnvError):
        OnlineIDQL(DiffusionPolicy(Features(3, 1)), env, SMALL)
    plans = DiffusionPolicy(Features(2, 1), DiffusionConfig(horizon=4, n_action_steps=2))
    with pytest.raises(ConfigError, match="actor = 'continues': must be frozen"):
        OnlineIDQL(plans, env, replace(SMALL, actor="continues"))
    with pytest.raises(ConfigError, match="capacity = 20: must be at least 24: n_steps of every environment"):
        OnlineIDQL(toy_policy(), env, replace(SMALL, capacity=20, n_steps=6))
    with pytest.raises(DatasetError, match="neither rewards nor success"):
        OnlineIDQL(toy_policy(), env, SMALL, data=replace(reach_demonstrations(0), rewards_from="none"))
    dense = make_toy(replace(reach_spec(), reward="dense"), 4)
    with pytest.raises(DatasetError, match="rewards were made of success, 1 or 0, and the environment's are dense"):
        OnlineIDQL(toy_policy(), dense, SMALL, data=replace(reach_demonstrations(0), rewards_from="success"))


def test_rewards_of_another_kind_are_refused() -> None:
    policy, data = toy_policy(), reach_demonstrations(0)
    dense = make_toy(replace(reach_spec(), reward="dense"), 4)
    with pytest.raises(ConfigError, match="reward = 'dense': must be sparse, as the data have it"):
        OnlineIDQL(policy, dense, SMALL, data=data)
    IDQL(policy, IDQL_SMALL).fit(data, 5)
    with pytest.raises(ConfigError, match="reward = 'dense': must be sparse, as the critics have it"):
        OnlineIDQL(policy, dense, SMALL)


def test_what_is_refused_leaves_a_policy_without_critics() -> None:
    policy = toy_policy()
    with pytest.raises(ConfigError, match="capacity"):
        OnlineIDQL(policy, make_toy(reach_spec(), 4), replace(SMALL, capacity=20, n_steps=6))
    assert policy.scorer is None


@pytest.mark.parametrize(("per_decision", "updates"), [(0.5, 30), (2.0, 120)])
def test_updates_are_of_decisions(per_decision: float, updates: int) -> None:
    online, taken = agent(n_steps=15, updates_per_decision=per_decision), []
    update = online.learner.update_critic
    online.learner.update_critic = lambda batch: taken.append(batch) or update(batch)
    online.update(online.collect())
    assert len(taken) == updates


def test_samples_are_drawn_at_the_temperature() -> None:
    policy = agent().policy
    noise = torch.randn(policy.n_draws() + 1, 4, policy.config.horizon, 1)
    obs = torch.rand(4, 1, 2)
    for temperature in (0.0, 1.0):
        chain = CandidateActor(policy, 1, "argmax", temperature).sample(obs, noise=noise)
        torch.testing.assert_close(chain.actions, policy.sample(obs, noise=noise[:-1], temperature=temperature))
    assert agent(temperature=0.5)._actor.temperature == 0.5


def test_rewards_are_scaled_as_those_of_the_data() -> None:
    plain, scaled = agent(data=True), agent(data=True, learner=replace(SMALL.learner, return_range=0.5))
    rollout = plain.collect()
    scale = scaled.learner.target.terms.reward_scale
    shown, _ = reach_demonstrations(0).split(IDQL_SMALL.bc.validation_share, 0)
    assert scale == pytest.approx(0.5 / (shown.returns.max() - shown.returns.min()))
    assert scale != 1
    torch.testing.assert_close(scaled._decisions(rollout).reward, scale * plain._decisions(rollout).reward)
    with pytest.raises(ConfigError, match=r"learner.return_range = 0.5: must be None: there are no data"):
        agent(learner=replace(SMALL.learner, return_range=0.5))
