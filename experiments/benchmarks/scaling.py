"""How collecting on Ray scales: its costs are measured here, larger clusters than this machine are simulated.

    python -m dprl.experiments.benchmarks.scaling [--figure scaling.png]

Measured: a collection by one worker on one core, and what Ray takes for calls, weights and rollouts. Simulated: one
collection by 1 to 4,096 workers with those costs, event by event. Checked: the same simulation against real workers on
local Ray nodes, whose environments sleep, so that many of them fit on a few cores.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dprl.config import validate
from dprl.cores import available_cores
from dprl.envs import avoid
from dprl.envs.chunked import ChunkedEnv, SimulatorStep
from dprl.errors import MissingDependencyError, check
from dprl.experiments import plots
from dprl.experiments.benchmarks import command
from dprl.experiments.benchmarks.cluster_model import Costs, Load, Machines, bottleneck, simulate
from dprl.experiments.benchmarks.rollout import DENOISING_STEPS, HIDDEN, TUNED_STEPS, our_policy
from dprl.experiments.vision import VIT
from dprl.mdp import Chain, DenoisingMDP, ExplorationConfig
from dprl.networks import MLPConfig
from dprl.observations import Observation, TensorObservation, map_parts
from dprl.policy import DiffusionConfig, DiffusionPolicy, Features
from dprl.rollout.collector import Share
from dprl.rollout.pool import Rollout
from dprl.rollout.ray_pool import RayPool, WorkerOptions
from dprl.rollout.ray_pool.cluster import prepare_environment
from dprl.rollout.ray_pool.workers import Reply, Worker, writable
from dprl.spec import BoolArray, EnvSpec, EnvState, FloatArray, IntArray, resolve
from dprl.training.progress import ProgressBar

try:
    import ray
    from ray.cluster_utils import Cluster
except ImportError as error:
    raise MissingDependencyError("ray", "ray", "measuring how Ray scales") from error

SLEEP_S = 1e-3
"""Of an environment step, where the simulation is checked: short, so that Ray's own costs are much of the time."""
CPUS_EACH = 0.1
"""What a worker of the check claims."""


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
        counts = ("envs_per_worker", "n_steps", "chunk", "largest", "workers_per_node")
        validate(self, at_least={**dict.fromkeys(counts, 1), "repeats": 2, "nodes": 2}, above={"gbit_per_s": 0})
        check(self.checked != () and min(self.checked) >= 1, "checked", self.checked, "must be numbers from 1 on")


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


@dataclass(frozen=True)
class Carrier:
    """Acts at random, and carries a policy of which it makes no use."""

    policy: DenoisingMDP

    @property
    def n_action_steps(self) -> int:
        """The policy's."""
        return self.policy.n_action_steps

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """A chain of draws."""
        _, *chunk = self.policy.noise_shape
        return self.policy.tuned_steps + 1, *chunk

    def sample(self, obs: TensorObservation, *, noise: Tensor) -> Chain:
        """Take the noise for chain and actions."""
        return Chain(noise.swapaxes(0, 1), noise[1:].swapaxes(0, 1), noise[-1].clamp(-1, 1))

    def cpu(self) -> Carrier:
        """It is there."""
        return self


class Case(NamedTuple):
    """A task, and a policy of the size people use for it."""

    spec: EnvSpec
    actor: DenoisingMDP | Carrier


def cases(config: ScalingBenchmark) -> dict[str, Case]:
    """Return what collecting is measured with: numbers alone, and images."""
    hopper, pixels = resolve("Hopper-v5"), resolve(avoid.PIXELS_ID)
    sees = DiffusionConfig(
        horizon=config.chunk, n_action_steps=config.chunk, num_train_timesteps=DENOISING_STEPS,
        denoiser=MLPConfig(HIDDEN), vision=VIT,
    )  # fmt: skip
    policy = DiffusionPolicy(Features(pixels.observation_size, pixels.action_size, cameras=pixels.cameras), sees)
    return {
        "state": Case(hopper, our_policy(hopper, config.chunk)),
        "images": Case(pixels, DenoisingMDP(policy, TUNED_STEPS, ExplorationConfig())),
    }


