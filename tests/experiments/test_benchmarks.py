"""Benchmarks run, and print and write what they measured."""

import json

import pytest

from dprl.experiments.benchmarks import sampling, training
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
