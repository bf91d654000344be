"""The diffusion policies and their competitors as the studies compare them, of like size."""

from __future__ import annotations

from dataclasses import replace

from dprl.diffusion import SolverConfig
from dprl.experiments.runs import PolicyChoice
from dprl.networks import MLPConfig, TransformerConfig, UNetConfig
from dprl.policy import (
    BeTConfig,
    CategoricalConfig,
    DiffusionConfig,
    GaussianConfig,
    GMMConfig,
    IBCConfig,
    LSTMGMMConfig,
    MSEConfig,
)

MLP = DiffusionConfig(num_train_timesteps=50, sampling=SolverConfig("ddim", 10), denoiser=MLPConfig(n_blocks=2))
TRANSFORMER = TransformerConfig(n_layers=2, embedding_size=64, attention_dropout=0.01)

DIFFUSION: dict[str, DiffusionConfig] = {
    "diffusion, MLP": MLP,
    "diffusion, U-Net": replace(MLP, denoiser=UNetConfig(down_dims=(24, 48), time_size=16)),
    "diffusion, transformer": replace(MLP, denoiser=TRANSFORMER),
    "rectified flow, MLP": DiffusionConfig(
        num_train_timesteps=100,
        schedule="rectified_flow",
        prediction_type="velocity",
        sampling=SolverConfig("euler", 10),
        denoiser=MLPConfig(n_blocks=2),
    ),
}

COMPETITORS: dict[str, PolicyChoice] = {
    "MSE": MSEConfig(),
    "Gaussian": GaussianConfig(),
    "GMM": GMMConfig(),
    "LSTM-GMM": LSTMGMMConfig(hidden_size=128),
    "categorical": CategoricalConfig(),
    "BeT (k-means bins, offsets)": BeTConfig(),
    "IBC": IBCConfig(hidden_size=128, n_negatives=32),
}

ALL: dict[str, PolicyChoice] = {**DIFFUSION, **COMPETITORS}


def with_chunks(config: PolicyChoice, horizon: int, n_action_steps: int) -> PolicyChoice:
    """Return `config` with these chunks; an LSTM keeps its single steps, as in robomimic."""
    if isinstance(config, LSTMGMMConfig):
        return config
    return replace(config, horizon=horizon, n_action_steps=n_action_steps)


def slug(name: str) -> str:
    """A name for files: ``diffusion, U-Net`` -> ``diffusion-u-net``."""
    words = "".join(c if c.isalnum() else " " for c in name.lower()).split()
    return "-".join(words)