def sleeping(case: Case) -> Case:
    """Return the same sizes, in environments that sleep and whose episodes do not end."""
    assert isinstance(case.actor, DenoisingMDP)
    builder = "dprl.experiments.benchmarks.scaling:build_sleeper"
    spec = replace(case.spec, id="sleeper", builder=builder, backend_id=str(SLEEP_S), max_episode_steps=1_000_000)
    return Case(spec, Carrier(case.actor))


# ---------------------------------------------------------------------------------------------------------- measurement


def measured_load(name: str, case: Case, config: ScalingBenchmark) -> tuple[Load, Reply]:
    """Let one worker's environments and policy run here, on one core; return also what it would reply."""
    n = config.envs_per_worker
    collector = Share(case.spec, 0, n, 0, n, num_threads=1).build()
    walls, cpus = [], []
    try:
        for _ in range(config.repeats + 1):
            wall, cpu = time.perf_counter(), time.process_time()
            rollout = collector.collect(case.actor, config.n_steps)
            walls.append(time.perf_counter() - wall)
            cpus.append(time.process_time() - cpu)
        reply = Reply(rollout, collector.state())
    finally:
        collector.dispose()
    mean, cpu = float(np.mean(walls[1:])), float(np.mean(cpus[1:]))
    load = Load(
        name, mean, float(np.std(walls[1:]) / mean), min(1.0, cpu / mean), _bytes(reply),
        len(ray.cloudpickle.dumps(case.actor)), n * config.n_steps * config.chunk,
    )  # fmt: skip
    return load, reply


def measured_costs(case: Case, reply: Reply, repeats: int) -> Costs:
    """Measure Ray on this machine, which must run already."""
    worker = _worker()
    actor, result = ray.put(case.actor), ray.put(reply)

    def trip(function: Callable[..., Any], *arguments: Any) -> float:
        return _median(lambda: ray.get(worker.apply.remote(function, *arguments)), repeats)

    call, look, nothing = _submission(worker, actor), _looking(repeats), trip(_nothing, 0)
    take, there = _taking(worker, result, repeats)
    seen = trip(_nothing, result)
    return Costs(
        put=_median(lambda: ray.put(case.actor), repeats),
        call=call,
        trip=max(0.0, nothing - call - _taking(worker, 0, repeats)[0]),
        load=max(0.0, trip(_nothing, actor) - nothing),
        store=max(0.0, there - seen),
        look=look[0],
        look_each=look[1],
        take=take + _median(lambda: writable(_state(reply)), repeats),
        join=_joining(reply.result, repeats),
    )


def _taking(worker: Any, result: Any, repeats: int) -> tuple[float, float]:
    """Return how long the learner takes to get a worker's result, and how long it was until it was there."""
    gets, waits = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        ref = worker.apply.remote(_same, result)
        ray.wait([ref])
        there = time.perf_counter()
        ray.get(ref)
        gets.append(time.perf_counter() - there)
        waits.append(there - start)
    return float(np.median(gets)), float(np.median(waits))


def _submission(worker: Any, actor: Any, n: int = 200) -> float:
    """What a call costs whoever makes it, with the arguments of a collection."""
    share = Share(resolve("Hopper-v5"), 0, 1, 0, 1)
    start = time.perf_counter()
    refs = [worker.apply.remote(_nothing, actor, share, 1) for _ in range(n)]
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

    few, many = (_median(partial(look, n), repeats) for n in sizes)
    ray.kill(worker)
    each = max(0.0, many - few) / (sizes[1] - sizes[0])
    return max(0.0, few - sizes[0] * each), each


def _joining(rollout: Rollout, repeats: int, sizes: tuple[int, int] = (4, 32)) -> float:
    """What a rollout more costs when they are joined."""
    few, many = (_median(partial(Rollout.concatenate, [rollout] * n), repeats) for n in sizes)
    return max(0.0, many - few) / (sizes[1] - sizes[0])


def _link(repeats: int, size: int = 8_000_000) -> float:
    """Bytes per second from one local node to the other, through Ray."""
    worker = _worker("elsewhere")
    seconds = []
    for _ in range(repeats):
        ref = worker.apply.remote(np.zeros, size, np.uint8)
        ray.wait([ref], fetch_local=False)
        start = time.perf_counter()
        ray.get(ref)
        seconds.append(time.perf_counter() - start)
    ray.kill(worker)
    return size / float(np.median(seconds))


