"""The scaling model: costs whose sum is known, and the whole command, small."""

import json
import math
from dataclasses import fields, replace

import numpy as np
import pytest

pytest.importorskip("ray")
from dprl.errors import ConfigError
from dprl.experiments.benchmarks import scaling
from dprl.experiments.benchmarks.scaling import Costs, Load, Machines, bottleneck, simulate
from dprl.observations import map_parts
from dprl.rollout import Rollout

FREE = Costs(**dict.fromkeys([field.name for field in fields(Costs)], 0.0))
LOAD = Load("load", compute_s=2.0, spread=0.0, cpu_share=1.0, reply_bytes=1000, weights_bytes=100, env_steps=800)
FAST = Machines(workers_per_node=2, link=math.inf)


@pytest.mark.parametrize("n", [1, 3, 4096])
def test_workers_that_cost_nothing_else_are_perfect(n):
    assert simulate(FREE, LOAD, FAST, n) == 2.0


@pytest.mark.parametrize(
    ("costs", "load", "machines", "n", "seconds"),
    [
        ({}, {}, Machines(2, 500.0), 2, 2.0),  # all on the learner's node
        ({}, {}, Machines(2, 500.0), 3, 2.0 + 0.2 + 2.0),  # weights one way, a reply the other
        ({}, {}, Machines(2, 500.0), 5, 2.0 + 0.2 + 3 * 2.0),  # node 2 has its weights before node 1's replies are in
        ({"put": 1.0}, {}, FAST, 3, 2.0 + 1.0),
        ({"load": 1.0}, {}, FAST, 3, 2.0 + 1.0),
        ({"store": 1.5}, {}, FAST, 3, 2.0 + 1.5),
        ({"join": 1.0}, {}, FAST, 3, 2.0 + 3.0),
        ({"trip": 0.5}, {}, FAST, 3, 2.0 + 0.5),
        ({"take": 1.25}, {}, FAST, 4, 2.0 + 4 * 1.25),
        ({"look": 0.25, "look_each": 0.125}, {}, FAST, 4, 2.0 + 0.25 + 4 * 0.125),
        ({"call": 0.5}, {}, FAST, 4, 2.0 + 4 * 0.5),
        ({}, {}, Machines(8, math.inf, cores=2), 8, 4 * 2.0),
        ({}, {"cpu_share": 0.25}, Machines(8, math.inf, cores=2), 8, 1.5 + 4 * 0.5),
    ],
)
def test_costs_add_up(costs, load, machines, n, seconds):
    assert simulate(replace(FREE, **costs), replace(LOAD, **load), machines, n) == pytest.approx(seconds)


def test_replies_that_come_together_are_taken_together():
    """Looking costs once for two pairs that arrive at different times, and for the second pair less."""
    costs = replace(FREE, look=0.1, look_each=0.01, call=0.0)
    uneven = Machines(2, 1000.0)  # the second pair's node has a link: its replies come a second apart
    assert simulate(costs, replace(LOAD, weights_bytes=0), uneven, 4) == pytest.approx(2.0 + 2.0 + 0.1 + 0.01)


def test_the_slowest_of_many_workers_is_waited_for():
    uneven = replace(LOAD, spread=0.1)
    times = [simulate(FREE, uneven, FAST, n) for n in (1, 100, 4000)]
    assert 2.4 < times[1] < times[2] < 3.0


def test_the_bottleneck_is_named():
    assert bottleneck(FREE, LOAD, Machines(2, 5000.0), 4) == "environments and policy"
    assert bottleneck(FREE, LOAD, Machines(2, 5000.0), 100) == "the network"
    assert bottleneck(replace(FREE, call=0.01), LOAD, FAST, 1000) == "calls"
    assert bottleneck(replace(FREE, look_each=0.01), LOAD, FAST, 1000) == "calls"
    assert bottleneck(replace(FREE, join=0.01), LOAD, FAST, 1000) == "taking and joining"
    assert bottleneck(replace(FREE, put=10.0), LOAD, FAST, 8) == "the policy's weights"


def test_what_sleeps_is_as_large_as_what_it_stands_for():
    pytest.importorskip("envpool")
    config = scaling.ScalingBenchmark(envs_per_worker=2, n_steps=2, repeats=2)
    for name, case in scaling.cases(config).items():
        real, asleep = (scaling.measured_load(name, c, config) for c in (case, scaling.sleeping(case)))
        for field in fields(Rollout):
            ours, theirs = (getattr(reply.result, field.name) for _, reply in (real, asleep))
            map_parts(lambda a, b: np.testing.assert_equal((a.shape, a.dtype), (b.shape, b.dtype)), ours, theirs)
        assert asleep[0].weights_bytes == pytest.approx(real[0].weights_bytes, rel=0.01)


@pytest.mark.full
def test_the_command(tmp_path, capsys):
    pytest.importorskip("envpool")
    file, figure = tmp_path / "figures.json", tmp_path / "figure.png"
    config = scaling.ScalingBenchmark(
        envs_per_worker=2, n_steps=2, largest=6, checked=(1, 3), repeats=2, json=file, figure=figure
    )
    scaling.main(config)
    found = json.loads(file.read_text())
    ran = [(c["load"], c["workers"]) for c in found["checked"]]
    assert ran == [("state", 1), ("state", 3), ("images", 1), ("images", 3)]
    assert [s["workers"] for s in found["simulated"]] == [1, 2, 4, 6] * 2
    assert all(min(m["costs"].values()) >= 0 and m["costs"]["put"] > 0 for m in found["measured"])
    assert figure.stat().st_size > 10_000
    assert {s["limited_by"] for s in found["simulated"]} <= set(scaling.PARTS)
    assert "Simulated" in capsys.readouterr().out


def test_refusals():
    with pytest.raises(ConfigError, match="gbit_per_s = 0"):
        scaling.ScalingBenchmark(gbit_per_s=0)
    with pytest.raises(ConfigError, match="checked = "):
        scaling.ScalingBenchmark(checked=())
    with pytest.raises(ConfigError, match="nodes = 1"):
        scaling.ScalingBenchmark(nodes=1)
