"""Collecting experience: one interface, in process or on Ray, with identical results."""

from dprl.rollout.evaluation import Evaluation, evaluate
from dprl.rollout.in_process import InProcessPool, as_pool
from dprl.rollout.pool import Rollout, RolloutPool

__all__ = ["Evaluation", "InProcessPool", "Rollout", "RolloutPool", "as_pool", "evaluate"]
