"""DPPO's speed: sampling, updating and whole iterations, against the authors' code and against the arithmetic's floor.

    python -m dprl.experiments.benchmarks.dppo [--reference PATH] [--device cuda]

Everything is measured in turn in the same run, several times; figures are medians, ratios are medians of the ratios of
measurements next to each other. `--reference` is where a checkout of the DPPO authors' code lies, with `einops` to
import it. The floor of a figure is what its matrix products take at the rate that this machine multiplies at.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AsyncVectorEnv
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from dprl.agents import DPPO, DPPOConfig
from dprl.config import validate
from dprl.cores import available_cores
from dprl.errors import check
from dprl.experiments.benchmarks import check_reference, command, seconds
from dprl.experiments.runs import check_device
from dprl.networks import MLPConfig
from dprl.networks.mlp import Activation, DenoisingMLP
from dprl.policy import DiffusionConfig, DiffusionPolicy, Features
from dprl.rollout import InProcessPool, Rollout
from dprl.seeding import torch_generator
from dprl.spec import EnvSpec, FloatArray, resolve
from dprl.training.precision import Precision, check_precision
from dprl.training.progress import ProgressBar

Part = Literal["sampling", "update", "iteration"]
Action = Callable[[], object]

DENOISING_STEPS, TUNED_STEPS = 20, 10
SAMPLES_AT_ONCE = 10
"""Decisions of one measurement of sampling."""


@dataclass(frozen=True)
class Task:
    """The paper's sizes for a task (arXiv:2409.00588, appendix)."""

    observation_size: int
    action_size: int
    n_envs: int
    n_steps: int
    batch_size: int
    n_epochs: int
    activation: Activation
    env: str | None = None
    """What simulates it, where that is installed with this library."""
    hidden_size: int = 512
    chunk: int = 4


TASKS = {
    "hopper": Task(11, 3, 40, 500, 50_000, 5, "relu", env="Hopper-v5"),
    "can": Task(23, 7, 50, 300, 7_500, 10, "mish"),
}


STORED_ON = "two cores of an AMD EPYC without AVX-512, torch 2.13.0, in float32"
STORED: dict[tuple[str, str], float] = {
    ("hopper", "sampling, batch 1"): 2.53,
    ("hopper", "sampling, batch 1, compiled"): 5.53,
    ("hopper", "sampling, batch 40"): 2.14,
    ("hopper", "sampling, batch 40, compiled"): 2.54,
    ("hopper", "sampling, batch 1000"): 1.69,
    ("hopper", "sampling, batch 1000, compiled"): 1.76,
    ("hopper", "update"): 2.68,
    ("hopper", "update, compiled"): 3.01,
    ("hopper", "iteration"): 2.78,
    ("hopper", "iteration, compiled"): 3.1,
    ("can", "sampling, batch 1"): 2.62,
    ("can", "sampling, batch 1, compiled"): 5.56,
    ("can", "sampling, batch 40"): 2.15,
    ("can", "sampling, batch 40, compiled"): 3.51,
    ("can", "sampling, batch 1000"): 2.05,
    ("can", "sampling, batch 1000, compiled"): 2.6,
    ("can", "update"): 2.57,
    ("can", "update, compiled"): 2.86,
}
"""Times faster than the authors' code, for those who do not have it."""


@dataclass(frozen=True)
class DPPOBenchmark:
    """What to measure."""

    tasks: tuple[str, ...] = tuple(TASKS)
    parts: tuple[Part, ...] = ("sampling", "update", "iteration")
    batches: tuple[int, ...] = (1, 40, 1000)
    """Of sampling: decisions at once."""
    share: float = 0.25
    """Of an iteration's decisions, for the part `update`."""
    repeats: int = 7
    device: str = "cpu"
    precision: Precision = "float32"
    """Of our updates."""
    compiled: bool = True
    """Also measure everything with `DPPOConfig.compile_after = 0`; compiling is not timed."""
    reference: Path | None = None
    """A checkout of the DPPO authors' code."""
    json: Path | None = None
    """Also write the figures to this file."""

    def __post_init__(self) -> None:
        validate(self, at_least={"repeats": 1}, above={"share": 0})
        check(self.share <= 1, "share", self.share, "must be at most 1")
        for task in self.tasks:
            check(task in TASKS, "tasks", task, f"must be of {', '.join(TASKS)}")
        for batch in self.batches:
            check(batch >= 1, "batches", batch, "must be at least 1")
        check_device(self.device)
        check_precision(self.precision, torch.device(self.device))
        check_reference(self.reference)


