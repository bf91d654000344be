"""IDQL: what critics learn on problems whose answer is known, that they choose well, and that runs go on exactly."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dprl.agents import IDQL, BCConfig, IDQLConfig
from dprl.data import Episodes
from dprl.errors import CheckpointError, ConfigError, DatasetError
from dprl.implicit import ValueObjective
from dprl.networks import MLPConfig
from dprl.observations import Camera
from dprl.policy import (
    ChunkCritic,
    CriticConfig,
    DiffusionConfig,
    DiffusionPolicy,
    Features,
    GaussianConfig,
    GaussianPolicy,
    InferenceConfig,
    Policy,
    RecedingHorizon,
    denoising_loss,
)
from dprl.seeding import torch_generator
from tests.policy.small import KINDS, VIT, random_episodes, small_config

STEPS = 4
SMALL = IDQLConfig(
    BCConfig(batch_size=8, steps_per_iteration=STEPS), critic=CriticConfig(hidden_size=8, n_layers=1), batch_size=16
)
DIFFUSION = DiffusionConfig(horizon=3, n_action_steps=2, num_train_timesteps=4, denoiser=MLPConfig(hidden_size=8))


def make(config: IDQLConfig = SMALL, data: Episodes | None = None, kind: str = "diffusion", seed: int = 0) -> IDQL:
    data = random_episodes() if data is None else data
    agent = IDQL(Policy.kinds[kind].for_dataset(data, small_config(kind), seed=seed), config, seed=seed)
    agent.set_data(data, 5 * STEPS)
    return agent


def iterate(agent: IDQL, n: int = 1) -> list[dict[str, float]]:
    rows = [agent.update(agent.collect()) for _ in range(n)]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


# --------------------------------------------------------------------------------------------------- what critics learn


BANDIT_MODES = np.array([-0.8, 0.6])
BANDIT_REWARDS = np.array([0.3, 1.0])


def bandit(n: int = 2_000, seed: int = 0) -> Episodes:
    """One decision an episode: the data go to either of two places, of which the rarer is worth more."""
    rng = np.random.default_rng(seed)
    mode = (rng.random(n) < 0.25).astype(int)
    actions = (BANDIT_MODES[mode] + 0.05 * rng.standard_normal(n)).astype(np.float32)[:, None]
    no = np.zeros(n, np.bool_)
    zeros = np.zeros((n, 1), np.float32)
    return Episodes(
        zeros, actions, BANDIT_REWARDS[mode].astype(np.float32), zeros, np.arange(1, n + 1), ~no, no, np.arange(n)
    )


def in_better_mode(actions: torch.Tensor) -> float:
    """Share of chunks (B, 1, 1) that are where the reward is larger."""
    return float(((actions[:, 0, 0] - BANDIT_MODES[1]).abs() < 0.3).float().mean())


def test_idql_chooses_the_better_of_two_modes_that_the_policy_keeps() -> None:
    """Weighted regression of a Gaussian has its mean between the modes, or must forget one."""
    data, n = bandit(), 1_000
    config = DiffusionConfig(horizon=1, num_train_timesteps=20, denoiser=MLPConfig(hidden_size=64))
    critic = CriticConfig(hidden_size=64)
    agent = IDQL(DiffusionPolicy.for_dataset(data, config), IDQLConfig(BCConfig(batch_size=128), critic=critic))
    policy = agent.fit(data, 1_000)
    obs, generator = torch.zeros(n, 1, 1), torch_generator(1)
    cloned = policy.sample(obs, generator=generator)
    share = in_better_mode(cloned)
    assert 0.1 < share < 0.45, "both modes are kept"
    assert in_better_mode(cloned) + float(((cloned[:, 0, 0] - BANDIT_MODES[0]).abs() < 0.3).float().mean()) > 0.95
    assert isinstance(policy, DiffusionPolicy)
    assert in_better_mode(policy.sample(obs, candidates=64, generator=generator)) >= 0.98
    gaussian = GaussianPolicy.for_dataset(data, GaussianConfig(horizon=1, hidden_size=64))
    weighted = IDQL(gaussian, IDQLConfig(BCConfig(batch_size=128), actor_objective="soft", critic=critic))
    assert in_better_mode(weighted.fit(data, 1_000).sample(obs, generator=generator)) < 0.6


def chain(n: int = 400) -> Episodes:
    """Three steps to the right with reward 1 at the end; half of the episodes are cut before, worth nothing so far."""
    rng = np.random.default_rng(0)
    whole = rng.random(n) < 0.5
    lengths = np.where(whole, 3, 2)
    observations = np.concatenate([np.arange(k, dtype=np.float32) for k in lengths])[:, None]
    rewards = np.concatenate([np.array([0, 0, 1.0][:k], np.float32) for k in lengths])
    no = np.zeros(n, np.bool_)
    return Episodes(
        observations, np.ones((len(observations), 1), np.float32), rewards, lengths.astype(np.float32)[:, None],
        np.cumsum(lengths), whole, no, np.arange(n),
    )  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("n_action_steps", [1, 2])
def test_values_are_those_of_what_follows(n_action_steps: int) -> None:
    """An episode that was cut goes on elsewhere: its end is worth what others earn from there."""
    gamma, data = 0.5, chain()
    config = replace(DIFFUSION, horizon=n_action_steps, n_action_steps=n_action_steps)
    settings = IDQLConfig(
        BCConfig(batch_size=8), critic=CriticConfig(hidden_size=32, objective=ValueObjective("expectile", 0.5)),
        gamma=gamma, learning_rate=3e-3, tau=0.05,
    )  # fmt: skip
    agent = IDQL(DiffusionPolicy.for_dataset(data, config), settings)
    agent.fit(data, 1_500)
    obs, actions = torch.arange(3.0).view(3, 1, 1), torch.ones(3, n_action_steps, 1)
    expected = [gamma**2, gamma, 1.0]  # whatever a chunk holds
    assert agent.target.score(obs, actions).tolist() == pytest.approx(expected, abs=0.03)
    assert agent.target.v(agent.target.see(obs)).tolist() == pytest.approx(expected, abs=0.03)


def test_gradients_are_those_of_the_two_losses() -> None:
    """In float64, against losses written out; critics and targets differ."""
    agent = make()
    with torch.no_grad():
        for value in agent.critic.parameters():
            value.add_(0.3 * torch.randn(value.shape, generator=torch_generator(0, "apart")))
    batch = next(agent.decisions.read(agent.collect().decisions))
    for module in (agent.policy, agent.critic, agent.target):
        module.double()
    batch = batch._replace(**{name: getattr(batch, name).double() for name in batch._fields})
    seen = agent.critic.see(batch.obs)
    with torch.no_grad():
        q_target = agent.target.q(agent.target.see(batch.obs), batch.actions).amin(0)
        goal = batch.reward + batch.discount * agent.critic.v(agent.critic.see(batch.next_obs))
    advantage = q_target - agent.critic.v(seen)
    expected = (torch.where(advantage < 0, 0.3, 0.7) * advantage**2).mean()
    expected = expected + sum(((q - goal) ** 2).mean() for q in agent.critic.q(seen, batch.actions))
    gradients = torch.autograd.grad(expected, list(agent.critic.parameters()))
    agent._learner.step = lambda: None
    agent.update_critic(batch)
    for ours, theirs in zip(agent.critic.parameters(), gradients, strict=True):
        assert ours.grad is not None
        torch.testing.assert_close(ours.grad, theirs)


@given(rate=st.floats(0.001, 1.0), seed=st.integers(0, 10))
def test_targets_move_towards_the_critics(rate: float, seed: int) -> None:
    from dprl.networks import polyak_update

    critic, target = (make(seed=seed + i).critic for i in range(2))
    before = [p.detach().clone() for p in target.parameters()]
    polyak_update(critic, target, rate)
    for old, new, goal in zip(before, target.parameters(), critic.parameters(), strict=True):
        torch.testing.assert_close(new, old + rate * (goal - old))
        assert bool(((new - goal).abs() <= (old - goal).abs() + 1e-6).all())


def test_an_update_moves_the_targets_a_little() -> None:
    agent = make(replace(SMALL, tau=0.1))
    before = [p.clone() for p in agent.target.parameters()]
    batch = next(agent.decisions.read(agent.collect().decisions))
    agent.update_critic(batch)
    for old, new, goal in zip(before, agent.target.parameters(), agent.critic.parameters(), strict=True):
        torch.testing.assert_close(new, old + 0.1 * (goal - old))
    assert all(not p.requires_grad and p.grad is None for p in agent.target.parameters())


# --------------------------------------------------------------------------------------------------------- going on


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_goes_on_exactly(kind: str, tmp_path: Path) -> None:
    whole, first, second = make(kind=kind), make(kind=kind), make(kind=kind)
    rows = iterate(whole, 3)
    assert iterate(first) == rows[:1]
    first.save(tmp_path / "saved")
    second.load_state(tmp_path / "saved")
    assert second.timesteps == STEPS
    assert iterate(second, 2) == rows[1:]
    for ours, theirs in ((second.target, whole.target), (second.policy, whole.policy)):
        assert all(a.equal(b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))


OPTIONS = {
    "soft": replace(
        SMALL, actor_objective="soft", critic=replace(SMALL.critic, objective=ValueObjective("exponential", 1.0))
    ),
    "hard": replace(SMALL, actor_objective="hard"),
    "exponential": replace(SMALL, actor_objective="exponential"),
    "quantile": replace(SMALL, critic=replace(SMALL.critic, objective=ValueObjective("quantile"))),
    "linex": replace(SMALL, critic=replace(SMALL.critic, objective=ValueObjective("exponential", 2.0))),
    "ensemble": replace(SMALL, critic=replace(SMALL.critic, n_critics=5, layer_norm=True, n_layers=3)),
    "of drawn ones": replace(SMALL, critic=replace(SMALL.critic, n_critics=5, minimum_over=2)),
    "padded": replace(SMALL, bc=replace(SMALL.bc, pad_after=0)),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_do_something_and_stay_finite(name: str) -> None:
    config = OPTIONS[name]
    other = SMALL if config.actor_objective == "bc" else replace(config, actor_objective="bc")
    usual, row = iterate(make(other), 3)[-1], iterate(make(config), 3)[-1]
    assert row != usual
    assert all(np.isfinite(value) for value in row.values())


WEIGHING = [kind for kind in KINDS if Policy.kinds[kind].weighs_samples]


@pytest.mark.parametrize("kind", sorted(set(WEIGHING) - {"diffusion"}))
def test_weights_count_and_their_scale_does_not(kind: str) -> None:
    """A sample of weight 2 is as good as two."""

    def weights_after(copies: list[int], weight: list[float] | None) -> list[torch.Tensor]:
        actor = make(kind=kind).actor
        batch = next(iter(actor.read(torch.tensor([copies]))))
        actor.step(batch, None if weight is None else torch.tensor(weight))
        return list(actor._online.parameters())

    twice = weights_after([0, 1, 1, 2], None)
    for factor in (1.0, 1e-3):
        weighed = weights_after([0, 1, 2], [factor, 2 * factor, factor])
        for ours, theirs in zip(weighed, twice, strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def test_denoising_weighs_samples() -> None:
    """A diffusion policy's loss, of given timesteps and noise."""
    policy = DiffusionPolicy(Features(3, 2), DIFFUSION)
    clean, noise = (torch.rand(3, 3, 2, generator=torch_generator(seed)) for seed in (0, 1))
    condition, timesteps = torch.rand(3, 1, 3), torch.tensor([0, 1, 3])
    rows = torch.tensor([0, 1, 1, 2])

    def loss(rows: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        args = (condition[rows], timesteps[rows], noise[rows])
        return denoising_loss(policy.base, policy.schedule, clean[rows], *args, weight)

    weight = torch.tensor([0.75, 1.5, 0.75])[:, None].expand(3, 3)
    torch.testing.assert_close(loss(torch.arange(3), weight), loss(rows, None))


@pytest.mark.parametrize("kind", sorted(set(KINDS) - set(WEIGHING)))
def test_losses_that_cannot_weigh_are_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match=f"actor_objective = 'soft': must be bc: a {kind} policy's loss"):
        make(OPTIONS["soft"], kind=kind)


