"""Episodes of a point on a line, planners of it, and critics that know what its states are worth."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from dprl.agents import BCConfig, DecisionDiffuser, Diffuser
from dprl.data import Episodes
from dprl.networks import MLPConfig
from dprl.policy import ChunkCritic, CriticConfig, DiffusionConfig, DiffusionPolicy, PlannerConfig, Policy
from dprl.policy.critic import ValueTerms
from dprl.seeding import numpy_generator

PLANS = PlannerConfig(horizon=4, n_action_steps=2, num_train_timesteps=10, denoiser=MLPConfig(hidden_size=64))
STATES = replace(PLANS, denoised="states", inverse_size=32, command="return")
BC = BCConfig(batch_size=128, learning_rate=3e-3, final_learning_rate=3e-4, ema_decay=0.98)
START = torch.zeros(1_000, 1, 1)
AnyPlans = TypeVar("AnyPlans", Diffuser, DecisionDiffuser)


def walks(n: int = 600, length: int = 6) -> Episodes:
    """From 0, each step of an episode to the same side; what is earned at its end is how far to the right that is."""
    rng = numpy_generator(0, "walks")
    side = rng.choice([-1.0, 1.0], n)[:, None]
    actions = (side + 0.1 * rng.standard_normal((n, length))).astype(np.float32)
    states = np.concatenate([np.zeros((n, 1), np.float32), np.cumsum(actions, 1)], axis=1).astype(np.float32)
    rewards = np.zeros((n, length), np.float32)
    rewards[:, -1] = states[:, -1]
    whole, no = np.ones(n, np.bool_), np.zeros(n, np.bool_)
    return Episodes(
        states[:, :-1].reshape(-1, 1), actions.reshape(-1, 1), rewards.reshape(-1), states[:, -1:],
        length * np.arange(1, n + 1), whole, no, np.arange(n),
    )  # fmt: skip


class Known(ChunkCritic):
    """V(s) = 10 s of one number, whatever the networks are."""

    def v(self, seen: Tensor) -> Tensor:
        return 10 * seen[:, 0]


def critics(gamma: float = 0.5, scale: float = 2.0, bootstrap: bool = True) -> Policy:
    policy = DiffusionPolicy.for_dataset(walks(4), DiffusionConfig(num_train_timesteps=2, horizon=1))
    policy.observation_normalizer.fit(torch.tensor([[-1.0], [1.0]]))  # so that what is seen is the state
    known = Known(policy, CriticConfig())
    known.terms = ValueTerms(gamma, scale, bootstrap)
    policy.scorer = known
    return policy


def share_to_the_right(plans: Tensor) -> float:
    return float((plans[:, 0, 0] > 0).float().mean())


def require_resumed_equals_uninterrupted(make: Callable[[], AnyPlans], folder: Path) -> tuple[AnyPlans, AnyPlans]:
    """Return both agents."""
    data, first = walks(20), []
    whole, stopped = make(), make()
    for agent in (whole, stopped):
        agent.set_data(data, 200)
        metrics = agent.update(agent.collect())
        first.append({name: value for name, value in metrics.items() if "time" not in name})
    assert first[0] == first[1]
    stopped.save(folder / "saved")
    resumed = make()
    resumed.set_data(data, 200)
    resumed.load_state(folder / "saved")
    assert resumed.timesteps == 100
    for agent in (whole, resumed):
        agent.update(agent.collect())
    ours, theirs = whole.policy.state_dict(), resumed.policy.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    return whole, resumed
