"""The scaling model: costs whose sum is known, and the whole command, small."""

import json
import math

import pytest

pytest.importorskip("ray")
from dprl.errors import ConfigError
from dprl.experiments.benchmarks import scaling
from dprl.experiments.benchmarks.scaling import Costs, Load, Machines, bottleneck, simulate

FREE = Costs(put=0, call=0, reply=(0, 0), get=(0, 0), copy=0, trip=0, load=0, store=(0, 0))
LOAD = Load("load", compute_s=2.0, spread=0.0, cpu_share=1.0, rollout_bytes=1000, weights_bytes=100, env_steps=800)
FAST = Machines(workers_per_node=2, link=math.inf)


@pytest.mark.parametrize("n", [1, 3, 4096])
def test_workers_that_cost_nothing_else_are_perfect(n):
    assert simulate(FREE, LOAD, FAST, n) == 2.0


@pytest.mark.parametrize(
    ("costs", "load", "machines", "n", "seconds"),
    [
        (FREE, LOAD, Machines(2, 500.0), 2, 2.0),  # all on the learner's node
        (FREE, LOAD, Machines(2, 500.0), 5, 2.0 + 0.2 + 3 * 2.0),  # 3 rollouts queue; weights reach node 1 in a hop
        (Costs(**{**vars(FREE), "put": 0.01}), LOAD, FAST, 3, 1.0 + 2.0),
        (Costs(**{**vars(FREE), "load": 0.01}), LOAD, FAST, 3, 1.0 + 2.0),
        (Costs(**{**vars(FREE), "store": (0.5, 0.001)}), LOAD, FAST, 3, 2.0 + 0.5 + 1.0),
        (Costs(**{**vars(FREE), "copy": 0.001}), LOAD, FAST, 3, 2.0 + 3.0),
        (Costs(**{**vars(FREE), "trip": 0.5}), LOAD, FAST, 3, 2.0 + 0.5),
        (Costs(**{**vars(FREE), "get": (0.25, 0.001)}), LOAD, FAST, 4, 2.0 + 4 * 1.25),
        (Costs(**{**vars(FREE), "reply": (0.25, 0.125)}), LOAD, FAST, 4, 2.0 + 0.25 + 4 * 0.125),
        (Costs(**{**vars(FREE), "call": 0.5}), LOAD, FAST, 4, 2.0 + 4 * 0.5),
        (FREE, LOAD, Machines(8, math.inf, cores=2), 8, 4 * 2.0),
        (FREE, Load(**{**vars(LOAD), "cpu_share": 0.25}), Machines(8, math.inf, cores=2), 8, 1.5 + 4 * 0.5),
    ],
)
def test_costs_add_up(costs, load, machines, n, seconds):
    assert simulate(costs, load, machines, n) == pytest.approx(seconds)


def test_the_slowest_of_many_workers_is_waited_for():
    uneven = Load(**{**vars(LOAD), "spread": 0.1})
    times = [simulate(FREE, uneven, FAST, n) for n in (1, 100, 4000)]
    assert 2.4 < times[1] < times[2] < 3.0


def test_the_bottleneck_is_named():
    slow_link, many_calls = Machines(2, 5000.0), Costs(**{**vars(FREE), "call": 0.01})
    assert bottleneck(FREE, LOAD, slow_link, 4) == "environments and policy"
    assert bottleneck(FREE, LOAD, slow_link, 100) == "network"
    assert bottleneck(many_calls, LOAD, FAST, 1000) == "calls"
    assert bottleneck(Costs(**{**vars(FREE), "copy": 1e-5}), LOAD, FAST, 1000) == "reading rollouts"
    assert bottleneck(Costs(**{**vars(FREE), "put": 1.0}), LOAD, FAST, 8) == "weights"


@pytest.mark.full
def test_the_command(tmp_path, capsys):
    pytest.importorskip("envpool")
    file, figure = tmp_path / "figures.json", tmp_path / "figure.png"
    config = scaling.ScalingBenchmark(
        envs_per_worker=2, n_steps=2, largest=8, checked=(1, 3), repeats=2, json=file, figure=figure
    )
    scaling.main(config)
    found = json.loads(file.read_text())
    assert [(c[0], c[1]) for c in found["checked"]] == [("state", 1), ("state", 3), ("images", 1), ("images", 3)]
    assert [s[1] for s in found["simulated"]] == [1, 2, 4, 8] * 2
    assert figure.stat().st_size > 10_000
    assert {s[5] for s in found["simulated"]} <= set(scaling.PARTS)
    assert "Simulated" in capsys.readouterr().out


def test_refusals():
    with pytest.raises(ConfigError, match="gbit_per_s = 0"):
        scaling.ScalingBenchmark(gbit_per_s=0)
    with pytest.raises(ConfigError, match="checked = "):
        scaling.ScalingBenchmark(checked=())
