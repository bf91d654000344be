"""Weight decay: each parameter in one group, once, in an order that stays."""

import copy

import pytest
import torch
from torch import nn

from dprl.errors import ConfigError
from dprl.networks.mlp import ResidualMLP
from dprl.networks.optim import weight_decay_groups
from dprl.networks.transformer import DenoisingTransformer, TransformerConfig
from dprl.networks.unet import ConditionalUNet1D, UNetConfig


class Mixture(nn.Module):
    """A little of what the other networks lack."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.image = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, bias=False))
        self.attention = nn.MultiheadAttention(4, 2, kdim=6)
        self.register_parameter("position", nn.Parameter(torch.zeros(1, 7, 4)))
        self.head = nn.Linear(4, 5)
        self.lstm = nn.LSTM(4, 3, num_layers=2, proj_size=2)
        self.tied = nn.Linear(4, 5)
        self.tied.weight = self.head.weight


def transformer(n_condition_layers: int = 0) -> nn.Module:
    sizes = {"n_layers": 1, "n_heads": 2, "embedding_size": 8}
    return DenoisingTransformer(4, 2, 1, 3, TransformerConfig(n_condition_layers=n_condition_layers, **sizes))


NETWORKS = {
    "mlp": lambda: ResidualMLP(3, 2, 8, 1, "relu"),
    "unet": lambda: ConditionalUNet1D(4, 2, 1, 3, UNetConfig(down_dims=(4, 8), n_groups=2)),
    "unet_mlp": lambda: ConditionalUNet1D(
        4, 2, 1, 3, UNetConfig(down_dims=(4, 8), n_groups=2, condition_encoder="mlp")
    ),
    "transformer": transformer,
    "transformer_encoder": lambda: transformer(1),
    "mixture": Mixture,
}


def names_by_group(module: nn.Module) -> list[set[str]]:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [{names[id(p)] for p in group["params"]} for group in weight_decay_groups(module, 0.1)]


@pytest.mark.parametrize("network", NETWORKS)
def test_groups_are_complete_disjoint_and_decay_matrices_only(network: str) -> None:
    module = NETWORKS[network]()
    parameters = [p for group in weight_decay_groups(module, 0.1) for p in group["params"]]
    assert len(parameters) == len({id(p) for p in parameters}) == len(list(module.parameters()))
    assert [group["weight_decay"] for group in weight_decay_groups(module, 0.1)] == [0.1, 0.0]
    decayed, rest = names_by_group(module)
    sizes = {name: parameter.dim() for name, parameter in module.named_parameters()}
    assert all(sizes[name] >= 2 for name in decayed)
    assert {name for name in rest if sizes[name] >= 2} <= {"pos_emb", "cond_pos_emb", "embedding.weight", "position"}


def test_mixture_by_hand() -> None:
    decayed, rest = names_by_group(Mixture())
    projections = {f"attention.{name}" for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight")}
    recurrent = {f"lstm.weight_{part}_l{layer}" for part in ("ih", "hh", "hr") for layer in (0, 1)}
    others = {"attention.out_proj.weight", "image.0.weight", "image.2.weight", "head.weight"}
    assert decayed == projections | recurrent | others
    assert {f"lstm.bias_{part}_l{layer}" for part in ("ih", "hh") for layer in (0, 1)} <= rest


@pytest.mark.parametrize("network", NETWORKS)
def test_state_fits_a_module_built_again(network: str) -> None:
    module = NETWORKS[network]()
    optimizer = torch.optim.AdamW(weight_decay_groups(module, 0.1), lr=0.1)
    for i, parameter in enumerate(module.parameters()):
        parameter.grad = torch.full_like(parameter, i + 1.0)
    optimizer.step()
    again = NETWORKS[network]()
    again.load_state_dict(module.state_dict())
    restored = torch.optim.AdamW(weight_decay_groups(again, 0.1), lr=0.1)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for i, (old, new) in enumerate(zip(module.parameters(), again.parameters(), strict=True)):
        moment = restored.state[new]["exp_avg"]
        torch.testing.assert_close(moment, torch.full_like(moment, (i + 1) * 0.1))
        assert torch.equal(moment, optimizer.state[old]["exp_avg"]), i


@pytest.mark.parametrize("weight_decay", [-0.1, float("nan"), float("inf")])
def test_decays_that_cannot_be(weight_decay: float) -> None:
    with pytest.raises(ConfigError, match=r"weight_decay = .*: must be a finite number of at least 0"):
        weight_decay_groups(nn.Linear(1, 1), weight_decay)
