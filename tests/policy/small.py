"""A tiny policy of every kind, and data whose answer is known."""

from dataclasses import fields, replace

import numpy as np
import torch

from dprl.data import Episodes
from dprl.networks import MLPConfig
from dprl.networks.resnet import ResNetConfig
from dprl.networks.vision import VisionConfig
from dprl.networks.vit import ViTConfig
from dprl.observations import Camera
from dprl.policy import Features, Policy, PolicyConfig
from dprl.seeding import torch_generator

FEATURES = Features(3, 2)
CAMERA = Camera("top", 24, 24)
KINDS = [kind for kind in Policy.kinds if kind != "planner"]  # whose chunks are of more than actions
CHUNKS = {"horizon": 3, "n_action_steps": 2, "n_obs_steps": 2}
SIZES = {
    "hidden_size": 8,
    "n_blocks": 1,
    "n_layers": 1,
    "n_modes": 3,
    "n_bins": 5,
    "n_negatives": 6,
    "n_candidates": 12,
    "langevin_steps": 3,
    "num_train_timesteps": 4,
    "denoiser": MLPConfig(hidden_size=8, time_size=4),
    "inverse_size": 8,
}
VIT = VisionConfig(vit=ViTConfig(embedding_size=8, n_heads=2, spatial_size=6), shift_pixels=2)
RESNET = VisionConfig("resnet", resnet=ResNetConfig(n_keypoints=4, max_stride=8, base_channels=16), shift_pixels=2)


def small_config(kind: str, **changes: object) -> PolicyConfig:
    """Of whatever kind: a new one is small where its fields have the usual names."""
    config_class = Policy.kinds[kind].config_class
    names = {f.name for f in fields(config_class)}
    asked = {name: value for name, value in (CHUNKS | SIZES).items() if name in names}
    return config_class(**asked | changes)


def small_policy(kind: str, features: Features = FEATURES, seed: int = 1, **changes: object) -> Policy:
    """Ranges are not the default, and what is learned from data is there."""
    policy = Policy.kinds[kind](features, small_config(kind, **changes), seed=seed)
    size, actions = features.observation_size, features.action_size
    policy.observation_normalizer.fit(torch.stack([-torch.ones(size), 2 + torch.arange(size)]))
    policy.action_normalizer.fit(torch.stack([-0.5 * torch.ones(actions), 1 + torch.arange(actions)]))
    data = random_episodes(features)
    policy.fit_actions(replace(data, rewards=data.actions[:, 0].copy()), seed)
    return policy


def random_episodes(features: Features = FEATURES, lengths: tuple[int, ...] = (5, 9, 6, 8), seed: int = 0) -> Episodes:
    rng = np.random.default_rng(seed)
    total, n = sum(lengths), len(lengths)
    observations = rng.uniform(-1, 2, (total, features.observation_size)).astype(np.float32)
    actions = rng.uniform(-0.5, 1, (total, features.action_size)).astype(np.float32)
    images = {c.name: rng.integers(0, 256, (total, *c.shape), np.uint8) for c in features.cameras}
    final_images = {c.name: np.zeros((n, *c.shape), np.uint8) for c in features.cameras}
    no = np.zeros(n, np.bool_)
    return Episodes(
        observations, actions, np.zeros(total, np.float32), observations[:n], np.cumsum(lengths), no, no, np.arange(n),
        images=images, final_images=final_images,
    )  # fmt: skip


def random_batch(policy: Policy, n: int, seed: int = 0) -> tuple[object, torch.Tensor]:
    """Observations, named parts where there are images, and actions (n, H, A) in the units of the environment."""
    generator = torch_generator(seed, "batch")
    obs = policy.blank_observation(n)
    parts = obs if isinstance(obs, dict) else {"": obs}
    for part in parts.values():
        values = torch.rand(part.shape, generator=generator)
        part.copy_(255 * values if part.dtype == torch.uint8 else 3 * values - 1)
    shape = (n, policy.config.horizon, policy.features.action_size)
    return obs, 1.5 * torch.rand(shape, generator=generator) - 0.5


def ways(share: float = 0.5, n: int = 256, noise: float = 0.02, seed: int = 0) -> Episodes:
    """Episodes of two steps that see nothing; both actions are about 1 in this share of them, else about -1."""
    rng = np.random.default_rng(seed)
    sign = np.where(np.arange(n) < share * n, 1.0, -1.0).repeat(2)[:, None]
    actions = (sign + noise * rng.standard_normal((2 * n, 1))).astype(np.float32)
    nothing, no = np.zeros((2 * n, 1), np.float32), np.zeros(n, np.bool_)
    return Episodes(nothing, actions, nothing[:, 0], nothing[:n], 2 * np.arange(1, n + 1), no, no, np.arange(n))


def trained(kind: str, data: Episodes, steps: int = 150, rate: float = 5e-3, **changes: object) -> Policy:
    """Adam on whole chunks; sizes that learn in about a second."""
    config = small_config(kind, **{"horizon": 2, "n_action_steps": 2, "n_obs_steps": 1, **changes})
    if hasattr(config, "hidden_size"):
        config = replace(config, hidden_size=32)
    policy = Policy.kinds[kind].for_dataset(data, config)
    chunks = data.chunks(config.n_obs_steps, config.horizon)
    obs, actions = data.observations[chunks.observation_rows], data.actions[chunks.action_rows]
    return fit(policy, torch.from_numpy(obs), torch.from_numpy(actions), steps, rate)


def fit(policy: Policy, obs: torch.Tensor, actions: torch.Tensor, steps: int, rate: float) -> Policy:
    optimizer = torch.optim.Adam(policy.parameters(), rate)
    generator = torch_generator(0, "training")
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        loss = policy.loss(obs, actions, generator=generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return policy


def drawn(policy: Policy, n: int = 400, **options: object) -> torch.Tensor:
    """Chunks (n, H, A) for observations of nothing."""
    return policy.sample(policy.blank_observation(n), generator=torch_generator(0, "drawn"), **options)
