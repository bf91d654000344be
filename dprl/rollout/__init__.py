"""Collecting experience: one interface, in process or on Ray, with identical results."""

from dprl.rollout.evaluation import Evaluation, evaluate
from dprl.rollout.pool import InProcessPool, PoolState, Rollout, RolloutPool, as_pool

__all__ = ["Evaluation", "InProcessPool", "PoolState", "Rollout", "RolloutPool", "as_pool", "evaluate"]
