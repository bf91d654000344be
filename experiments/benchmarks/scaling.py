"""How collecting on Ray scales: its costs are measured here, larger clusters than this machine are simulated.

    python -m dprl.experiments.benchmarks.scaling [--figure scaling.png]

Measured: a collection by one worker on one core, and what Ray takes for calls, weights and rollouts. Simulated: one
collection by 1 to 4,096 workers with those costs, event by event. Checked: the same simulation against real workers on
local Ray nodes, whose environments sleep, so that many of them fit on a few cores.
"""

from __future__ import annotations

import heapq
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dprl.config import validate
from dprl.envs import avoid
from dprl.envs.chunked import ChunkedEnv, SimulatorStep
from dprl.errors import MissingDependencyError, check
from dprl.experiments import plots
from dprl.experiments.benchmarks import command
from dprl.experiments.benchmarks.rollout import our_policy
from dprl.experiments.vision import VIT
from dprl.mdp import Chain, DenoisingMDP, ExplorationConfig
from dprl.networks import MLPConfig
from dprl.observations import Camera, Observation, TensorObservation, map_parts
from dprl.policy import DiffusionConfig, DiffusionPolicy, Features
from dprl.rollout.collector import Share
from dprl.rollout.pool import Actor, Rollout
from dprl.rollout.ray_pool import RayPool, WorkerOptions
from dprl.rollout.ray_pool.workers import Worker
from dprl.spec import BoolArray, EnvSpec, FloatArray, IntArray, resolve
from dprl.training.progress import ProgressBar

try:
    import ray
    from ray.cluster_utils import Cluster
except ImportError as error:
    raise MissingDependencyError("ray", "ray", "measuring how Ray scales") from error

MB = 1e6
SIZES = (100_000, 1_000_000, 8_000_000)
"""Bytes of the results by which transfers are measured."""
SLEEP_S = 0.02
"""Of an environment step, where the simulation is checked."""


@dataclass(frozen=True)
class ScalingBenchmark:
    """What to measure, and of what clusters to think."""

    envs_per_worker: int = 8
    n_steps: int = 25
    """Decisions of a collection."""
    chunk: int = 4
    """Environment steps per decision."""
    largest: int = 4096
    """Workers."""
    workers_per_node: int = 32
    gbit_per_s: float = 10.0
    """Of each node's network."""
    checked: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Numbers of workers at which the simulation is checked against real ones."""
    nodes: int = 2
    """Local nodes of that check."""
    repeats: int = 7
    figure: Path | None = None
    """Also draw to this file."""
    json: Path | None = None
    """Also write all figures to this file."""

    def __post_init__(self) -> None:
        counts = ("envs_per_worker", "n_steps", "chunk", "largest", "workers_per_node", "nodes")
        validate(self, at_least={**dict.fromkeys(counts, 1), "repeats": 2}, above={"gbit_per_s": 0})
        check(self.checked != () and min(self.checked) >= 1, "checked", self.checked, "must be numbers from 1 on")


# ------------------------------------------------------------------------------------------------------- the simulation


@dataclass(frozen=True)
class Costs:
    """What Ray takes, in seconds; measured. A transfer takes a fixed time and a time for each byte."""

    put: float
    """The learner puts the weights into the object store: per byte."""
    call: float
    """The learner submits a call."""
    reply: tuple[float, float]
    """It looks for results that have arrived: per look, and per result it still waits for."""
    get: tuple[float, float]
    """It takes a result: fixed, per byte."""
    copy: float
    """It joins the rollouts: per byte."""
    trip: float
    """A call with nothing to do, there and back."""
    load: float
    """A worker reads the weights: per byte."""
    store: tuple[float, float]
    """A worker writes its rollout: fixed, per byte."""


@dataclass(frozen=True)
class Load:
    """One worker's part of a collection."""

    name: str
    compute_s: float
    """Its environments and its policy: mean."""
    spread: float
    """Standard deviation over mean."""
    cpu_share: float
    """Of `compute_s`, on a core; the rest sleeps."""
    rollout_bytes: int
    weights_bytes: int
    env_steps: int


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
    "calls": lambda c, x, m: (replace(c, call=0.0, reply=(0.0, 0.0), get=(0.0, c.get[1]), trip=0.0), x, m),
    "weights": lambda c, x, m: (c, replace(x, weights_bytes=0), m),
    "network": lambda c, x, m: (c, x, replace(m, link=math.inf)),
    "reading rollouts": lambda c, x, m: (replace(c, get=(c.get[0], 0.0), copy=0.0, store=(0.0, 0.0)), x, m),
}
"""What may limit a collection, and what it would be without that."""


