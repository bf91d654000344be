"""Value objectives and implicit policies, on small tables whose answers are known."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dprl.errors import ConfigError
from dprl.implicit import ActorObjective, ValueObjective, actor_weight

Q = torch.tensor([-1.3, -0.4, 0.1, 0.7, 1.9], dtype=torch.float64)
CHANCE = torch.tensor([0.1, 0.3, 0.2, 0.25, 0.15], dtype=torch.float64)
"""Of each of five actions in the data."""
EXPECTILES = [ValueObjective("expectile", tau) for tau in (0.3, 0.5, 0.7, 0.9, 0.99)]
EXPONENTIALS = [ValueObjective("exponential", alpha, clip=1e9) for alpha in (0.1, 1.0, 3.0)]
CLIPPED = [ValueObjective("exponential", alpha) for alpha in (1.0, 3.0, 10.0)]
QUANTILES = [ValueObjective("quantile", tau) for tau in (0.3, 0.55, 0.7, 0.9)]
SMOOTH = [*EXPECTILES, *EXPONENTIALS, *CLIPPED]


def minimiser(objective: ValueObjective, q: Tensor = Q, chance: Tensor = CHANCE) -> Tensor:
    """V of least expected loss, by bisection on the loss's own gradient."""
    low, high = q.min() - 1, q.max() + 1
    for _ in range(100):
        v = ((low + high) / 2).requires_grad_()
        (slope,) = torch.autograd.grad((chance * objective.loss(q - v)).sum(), v)
        low, high = (low, v.detach()) if slope > 0 else (v.detach(), high)
    return (low + high).detach() / 2


