"""The denoising transformer of Diffusion Policy (arXiv:2303.04137): actions attend to the timestep and observations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from dprl.config import validate
from dprl.errors import check
from dprl.networks.denoiser import Denoiser
from dprl.networks.timestep import SinusoidalEmbedding, check_time_size


@dataclass(frozen=True)
class TransformerConfig:
    """A transformer denoiser. The dropouts are Diffusion Policy's for low-dimensional observations."""

    n_layers: int = 4
    """Decoder layers."""
    n_heads: int = 4
    """Attention heads; they divide `embedding_size`."""
    embedding_size: int = 128
    """Size of a token."""
    n_condition_layers: int = 0
    """Self-attention layers over the condition's tokens; 0 is a two-layer MLP on each token instead."""
    embedding_dropout: float = 0.0
    """Dropout of the embedded tokens."""
    attention_dropout: float = 0.3
    """Dropout within the layers: of attention weights, and of what each sub-layer adds."""
    causal: bool = True
    """Whether an action sees no later action than itself, as in Diffusion Policy.

    An action's noise is then predicted without the later actions, which the data's score does depend on: where
    demonstrations go several ways, False succeeds more often (docs/results/multimodal).
    """
    masks_observations: bool = False
    """Whether action t attends only to observations 0 to t, as in Diffusion Policy's code, whose chunks begin at the
    first observation. Chunks here begin at the latest one, so every action may see all of them. Without `causal` it
    sees later ones through the other actions all the same."""

    def __post_init__(self) -> None:
        validate(self, at_least={"n_layers": 1, "n_heads": 1, "n_condition_layers": 0})
        check_time_size("embedding_size", self.embedding_size)
        divides = self.embedding_size % self.n_heads == 0
        check(divides, "n_heads", self.n_heads, f"must divide embedding_size = {self.embedding_size}")
        for name in ("embedding_dropout", "attention_dropout"):
            check(0 <= getattr(self, name) < 1, name, getattr(self, name), "must be at least 0 and below 1")


def causal_mask(horizon: int) -> Tensor:
    """What to add to the attention between actions (H, H): -inf where the column's action is the later one."""
    return torch.full((horizon, horizon), -torch.inf).triu(1)


def memory_mask(horizon: int, n_obs_steps: int) -> Tensor:
    """What to add to the attention of actions to [timestep, observations] (H, 1 + O).

    Action t sees the timestep and observations 0 to t: the t of both counts from the first observation.
    """
    return torch.full((horizon, 1 + n_obs_steps), -torch.inf).triu(2)


class DenoisingTransformer(Denoiser):
    """Predicts the noise in a chunk with a pre-norm transformer decoder over its actions.

    Args:
        horizon: H, actions in a chunk.
        action_size: A, numbers in an action.
        n_obs_steps: O, observations in the condition, a token each.
        feature_size: F, numbers in each of them.
        config: the sizes of the network.
    """

    mask: Tensor | None
    memory_mask: Tensor | None

    def __init__(
        self, horizon: int, action_size: int, n_obs_steps: int, feature_size: int, config: TransformerConfig
    ) -> None:
        super().__init__()
        size = config.embedding_size
        self.time_emb = SinusoidalEmbedding(size)
        self.cond_obs_emb = nn.Linear(feature_size, size)
        self.cond_pos_emb = nn.Parameter(torch.zeros(1, 1 + n_obs_steps, size))
        self.input_emb = nn.Linear(action_size, size)
        self.pos_emb = nn.Parameter(torch.zeros(1, horizon, size))
        self.dropout = nn.Dropout(config.embedding_dropout)
        kwargs: dict[str, Any] = {
            "dropout": config.attention_dropout,
            "activation": "gelu",
            "batch_first": True,
            "norm_first": True,
        }
        if config.n_condition_layers == 0:
            self.encoder: nn.Module = nn.Sequential(nn.Linear(size, 4 * size), nn.Mish(), nn.Linear(4 * size, size))
        else:
            encoder_layer = nn.TransformerEncoderLayer(size, config.n_heads, 4 * size, **kwargs)
            self.encoder = nn.TransformerEncoder(encoder_layer, config.n_condition_layers, enable_nested_tensor=False)
        decoder_layer = nn.TransformerDecoderLayer(size, config.n_heads, 4 * size, **kwargs)
        self.decoder = nn.TransformerDecoder(decoder_layer, config.n_layers)
        self.ln_f = nn.LayerNorm(size)
        self.head = nn.Linear(size, action_size)
        self.register_buffer("mask", causal_mask(horizon) if config.causal else None, persistent=False)
        visible = memory_mask(horizon, n_obs_steps) if config.masks_observations else None
        self.register_buffer("memory_mask", visible, persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        """As in the paper's code: weights and positions from N(0, 0.02²), no biases, LayerNorms the identity."""
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def embed(self, timestep: Tensor) -> Tensor:
        """See `Denoiser.embed`."""
        return cast("Tensor", self.time_emb(timestep))

    def prepare(self, time: Tensor, condition: Tensor) -> Tensor:
        """The condition's tokens, encoded: (B, size) or (1, size), (B, O, F) -> (B, 1 + O, size)."""
        first = time.expand(len(condition), -1)[:, None]
        tokens = torch.cat([first, self.cond_obs_emb(condition)], dim=1) + self.cond_pos_emb
        return cast("Tensor", self.encoder(self.dropout(tokens)))

    def denoise(self, noisy_actions: Tensor, prepared: Tensor) -> Tensor:
        """See `Denoiser.denoise`."""
        x = self.dropout(self.input_emb(noisy_actions) + self.pos_emb)  # (B, H, size)
        x = self.decoder(x, prepared, self.mask, self.memory_mask, tgt_is_causal=self.mask is not None)
        return cast("Tensor", self.head(self.ln_f(x)))