def test_held_out_episodes_are_validated_on_and_not_learned_from() -> None:
    config = replace(SMALL, bc=replace(SMALL.bc, validation_share=0.25, validation_every=1))
    agent = make(config)
    assert len(agent.decisions) < len(make().decisions)
    (by_critics,) = agent.decisions.read(torch.arange(len(agent.decisions))[None])
    (by_clone,) = agent.actor.read(torch.arange(len(agent.actor._training))[None])
    seen = [{tuple(row) for row in batch.obs.flatten(1).tolist()} for batch in (by_critics, by_clone)]
    assert seen[0] <= seen[1]
    (row,) = iterate(agent)
    assert {"validation/loss", "bc/learning_rate"} <= row.keys()


def test_images_are_seen_by_critics_of_their_own() -> None:
    features = Features(3, 2, (Camera("top", 24, 24),))
    data = random_episodes(features)
    policy = DiffusionPolicy.for_dataset(data, replace(DIFFUSION, vision=VIT))
    agent = IDQL(policy, SMALL)
    agent.set_data(data, 10)
    before = [p.clone() for p in agent.critic.encoder.parameters()]
    iterate(agent)
    assert agent.critic.encoder is not policy.encoder
    assert any(not a.equal(b) for a, b in zip(before, agent.critic.encoder.parameters(), strict=True))


