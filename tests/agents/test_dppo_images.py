"""DPPO on policies that see images: tuned steps see through an encoder of their own, frozen ones through the base's."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dprl.agents import DPPO, DPPOConfig
from dprl.agents.targets import Pairs
from dprl.envs.chunked import ChunkedEnv, SimulatorStep
from dprl.networks import MLPConfig
from dprl.networks.vision import VisionConfig
from dprl.networks.vit import ViTConfig
from dprl.observations import STATE, Camera, Observation, take
from dprl.policy import DiffusionConfig, DiffusionPolicy, Features, GaussianConfig, GaussianPolicy, Policy
from dprl.spec import EnvSpec, FloatArray, IntArray, env_seeds
from tests.toys import Reach, reach_spec

CAMERA = Camera("top", 24, 24)
VIT = VisionConfig(vit=ViTConfig(embedding_size=8, n_heads=2, spatial_size=6), shift_pixels=2)
SMALL = DPPOConfig(
    tuned_steps=3, n_steps=4, n_epochs=1, batch_size=40, micro_batch_size=25, critic_hidden_size=16, learning_rate=1e-3
)


class ReachPixels(Reach):
    """The reacher of `tests.toys`: where the hand is, as a number; where the goal is, in an image alone."""

    def reset(self, indices: IntArray, episodes: IntArray) -> Observation:
        super().reset(indices, episodes)
        return self._seen(indices)

    def step(self, indices: IntArray, actions: FloatArray) -> SimulatorStep:
        return replace(super().step(indices, actions), observation=self._seen(indices))

    def _seen(self, indices: IntArray) -> Observation:
        images = np.zeros((len(indices), *CAMERA.shape), np.uint8)
        for row, goal in enumerate(self.state[indices, 1]):
            images[row, :, int((goal + 1.1) / 2.2 * 23)] = 255
        return {STATE: self.state[indices, :1].copy(), CAMERA.part: images}


def build_pixels(spec: EnvSpec, seeds: list[int], num_threads: int = 0) -> ChunkedEnv:
    return ChunkedEnv(spec, ReachPixels(seeds), seeds)


def make_env(n_envs: int = 3) -> ChunkedEnv:
    spec = replace(
        reach_spec(), id="toy/reach-pixels", builder="tests.agents.test_dppo_images:build_pixels",
        observation_size=1, cameras=(CAMERA,), max_episode_steps=20,
    )  # fmt: skip
    return build_pixels(spec, env_seeds(0, n_envs))


def make_policy(kind: str = "diffusion") -> Policy:
    features = Features(1, 1, (CAMERA,))
    if kind == "gaussian":
        return GaussianPolicy(features, GaussianConfig(horizon=2, hidden_size=16, n_blocks=1, vision=VIT))
    config = DiffusionConfig(horizon=2, num_train_timesteps=6, denoiser=MLPConfig(hidden_size=16), vision=VIT)
    return DiffusionPolicy(features, config)


def agent(kind: str = "diffusion", **changes: object) -> DPPO:
    return DPPO(make_policy(kind), make_env(), replace(SMALL, **changes))


def snapshot(module: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def changed(module: torch.nn.Module, before: list[torch.Tensor]) -> bool:
    return any(not torch.equal(a, b) for a, b in zip(module.parameters(), before, strict=True))


def test_the_tuned_encoder_learns_and_the_frozen_one_does_not() -> None:
    dppo = agent()
    parts = {
        "tuned": dppo.policy.tuned, "tuned_encoder": dppo.policy.tuned_encoder, "critic": dppo.critic.encoder,
        "base": dppo.policy.base, "encoder": dppo.policy.encoder,
    }  # fmt: skip
    before = {name: snapshot(part) for name, part in parts.items()}
    metrics = dppo.update(dppo.collect())
    assert np.isfinite(metrics["dppo/policy_loss"])
    assert {name: changed(part, before[name]) for name, part in parts.items()} == {
        "tuned": True, "tuned_encoder": True, "critic": True, "base": False, "encoder": False,
    }  # fmt: skip


def test_a_gaussian_policys_encoder_learns_too() -> None:
    dppo = agent("gaussian", tuned_steps=1)
    before = snapshot(dppo.policy.encoder)
    dppo.update(dppo.collect())
    assert changed(dppo.policy.encoder, before)


def test_no_network_gets_more_than_a_micro_batch_at_once() -> None:
    dppo = agent(critic="state_action", micro_batch_size=5)
    rollout, rows = dppo.collect(), []
    for module in (dppo.critic, dppo.baseline, dppo.policy.tuned_encoder):
        module.register_forward_hook(lambda _, inputs, output: rows.append(len(output)))
    dppo.update(rollout)
    assert 1 < max(rows) <= 5


def test_frozen_steps_see_what_they_saw_and_tuned_ones_do_not() -> None:
    dppo = agent()
    obs = dppo._rows(dppo.collect().observations)
    noise = torch.randn(7, 12, 2, 1, generator=torch.Generator().manual_seed(0))
    before = dppo.mdp.sample(obs, noise=noise)
    with torch.no_grad():
        for parameter in dppo.policy.tuned_encoder.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    after = dppo.mdp.sample(obs, noise=noise)
    assert torch.equal(after.steps[:, 0], before.steps[:, 0]), "what the first tuned step starts from"
    assert not torch.allclose(after.steps[:, 1], before.steps[:, 1])
    torch.testing.assert_close(dppo.mdp.sample(obs, noise=noise, pretrained=True).steps, before.steps)


def test_log_probs_of_the_rollout_are_those_of_the_update_without_augmentation() -> None:
    dppo = agent()
    targets, _ = dppo._prepare(dppo.collect())
    k = torch.zeros(12, dtype=torch.long)
    pairs = Pairs(torch.arange(12), k)
    augmented = dppo._log_prob(targets, pairs)
    condition = dppo.mdp.condition(targets.observation)
    with torch.no_grad():
        plain = dppo.mdp.log_prob(condition, targets.x(pairs), targets.x_next(pairs), k).mean((1, 2))
    torch.testing.assert_close(plain, targets.old_log_prob[:, 0], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(augmented, targets.old_log_prob[:, 0], atol=1e-6)


def test_with_every_step_tuned_the_base_is_not_even_asked() -> None:
    dppo = agent(tuned_steps=6)
    calls = []
    dppo.policy.encoder.register_forward_hook(lambda *_: calls.append(1))
    dppo.update(dppo.collect())
    dppo.policy.sample(take(dppo._rows(dppo.collect().observations), slice(2)))
    assert calls == []


@pytest.mark.parametrize("kind", ["diffusion", "gaussian"])
def test_a_policy_that_sees_is_saved_and_its_run_goes_on_to_the_bit(kind: str, tmp_path: Path) -> None:
    changes = {"tuned_steps": 1} if kind == "gaussian" else {"regularizer": "kl", "critic": "state_action"}
    whole = agent(kind, **changes)
    whole.update(whole.collect())
    whole.save(tmp_path / "saved")
    loaded = Policy.from_pretrained(tmp_path / "saved")
    obs = take(whole._rows(whole.pool.collect(whole.mdp, 1).observations), slice(2))
    draws = [policy.sample(obs, generator=torch.Generator().manual_seed(0)) for policy in (loaded, whole.policy)]
    assert torch.equal(*draws)

    again = agent(kind, **changes)
    again.load_state(tmp_path / "saved")
    once = agent(kind, **changes)
    once.update(once.collect())
    for dppo in (again, once):
        dppo.update(dppo.collect())
    assert all(torch.equal(a, b) for a, b in zip(snapshot(again.policy), snapshot(once.policy), strict=True))


def test_the_tuned_policy_acts_as_before_until_it_learns() -> None:
    policy = make_policy()
    obs = {STATE: torch.rand(4, 1, 1), CAMERA.part: torch.randint(0, 256, (4, 1, *CAMERA.shape), dtype=torch.uint8)}
    before = policy.sample(obs, generator=torch.Generator().manual_seed(0))
    DPPO(policy, make_env(), SMALL)
    torch.testing.assert_close(policy.sample(obs, generator=torch.Generator().manual_seed(0)), before)
