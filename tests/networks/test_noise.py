"""Learned noise: within its bounds, and really learned."""

import pytest
import torch

from dprl.errors import ConfigError
from dprl.networks.noise import Eta, LearnedNoiseConfig, NoiseStd

CONFIG = LearnedNoiseConfig("std", low=0.1, high=0.3, start=0.25, hidden_size=8)


def shaken(module: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(parameter))))
    return module


def test_it_starts_where_it_is_told_whatever_it_sees() -> None:
    std = NoiseStd(6, 4, 2, CONFIG)(torch.randn(5, 2, 3), torch.tensor([7]))
    assert std.shape == (5, 4, 2)
    torch.testing.assert_close(std, torch.full_like(std, 0.15))


def test_it_stays_within_its_bounds_and_depends_on_all_it_sees() -> None:
    net = shaken(NoiseStd(6, 4, 2, CONFIG))
    condition = torch.randn(50, 2, 3, generator=torch.Generator().manual_seed(0))
    std = net(30 * condition, torch.tensor([7]))
    assert (std >= 0.1).all()
    assert (std <= 0.3).all()
    assert not torch.equal(std, net(30 * condition, torch.tensor([8])))
    assert std.std(0).min() > 0
    assert net(condition, torch.arange(50)).shape == (50, 4, 2)


@pytest.mark.parametrize(("per_state", "per_action"), [(True, True), (False, True), (True, False), (False, False)])
def test_eta_depends_on_what_it_may(per_state: bool, per_action: bool) -> None:
    config = LearnedNoiseConfig("eta", 0.1, 1.0, per_state=per_state, per_action=per_action, hidden_size=8)
    eta = shaken(Eta(3, 2, config))(torch.randn(5, 1, 3, generator=torch.Generator().manual_seed(0)))
    assert eta.shape == (5, 1, 2 if per_action else 1)
    assert (eta.std(0).max().item() > 1e-5) == per_state


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"what": "std", "low": 0.05}, r"low = 0.05: of a std must be at least 0.054"),
        ({"low": 0.3, "high": 0.2}, "high = 0.2: must be above low"),
        ({"what": "eta", "high": 1.5}, "high = 1.5: of eta must be at most 1"),
        ({"start": 0.0}, "start = 0.0: must be between 0 and 1"),
        ({"what": "sigma"}, "what = 'sigma': must be one of none, std, eta"),
        ({"hidden_size": 0}, "hidden_size = 0: must be at least 1"),
    ],
)
def test_bad_settings_are_refused(settings, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LearnedNoiseConfig(**settings)