def _worker(where: str = "node:__internal_head__") -> Any:
    """Start one on a node that has the resource `where`: the learner's, or the other."""
    worker: Any = ray.remote(Worker).options(num_cpus=CPUS_EACH, resources={where: 1e-3}).remote()
    ray.get(worker.ready.remote())
    return worker


def _nothing(*_: Any) -> None:
    """Take arguments."""


def _same(result: Any) -> Any:
    return result


def _state(reply: Reply) -> EnvState:
    assert reply.state is not None
    return reply.state


def _median(call: Callable[[], Any], repeats: int) -> float:
    call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


def _bytes(reply: Reply) -> int:
    sizes: list[int] = []
    for value in (*vars(reply.result).values(), *vars(_state(reply)).values()):
        map_parts(lambda array: sizes.append(np.asarray(array).nbytes), value)
    return sum(sizes)


# ------------------------------------------------------------------------------------------------------------ the check


@dataclass(frozen=True)
class Check:
    """A collection by real workers, whose environments sleep, and what the simulation says of it."""

    load: str
    workers: int
    alone_s: float
    """What a worker's own part takes."""
    measured_s: float
    simulated_s: float

    @property
    def ratio(self) -> float:
        """Simulated over measured, of what comes on top of a worker's own part."""
        return (self.simulated_s - self.alone_s) / (self.measured_s - self.alone_s)


def checks(config: ScalingBenchmark, link: float, bar: ProgressBar) -> Iterator[Check]:
    """Collect with more and more workers on local nodes, and simulate the same."""
    for name, awake in cases(config).items():
        case = sleeping(awake)
        load, reply = measured_load(name, case, config)
        costs = measured_costs(case, reply, config.repeats)
        for n in config.checked:
            bar.note(f"{name}, {n} workers")
            here = Machines(math.ceil(n / config.nodes), link, available_cores())
            yield Check(name, n, load.compute_s, _collected(case, n, config), simulate(costs, load, here, n))
            bar.advance(1)


def _collected(case: Case, n_workers: int, config: ScalingBenchmark) -> float:
    n_envs, size = n_workers * config.envs_per_worker, config.envs_per_worker
    options = WorkerOptions(cpus=CPUS_EACH, placement="SPREAD")
    with RayPool(case.spec, n_envs, num_workers=n_workers, slice_size=size, workers=options) as pool:
        return _median(lambda: pool.collect(case.actor, config.n_steps), config.repeats)