def test_critics_that_a_policy_has_go_on() -> None:
    policy = make().fit(random_episodes(), STEPS)
    assert isinstance(policy.scorer, ChunkCritic)
    had = {name: value.clone() for name, value in policy.scorer.state_dict().items()}
    again = IDQL(policy, SMALL, seed=5)
    for critic in (again.critic, again.target):
        assert all(value.equal(had[name]) for name, value in critic.state_dict().items())
    assert IDQL(policy).config.critic == SMALL.critic
    for changes, message in (
        ({"critic": CriticConfig(n_critics=5)}, "critic.n_critics = 5: must be left out: the policy's critics"),
        ({"gamma": 0.5}, "gamma = 0.5: must be left out: the policy's critics were learned with 0.99"),
    ):
        with pytest.raises(ConfigError, match=message):
            IDQL(policy, replace(SMALL, **changes))
    executed = policy.n_action_steps
    policy.set_n_action_steps(executed - 1)
    with pytest.raises(ConfigError, match=f"n_action_steps = {executed - 1}: must be {executed}: the policy's critics"):
        IDQL(policy, SMALL)


def test_of_how_many_critics_the_least_counts_may_change(caplog: pytest.LogCaptureFixture) -> None:
    """And what they keep, where it is no default, is said."""
    config = replace(SMALL, critic=replace(SMALL.critic, n_critics=4), gamma=0.9)
    policy = make(config).fit(random_episodes(), STEPS)
    with caplog.at_level("WARNING"):
        again = IDQL(policy, replace(SMALL, critic=CriticConfig(minimum_over=2)))
    assert (again.config.critic.minimum_over, again.config.critic.n_critics) == (2, 4)
    assert again.target.config.minimum_over == 2
    assert "the critics go on as they were learned: critic.hidden_size 8, critic.n_layers 1" in caplog.text
    assert "critic.n_critics 4" in caplog.text
    assert "gamma 0.9" in caplog.text


