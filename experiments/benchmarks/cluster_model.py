"""A model of one collection on a Ray cluster: what workers, calls, weights and replies take, event by event."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

SEEDS = 5
"""Simulations that are averaged, since workers differ by chance."""


@dataclass(frozen=True)
class Load:
    """One worker's part of a collection."""

    name: str
    compute_s: float
    """Its environments and its policy: mean."""
    spread: float
    """Standard deviation over mean: of one process here, taken for that between workers."""
    cpu_share: float
    """Of `compute_s`, on a core; the rest sleeps."""
    reply_bytes: int
    """Its rollout, and the state of its environments."""
    weights_bytes: int
    env_steps: int


@dataclass(frozen=True)
class Costs:
    """What Ray takes for one load, in seconds; measured."""

    put: float
    """The learner puts the policy into the object store."""
    call: float
    """The learner submits a call."""
    trip: float
    """A call that does nothing, beside submitting and taking it."""
    load: float
    """A worker reads the policy."""
    store: float
    """A worker writes its reply."""
    look: float
    """The learner looks which replies have come: fixed,"""
    look_each: float
    """and for each that is still to come."""
    take: float
    """The learner takes a reply."""
    join: float
    """The learner joins the rollouts: for each."""


@dataclass(frozen=True)
class Machines:
    """Where it runs."""

    workers_per_node: int
    link: float
    """Bytes per second into or out of a node."""
    cores: int | None = None
    """For all workers together. None: one each."""


Part = Callable[[Costs, Load, Machines], tuple[Costs, Load, Machines]]
PARTS: dict[str, Part] = {
    "environments and policy": lambda c, x, m: (c, replace(x, compute_s=0.0), m),
    "the slowest worker": lambda c, x, m: (c, replace(x, spread=0.0), m),
    "calls": lambda c, x, m: (replace(c, call=0.0, trip=0.0, look=0.0, look_each=0.0), x, m),
    "the policy's weights": lambda c, x, m: (replace(c, put=0.0, load=0.0), replace(x, weights_bytes=0), m),
    "the network": lambda c, x, m: (c, x, replace(m, link=math.inf)),
    "taking and joining": lambda c, x, m: (replace(c, store=0.0, take=0.0, join=0.0), x, m),
}
"""What may limit a collection, and what it would be without that."""


def simulate(costs: Costs, load: Load, machines: Machines, n_workers: int) -> float:
    """Return the seconds that a collection by `n_workers` takes, on average."""
    return float(np.mean([_once(costs, load, machines, n_workers, np.random.default_rng(i)) for i in range(SEEDS)]))


def _once(costs: Costs, load: Load, machines: Machines, n_workers: int, rng: np.random.Generator) -> float:
    written = _written(costs, load, machines, n_workers, rng)
    here = _sent(written, load.reply_bytes / machines.link, machines.workers_per_node) + costs.trip / 2
    submitted = costs.put + n_workers * costs.call
    return _taken(np.sort(here), submitted, costs) + n_workers * costs.join


def _written(
    costs: Costs, load: Load, machines: Machines, n_workers: int, rng: np.random.Generator
) -> npt.NDArray[np.float64]:
    """When each worker has written its reply. Every other node gets the weights from the learner's, one by one."""
    workers = np.arange(n_workers)
    weights = costs.put + workers // machines.workers_per_node * load.weights_bytes / machines.link
    called = costs.put + (workers + 1) * costs.call + costs.trip / 2
    times = load.compute_s * np.maximum(0.0, 1 + load.spread * rng.standard_normal(n_workers))
    slept = np.maximum(called, weights) + (1 - load.cpu_share) * times
    busy = load.cpu_share * times + costs.load + costs.store
    if machines.cores is None:
        return np.asarray(slept + busy)
    free = [0.0] * machines.cores  # the cores take the work in the order in which it comes
    done: npt.NDArray[np.float64] = np.empty(n_workers)
    for worker in np.argsort(slept):
        done[worker] = max(heapq.heappop(free), slept[worker]) + busy[worker]
        heapq.heappush(free, done[worker])
    return done


def _sent(written: npt.NDArray[np.float64], seconds_each: float, workers_per_node: int) -> npt.NDArray[np.float64]:
    """When each reply is on the learner's node: those of other nodes come one after the other over its link."""
    arrived, link = written.copy(), 0.0
    for worker in np.argsort(written, kind="stable"):
        if worker >= workers_per_node:
            link = max(link, written[worker]) + seconds_each
            arrived[worker] = link
    return arrived


def _taken(arrivals: npt.NDArray[np.float64], start: float, costs: Costs) -> float:
    """When the learner has taken all that arrives (in this order): it takes at once what is there, and looks again."""
    now, taken, n = start, 0, len(arrivals)
    while taken < n:
        now = max(now, arrivals[taken])
        there = int(np.searchsorted(arrivals, now, side="right"))
        now += costs.look + costs.look_each * (n - taken) + costs.take * (there - taken)
        taken = there
    return float(now)


def bottleneck(costs: Costs, load: Load, machines: Machines, n_workers: int) -> str:
    """Return the part without which the collection would be shortest."""
    without = {name: simulate(*part(costs, load, machines), n_workers) for name, part in PARTS.items()}
    return min(without, key=without.__getitem__)