@contextmanager
def local_nodes(config: ScalingBenchmark) -> Iterator[None]:
    """Ray on several nodes of this machine, with as many CPUs as the check wants."""
    prepare_environment()
    room: dict[str, Any] = {
        "num_cpus": math.ceil(CPUS_EACH * max(config.checked)) + 1, "object_store_memory": 2 * 10**9
    }  # fmt: skip
    cluster = Cluster(initialize_head=True, head_node_args={**room, "include_dashboard": False})
    try:
        for _ in range(config.nodes - 1):
            cluster.add_node(**room, resources={"elsewhere": 1})
        ray.init(cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


# ---------------------------------------------------------------------------------------------------------- the command


@dataclass(frozen=True)
class Size:
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
    """What the learner holds: the replies, and the rollout that they are joined to."""


def sizes(config: ScalingBenchmark, costs: Costs, load: Load) -> list[Size]:
    """Simulate clusters of all sizes."""
    machines = Machines(config.workers_per_node, config.gbit_per_s * 1e9 / 8)
    powers = [2**power for power in range(config.largest.bit_length())]
    found = []
    for n in sorted({*powers, config.largest}):
        seconds = simulate(costs, load, machines, n)
        found.append(Size(
            load.name, n, seconds, n * load.env_steps / seconds, load.compute_s / seconds,
            bottleneck(costs, load, machines, n), 2 * n * load.reply_bytes / 1e9,
        ))  # fmt: skip
    return found


class Measured(NamedTuple):
    """A load and its costs."""

    load: Load
    costs: Costs


def main(config: ScalingBenchmark) -> None:
    """Measure, check, simulate, and print tables."""
    measured = []
    with ProgressBar("measure and check", 2 * (1 + len(config.checked))) as bar, local_nodes(config):
        for name, case in cases(config).items():
            bar.note(name)
            load, reply = measured_load(name, case, config)
            measured.append(Measured(load, measured_costs(case, reply, config.repeats)))
            bar.advance(1)
        link = _link(config.repeats)
        checked = list(checks(config, link, bar))
    simulated = [size for load, costs in measured for size in sizes(config, costs, load)]
    console = Console()
    console.print(_measured_table(measured), _checked_table(checked), _simulated_table(simulated))
    console.print(
        f"{config.envs_per_worker} environments a worker, {config.n_steps} decisions of {config.chunk} steps; "
        f"simulated with {config.workers_per_node} workers a node and {config.gbit_per_s:g} Gbit/s; medians of "
        f"{config.repeats} on {available_cores()} cores; {config.nodes} local nodes, between them "
        f"{link / 1e6:,.0f} MB/s"
    )
    if config.json is not None:
        figures = {
            "config": asdict(config), "link": link,
            "measured": [{"load": asdict(load), "costs": asdict(costs)} for load, costs in measured],
            "checked": [asdict(c) for c in checked], "simulated": [asdict(size) for size in simulated],
        }  # fmt: skip
        config.json.write_text(json.dumps(figures, indent=1, default=str), encoding="utf-8")
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
        counts = [check.workers for check in real]
        truth.loglog(counts, [c.measured_s - c.alone_s for c in real], "o", color=color, label=f"{name}, measured")
        truth.loglog(counts, [c.simulated_s - c.alone_s for c in real], "-", color=color, label="simulated")
    for axis, title in (
        (speed, "environment steps per second\n(simulated; dotted: perfect)"),
        (share, "efficiency (simulated)"),
        (truth, "seconds beyond a worker's own part,\nenvironments that sleep, this machine"),
    ):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("workers")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    share.set_ylim(0, 1.05)
    figure.savefig(file, dpi=120)


def _measured_table(measured: list[Measured]) -> Table:
    names = [load.name for load, _ in measured]
    table = Table("", *names, title="Measured here", box=None, title_justify="left")
    rows: dict[str, Callable[[Load, Costs], str]] = {
        "a worker's collection, one core": lambda x, _: f"{x.compute_s:.3f} s ± {100 * x.spread:.0f} %",
        "its reply": lambda x, _: f"{x.reply_bytes / 1e6:.2f} MB",
        "the policy": lambda x, _: f"{x.weights_bytes / 1e6:.2f} MB",
        "put the policy into the store": lambda _, c: f"{1e3 * c.put:.2f} ms",
        "read it, each worker": lambda _, c: f"{1e3 * c.load:.2f} ms",
        "submit a call": lambda _, c: f"{1e3 * c.call:.2f} ms",
        "a call, there and back": lambda _, c: f"{1e3 * c.trip:.2f} ms",
        "write a reply, each worker": lambda _, c: f"{1e3 * c.store:.2f} ms",
        "look for replies": lambda _, c: f"{1e3 * c.look:.3f} ms",
        "and for each still to come": lambda _, c: f"{1e6 * c.look_each:.2f} µs",
        "take a reply": lambda _, c: f"{1e3 * c.take:.2f} ms",
        "join its rollout to the others": lambda _, c: f"{1e3 * c.join:.2f} ms",
    }
    for name, shown in rows.items():
        table.add_row(name, *(shown(load, costs) for load, costs in measured))
    return table


def _checked_table(checked: list[Check]) -> Table:
    columns = ("load", "workers", "own part, s", "measured, s", "simulated, s", "simulated / measured beyond own part")
    table = Table(*columns, title="\nChecked: real workers, environments that sleep", box=None, title_justify="left")
    for c in checked:
        seconds = (f"{value:.3f}" for value in (c.alone_s, c.measured_s, c.simulated_s))
        table.add_row(c.load, str(c.workers), *seconds, f"{c.ratio:.2f}")
    return table


def _simulated_table(simulated: list[Size]) -> Table:
    columns = ("load", "workers", "collection, s", "env steps/s", "efficiency", "limited by", "learner holds, GB")
    table = Table(*columns, title="\nSimulated", box=None, title_justify="left")
    for size in simulated:
        table.add_row(
            size.load, f"{size.workers:,}", f"{size.seconds:.2f}", f"{size.env_steps_per_s:,.0f}",
            f"{size.efficiency:.2f}", size.limited_by, f"{size.gigabytes:.2f}",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    command(main, ScalingBenchmark)