def test_critics_that_learned_nothing_yet_are_not_kept() -> None:
    policy = make().policy
    policy.scorer.terms = None
    assert IDQL(policy, replace(SMALL, critic=replace(SMALL.critic, n_critics=5))).config.critic.n_critics == 5


def test_a_clone_is_weighed_by_the_target_critics() -> None:
    agent, seen = make(replace(SMALL, actor_objective="exponential")), []
    with torch.no_grad():
        for parameter in agent.critic.parameters():
            parameter.add_(1.0)
    (chunks,) = agent.actor.read(torch.arange(6)[None])
    agent.actor.step = lambda batch, weight=None: seen.append(weight) or torch.zeros(())
    agent.update_actor(chunks)
    expected = agent.target.advantage(chunks.obs, chunks.actions)
    torch.testing.assert_close(seen[0], torch.exp(3.0 * expected).clamp(max=100))


@pytest.mark.parametrize(("rewards_from", "bootstraps"), [("data", True), ("success", False)])
def test_nothing_follows_where_rewards_were_made_of_success(rewards_from: str, bootstraps: bool) -> None:
    data = replace(random_episodes(), rewards_from=rewards_from, rewards=np.ones(28, np.float32))
    assert make(data=data).target.terms.bootstrap_truncated is bootstraps


