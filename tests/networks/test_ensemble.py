"""Several perceptrons at once are each what torch's own layers make."""

import pytest
import torch
from torch import nn

from dprl.networks.ensemble import EnsembleMLP


@pytest.mark.parametrize("normed", [False, True])
def test_each_is_a_perceptron_of_its_own(normed: bool) -> None:
    ensemble = EnsembleMLP(3, 5, 8, 2, "relu", normed=normed)
    x = torch.randn(7, 5)
    with torch.no_grad():
        for gain, shift in zip(ensemble.gains, ensemble.shifts, strict=True):
            gain.add_(torch.randn_like(gain))
            shift.add_(torch.randn_like(shift))
    for i in range(3):
        layers: list[nn.Module] = []
        for place, (weight, bias) in enumerate(zip(ensemble.weights, ensemble.biases, strict=True)):
            linear = nn.Linear(*weight[i].shape)
            linear.load_state_dict({"weight": weight[i].T, "bias": bias[i, 0]})
            layers.append(linear)
            if place == 2:
                continue
            if normed:
                norm = nn.LayerNorm(8)
                norm.load_state_dict({"weight": ensemble.gains[place][i, 0], "bias": ensemble.shifts[place][i, 0]})
                layers.append(norm)
            layers.append(nn.ReLU())
        torch.testing.assert_close(ensemble(x)[i], nn.Sequential(*layers)(x)[:, 0])


def test_it_begins_as_torchs_layers_do() -> None:
    ensemble = EnsembleMLP(4, 25, 16, 1, "relu", normed=True)
    for parameters, width in ((ensemble.weights, 25), (ensemble.biases, 25)):
        assert parameters[0].abs().max() <= 1 / width**0.5
    assert all(gain.eq(1).all() for gain in ensemble.gains)
    assert all(shift.eq(0).all() for shift in ensemble.shifts)