def simulate(costs: Costs, load: Load, machines: Machines, n_workers: int, seed: int = 0) -> float:
    """Return the seconds that a collection by `n_workers` takes."""
    ready = _computed(costs, load, machines, n_workers, np.random.default_rng(seed))
    ready = _sent(ready, load.rollout_bytes / machines.link, machines.workers_per_node)
    submitted = load.weights_bytes * costs.put + n_workers * costs.call
    taken = _taken(np.sort(ready) + costs.trip / 2, submitted, costs, load)
    return taken + n_workers * load.rollout_bytes * costs.copy


def _computed(
    costs: Costs, load: Load, machines: Machines, n_workers: int, rng: np.random.Generator
) -> npt.NDArray[np.float64]:
    """When each worker has written its rollout. Weights go from node to node: twice as many have them every time."""
    workers = np.arange(n_workers)
    waves = np.ceil(np.log2(workers // machines.workers_per_node + 1))
    weights = load.weights_bytes * costs.put + waves * load.weights_bytes / machines.link
    called = load.weights_bytes * costs.put + (workers + 1) * costs.call + costs.trip / 2
    times = load.compute_s * np.maximum(0.0, 1 + load.spread * rng.standard_normal(n_workers))
    slept = np.maximum(called, weights) + (1 - load.cpu_share) * times
    store = costs.store[0] + load.rollout_bytes * costs.store[1]
    busy = load.cpu_share * times + load.weights_bytes * costs.load + store
    if machines.cores is None:
        return np.asarray(slept + busy)
    free = [0.0] * machines.cores  # the cores take the work in the order in which it comes
    done: npt.NDArray[np.float64] = np.empty(n_workers)
    for worker in np.argsort(slept):
        done[worker] = max(heapq.heappop(free), slept[worker]) + busy[worker]
        heapq.heappush(free, done[worker])
    return done


def _sent(ready: npt.NDArray[np.float64], seconds_each: float, workers_per_node: int) -> npt.NDArray[np.float64]:
    """When each rollout is on the learner's node: those of other nodes come one after the other over its link."""
    arrived, link = ready.copy(), 0.0
    for worker in np.argsort(ready, kind="stable"):
        if worker >= workers_per_node:
            link = max(link, ready[worker]) + seconds_each
            arrived[worker] = link
    return arrived


def _taken(arrivals: npt.NDArray[np.float64], start: float, costs: Costs, load: Load) -> float:
    """When the learner has taken all that arrives (in this order): it takes at once what is there, and looks again."""
    now, taken, n = start, 0, len(arrivals)
    each = costs.get[0] + load.rollout_bytes * costs.get[1]
    while taken < n:
        now = max(now, arrivals[taken])
        there = int(np.searchsorted(arrivals, now, side="right"))
        now += costs.reply[0] + costs.reply[1] * (n - taken) + each * (there - taken)
        taken = there
    return float(now)


def bottleneck(costs: Costs, load: Load, machines: Machines, n_workers: int) -> str:
    """Return the part without which the collection would be shortest."""
    without = {name: simulate(*part(costs, load, machines), n_workers) for name, part in PARTS.items()}
    return min(without, key=without.__getitem__)


# ------------------------------------------------------------------------------------------------------- what is loaded


class Sleeper:
    """A simulator that sleeps; its observations are blank. Its spec's `backend_id` says for how long."""

    def __init__(self, spec: EnvSpec) -> None:
        self._spec, self._seconds = spec, float(spec.backend_id)

    def reset(self, indices: IntArray, episodes: IntArray) -> Observation:
        """Start."""
        blank: Observation = self._spec.zero_observation(len(indices))
        return blank

    def step(self, indices: IntArray, actions: FloatArray) -> SimulatorStep:
        """Sleep."""
        time.sleep(self._seconds)
        no: BoolArray = np.zeros(len(indices), np.bool_)
        return SimulatorStep(self._spec.zero_observation(len(indices)), np.zeros(len(indices)), no, no, no)

    def close(self) -> None:
        """Nothing is open."""


def build_sleeper(spec: EnvSpec, seeds: list[int], num_threads: int = 0) -> ChunkedEnv:
    """Build one for each seed."""
    return ChunkedEnv(spec, Sleeper(spec), seeds)


def sleeper(cameras: tuple[Camera, ...]) -> EnvSpec:
    """Return the spec of environments that sleep."""
    return EnvSpec(
        id="sleeper", builder="dprl.experiments.benchmarks.scaling:build_sleeper", backend_id=str(SLEEP_S),
        observation_size=11, action_low=(-1.0,) * 3, action_high=(1.0,) * 3, max_episode_steps=1000, cameras=cameras,
    )  # fmt: skip


@dataclass(frozen=True)
class Carrier:
    """Acts at random, and is as large as a policy."""

    n_action_steps: int
    action_size: int
    n_chain: int
    weights: Tensor

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """A chain of draws."""
        return self.n_chain, self.n_action_steps, self.action_size

    def sample(self, obs: TensorObservation, *, noise: Tensor) -> Chain:
        """Take the noise for chain and actions."""
        return Chain(noise.swapaxes(0, 1), noise[-1].clamp(-1, 1))

    def cpu(self) -> Carrier:
        """It is there."""
        return self


class Case(NamedTuple):
    """A task, and a policy of the size people use for it."""

    spec: EnvSpec
    actor: Actor


def cases(config: ScalingBenchmark) -> dict[str, Case]:
    """Return what collecting is measured with: numbers alone, and images."""
    hopper, pixels = resolve("Hopper-v5"), resolve(avoid.PIXELS_ID)
    sees = DiffusionConfig(
        horizon=config.chunk, n_action_steps=config.chunk, num_train_timesteps=20, denoiser=MLPConfig(), vision=VIT
    )
    policy = DiffusionPolicy(Features(pixels.observation_size, pixels.action_size, cameras=pixels.cameras), sees)
    return {
        "state": Case(hopper, our_policy(hopper, config.chunk)),
        "images": Case(pixels, DenoisingMDP(policy, 10, ExplorationConfig())),
    }


def sleeping(case: Case, chunk: int) -> Case:
    """Return the same sizes, in environments that sleep."""
    spec = sleeper(case.spec.cameras)
    weights = torch.zeros(_pickled(case.actor) // 4)
    n_chain = case.actor.noise_shape[0]
    return Case(spec, Carrier(chunk, spec.action_size, n_chain, weights))


# ---------------------------------------------------------------------------------------------------------- measurement


def measured_load(name: str, case: Case, config: ScalingBenchmark) -> Load:
    """Let one worker's environments and policy run here, on one core."""
    n = config.envs_per_worker
    collector = Share(case.spec, 0, n, 0, n, num_threads=1).build()
    walls, cpus = [], []
    try:
        for _ in range(config.repeats + 1):
            wall, cpu = time.perf_counter(), time.process_time()
            rollout = collector.collect(case.actor, config.n_steps)
            walls.append(time.perf_counter() - wall)
            cpus.append(time.process_time() - cpu)
    finally:
        collector.dispose()
    mean, cpu = float(np.mean(walls[1:])), float(np.mean(cpus[1:]))
    steps = n * config.n_steps * config.chunk
    share = min(1.0, cpu / mean)
    return Load(name, mean, float(np.std(walls[1:]) / mean), share, _bytes(rollout), _pickled(case.actor), steps)


def measured_costs(weights_bytes: int, repeats: int) -> Costs:
    """Measure Ray on this machine, which must run already."""
    worker = _worker()
    weights = torch.zeros(weights_bytes // 4)

    def trip(function: Callable[..., Any], *arguments: Any) -> float:
        return _median(lambda: ray.get(worker.apply.remote(function, *arguments)), repeats)

    nothing = _median(lambda: ray.get(worker.ready.remote()), 5 * repeats)
    put = _median(lambda: ray.put(weights), repeats)
    shared = ray.put(weights)
    gets, stores = zip(*[_transfer(worker, size, repeats, nothing) for size in SIZES], strict=True)
    block = np.zeros(SIZES[-1], np.uint8)
    costs = Costs(
        put=put / weights_bytes,
        call=_submission(worker),
        reply=_looking(repeats),
        get=_line(SIZES, gets),
        copy=_median(lambda: np.concatenate([block] * 8), repeats) / (8 * block.nbytes),
        trip=nothing,
        load=max(0.0, trip(_touch, shared) - nothing) / weights_bytes,
        store=_line(SIZES, stores),
    )
    ray.kill(worker)
    return costs


def _transfer(worker: Any, size: int, repeats: int, nothing: float) -> tuple[float, float]:
    """Return how long the learner takes to get a result of `size` bytes, and the worker to write it."""
    gets, stores = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        ref = worker.apply.remote(_blank, size)
        ray.wait([ref])
        arrived = time.perf_counter()
        ray.get(ref)
        gets.append(time.perf_counter() - arrived)
        stores.append(max(0.0, arrived - start - nothing))
    return float(np.median(gets)), float(np.median(stores))


def _submission(worker: Any, n: int = 500) -> float:
    start = time.perf_counter()
    refs = [worker.ready.remote() for _ in range(n)]
    seconds = (time.perf_counter() - start) / n
    ray.get(refs)
    return seconds


def _looking(repeats: int, sizes: tuple[int, int] = (10, 2000)) -> tuple[float, float]:
    """What a look at results costs that are still to come: fixed, and for each of them."""
    worker = _worker()
    refs = [worker.apply.remote(time.sleep, 3600), *(worker.ready.remote() for _ in range(sizes[1]))]

    def look(n: int) -> None:
        ray.wait(refs[:n], timeout=0)
        ray.wait(refs[:n], num_returns=n, timeout=0)

    cost = _line(sizes, [_median(partial(look, n), repeats) for n in sizes])
    ray.kill(worker)
    return cost


def _link(cluster: Any, repeats: int) -> float:
    """Bytes per second from one local node to the other, through Ray."""
    worker = _worker(resources={"elsewhere": 1})
    seconds = []
    for _ in range(repeats):
        ref = worker.apply.remote(_blank, SIZES[-1])
        ray.wait([ref], fetch_local=False)
        start = time.perf_counter()
        ray.get(ref)
        seconds.append(time.perf_counter() - start)
    ray.kill(worker)
    return SIZES[-1] / float(np.median(seconds))


def _worker(**options: Any) -> Any:
    worker: Any = ray.remote(Worker).options(num_cpus=0.1, **options).remote()
    ray.get(worker.ready.remote())
    return worker


def _blank(size: int) -> npt.NDArray[np.uint8]:
    return np.zeros(size, np.uint8)


def _touch(weights: Tensor) -> float:
    return float(weights.clone()[0])


def _median(call: Callable[[], Any], repeats: int) -> float:
    call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


def _line(sizes: tuple[int, ...], seconds: Any) -> tuple[float, float]:
    """A fixed time, and a time per unit, neither below 0."""
    slope, fixed = np.polyfit(sizes, seconds, 1)
    return max(0.0, float(fixed)), max(0.0, float(slope))


def _bytes(rollout: Rollout) -> int:
    sizes: list[int] = []
    for value in vars(rollout).values():
        map_parts(lambda array: sizes.append(array.nbytes), value)
    return sum(sizes)


def _pickled(actor: Actor) -> int:
    return len(ray.cloudpickle.dumps(actor.cpu()))


# ------------------------------------------------------------------------------------------------------------ the check


class Check(NamedTuple):
    """A collection by real workers, whose environments sleep, and what the simulation says of it."""

    load: str
    workers: int
    measured_s: float
    simulated_s: float


def checks(config: ScalingBenchmark, costs: Costs, cluster: Any, bar: ProgressBar) -> list[Check]:
    """Collect with more and more workers on local nodes, and simulate the same."""
    found = []
    machines = Machines(max(config.checked), _link(cluster, config.repeats), len(os.sched_getaffinity(0)))
    for name, awake in cases(config).items():
        case = sleeping(awake, config.chunk)
        load = measured_load(name, case, config)
        for n in config.checked:
            bar.note(f"{name}, {n} workers")
            here = replace(machines, workers_per_node=math.ceil(n / config.nodes))
            found.append(Check(name, n, _collected(case, n, config), simulate(costs, load, here, n)))
            bar.advance(1)
    return found


def _collected(case: Case, n_workers: int, config: ScalingBenchmark) -> float:
    n_envs = n_workers * config.envs_per_worker
    options = WorkerOptions(cpus=0.1, placement="SPREAD")
    with RayPool(
        case.spec, n_envs, num_workers=n_workers, slice_size=config.envs_per_worker, workers=options
    ) as pool:  # fmt: skip
        return _median(lambda: pool.collect(case.actor, config.n_steps), config.repeats)


@contextmanager
def local_nodes(n: int) -> Iterator[Any]:
    """Ray on several nodes of this machine, with as many CPUs as the check wants."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False})
    try:
        for _ in range(n - 1):
            cluster.add_node(num_cpus=4, resources={"elsewhere": 1})
        ray.init(cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


# ---------------------------------------------------------------------------------------------------------- the command


class Size(NamedTuple):
    """A simulated cluster."""

    load: str
    workers: int
    seconds: float
    """Of a collection."""
    env_steps_per_s: float
    efficiency: float
    """Steps per second over those of as many workers that cost nothing but their own work."""
    limited_by: str
    gigabytes: float
    """The rollouts of a collection, which the learner holds."""


def sizes(config: ScalingBenchmark, costs: Costs, load: Load) -> list[Size]:
    """Simulate clusters of all sizes."""
    machines = Machines(config.workers_per_node, config.gbit_per_s * 1e9 / 8)
    found = []
    for power in range(int(math.log2(config.largest)) + 1):
        n = 2**power
        seconds = simulate(costs, load, machines, n)
        found.append(Size(
            load.name, n, seconds, n * load.env_steps / seconds, load.compute_s / seconds,
            bottleneck(costs, load, machines, n), n * load.rollout_bytes / 1e9,
        ))  # fmt: skip
    return found


def main(config: ScalingBenchmark) -> None:
    """Measure, check, simulate, and print tables."""
    loads = [measured_load(name, case, config) for name, case in cases(config).items()]
    with ProgressBar("check", len(loads) * len(config.checked)) as bar, local_nodes(config.nodes) as cluster:
        costs = measured_costs(max(load.weights_bytes for load in loads), config.repeats)
        checked = checks(config, costs, cluster, bar)
    simulated = [size for load in loads for size in sizes(config, costs, load)]
    console = Console()
    console.print(_measured_table(costs, loads), _checked_table(checked), _simulated_table(simulated))
    console.print(
        f"{config.envs_per_worker} environments a worker, {config.n_steps} decisions of {config.chunk} steps; "
        f"{config.workers_per_node} workers a node, {config.gbit_per_s:g} Gbit/s; medians of {config.repeats} on "
        f"{len(os.sched_getaffinity(0))} cores, {config.nodes} local nodes"
    )
    if config.json is not None:
        figures = {"costs": costs, "loads": loads, "checked": checked, "simulated": simulated}
        config.json.write_text(json.dumps(figures, indent=1, default=_plain), encoding="utf-8")
    if config.figure is not None:
        draw(simulated, checked, config.figure)


def draw(simulated: list[Size], checked: list[Check], file: Path) -> None:
    """Throughput and efficiency of simulated clusters, and how the simulation fares beside real workers."""
    figure = plots.new_figure(figsize=(12, 3.6))
    speed, share, truth = figure.subplots(1, 3)
    for i, name in enumerate(dict.fromkeys(size.load for size in simulated)):
        own, color = [size for size in simulated if size.load == name], f"C{i}"
        workers = [size.workers for size in own]
        speed.loglog(workers, [size.env_steps_per_s for size in own], "o-", ms=3, color=color, label=name)
        alone = own[0].env_steps_per_s / own[0].efficiency
        speed.loglog(workers, [n * alone for n in workers], ":", color=color)
        share.semilogx(workers, [size.efficiency for size in own], "o-", ms=3, color=color, label=name)
        real = [check for check in checked if check.load == name]
        truth.loglog([c.workers for c in real], [c.measured_s for c in real], "o", color=color, label=f"{name}, real")
        truth.loglog([c.workers for c in real], [c.simulated_s for c in real], "-", color=color, label="simulated")
    for axis, title in (
        (speed, "environment steps per second\n(simulated; dotted: perfect)"),
        (share, "efficiency (simulated)"),
        (truth, "seconds of a collection,\nenvironments that sleep"),
    ):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("workers")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    share.set_ylim(0, 1.05)
    figure.savefig(file, dpi=120)


def _measured_table(costs: Costs, loads: list[Load]) -> Table:
    table = Table("measured", "", title="Measured here", box=None, title_justify="left")
    for load in loads:
        table.add_row(
            f"{load.name}: a worker's collection",
            f"{load.compute_s:.3f} s ± {100 * load.spread:.0f} %, rollout {load.rollout_bytes / MB:.2f} MB, "
            f"weights {load.weights_bytes / MB:.1f} MB",
        )
    microseconds = {
        "submit a call": costs.call,
        "a call, there and back": costs.trip,
        "look for results": costs.reply[0],
        "and for each that is still to come": costs.reply[1],
        "take a result": costs.get[0],
        "and for each MB": costs.get[1] * MB,
        "write a result, for each MB": costs.store[1] * MB,
        "join rollouts, for each MB": costs.copy * MB,
        "share weights, for each MB": costs.put * MB,
        "read weights, for each MB": costs.load * MB,
    }
    for name, seconds in microseconds.items():
        table.add_row(name, f"{1e6 * seconds:,.1f} µs")
    return table


def _checked_table(checked: list[Check]) -> Table:
    columns = ("load", "workers", "measured, s", "simulated, s", "ratio")
    table = Table(*columns, title="\nChecked: real workers, environments that sleep", box=None, title_justify="left")
    for check_ in checked:
        ratio = check_.simulated_s / check_.measured_s
        table.add_row(
            check_.load, str(check_.workers), f"{check_.measured_s:.2f}", f"{check_.simulated_s:.2f}", f"{ratio:.2f}"
        )
    return table


def _simulated_table(simulated: list[Size]) -> Table:
    columns = ("load", "workers", "collection, s", "env steps/s", "efficiency", "limited by", "rollouts, GB")
    table = Table(*columns, title="\nSimulated", box=None, title_justify="left")
    for size in simulated:
        table.add_row(
            size.load, f"{size.workers:,}", f"{size.seconds:.2f}", f"{size.env_steps_per_s:,.0f}",
            f"{size.efficiency:.2f}", size.limited_by, f"{size.gigabytes:.2f}",
        )  # fmt: skip
    return table


def _plain(value: Any) -> Any:
    return asdict(value) if hasattr(value, "__dataclass_fields__") else str(value)


if __name__ == "__main__":
    command(main, ScalingBenchmark)
