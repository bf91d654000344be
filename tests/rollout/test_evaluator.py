"""Evaluation on workers that do nothing else."""

import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import nn

from dprl.errors import ClosedPoolError, ConfigError
from dprl.guidance import Guides, ValueGuide
from dprl.policy import ChunkCritic, CriticConfig, InferenceConfig, RecedingHorizon
from dprl.rollout import evaluate
from dprl.spec import env_seeds
from tests.policy.small import small_policy
from tests.rollout.faulty import Fault, faulty_spec, plant
from tests.toys import toy_policy

ray = pytest.importorskip("ray")
from dprl.rollout.ray_pool import RayEvaluator, WorkerOptions  # noqa: E402
from dprl.rollout.ray_pool.evaluator import on_cpu  # noqa: E402
from tests.rollout.leaks import assert_nothing_is_left, start_ray  # noqa: E402

EPISODES, SEED = 60, 1


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    start_ray(num_cpus=4)
    yield
    ray.shutdown()


def untimed(result):
    return replace(result, policy_latency_ms_p50=0.0)


@pytest.mark.parametrize("num_workers", [pytest.param(1, marks=pytest.mark.full), 2])
def test_it_evaluates_the_policy_as_it_was(num_workers, cluster, tmp_path):
    """Also where an environment fails."""
    policy, spec = toy_policy(), faulty_spec(tmp_path)
    expected = untimed(evaluate(policy, spec, EPISODES, SEED))
    plant(tmp_path, Fault("raise", env_seeds(SEED, 1, 30, purpose="evaluation")[0], 0, 0))
    with RayEvaluator(spec, num_workers=num_workers) as evaluator:
        first = evaluator.start(policy, EPISODES, SEED)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(1.0)
        second = evaluator.start(policy, EPISODES, SEED)
        assert untimed(first.result()) == expected
        assert untimed(second.result()) == untimed(evaluate(policy, spec, EPISODES, SEED)) != expected
    assert list(tmp_path.iterdir()) == []
    assert_nothing_is_left()


def test_all_that_guides_and_chooses_goes_to_the_cpu_with_the_policy(monkeypatch):
    """Critics of another policy, too, which its own move does not reach. (All is on the CPU here.)"""
    policy, other = small_policy("diffusion"), small_policy("diffusion")
    policy.scorer, critic = ChunkCritic(policy, CriticConfig(hidden_size=8)), ChunkCritic(other, CriticConfig())
    guide = Guides((ValueGuide(critic), ValueGuide(policy.scorer)))
    control = RecedingHorizon(policy, InferenceConfig(candidates=2), guide=guide, scorer=critic)
    monkeypatch.setattr(type(policy), "device", property(lambda self: torch.device("cuda")))
    moved = []
    monkeypatch.setattr(nn.Module, "cpu", lambda self: moved.append(self) or self)
    copied = on_cpu(control)
    assert all(part in moved for part in (copied.policy, copied.policy.scorer, copied.scorer, copied.scorer.sees_as))
    assert copied.scorer.sees_as is not copied.policy
    assert copied.scorer is copied.guide.guides[0].of is not critic
    assert copied.policy.scorer is copied.guide.guides[1].of is not policy.scorer
    monkeypatch.undo()
    obs = torch.zeros(3, 2, 3)
    ours, theirs = (c.plan(obs, c.start(3), torch.Generator().manual_seed(0))[0] for c in (control, copied))
    assert ours.equal(theirs)


@pytest.mark.full
def test_closing_ends_an_evaluation_under_way(cluster, tmp_path):
    plant(tmp_path, Fault("hang", env_seeds(SEED, 1, 30, purpose="evaluation")[0], 0, 0))
    start = time.monotonic()
    with RayEvaluator(faulty_spec(tmp_path)) as evaluator:
        running = evaluator.start(toy_policy(), EPISODES, SEED)
        waiting = evaluator.start(toy_policy(), EPISODES, SEED)
        while list(tmp_path.iterdir()):
            time.sleep(0.1)
    with pytest.raises(ClosedPoolError):
        running.result()
    assert waiting.cancelled()
    assert time.monotonic() - start < 30
    assert_nothing_is_left()


def test_too_many_workers_are_refused(cluster, tmp_path):
    with pytest.raises(ConfigError, match="5 workers x 1 CPUs each = 5"):
        RayEvaluator(faulty_spec(tmp_path), num_workers=5, workers=WorkerOptions())