def test_what_critics_see_is_augmented_while_they_learn() -> None:
    features = Features(3, 2, (Camera("top", 24, 24),))
    data = random_episodes(features)
    agent, given = IDQL(DiffusionPolicy.for_dataset(data, replace(DIFFUSION, vision=VIT)), SMALL), []
    agent.set_data(data, 10)
    see = agent.critic.see
    agent.critic.see = lambda obs, generator=None: given.append(generator) or see(obs, generator)
    (batch,) = agent.decisions.read(torch.arange(4)[None])
    agent.update_critic(batch)
    assert given == [None, agent._generator], "what is learned from, and not what follows it"


@pytest.mark.parametrize("selection", ["argmax", "implicit", "softmax"])
def test_critics_that_are_not_finite_choose_nothing(selection: str) -> None:
    policy = make().fit(random_episodes(), STEPS)
    for net in (policy.scorer.q_net, policy.scorer.v_net):
        net.biases[-1].fill_(torch.nan)
    obs = torch.rand(5, policy.config.n_obs_steps, 3)
    with pytest.raises(ConfigError, match="must return finite scores"):
        policy.sample(obs, candidates=4, selection=selection)


def test_critics_are_saved_of_as_many_actions_as_they_are(tmp_path: Path) -> None:
    policy = make().fit(random_episodes(), STEPS)
    obs = torch.rand(5, policy.config.n_obs_steps, 3)
    chunks = policy.sample(obs)
    scores = policy.scorer.score(obs, chunks)
    policy.set_n_action_steps(policy.n_action_steps - 1)
    policy.save_pretrained(tmp_path)
    loaded = Policy.from_pretrained(tmp_path)
    assert loaded.scorer.n_action_steps == policy.n_action_steps + 1
    torch.testing.assert_close(loaded.scorer.score(obs, chunks), scores)
    file = tmp_path / "critic.json"
    about = json.loads(file.read_text())
    file.write_text(json.dumps(about | {"n_action_steps": 99}))
    (tmp_path / "manifest.json").unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match="n_action_steps = 99: must be from 1 to the horizon"):
        Policy.from_pretrained(tmp_path)


def test_a_range_of_returns_scales_the_rewards() -> None:
    rewards = np.random.default_rng(0).normal(size=28).astype(np.float32)
    data = replace(random_episodes(), rewards=rewards)
    scale = 5 / (data.returns.max() - data.returns.min())
    scaled = make(replace(SMALL, return_range=5.0), data)
    assert scaled.target.terms.reward_scale == pytest.approx(scale)
    by_hand = make(SMALL, replace(data, rewards=(rewards * np.float32(scale))))
    assert iterate(scaled) == iterate(by_hand)
    with pytest.raises(DatasetError, match=r"return_range = 5\.0: every episode has the return 0"):
        make(replace(SMALL, return_range=5.0), random_episodes())