def test_the_expectile_of_a_half_is_half_the_mean_squared_error() -> None:
    advantage = torch.randn(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(ValueObjective("expectile", 0.5).loss(advantage).mean(), 0.5 * (advantage**2).mean())


@pytest.mark.parametrize("objective", SMOOTH, ids=str)
def test_v_is_the_value_of_the_implicit_policy(objective: ValueObjective) -> None:
    """E_w[Q] = V."""
    v = minimiser(objective)
    policy = CHANCE * objective.weight(Q - v)
    policy = policy / policy.sum()
    assert float((policy * Q).sum()) == pytest.approx(float(v), abs=1e-6)


@pytest.mark.parametrize("objective", EXPECTILES, ids=str)
def test_expectile_weights_in_closed_form(objective: ValueObjective) -> None:
    tau, v = objective.level, minimiser(objective)
    np.testing.assert_allclose(objective.weight(Q - v), np.where(v > Q, 1 - tau, tau), atol=1e-12)


@pytest.mark.parametrize("objective", EXPONENTIALS, ids=str)
def test_exponential_in_closed_form(objective: ValueObjective) -> None:
    alpha, v = objective.level, minimiser(objective)
    assert float(v) == pytest.approx(math.log(float((CHANCE * (alpha * Q).exp()).sum())) / alpha, abs=1e-6)
    advantage = (Q - v).numpy()
    np.testing.assert_allclose(
        objective.weight(Q - v), np.abs(np.exp(alpha * advantage) - 1) / np.abs(alpha * advantage), rtol=1e-6
    )


@pytest.mark.parametrize("objective", QUANTILES, ids=str)
def test_v_is_the_quantile(objective: ValueObjective) -> None:
    v = float(minimiser(objective))
    cumulative = CHANCE.cumsum(0)
    expected = float(Q[int((cumulative < objective.level - 1e-12).sum())])
    assert v == pytest.approx(expected, abs=1e-3)
    weight = objective.weight(Q - v)
    assert bool((weight >= 0).all())
    assert bool(weight.isfinite().all())
    floored = torch.where(v > Q, 1 - objective.level, objective.level) / (Q - v).abs().clamp(min=1e-2)
    torch.testing.assert_close(weight, floored)


@pytest.mark.parametrize("objective", SMOOTH, ids=str)
def test_a_v_that_is_trained_gets_there(objective: ValueObjective) -> None:
    """Of samples of the data, by gradient descent as the agent does it."""
    v = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([v], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (CHANCE * objective.loss(Q - v)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert float(v.detach()) == pytest.approx(float(minimiser(objective)), abs=1e-3)


advantages = st.floats(-20, 20, allow_nan=False).filter(lambda a: abs(a) > 1e-3)


@pytest.mark.parametrize("objective", [*SMOOTH, *QUANTILES], ids=str)
@given(a=advantages)
def test_weights_are_the_slope_over_the_advantage(objective: ValueObjective, a: float) -> None:
    """Up to one factor for all; the quantile's are floored."""
    advantage = torch.tensor(a, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(objective.loss(advantage), advantage)
    factor = {"expectile": 2.0, "quantile": 1.0, "exponential": objective.level}[objective.kind]
    divisor = max(abs(a), objective.least_advantage) if objective.kind == "quantile" else abs(a)
    assert float(objective.weight(advantage)) * factor == pytest.approx(abs(float(slope)) / divisor, rel=1e-6)


@pytest.mark.parametrize("objective", SMOOTH, ids=str)
def test_gradients(objective: ValueObjective) -> None:
    grid = torch.linspace(-3.03, 3.01, 40, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(objective.loss, grid)


@pytest.mark.parametrize("objective", [*EXPECTILES, *CLIPPED, *QUANTILES], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_advantages_have_finite_losses_and_weights(objective: ValueObjective, dtype: torch.dtype) -> None:
    advantage = torch.tensor([-1e6, -1e-12, 0.0, 1e-12, 1e-5, 1e6], dtype=dtype, requires_grad=True)
    loss = objective.loss(advantage)
    (slope,) = torch.autograd.grad(loss.sum(), advantage)
    weight = objective.weight(advantage)
    for values in (loss, slope, weight):
        assert bool(values.isfinite().all())
    assert bool((weight >= 0).all())
    assert bool((loss >= 0).all())
    assert not weight.requires_grad


def test_the_exponential_is_smooth_where_it_turns_linear() -> None:
    objective = ValueObjective("exponential", 2.0)
    turn = math.log(objective.clip) / 2
    near = torch.tensor([turn - 1e-6, turn + 1e-6], dtype=torch.float64, requires_grad=True)
    loss = objective.loss(near)
    (slope,) = torch.autograd.grad(loss.sum(), near)
    assert loss.tolist() == pytest.approx([float(loss.detach().mean())] * 2, abs=1e-4)
    assert slope.tolist() == pytest.approx([objective.clip - 1] * 2, rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("bc", [1, 1, 1, 1]),
        ("soft", [0.3, 0.3, 0.7, 0.7]),
        ("hard", [0, 1, 1, 1]),
        ("exponential", [math.exp(-3), math.exp(-0.015), math.exp(1.5), 100]),
    ],
)
def test_what_the_actor_weighs_by(kind: ActorObjective, expected: list[float]) -> None:
    weight = actor_weight(kind, torch.tensor([-1.0, -0.005, 0.5, 9.0]), ValueObjective())
    np.testing.assert_allclose(weight, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "mean"}, "kind = 'mean': must be one of"),
        ({"level": 1.0}, "level = 1.0: must be below 1 where kind is expectile"),
        ({"kind": "quantile", "level": 0.0}, "level = 0.0"),
        ({"kind": "exponential", "level": 0.0}, "level = 0.0: must be above 0"),
        ({"kind": "exponential", "level": math.inf}, "level = inf"),
        ({"clip": 1.0}, "clip = 1.0: must be above 1"),
        ({"clip": math.inf}, "clip = inf: must be a finite number"),
        ({"least_advantage": 0.0}, "least_advantage = 0.0: must be above 0"),
        ({"least_advantage": math.nan}, "least_advantage = nan: must be a finite number"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ValueObjective(**settings)
