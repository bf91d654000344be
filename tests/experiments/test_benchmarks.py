"""Benchmarks run, and print and write what they measured."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from dprl.agents import BCConfig, DiffusionQLConfig, IDQLConfig
from dprl.errors import ConfigError
from dprl.experiments.benchmarks import dppo, guidance, offline, rollout, sampling, training
from dprl.networks import MLPConfig
from dprl.policy import CriticConfig, DiffusionConfig

MLP = MLPConfig(hidden_size=8)


def test_sampling(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sampling, "DENOISERS", {"mlp": MLP})
    file = tmp_path / "figures.json"
    figures = sampling.main(sampling.SamplingBenchmark(steps=3, repeats=1, json=file))
    assert [(f["solver"], f["batch"]) for f in json.loads(file.read_text())] == [
        (solver, batch) for solver in sampling.SOLVERS for batch in (1, 64)
    ]
    assert all(f.sample_ms > 0 and f.forward_ms > 0 for f in figures)
    printed = capsys.readouterr().out
    assert all(solver in printed for solver in sampling.SOLVERS)


def test_guidance(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(guidance, "DENOISERS", {"mlp": MLP})
    monkeypatch.setattr(guidance, "BATCHES", (1, 2))
    file = tmp_path / "figures.json"
    figures = guidance.main(guidance.GuidanceBenchmark(steps=3, repeats=2, json=file))
    assert [(f["gradient"], f["batch"]) for f in json.loads(file.read_text())] == [
        (gradient, batch) for gradient in guidance.GRADIENTS for batch in (1, 2)
    ]
    assert all(f.unguided_ms > 0 and f.guided_ms > 0 for f in figures)
    assert "through" in capsys.readouterr().out


@pytest.mark.full
def test_training(tmp_path, monkeypatch):
    policy = DiffusionConfig(num_train_timesteps=4, denoiser=MLP)
    monkeypatch.setattr(training, "CASES", {"mlp": training.Case(policy, 8, sees=False)})
    file = tmp_path / "figures.json"
    figures = training.main(training.TrainingBenchmark(steps=2, repeats=2, json=file))
    assert [f["way"] for f in json.loads(file.read_text())] == list(training.WAYS)
    assert figures[0].speedup == 1
    assert all(f.step_ms > 0 for f in figures)


def test_offline(tmp_path, monkeypatch, capsys):
    small = IDQLConfig(BCConfig(batch_size=8), critic=CriticConfig(hidden_size=8), batch_size=8)
    monkeypatch.setattr(offline, "PAPER", small)
    monkeypatch.setattr(offline, "EDP", DiffusionQLConfig(**vars(small)))
    monkeypatch.setattr(offline, "BEHAVIOUR", DiffusionConfig(num_train_timesteps=2, denoiser=MLP))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # which takes a minute
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: None)
    file = tmp_path / "figures.json"
    figures = offline.main(offline.OfflineBenchmark(steps=2, repeats=2, transitions=1_000, json=file))
    assert [f["way"] for f in json.loads(file.read_text())] == [f.way for f in figures]
    assert all(f.steps_per_s > 0 and 0 < f.loading < 1 and f.share_of_bare > 0 for f in figures)
    assert "Diffusion-QL, chain" in capsys.readouterr().out


@pytest.mark.full
def test_rollout(tmp_path, capsys):
    pytest.importorskip("envpool")
    file = tmp_path / "figures.json"
    envs = ("Hopper-v5", rollout.SPIN)
    rollout.main(rollout.RolloutBenchmark(envs, n_envs=2, workers=(), seconds=0.05, repeats=2, json=file))
    figures = json.loads(file.read_text())["figures"]
    ways = [rollout.PROCESSES, rollout.INSIDE, "one after the other", "pool, in process", "pool, double buffer"]
    assert [f["way"] for f in figures] == [*ways, "MuJoCo's steps alone", *ways, *ways]
    assert all(len(f["steps_per_s"]) == 2 and min(f["steps_per_s"]) > 0 for f in figures)
    spinning = [f for f in figures if f["env"] == rollout.SPIN and f["way"] == "one after the other"]
    assert max(spinning[0]["steps_per_s"]) < 1000, "a millisecond each"
    shown = " ".join(capsys.readouterr().out.split())
    assert "MuJoCo" in shown
    assert re.search(r"Hopper-v5: checking observations, rewards and actions is \d+\.\d\d% of that pool's time", shown)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_envs": 0}, "n_envs = 0"),
        ({"n_envs": 5, "workers": ()}, "n_envs = 5: must be even"),
        ({"workers": (2, 5)}, "workers = 2: must divide the largest, 5"),
        ({"workers": (3,)}, "workers = 3: must divide the largest, 3, and that the 40 environments"),
        ({"reference": Path("nowhere")}, "reference = 'nowhere': must be a checkout of DPPO"),
    ],
)
def test_rollout_refuses(changes, message):
    with pytest.raises(ConfigError, match=message):
        rollout.RolloutBenchmark(**changes)


TINY = dppo.Task(11, 3, 2, 3, 20, 1, "relu", env="Hopper-v5", hidden_size=8)
# What the driver asks of the authors' code, with nothing in it: the test is of the driver.
REFERENCE = {
    "diffusion/mlp_diffusion.py": """
