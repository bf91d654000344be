"""The main job, cut down to seconds, end to end."""

import json
from pathlib import Path

import pytest

from dprl.cli import main
from dprl.envs import envpool, rendering
from dprl.experiments.catalogue import CATALOGUE, find


@pytest.mark.skipif(not envpool.available(), reason="EnvPool is not installed")
def test_smoke_demo_leaves_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendering, "find_backend", lambda: None)  # drawing frames takes long
    out = tmp_path / "demo"
    assert main(["demo", "smoke", "--out", str(out), "--quiet"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for line in ("demonstrations", "behaviour cloning", "fine-tuned (DPPO)", "apt-get install libegl1"):
        assert line in printed
    results = json.loads((out / "results.json").read_text())
    assert results["before"]["episodes"] == results["after"]["episodes"] == find("smoke").eval_episodes
    assert results["before"]["seed"] == results["after"]["seed"], "the same held-out starts"
    for name in ("learning_curve.png", "trajectories.png", "data/data/main_data.hdf5", "finetune/checkpoints/last"):
        assert (out / name).exists()
    assert main(["demo", "smoke", "--out", str(out), "--quiet"]) == 2, "nothing is overwritten"


def test_every_experiment_resolves_and_agrees_with_itself() -> None:
    for experiment in CATALOGUE:
        assert experiment.collect.env == experiment.finetune.env
        assert experiment.finetune.dppo.tuned_steps <= experiment.pretrain.num_train_timesteps
