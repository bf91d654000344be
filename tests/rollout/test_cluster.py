"""Several nodes: the code goes to them, and a node that leaves does not stop a training."""

import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dprl.agents import DPPO, DPPOConfig
from dprl.errors import ConfigError
from dprl.rollout import InProcessPool, RolloutPool
from tests.rollout.faulty import faulty_spec
from tests.toys import toy_policy

ray = pytest.importorskip("ray")
from ray.cluster_utils import Cluster  # noqa: E402

from dprl.rollout.ray_pool import RayPool, Resource, WorkerOptions  # noqa: E402

N_ENVS, SLICE, SEED = 8, 2, 5
CONFIG = DPPOConfig(tuned_steps=2, n_steps=6, batch_size=20, n_epochs=1)


@pytest.fixture
def cluster() -> Iterator[Any]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    yield cluster
    cluster.shutdown()


def learn(pool: RolloutPool, before: dict[int, Any], iterations: int = 4) -> dict[str, Any]:
    """Train; call `before[i]` in front of iteration i."""
    agent = DPPO(toy_policy(), pool, CONFIG, seed=0)
    for i in range(iterations):
        before.get(i, lambda: None)()
        agent.update(agent.collect())
    return agent.policy.state_dict()


@pytest.mark.full
def test_training_goes_on_and_says_so_when_a_node_is_removed(cluster, tmp_path, caplog):
    """And learns what it would have learned."""
    node = cluster.add_node(num_cpus=2)
    options = WorkerOptions(placement="SPREAD", restart_timeout_s=8.0)
    with InProcessPool(faulty_spec(tmp_path), N_ENVS, seed=SEED, slice_size=SLICE) as pool:
        expected = learn(pool, {})
    pool = RayPool(
        faulty_spec(tmp_path), N_ENVS, num_workers=4, seed=SEED, slice_size=SLICE, workers=options,
        address=cluster.address,
    )  # fmt: skip
    with pool, caplog.at_level(logging.WARNING, "dprl"):
        at = {ray.get(worker.apply.remote(_node)) for worker in pool._crew._workers}
        assert len(at) == 2, "the workers are spread"
        learned = learn(pool, {2: lambda: cluster.remove_node(node, allow_graceful=False)})
        assert len(pool._crew.hosts) == 2
    assert [name for name in expected if not learned[name].equal(expected[name])] == []
    given_up = [r.created for r in caplog.records if "does not come back: the others take" in r.getMessage()]
    assert len(given_up) == 2
    assert given_up[1] - given_up[0] < options.restart_timeout_s / 2, "they are waited for together"


@pytest.mark.full
def test_workers_that_no_node_holds_are_refused_at_once(cluster, tmp_path):
    """Together the nodes have the CPUs; Ray alone would let a worker wait."""
    cluster.add_node(num_cpus=2)
    options = WorkerOptions(cpus=1.25)
    too_little = r"num_workers = 4: 4 workers x 1\.25 CPUs each = 5, but Ray has 4 CPUs free"
    with pytest.raises(ConfigError, match=too_little):
        RayPool(
            faulty_spec(tmp_path), N_ENVS, num_workers=4, workers=options, slice_size=SLICE, address=cluster.address
        )
    cluster.add_node(num_cpus=1)
    with pytest.raises(ConfigError, match=r"Ray's 3 nodes have enough, .* 1\.25 CPUs each, .* they hold only 2"):
        RayPool(
            faulty_spec(tmp_path), N_ENVS, num_workers=4, workers=options, slice_size=SLICE, address=cluster.address
        )


def _node() -> str:
    return str(ray.get_runtime_context().get_node_id())


@pytest.mark.full
def test_workers_run_where_their_resource_is(cluster, tmp_path):
    cluster.add_node(num_cpus=1, resources={"simulation": 2})
    options = WorkerOptions(cpus=0.5, resources=(Resource("simulation"),))
    spec = faulty_spec(tmp_path)
    with RayPool(spec, N_ENVS, num_workers=2, slice_size=SLICE, workers=options, address=cluster.address) as pool:
        assert len({ray.get(worker.apply.remote(_node)) for worker in pool._crew._workers}) == 1
        with pytest.raises(ConfigError, match="4 workers x 1 'simulation' each = 4, but Ray has 0 'simulation' free"):
            RayPool(spec, N_ENVS, num_workers=4, slice_size=SLICE, workers=options)


@pytest.mark.full
def test_the_runtime_environment_carries_this_code(cluster, tmp_path):
    """A copy of it, agents and environments included, lies where a node's workers look for modules."""
    spec = faulty_spec(tmp_path)
    with RayPool(spec, N_ENVS, num_workers=1, slice_size=SLICE, address=cluster.address) as pool:
        (worker,) = pool._crew._workers
        (place,) = [p for p in ray.get(worker.apply.remote(_search_path)) if "py_modules" in p]
    for name in ("__init__.py", "agents/dppo.py", "envs/catalogue.py", "rollout/collector.py"):
        assert Path(place, "dprl", name).is_file()


def _search_path() -> list[str]:
    return sys.path


def test_the_copy_can_be_imported_alone():
    from dprl.rollout.ray_pool.cluster import _code_for

    with _code_for("somewhere", None) as environment:
        (package,) = environment["py_modules"]
        script = "import dprl.agents, dprl.envs.catalogue; print(dprl.agents.__file__)"
        alone = {**os.environ, "PYTHONPATH": str(Path(package).parent)}
        done = subprocess.run(
            [sys.executable, "-c", script], env=alone, cwd="/", capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == f"{package}/agents/__init__.py", done.stderr
    assert not Path(package).exists()
    with _code_for("somewhere", {"pip": []}) as environment:
        assert environment == {"pip": []}, "the user knows better"
    with _code_for(None, None) as environment:
        assert environment is None


def test_a_ray_that_does_not_start_is_one_error(monkeypatch):
    from dprl.rollout.ray_pool.cluster import _start

    def init(**_):
        raise Exception("The current node timed out during startup.")  # as Ray raises it

    monkeypatch.setattr("ray.init", init)
    with pytest.raises(ConfigError, match="Ray did not start: The current node timed out during startup"):
        _start(None, None)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "no.such.host:6379", "nonsense"])
def test_an_address_where_no_cluster_is_is_refused_at_once(address, tmp_path):
    start = time.monotonic()
    with pytest.raises(ConfigError, match=f"address = '{address}': this cluster cannot be joined"):
        RayPool(faulty_spec(tmp_path), N_ENVS, num_workers=1, address=address)
    assert time.monotonic() - start < 20
    assert not ray.is_initialized()


@pytest.mark.full
def test_an_address_beside_a_running_ray_is_refused(cluster, tmp_path):
    with RayPool(faulty_spec(tmp_path), N_ENVS, num_workers=1, address=cluster.address) as pool:
        with pytest.raises(ConfigError, match=r"address = .*: Ray is initialised in this process already"):
            RayPool(faulty_spec(tmp_path), N_ENVS, num_workers=1, address=cluster.address)
        assert pool.state().actions.shape == (0, 1)
        assert np.all(pool.state().episodes == -1)
    assert not ray.is_initialized()
