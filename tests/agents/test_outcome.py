"""What chunks led to: returns and success, of clean chunks and of noisy ones."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dprl.agents import BC, BCConfig, Outcome, OutcomeConfig
from dprl.data import Episodes
from dprl.data.transitions import returns_to_go
from dprl.errors import CheckpointError, ConfigError, DatasetError
from dprl.guidance import NoisyValue, Value, ValueGuide
from dprl.policy import ChunkValueConfig, DiffusionConfig, DiffusionPolicy, Features, Policy, Scorer
from dprl.seeding import numpy_generator
from tests.policy.small import FEATURES, random_episodes, small_policy

K, MODE, STD = 8, 0.6, 0.4
NETWORKS = ChunkValueConfig(64, 2, n_networks=1)
SMALL = ChunkValueConfig(hidden_size=8, n_layers=1)


def a_policy() -> DiffusionPolicy:
    """Of one number, whose actions are as they are."""
    policy = DiffusionPolicy(Features(1, 1), DiffusionConfig(num_train_timesteps=K, horizon=1))
    policy.observation_normalizer.fit(torch.tensor([[-1.0], [1.0]]))
    policy.action_normalizer.fit(torch.tensor([[-1.0], [1.0]]))
    return policy


def one_step_episodes(n: int = 4_000) -> Episodes:
    """Actions around two modes of equal weight, of which the right one succeeds, if less surely than it would seem."""
    rng = numpy_generator(0, "test")
    right = rng.random(n) < 0.5
    actions = (np.where(right, MODE, -MODE) + STD * rng.standard_normal(n)).astype(np.float32)[:, None]
    success = rng.random(n) < np.where(right, 0.9, 0.2)
    seen, whole = rng.uniform(-1, 1, (n, 1)).astype(np.float32), np.ones(n, np.bool_)
    rewards = np.where(right, 5.0, 1.0).astype(np.float32) + seen[:, 0]
    return Episodes(seen, actions, rewards, seen, np.arange(1, n + 1), whole, success, np.arange(n))


def learned(of: str, **changes: object) -> tuple[DiffusionPolicy, Outcome]:
    policy = a_policy()
    config = OutcomeConfig(of, NETWORKS, learning_rate=1e-2, ema_decay=0.98, **changes)
    agent = Outcome(policy, config)
    agent.fit(one_step_episodes(), 400)
    return policy, agent


def told() -> Episodes:
    """Episodes that earned something, of which the longer two succeeded."""
    data = random_episodes()
    return replace(data, rewards=data.actions[:, 0].copy(), success=data.lengths > 7)


def share_of_the_right(chunks: Tensor, signal: float, noise: float) -> Tensor:
    """Of what became `chunks` when noised."""
    variance = (signal * STD) ** 2 + noise**2
    return torch.sigmoid(2 * signal * MODE * chunks / variance)


@pytest.mark.parametrize("of", ["return", "success"])
def test_what_noisy_and_clean_chunks_led_to(of: str) -> None:
    policy, agent = learned(of)
    low, high = (1.3, 5.3) if of == "return" else (0.2, 0.9)
    clean = torch.as_tensor(one_step_episodes().actions)[:, None]
    obs, noise = torch.full_like(clean, 0.3), torch.randn(clean.shape)
    said = {(1.0, 0.0): (clean, agent.average.score(obs, clean))}
    for t in (0, K // 2, K - 1):
        noisy = policy.schedule.add_noise(clean, noise, torch.full((len(clean),), t))
        said[policy.schedule.level(t)] = (noisy, agent.average.noisy_at(obs)(noisy, t))
    for level, (chunks, worth) in said.items():
        expected = low + (high - low) * share_of_the_right(chunks.flatten(), *level)
        found = worth if of == "return" else worth.exp()
        assert (found - expected).abs().mean() < 0.12 * (high - low)


def test_it_guides_to_what_succeeds() -> None:
    data = one_step_episodes()
    policy = DiffusionPolicy.for_dataset(data, DiffusionConfig(num_train_timesteps=K, horizon=1))
    BC(policy, BCConfig(learning_rate=3e-3, ema_decay=0.98)).fit(data, 400)
    Outcome(policy, OutcomeConfig("success", NETWORKS, learning_rate=3e-3, ema_decay=0.98)).fit(data, 400)
    obs, generator = torch.zeros(2_000, 1, 1), torch.Generator().manual_seed(0)
    plain = policy.sample(obs, generator=generator)
    guided = policy.sample(obs, generator=generator, guide=ValueGuide(policy.scorer, 1.0, "noisy", "score"))
    positive = data.actions[:, 0] > 0
    assert (plain > 0).float().mean() == pytest.approx(positive.mean(), abs=0.06)
    assert (guided > 0).float().mean() == pytest.approx(positive[data.success].mean(), abs=0.06)
    assert positive[data.success].mean() > positive.mean() + 0.2


def test_without_noise_it_is_no_noisy_value() -> None:
    for noised in (True, False):
        policy = small_policy("diffusion")
        agent = Outcome(policy, OutcomeConfig(critic=replace(SMALL, noised=noised)))
        agent.fit(told(), 2)
        assert isinstance(agent.average, NoisyValue) == noised
        assert isinstance(agent.average, Value)
        assert isinstance(agent.average, Scorer)
        if not noised:
            with pytest.raises(ConfigError, match="must have a method noisy_at"):
                ValueGuide(agent.average, 1.0, "noisy")


def test_the_policy_stays_and_one_seed_gives_one_result() -> None:
    found = []
    for _ in range(2):
        policy = small_policy("diffusion")
        before = [p.clone() for p in policy.parameters()]
        agent = Outcome(policy, OutcomeConfig(critic=SMALL), seed=3)
        agent.fit(told(), 3)
        assert all(a.equal(b) for a, b in zip(before, policy.parameters(), strict=True))
        found.append([p.clone() for p in agent.average.parameters()])
    assert all(a.equal(b) for a, b in zip(*found, strict=True))
    start = Outcome(small_policy("diffusion"), OutcomeConfig(critic=SMALL), seed=3).average.parameters()
    assert not all(a.equal(b) for a, b in zip(found[0], start, strict=True))


@pytest.mark.parametrize("of", ["return", "success"])
def test_it_is_saved_with_the_policy(of: str, tmp_path: Path) -> None:
    policy = small_policy("diffusion")
    Outcome(policy, OutcomeConfig(of, SMALL)).fit(told(), 3)
    policy.save_pretrained(tmp_path / "policy")
    loaded = Policy.from_pretrained(tmp_path / "policy")
    obs, chunks = torch.linspace(-1, 2, 12).view(2, 2, 3), torch.linspace(-0.5, 1, 12).view(2, 3, 2)
    assert loaded.scorer.score(obs, chunks).equal(policy.scorer.score(obs, chunks))
    (tmp_path / "policy" / "value.json").write_text('{"hidden_size": 9}')
    with pytest.raises(CheckpointError):
        Policy.from_pretrained(tmp_path / "policy")


def test_returns_are_of_the_rest_of_the_episode() -> None:
    data = random_episodes(lengths=(3, 2))
    rewards = np.array([1, 2, 4, 8, 16], np.float32)
    data = replace(data, rewards=rewards, terminated=np.array([True, False]))
    assert returns_to_go(data, 0.5).tolist() == [1 + 1 + 1, 2 + 2, 4, 8 + 8, 16]
    assert returns_to_go(data, 1.0, 100).tolist() == [7 - 100, 6 - 100, 4 - 100, 24, 16]
    assert data.rewards.tolist() == rewards.tolist()


def test_data_that_do_not_say_are_refused() -> None:
    data, policy = told(), small_policy("diffusion")
    for of, changed, complaint in (
        ("return", replace(data, rewards_from="none"), "neither rewards nor success"),
        ("return", replace(data, rewards=np.zeros_like(data.rewards)), "every return of the data is 0"),
        ("success", replace(data, success_known=False), "do not say which episodes succeeded"),
        ("success", replace(data, success=np.ones_like(data.success)), "every success of the data is 1"),
        ("return", random_episodes(Features(4, 2)), "the policy has"),
    ):
        with pytest.raises(DatasetError, match=complaint):
            Outcome(policy, OutcomeConfig(of, SMALL)).fit(changed, 1)


def test_other_policies_and_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="must be a diffusion policy or flow"):
        Outcome(small_policy("gaussian", FEATURES))
    for changes in ({"gamma": 1.5}, {"clean_share": -0.1}, {"ema_decay": 1.0}, {"batch_size": 0}):
        with pytest.raises(ConfigError, match=next(iter(changes))):
            OutcomeConfig(**changes)
    with pytest.raises(ConfigError, match="termination_penalty"):
        OutcomeConfig("success", termination_penalty=1.0)
    with pytest.raises(ConfigError, match=r"critic\.worth"):
        OutcomeConfig(critic=ChunkValueConfig(worth="log_probability"))
    with pytest.raises(ConfigError, match="clean_share"):
        OutcomeConfig(critic=ChunkValueConfig(noised=False), clean_share=0.5)


def test_what_is_explained_is_of_held_out_episodes() -> None:
    agent = Outcome(a_policy(), OutcomeConfig("return", NETWORKS, learning_rate=3e-3, ema_decay=0.9))
    agent.set_data(one_step_episodes(400), 300)
    figures = [agent.update(agent.collect()) for _ in range(3)]
    explained = figures[-1]["validation/explained_variance"]
    assert 0.5 < explained <= 1
    assert figures[-1]["outcome/loss"] < figures[0]["outcome/loss"]