import torch
class DiffusionMLP(torch.nn.Linear):
    def __init__(self, action_dim, horizon_steps, cond_dim, time_dim, mlp_dims, activation_type, residual_style):
        super().__init__(cond_dim, action_dim * horizon_steps)
""",
    "common/critic.py": """
import torch
class CriticObs(torch.nn.Linear):
    def __init__(self, cond_dim, mlp_dims, activation_type, residual_style):
        super().__init__(cond_dim, 1)
    def forward(self, cond):
        return super().forward(cond["state"].flatten(1))
""",
    "diffusion/diffusion_ppo.py": """
import types, torch
class PPODiffusion(torch.nn.Module):
    def __init__(self, actor, critic, ft_denoising_steps, horizon_steps, action_dim, **rest):
        super().__init__()
        self.actor_ft, self.critic, self.shape, self.k = actor, critic, (horizon_steps, action_dim), ft_denoising_steps
        self.asked = []
    def forward(self, cond, deterministic, return_chain):
        self.asked.append(len(cond["state"]))
        return types.SimpleNamespace(trajectories=self.actor_ft(cond["state"]).view(-1, *self.shape))
    def get_logprobs(self, cond, chains):
        return torch.zeros(len(chains) * self.k, *self.shape)
    def loss(self, cond, before, after, step, *rest, use_bc_loss, reward_horizon):
        assert before.shape == after.shape == (len(step), *self.shape)
        self.asked.append(("pairs", len(step)))
        return self.actor_ft(cond["state"]).mean(), 0, self.critic(cond).mean()
""",
}


@pytest.fixture
def reference(tmp_path, monkeypatch):
    for name, source in REFERENCE.items():
        file = tmp_path / "theirs/model" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        (file.parent / "__init__.py").touch()
        file.write_text(source)
    yield tmp_path / "theirs"
    for name in [name for name in sys.modules if name.split(".")[0] == "model"]:
        del sys.modules[name]


def test_dppo_against_a_reference(reference, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dppo, "TASKS", {"tiny": TINY})
    monkeypatch.setattr(sys, "path", [*sys.path])
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: (compiled.append(function), function)[1])
    file = tmp_path / "figures.json"
    dppo.main(dppo.DPPOBenchmark(tasks=("tiny",), batches=(1, 3), share=1.0, repeats=2, reference=reference, json=file))
    figures = json.loads(file.read_text())["figures"]
    parts = ["sampling, batch 1", "sampling, batch 3", "update", "iteration"]
    assert [f["what"] for f in figures] == [name for part in parts for name in (part, f"{part}, compiled")]
    assert len(compiled) == 2 * len(parts)  # of each the chain and the update
    assert all(len(f["ours_s"]) == len(f["theirs_s"]) == 2 and f["floor_s"] > 0 for f in figures)
    samples, steps = 3 * 2 * dppo.TUNED_STEPS, 3 * 2 * 4
    assert [f["amount"] for f in figures] == [10, 10, 30, 30, samples, samples, steps, steps]
    printed = capsys.readouterr().out
    assert "decisions" in printed
    assert "stored" not in printed


def test_dppo_without_a_reference_shows_stored_ratios_as_such(monkeypatch, capsys):
    monkeypatch.setattr(dppo, "TASKS", {"hopper": TINY})
    dppo.main(dppo.DPPOBenchmark(tasks=("hopper",), parts=("sampling",), batches=(1,), repeats=1, compiled=False))
    printed = " ".join(capsys.readouterr().out.split())
    assert f"{dppo.STORED['hopper', 'sampling, batch 1']:.2f}" in printed
    assert "(stored)" in printed
    assert "stored ratios were measured on" in printed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"repeats": 0}, "repeats = 0"),
        ({"share": 0.0}, "share = 0.0"),
        ({"share": 1.5}, "share = 1.5: must be at most 1"),
        ({"tasks": ("hoper",)}, "tasks = 'hoper': must be of hopper, can"),
        ({"batches": (0,)}, "batches = 0"),
        ({"device": "cuda:77"}, "device = 'cuda:77'"),
        ({"precision": "tf32"}, "precision = 'tf32'"),
        ({"reference": Path("nowhere")}, "must be a checkout of DPPO"),
    ],
)
def test_bad_settings_of_dppo_are_refused(changes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        dppo.DPPOBenchmark(**changes)
