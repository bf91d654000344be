"""A pillar that no data have, and the reward that keeps clear of it, also as the README writes it."""

import re
from pathlib import Path

import numpy as np
import torch

from dprl.envs import avoid
from dprl.experiments import obstacle
from dprl.guidance.spec import GuidanceConfig, steering
from dprl.policy import DiffusionConfig, DiffusionPolicy, Features

README = Path(__file__).resolve().parents[2] / "README.md"
UP = torch.tensor([[[0.0, 1.0]] * 16])


def test_paths_away_from_the_pillar_are_worth_more() -> None:
    x = torch.tensor([-0.5, 0.2, 0.4, 0.5])
    worth = obstacle.clear(torch.stack([x, torch.full((4,), -0.4)], 1)[:, None], UP.expand(4, -1, -1))
    assert worth.shape == (4,)
    assert worth.tolist() == sorted(worth.tolist(), reverse=True)
    most = 16 * (obstacle.RADIUS + obstacle.MARGIN)
    torch.testing.assert_close(worth[0], torch.tensor(most))


def test_what_enters_the_pillar() -> None:
    beside, through = (np.array([(x, y) for y in np.linspace(-0.8, 0.8, 33)]) for x in (0.8, 0.5))
    assert obstacle.enters(through)
    assert not obstacle.enters(beside)


def test_the_guide_moves_actions_away_from_it() -> None:
    policy = DiffusionPolicy(Features(2, 2), DiffusionConfig(num_train_timesteps=5, horizon=16))
    obs, noise = torch.tensor([[[0.4, -0.1]]]), torch.randn(5, 1, 16, 2)
    guide, _ = steering(GuidanceConfig(obstacle.CLEAR, 3.0), policy)
    plain, guided = (policy.sample(obs, noise=noise, guide=g) for g in (None, guide))
    assert obstacle.clear(obs, guided) > obstacle.clear(obs, plain)


def test_the_readmes_reward_is_this_one() -> None:
    """Its lines are run as they stand."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    (block,) = [block for block in blocks if "PILLAR" in block]
    assert len(block.splitlines()) <= 10
    names: dict[str, object] = {}
    exec(block, names)
    obs, actions = torch.rand(7, 1, 2) - 0.5, torch.rand(7, 16, 2)
    torch.testing.assert_close(names["clear"](obs, actions), obstacle.clear(obs, actions))
    assert avoid.SPEED == 0.05
