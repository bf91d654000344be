"""Recording and replaying. What needs a GPU is skipped without one: `pytest -k cuda` on a machine that has one."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dprl.agents import DPPO, DPPOConfig
from dprl.cuda_graphs import WARM_UPS, Replayed
from dprl.mdp import ExplorationConfig
from dprl.networks.noise import LearnedNoiseConfig
from dprl.policy import DiffusionConfig, DiffusionPolicy, Features
from dprl.schedules import Anneal, Warmup
from tests.toys import make_toy, reach_spec

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=cuda)]
CONFIG = DPPOConfig(tuned_steps=3, n_steps=8, n_epochs=4, batch_size=32, target_kl=None, max_grad_norm=1.0)
OPTIONS = {
    "plain": CONFIG,
    "parts that differ by one": replace(CONFIG, batch_size=36),
    "micro-batches": replace(CONFIG, micro_batch_size=7),
    "learning rate": replace(CONFIG, lr_schedule=Warmup(warmup=4)),
    "critic first": replace(CONFIG, critic_warmup=2),
    "noisy action": replace(CONFIG, critic="state_action"),
    "kl": replace(CONFIG, regularizer="kl"),
    "bc": replace(CONFIG, regularizer="bc"),
    "w2": replace(CONFIG, regularizer="w2"),
    "value clip": replace(CONFIG, clip_range_vf=0.2),
    "sum": replace(CONFIG, log_prob_reduction="sum"),
    "fewer tuned steps": replace(CONFIG, anneal_tuned_steps=Anneal(1, 3)),
    "less noise": replace(CONFIG, exploration=ExplorationConfig(0.3, anneal=Anneal(0.1, 3))),
    "quantiles": replace(CONFIG, advantage_quantiles=(0.05, 0.95)),
    "learned noise": replace(
        CONFIG, exploration=ExplorationConfig(learned=LearnedNoiseConfig("std")), entropy_coef=0.01
    ),
    "target KL": replace(CONFIG, target_kl=1e-3, learning_rate=0.01),
}


def dppo_on(device: str, config: DPPOConfig = CONFIG) -> DPPO:
    policy = DiffusionPolicy(Features(2, 1), DiffusionConfig(horizon=2, num_train_timesteps=5))
    weights = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=weights))
    return DPPO(policy.to(device), make_toy(reach_spec(), 4), config)


def tuned(dppo: DPPO) -> Tensor:
    return torch.cat([p.detach().flatten().cpu() for p in dppo.mdp.trainable().parameters()])


@pytest.mark.parametrize("device", DEVICES)
def test_every_call_runs_once(device: str) -> None:
    total = torch.zeros(2, device=device)

    def add(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        total.add_(x)
        return {"sum": x + y, "total": total}

    replayed, expected = Replayed(add), torch.zeros(2)
    for i in range(2 * WARM_UPS + 1):
        x = torch.tensor([1.0, float(i)])
        expected += x
        found = replayed(x.to(device), torch.ones(2, device=device))
        kept = found["total"].clone()
        replayed_values = {name: value.cpu() for name, value in found.items()}
        torch.testing.assert_close(replayed_values["sum"], x + 1)
        torch.testing.assert_close(replayed_values["total"], expected)
        assert torch.equal(kept, found["total"])
    assert replayed(torch.ones(1, device=device), torch.ones(1, device=device))["sum"].shape == (1,)  # another shape


@cuda
def test_what_it_returned_is_not_overwritten_on_cuda() -> None:
    replayed = Replayed(lambda x: {"x": 2 * x})
    found = [replayed(torch.full((3,), float(i), device="cuda"))["x"] for i in range(WARM_UPS + 3)]
    assert [float(x[0]) for x in found] == [2.0 * i for i in range(WARM_UPS + 3)]


@cuda
def test_draws_go_on_from_one_replay_to_the_next_on_cuda() -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    replayed = Replayed(lambda x: {"x": x + torch.randn(4, generator=generator, device="cuda")}, generator)
    zero = torch.zeros(4, device="cuda")
    ours = torch.stack([replayed(zero)["x"] for _ in range(WARM_UPS + 3)])
    generator.manual_seed(0)
    torch.testing.assert_close(ours, torch.stack([torch.randn(4, generator=generator, device="cuda") for _ in ours]))


@cuda
@pytest.mark.parametrize("name", OPTIONS)
def test_recorded_updates_are_the_plain_ones_on_cuda(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    after, figures = [], []
    for warm_ups in (WARM_UPS, 10**9):  # the second is never recorded
        monkeypatch.setattr("dprl.cuda_graphs.WARM_UPS", warm_ups)
        dppo = dppo_on("cuda", OPTIONS[name])
        for _ in range(4):
            metrics = dppo.update(dppo.collect())
        figures.append({key: value for key, value in metrics.items() if key.startswith("dppo/")})
        after.append(tuned(dppo))
    assert (after[0] - tuned(dppo_on("cuda", OPTIONS[name]))).abs().max() > 1e-3  # it learned
    torch.testing.assert_close(after[0], after[1], atol=1e-4, rtol=1e-3)
    assert figures[0] == pytest.approx(figures[1], abs=1e-2, rel=1e-2)


@cuda
def test_cuda_agrees_with_the_cpu() -> None:
    """The same rollout, in minibatches of everything: their order does not matter."""
    config = replace(CONFIG, batch_size=10_000)
    after, rollout = [], dppo_on("cpu", config).collect()
    for device in ("cpu", "cuda"):
        dppo = dppo_on(device, config)
        for _ in range(3):
            dppo.update(rollout)
        after.append(tuned(dppo))
    torch.testing.assert_close(*after, atol=1e-4, rtol=1e-3)


@cuda
def test_a_run_resumes_on_cuda(tmp_path: Path) -> None:
    whole = dppo_on("cuda")
    whole.update(whole.collect())
    whole.save(tmp_path / "saved")
    whole.update(whole.collect())
    resumed = dppo_on("cuda")
    resumed.load_state(tmp_path / "saved")
    resumed.update(resumed.collect())
    assert resumed.timesteps == whole.timesteps
    torch.testing.assert_close(tuned(resumed), tuned(whole), atol=1e-5, rtol=1e-4)


@cuda
@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_compiled_updates_are_the_plain_ones_on_cuda(precision: str) -> None:
    after = []
    for compiled in (False, True):
        dppo = dppo_on("cuda", replace(CONFIG, precision=precision))  # type: ignore[arg-type]
        if compiled:
            dppo.compile()
        for _ in range(4):
            dppo.update(dppo.collect())
        after.append(tuned(dppo))
    tolerance = 1e-3 if precision == "float32" else 3e-2
    torch.testing.assert_close(*after, atol=tolerance, rtol=tolerance)
