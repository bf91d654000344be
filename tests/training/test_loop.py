"""The loop around faults of environments: what was learned is saved, and the run goes on exactly."""

from dataclasses import replace

import numpy as np
import pytest
from safetensors.torch import load_file

from dprl.agents import DPPO, DPPOConfig
from dprl.errors import EnvFaultError
from dprl.log import read_metrics
from dprl.rollout import Evaluation, InProcessPool, RolloutPool
from dprl.spec import env_seeds
from dprl.training import LoopConfig, RunFolder, train
from tests.rollout.faulty import Fault, faulty_spec, plant
from tests.toys import toy_policy

LOOP = LoopConfig(total_timesteps=600, checkpoint_every=100)
CONFIG = DPPOConfig(tuned_steps=2, n_steps=5, batch_size=20, n_epochs=1)


def agent(pool: RolloutPool) -> DPPO:
    return DPPO(toy_policy(), pool, CONFIG, seed=0)


def figures(run: RunFolder) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in read_metrics(run.path)]


def test_a_run_stopped_by_an_environment_is_saved_and_resumes_exactly(tmp_path):
    healthy, ill = tmp_path / "healthy", tmp_path / "ill"
    healthy.mkdir()
    ill.mkdir()
    whole = RunFolder.create(tmp_path / "whole", "toy", {})
    with InProcessPool(faulty_spec(healthy), 8, seed=0) as pool:
        train(agent(pool), LOOP, run=whole, progress_bar=False)
    assert len(figures(whole)) > 4

    run = RunFolder.create(tmp_path / "run", "toy", {})
    plant(ill, Fault("nan", env_seeds(0, 8)[3], 5, 1))
    where = "environment 3, episode 5, step 1"
    pool = InProcessPool(faulty_spec(ill), 8, seed=0, max_failures=0)
    with pool, pytest.raises(EnvFaultError, match=where) as stopped:
        train(agent(pool), LOOP, run=run, progress_bar=False)
    assert stopped.value.__notes__ == [f"all iterations are saved; continue with 'dprl resume {run.path}'"]
    assert run.progress()["iteration"] == figures(run)[-1]["iteration"] > 0, "though a checkpoint was not due"

    with InProcessPool(faulty_spec(ill), 8, seed=0) as pool:
        train(agent(pool), LOOP, run=run, resume=True, progress_bar=False)
    assert figures(run) == figures(whole)
    for name in ("model.safetensors", "training.safetensors"):
        ours, theirs = (load_file(r.checkpoints / "last" / name) for r in (run, whole))
        assert [key for key in ours if not np.array_equal(ours[key], theirs[key], equal_nan=True)] == []


def test_a_run_whose_evaluation_fails_is_saved_and_resumes_exactly(tmp_path):
    """It goes on after the iteration that could not be evaluated."""
    ill = tmp_path / "ill"
    ill.mkdir()
    whole, run = (RunFolder.create(tmp_path / name, "toy", {}) for name in ("whole", "run"))
    with InProcessPool(faulty_spec(ill), 8, seed=0) as pool:
        train(agent(pool), LOOP, run=whole, progress_bar=False)

    def fails() -> Evaluation:
        raise EnvFaultError("toy", "observation is not finite", "nan", 3, 0, 1, 7)

    loop = replace(LOOP, eval_every=2)
    learner = agent(InProcessPool(faulty_spec(ill), 8, seed=0))

    def score() -> Evaluation:
        return fails() if learner.iteration else good()

    with learner.pool, pytest.raises(EnvFaultError, match="environment 3"):
        train(learner, loop, run=run, evaluate=score, progress_bar=False)
    assert run.progress()["iteration"] == figures(run)[-1]["iteration"] == 2
    with InProcessPool(faulty_spec(ill), 8, seed=0) as pool:
        train(agent(pool), LOOP, run=run, resume=True, progress_bar=False)
    assert without_evaluations(run) == figures(whole)


def good() -> Evaluation:
    return Evaluation("toy", 1, 0, 1.0, (0.2, 1.0), 1.0, None, 3.0, 1.0)


def without_evaluations(run: RunFolder) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if not k.startswith("eval/")} for row in figures(run)]
