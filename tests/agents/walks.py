"""Episodes of a point on a line, and critics that know what its states are worth."""

import numpy as np
import torch
from torch import Tensor

from dprl.data import Episodes
from dprl.policy import ChunkCritic, CriticConfig, DiffusionConfig, DiffusionPolicy, Policy
from dprl.policy.critic import ValueTerms
from dprl.seeding import numpy_generator


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