@dataclass(frozen=True)
class Figure:
    """One thing that was measured."""

    task: str
    what: str
    unit: str
    amount: float
    """Of the unit, in one measurement."""
    ours_s: list[float] = field(default_factory=list)
    theirs_s: list[float] = field(default_factory=list)
    floor_s: float = float("nan")
    """What the matrix products, and the simulator, would take alone."""

    @property
    def ratio(self) -> float:
        """How many times faster ours is, in the median."""
        return float(np.median(np.divide(self.theirs_s, self.ours_s))) if self.theirs_s else float("nan")


# ------------------------------------------------------------------------------------------------------------- ours


def our_agent(task: Task, device: str, precision: Precision = "float32", share: float = 1.0) -> DPPO:
    """Our DPPO at the task's sizes, in an environment of them."""
    features = Features(task.observation_size, task.action_size)
    network = MLPConfig(task.hidden_size, activation=task.activation)
    config = DiffusionConfig(horizon=task.chunk, num_train_timesteps=DENOISING_STEPS, denoiser=network)
    policy = DiffusionPolicy(features, config).to(device)
    env = InProcessPool(_spec(task), task.n_envs, slice_size=task.n_envs)
    return DPPO(
        policy, env,
        DPPOConfig(
            tuned_steps=TUNED_STEPS, n_steps=max(1, round(share * task.n_steps)), n_epochs=task.n_epochs,
            batch_size=task.batch_size, learning_rate=1e-4, clip_range=0.01, clip_range_base=0.01,
            critic_activation="mish", target_kl=None, precision=precision,
        ),
    )  # fmt: skip


def _spec(task: Task) -> EnvSpec:
    if task.env is not None:
        return resolve(task.env)
    size = task.action_size
    return EnvSpec(
        id="sizes", builder="dprl.experiments.benchmarks.dppo:build_nothing", backend_id="", max_episode_steps=1000,
        observation_size=task.observation_size, action_low=(-1.0,) * size, action_high=(1.0,) * size,
    )  # fmt: skip


def build_nothing(spec: EnvSpec, seeds: list[int], num_threads: int = 0) -> Any:
    """Environments of the right sizes in which nothing happens: only updates are measured with them."""
    from dprl.envs.chunked import ChunkedEnv, SimulatorStep

    class Nothing:
        def reset(self, indices: Any, episodes: Any) -> FloatArray:
            return np.zeros((len(indices), spec.observation_size), np.float32)

        def step(self, indices: Any, actions: FloatArray) -> SimulatorStep:
            n, no = len(indices), np.zeros(len(indices), np.bool_)
            return SimulatorStep(np.zeros((n, spec.observation_size), np.float32), np.zeros(n, np.float32), no, no, no)

        def close(self) -> None: ...

    return ChunkedEnv(spec, Nothing(), seeds)


