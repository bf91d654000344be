"""Policies: observations in, action chunks out."""

from dprl.policy.base import CONFIG_FILE, MODEL_FILE, Features, Policy, PolicyConfig, find_policy, masked_mean
from dprl.policy.candidates import Scorer, best_of
from dprl.policy.categorical import BeTConfig, BeTPolicy, CategoricalConfig, CategoricalPolicy
from dprl.policy.chunk_value import ChunkValue, ChunkValueConfig, NoisyChunkValue
from dprl.policy.control import InferenceConfig, Memory, PredictState, RecedingHorizon
from dprl.policy.critic import ChunkCritic, CriticConfig
from dprl.policy.diffusion import DiffusionConfig, DiffusionPolicy, denoising_loss
from dprl.policy.explicit import (
    GaussianConfig,
    GaussianPolicy,
    GMMConfig,
    GMMPolicy,
    LSTMGMMConfig,
    LSTMGMMPolicy,
    MSEConfig,
    MSEPolicy,
)
from dprl.policy.implicit import IBCConfig, IBCPolicy
from dprl.policy.normalize import MinMaxNormalizer
from dprl.policy.planner import Planner, PlannerConfig

__all__ = [
    "CONFIG_FILE",
    "MODEL_FILE",
    "BeTConfig",
    "BeTPolicy",
    "CategoricalConfig",
    "CategoricalPolicy",
    "ChunkCritic",
    "ChunkValue",
    "ChunkValueConfig",
    "CriticConfig",
    "DiffusionConfig",
    "DiffusionPolicy",
    "Features",
    "GMMConfig",
    "GMMPolicy",
    "GaussianConfig",
    "GaussianPolicy",
    "IBCConfig",
    "IBCPolicy",
    "InferenceConfig",
    "LSTMGMMConfig",
    "LSTMGMMPolicy",
    "MSEConfig",
    "MSEPolicy",
    "Memory",
    "MinMaxNormalizer",
    "NoisyChunkValue",
    "Planner",
    "PlannerConfig",
    "Policy",
    "PolicyConfig",
    "PredictState",
    "RecedingHorizon",
    "Scorer",
    "best_of",
    "denoising_loss",
    "find_policy",
    "masked_mean",
]