def test_the_least_is_of_critics_that_are_drawn() -> None:
    agent = make(replace(SMALL, critic=replace(SMALL.critic, n_critics=4, minimum_over=2)))
    q = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    drawn = torch.cat([agent.least(q) for _ in range(600)])
    shares = [float((drawn == value).float().mean()) for value in (1, 2, 3, 4)]
    assert shares == pytest.approx([3 / 6, 2 / 6, 1 / 6, 0], abs=0.07)
    assert float(make().least(q)) == 1


def test_data_without_rewards_are_refused_and_nothing_is_begun() -> None:
    data = replace(random_episodes(), rewards_from="none")
    agent = IDQL(DiffusionPolicy.for_dataset(data, DIFFUSION), SMALL)
    with pytest.raises(DatasetError, match="neither rewards nor success"):
        agent.fit(data, 10)
    with pytest.raises(ConfigError, match="steps = 0"):
        agent.fit(random_episodes(), 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gamma": 1.1}, "gamma = 1.1: must be from 0 to 1"),
        ({"tau": 0.0}, "tau = 0.0"),
        ({"tau": 2.0}, "tau = 2.0: must be at most 1"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"learning_rate": 0.0}, "learning_rate = 0.0"),
        ({"actor_objective": "best"}, "actor_objective = 'best'"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        IDQLConfig(**settings)


@pytest.mark.parametrize(("n", "message"), [(3, "minimum_over = 3: must be at most 2"), (0, "minimum_over = 0")])
def test_more_critics_than_there_are_cannot_be_drawn(n: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CriticConfig(minimum_over=n)


# ------------------------------------------------------------------------------------------------------------- acting


@pytest.fixture(scope="module")
def trained() -> Policy:
    return make().fit(random_episodes(), 2 * STEPS)


def test_a_policy_is_saved_with_its_critics(trained: Policy, tmp_path: Path) -> None:
    trained.save_pretrained(tmp_path / "policy")
    loaded = Policy.from_pretrained(tmp_path / "policy")
    obs, actions = torch.rand(5, 2, 3), torch.rand(5, 3, 2)
    assert isinstance(loaded.scorer, ChunkCritic)
    assert isinstance(trained.scorer, ChunkCritic)
    assert loaded.scorer.config == trained.scorer.config
    assert loaded.scorer.score(obs, actions).equal(trained.scorer.score(obs, actions))
    assert loaded.state_dict().keys() == trained.state_dict().keys()
    assert not any("q_net" in name for name in loaded.state_dict())


def test_a_damaged_critic_is_named(trained: Policy, tmp_path: Path) -> None:
    trained.save_pretrained(tmp_path / "policy")
    (tmp_path / "policy" / "manifest.json").unlink()
    file = tmp_path / "policy" / "critic.json"
    text = file.read_text()
    file.write_text(text.replace('"n_layers": 1', '"n_layers": 2'))
    with pytest.raises(CheckpointError, match=r"critic.safetensors' does not fit"):
        Policy.from_pretrained(tmp_path / "policy")
    file.write_text(text.replace('"relu"', '"elu"'))
    with pytest.raises(CheckpointError, match=r"critic.json.*activation = 'elu'"):
        Policy.from_pretrained(tmp_path / "policy")


@pytest.mark.parametrize("selection", ["argmax", "implicit", "softmax"])
def test_candidates_are_chosen_in_control(trained: Policy, selection: str) -> None:
    control = RecedingHorizon(trained, InferenceConfig(candidates=6, selection=selection))
    obs = torch.rand(4, 2, 3)
    actions, _ = control.plan(obs, control.start(4), torch_generator(0))
    again, _ = control.plan(obs, control.start(4), torch_generator(0))
    assert actions.shape == (4, 2, 2)
    assert actions.equal(again)
