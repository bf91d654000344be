"""The loop around faults of environments: what was learned is saved, and the run goes on exactly."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from dprl.agents import DPPO, DPPOConfig
from dprl.errors import EnvFaultError, WorkerError
from dprl.log import read_metrics
from dprl.rollout import Evaluation, InProcessPool, Rollout, RolloutPool
from dprl.spec import env_seeds
from dprl.training import Evaluate, LoopConfig, RunFolder, train
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


class Scorer:
    """Scores the iterations of an agent by a list of successes, at once or in a thread."""

    def __init__(self, learner: DPPO, scores: list[float]) -> None:
        self.learner, self.scores, self.asked = learner, scores, list[int]()

    def now(self) -> Evaluation:
        i = self.learner.iteration
        self.asked.append(i)
        return replace(good(), success_rate=self.scores[i % len(self.scores)])

    @contextmanager
    def beside(self) -> Iterator[Evaluate]:
        def start() -> Future[Evaluation]:
            result = self.now()
            return threads.submit(lambda: result)

        with ThreadPoolExecutor(1) as threads:
            yield start


EVALUATED = replace(LOOP, eval_every=2)
SCORES = [0.1, 0.0, 0.9, 0.0, 0.3, 0.0, 0.3, 0.0, 0.3, 0.0]
"""The best is that of iteration 2."""


def trained(folder: Path, beside: bool, **options: Any) -> tuple[RunFolder, Scorer]:
    folder.mkdir(exist_ok=True)
    run = RunFolder(folder / "run") if options.get("resume") else RunFolder.create(folder / "run", "toy", {})
    with InProcessPool(faulty_spec(folder), 8, seed=0) as pool:
        scorer = Scorer(agent(pool), SCORES)
        with scorer.beside() if beside else nullcontext(scorer.now) as evaluate:
            train(scorer.learner, EVALUATED, run=run, evaluate=evaluate, progress_bar=False, **options)
    return run, scorer


def evaluations(run: RunFolder) -> dict[int, float]:
    return {row["iteration"]: row["eval/success_rate"] for row in figures(run) if "eval/success_rate" in row}


def test_an_evaluation_beside_training_is_in_the_row_that_follows(tmp_path):
    (waited, by_turns), (beside, meanwhile) = (
        trained(tmp_path / "a", beside=False),
        trained(tmp_path / "b", beside=True),
    )
    assert by_turns.asked == meanwhile.asked
    assert without_evaluations(waited) == without_evaluations(beside)
    last = figures(waited)[-1]["iteration"]
    assert len(evaluations(waited)) > 3
    assert evaluations(beside) == {min(i + 1, last): score for i, score in evaluations(waited).items()}
    for run in (waited, beside):
        assert (run.checkpoints / "best").resolve().name == "iteration-000002"
        assert sorted(f.name for f in run.checkpoints.iterdir() if not f.is_symlink()) == [
            "iteration-000002", f"iteration-{last:06d}",
        ]  # fmt: skip


def test_a_run_stopped_during_an_evaluation_beside_it_asks_for_it_again(tmp_path, monkeypatch):
    whole, _ = trained(tmp_path / "whole", beside=True)

    class Killed(BaseException):
        pass

    collect = DPPO.collect

    def stops(self: DPPO) -> Rollout:
        if self.iteration == 2:
            raise Killed
        return collect(self)

    monkeypatch.setattr(DPPO, "collect", stops)
    with pytest.raises(Killed):
        trained(tmp_path / "run", beside=True)
    monkeypatch.setattr(DPPO, "collect", collect)
    assert RunFolder(tmp_path / "run" / "run").progress()["pending_evaluation"]
    run, scorer = trained(tmp_path / "run", beside=True, resume=True)
    assert scorer.asked[0] == 2
    assert figures(run) == figures(whole)
    assert (run.checkpoints / "best").resolve().name == "iteration-000002"


def test_a_failing_evaluation_beside_training_stops_it_with_all_saved(tmp_path):
    folder = tmp_path / "ill"
    folder.mkdir()
    run = RunFolder.create(tmp_path / "run", "toy", {})

    def fails() -> Future[Evaluation]:
        failed: Future[Evaluation] = Future()
        failed.set_exception(WorkerError("no worker is left"))
        return failed

    with InProcessPool(faulty_spec(folder), 8, seed=0) as pool, pytest.raises(WorkerError, match="no worker is left"):
        train(agent(pool), EVALUATED, run=run, evaluate=fails, progress_bar=False)
    assert run.progress()["iteration"] == figures(run)[-1]["iteration"] == 1
