"""The model of a collection on a cluster: costs whose sum is known."""

import math
from dataclasses import fields, replace

import pytest

from dprl.experiments.benchmarks.cluster_model import Costs, Load, Machines, bottleneck, simulate

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