def random_rollout(task: Task, n_steps: int) -> Rollout:
    """Return numbers of the right shapes; how long an update takes does not depend on them."""
    rng = np.random.default_rng(0)
    rows, chunk = (n_steps, task.n_envs), (task.chunk, task.action_size)

    def normal(*shape: int) -> FloatArray:
        return rng.standard_normal((*rows, *shape), np.float32)

    no = np.zeros(rows, np.bool_)
    return Rollout(
        observations=normal(1, task.observation_size),
        chains=0.3 * normal(TUNED_STEPS + 1, *chunk),
        log_probs=normal(TUNED_STEPS, *chunk),
        step_rewards=normal(task.chunk),
        terminated=no, truncated=no, success=no,
        n_steps=np.full(rows, task.chunk),
        final_observations=normal(1, task.observation_size),
        episode_returns=normal(),
        episode_lengths=np.full(rows, 100),
        environments=np.arange(task.n_envs),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------ the authors'


class Reference:
    """The authors' model, driven as their training loop drives it."""

    def __init__(self, path: Path, task: Task, device: str) -> None:
        if str(path) not in sys.path:
            sys.path.insert(0, str(path))
        activation = {"relu": "ReLU", "mish": "Mish"}[task.activation]
        actor = importlib.import_module("model.diffusion.mlp_diffusion").DiffusionMLP(
            action_dim=task.action_size, horizon_steps=task.chunk, cond_dim=task.observation_size, time_dim=16,
            mlp_dims=[task.hidden_size] * 3, activation_type=activation, residual_style=True,
        )  # fmt: skip
        critic = importlib.import_module("model.common.critic").CriticObs(
            cond_dim=task.observation_size, mlp_dims=[256] * 3, activation_type="Mish", residual_style=True
        )
        self.model = importlib.import_module("model.diffusion.diffusion_ppo").PPODiffusion(
            gamma_denoising=0.99, clip_ploss_coef=0.01, actor=actor, critic=critic, ft_denoising_steps=TUNED_STEPS,
            horizon_steps=task.chunk, obs_dim=task.observation_size, action_dim=task.action_size,
            denoising_steps=DENOISING_STEPS, randn_clip_value=3, device=device,
        )  # fmt: skip
        self._task, self._device = task, device
        self._optimizers = [
            torch.optim.AdamW(self.model.actor_ft.parameters(), 1e-4, weight_decay=0.0),
            torch.optim.AdamW(self.model.critic.parameters(), 1e-3, weight_decay=0.0),
        ]

    @torch.no_grad()
    def decide(self, observations: Tensor) -> Any:
        """Sample chunks and chains for observations (B, 1, D)."""
        return self.model(cond={"state": observations}, deterministic=False, return_chain=True)

    def update(self, rollout: Rollout) -> None:
        """Everything between a rollout and the next."""
        observations, chains = (
            torch.as_tensor(array, device=self._device).flatten(0, 1)
            for array in (rollout.observations, rollout.chains)
        )
        at_once = 10_000  # their `logprob_batch_size`
        with torch.no_grad():
            values = torch.cat([self.model.critic({"state": part}).flatten() for part in observations.split(at_once)])
            parts = zip(observations.split(at_once), chains.split(at_once), strict=True)
            old = torch.cat([self.model.get_logprobs({"state": part}, own) for part, own in parts])
        old = old.view(len(chains), TUNED_STEPS, *chains.shape[2:])
        advantages = torch.as_tensor(rollout.rewards, device=self._device).flatten()
        size, total = self._task.batch_size, len(chains) * TUNED_STEPS
        for _ in range(self._task.n_epochs):
            order = torch.randperm(total, device=self._device)
            for start in range(max(1, total // size)):
                row, step = torch.unravel_index(order[start * size : (start + 1) * size], (len(chains), TUNED_STEPS))
                losses = self.model.loss(
                    {"state": observations[row]}, chains[row, step], chains[row, step + 1], step, values[row],
                    values[row], advantages[row].clone(), old[row, step], use_bc_loss=False,
                    reward_horizon=self._task.chunk,
                )  # fmt: skip
                for optimizer in self._optimizers:
                    optimizer.zero_grad()
                (losses[0] + 0.5 * losses[2]).backward()
                for optimizer in self._optimizers:
                    optimizer.step()

    def iteration(self, env: AsyncVectorEnv, rollout: Rollout) -> None:
        """Step a process per environment for a whole rollout, with their policy, and update on as many numbers."""
        observation: Any = env.reset(seed=0)[0]
        for _ in range(self._task.n_steps):
            seen = torch.as_tensor(np.asarray(observation, np.float32)[:, None], device=self._device)
            actions = self.decide(seen).trajectories.cpu().numpy()
            for action in actions.swapaxes(0, 1):
                observation, *_ = env.step(action)
        self.update(rollout)


# -------------------------------------------------------------------------------------------------------- the floor


@torch.no_grad()
def multiplying_rate(device: str, size: int, rows: int) -> float:
    """Return the floating point operations per second of (rows, size) @ (size, size)."""
    a, b = torch.randn(rows, size, device=device), torch.randn(size, size, device=device)
    best = min(seconds(lambda: a @ b, device) for _ in range(10))
    return 2 * rows * size * size / best


def products(network: nn.Module, *, training: bool) -> int:
    """Return the floating point operations of a row's matrix products: the forward pass, and the backward with it.

    The first layer's inputs need no gradient.
    """
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
    numbers = [layer.in_features * layer.out_features for layer in layers]
    return 2 * (3 * sum(numbers) - numbers[0] if training else sum(numbers))


# ------------------------------------------------------------------------------------------------------ measurement


class Measured(NamedTuple):
    """What is to be measured: our ways, of which the second is compiled, and the authors'."""

    figure: Figure
    ours: Sequence[Action]
    theirs: Action | None


@contextmanager
def our_agents(config: DPPOBenchmark, task: Task, share: float = 1.0) -> Iterator[list[DPPO]]:
    """One, and one that is compiled where that is asked for."""
    agents = [our_agent(task, config.device, config.precision, share) for _ in range(1 + config.compiled)]
    for agent in agents[1:]:
        agent.compile()
    try:
        yield agents
    finally:
        for agent in agents:
            agent.pool.close()


@contextmanager
def sampling(config: DPPOBenchmark, name: str, batch: int) -> Iterator[Measured]:
    """Decisions, `batch` at once."""
    task = TASKS[name]
    obs = torch.zeros(batch, 1, task.observation_size, device=config.device)
    generator = torch_generator(0, "benchmark", device=config.device)
    theirs = None if config.reference is None else Reference(config.reference, task, config.device)
    rate = multiplying_rate(config.device, task.hidden_size, batch)

    def decide(agent: DPPO) -> None:
        for _ in range(SAMPLES_AT_ONCE):
            agent.mdp.sample(obs, generator=generator)

    with one_thread_if(batch < 256), our_agents(config, task, share=0.01) as agents:
        flops = SAMPLES_AT_ONCE * batch * DENOISING_STEPS * products(_network(agents[0]), training=False)
        yield Measured(
            Figure(name, f"sampling, batch {batch}", "decisions", SAMPLES_AT_ONCE * batch, floor_s=flops / rate),
            [partial(decide, agent) for agent in agents],
            None if theirs is None else lambda: [theirs.decide(obs) for _ in range(SAMPLES_AT_ONCE)],
        )


@contextmanager
def one_thread_if(small: bool) -> Iterator[None]:
    """Small batches are faster on one thread of a CPU, for both sides."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if small else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def update(config: DPPOBenchmark, name: str) -> Iterator[Measured]:
    """The update alone, on a share of an iteration's decisions."""
    task = TASKS[name]
    theirs = None if config.reference is None else Reference(config.reference, task, config.device)
    with our_agents(config, task, config.share) as agents:
        rollout = random_rollout(task, agents[0].config.n_steps)
        samples = rollout.rewards.size * TUNED_STEPS * task.n_epochs
        yield Measured(
            Figure(name, "update", "samples", samples, floor_s=_update_floor(config, agents[0], task, samples)),
            [partial(agent.update, rollout) for agent in agents],
            None if theirs is None else partial(theirs.update, rollout),
        )


@contextmanager
def iteration(config: DPPOBenchmark, name: str) -> Iterator[Measured]:
    """A whole iteration, in the task's environments."""
    task = TASKS[name]
    rollout = random_rollout(task, task.n_steps)
    steps = rollout.rewards.size * task.chunk
    samples = rollout.rewards.size * TUNED_STEPS * task.n_epochs
    theirs, env = None, None
    if config.reference is not None:
        reference = Reference(config.reference, task, config.device)
        env = AsyncVectorEnv([partial(gymnasium.make, str(task.env))] * task.n_envs)
        theirs = partial(reference.iteration, env, rollout)

    def iterate(agent: DPPO) -> None:
        agent.update(agent.collect())

    try:
        with our_agents(config, task) as agents:
            first = agents[0]
            actions = np.zeros((task.n_envs, task.chunk, task.action_size), np.float32)
            first.pool.reset()
            start = time.perf_counter()
            for _ in range(task.n_steps):
                first.pool.step_chunk(actions)
            simulator = time.perf_counter() - start
            flops = rollout.rewards.size * DENOISING_STEPS * products(_network(first), training=False)
            deciding = flops / multiplying_rate(config.device, task.hidden_size, task.n_envs)
            floor = simulator + deciding + _update_floor(config, first, task, samples)
            yield Measured(
                Figure(name, "iteration", "environment steps", steps, floor_s=floor),
                [partial(iterate, agent) for agent in agents],
                theirs,
            )
    finally:
        if env is not None:
            env.close()


def _network(agent: DPPO) -> nn.Module:
    policy = agent.policy
    assert isinstance(policy, DiffusionPolicy)
    assert isinstance(policy.base, DenoisingMLP)
    return policy.base.net


def _update_floor(config: DPPOBenchmark, agent: DPPO, task: Task, samples: int) -> float:
    """What the actor's products take for pairs of decision and denoising step, and the critic's for decisions."""
    rate = multiplying_rate(config.device, task.hidden_size, min(task.batch_size, 20_000))
    flops = samples * products(_network(agent), training=True)
    return (flops + samples // TUNED_STEPS * products(agent.critic, training=True)) / rate


def measurements(config: DPPOBenchmark) -> list[Callable[[], Any]]:
    """Return everything to measure."""
    found: list[Callable[[], Any]] = []
    for name in config.tasks:
        if "sampling" in config.parts:
            found += [partial(sampling, config, name, batch) for batch in config.batches]
        if "update" in config.parts:
            found.append(partial(update, config, name))
        if "iteration" in config.parts and TASKS[name].env is not None:
            found.append(partial(iteration, config, name))
    return found


def figures(config: DPPOBenchmark) -> list[Figure]:
    """Measure everything."""
    found, all_of_them = [], measurements(config)
    with ProgressBar("measure", len(all_of_them) * config.repeats) as bar:
        for opened in all_of_them:
            torch.compiler.reset()  # torch compiles no more than eight sizes
            with opened() as (figure, ours, theirs):
                bar.note(f"{figure.task}, {figure.what}")
                long = figure.what == "iteration"  # needs no warming up, but for what compiles
                for action in ours[1:] if long else (*ours, theirs):
                    if action is not None:
                        action()
                names = (figure.what, f"{figure.what}, compiled")
                own = [replace(figure, what=name, ours_s=[]) for name, _ in zip(names, ours, strict=False)]
                for _ in range(config.repeats):
                    for way, action in zip(own, ours, strict=True):
                        way.ours_s.append(seconds(action, config.device))
                    if theirs is not None:
                        figure.theirs_s.append(seconds(theirs, config.device))
                    bar.advance(1)
            found += own  # which share what the authors' code took
    return found


def main(config: DPPOBenchmark) -> None:
    """Measure and print one table."""
    found = figures(config)
    table = Table("task", "what", "ours", "the authors'", "times faster", "all", "share of the floor", box=None)
    for figure in found:
        ours = figure.amount / np.median(figure.ours_s)
        ratio, every = f"{figure.ratio:.2f}", ""
        if figure.theirs_s:
            ratios = np.divide(figure.theirs_s, figure.ours_s)
            every = f"{ratios.min():.2f} to {ratios.max():.2f}"
        else:
            stored = STORED.get((figure.task, figure.what)) if config.device == "cpu" else None
            ratio = "" if stored is None else f"{stored:.2f} (stored)"
        table.add_row(
            figure.task, figure.what, f"{ours:,.0f} {figure.unit}/s",
            f"{figure.amount / np.median(figure.theirs_s):,.0f}" if figure.theirs_s else "",
            ratio, every, f"{figure.floor_s / np.median(figure.ours_s):.0%}",
        )  # fmt: skip
    console = Console()
    console.print(table)
    console.print(
        f"{config.repeats} repeats on {config.device}, {available_cores()} cores, torch {torch.__version__}; our "
        f"updates in {config.precision}, all else in float32"
    )
    if config.reference is None:
        console.print(f"stored ratios were measured on {STORED_ON}; --reference PATH measures them here")
    if config.json is not None:
        content = {"config": asdict(config), "figures": [asdict(figure) for figure in found]}
        config.json.write_text(json.dumps(content, indent=1, default=str), encoding="utf-8")


if __name__ == "__main__":
    command(main, DPPOBenchmark)
