"""Benchmarks run, and print and write what they measured."""

import json
import re
from pathlib import Path

import pytest

from dprl.errors import ConfigError
from dprl.experiments.benchmarks import rollout, sampling, training
from dprl.networks import MLPConfig
from dprl.policy import DiffusionConfig

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


@pytest.mark.full
def test_training(tmp_path, monkeypatch):
    policy = DiffusionConfig(num_train_timesteps=4, denoiser=MLP)
    monkeypatch.setattr(training, "CASES", {"mlp": training.Case(policy, 8, sees=False)})
    file = tmp_path / "figures.json"
    figures = training.main(training.TrainingBenchmark(steps=2, repeats=2, json=file))
    assert [f["way"] for f in json.loads(file.read_text())] == list(training.WAYS)
    assert figures[0].speedup == 1
    assert all(f.step_ms > 0 for f in figures)


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
