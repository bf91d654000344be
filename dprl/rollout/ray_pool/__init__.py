"""Environments on Ray workers."""

from dprl.rollout.ray_pool.evaluator import RayEvaluator
from dprl.rollout.ray_pool.pool import RayPool
from dprl.rollout.ray_pool.workers import Resource, WorkerOptions

__all__ = ["RayEvaluator", "RayPool", "Resource", "WorkerOptions"]
