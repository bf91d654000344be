"""Simulator steps per second, by what runs the environments: with and without a policy in the loop, and memory.

    python -m dprl.experiments.benchmarks.rollout [--reference PATH] [--device cuda]

Everything is measured in turn in the same run, several times; figures are medians, ratios are medians of the ratios of
measurements next to each other. `--reference` is where a checkout of the DPPO authors' code lies: its own policy then
acts in the loop of a process per environment, as it does there.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import psutil
import torch
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dprl.config import validate
from dprl.cores import available_cores
from dprl.envs.gymnasium import make_single
from dprl.errors import check
from dprl.experiments.benchmarks import check_reference, command
from dprl.experiments.runs import check_device
from dprl.mdp import Chain, DenoisingMDP, ExplorationConfig
from dprl.networks import MLPConfig
from dprl.observations import TensorObservation, batch_size
from dprl.policy import DiffusionConfig, DiffusionPolicy, Features
from dprl.rollout import InProcessPool, RolloutPool
from dprl.rollout.pool import Actor
from dprl.seeding import torch_generator
from dprl.spec import EnvOptions, EnvSpec, FloatArray, resolve
from dprl.training.progress import ProgressBar

SPIN = "1 ms of Python"
SPIN_S = 1e-3
DENOISING_STEPS, TUNED_STEPS, HIDDEN = 20, 10, 512
PROCESSES, INSIDE, ALONE = "a process each", "a process each, chunks inside", "MuJoCo's steps alone"
"""What others are compared with: `AsyncVectorEnv`, the same as the DPPO authors use it, and the floor."""


@dataclass(frozen=True)
class RolloutBenchmark:
    """What to measure."""

    envs: tuple[str, ...] = ("Hopper-v5", "HalfCheetah-v5", "metaworld/push-v3", SPIN)
    n_envs: int = 40
    chunk: int = 4
    """Environment steps per decision."""
    workers: tuple[int, ...] = (1, 2)
    """Ray workers."""
    seconds: float = 3.0
    """Of each measurement."""
    repeats: int = 3
    device: str = "cpu"
    """Where every policy acts but those of Ray's workers, which have no accelerator."""
    reference: Path | None = None
    """A checkout of the DPPO authors' code, whose policy acts beside gymnasium.vector."""
    json: Path | None = None
    """Also write the figures to this file."""

    def __post_init__(self) -> None:
        validate(self, at_least=dict.fromkeys(("n_envs", "chunk", "repeats"), 1), above={"seconds": 0})
        check(self.n_envs % 2 == 0, "n_envs", self.n_envs, "must be even: one way divides them in halves")
        most = max(self.workers, default=1)
        for workers in self.workers:
            fits = workers >= 1 and most % workers == 0 and self.n_envs % most == 0
            check(fits, "workers", workers, f"must divide the largest, {most}, and that the {self.n_envs} environments")
        check_device(self.device)
        check_reference(self.reference)


@dataclass(frozen=True)
class Figure:
    """One way to run one task."""

    env: str
    way: str
    policy: bool
    steps_per_s: tuple[float, ...]
    """Of each repetition."""
    memory_mb: float
    """Of all processes, beyond what was there before (proportional set size)."""


Round = Callable[[], int]
"""One decision of every environment, or many; returns the environment steps that were simulated."""
Decide = Callable[[FloatArray], FloatArray]
"""Observations (N, D) to actions (N, E, A)."""


# ------------------------------------------------------------------------------------------- ways to run environments


class Spinner(gymnasium.Env[FloatArray, FloatArray]):
    """Keeps a core busy for a millisecond of its own time at every step."""

    observation_space = gymnasium.spaces.Box(-1, 1, (4,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, _: str = "") -> None:
        self._blank = np.zeros(4, np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[FloatArray, dict[str, Any]]:
        """Start."""
        return self._blank, {}

    def step(self, action: FloatArray) -> tuple[FloatArray, float, bool, bool, dict[str, Any]]:
        """Spin."""
        end = time.thread_time() + SPIN_S
        while time.thread_time() < end:
            pass
        return self._blank, 0.0, False, False, {}


class Chunked(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Executes a chunk of actions inside the environment's process, as the DPPO authors' code does."""

    def __init__(self, env: gymnasium.Env[Any, Any], chunk: int) -> None:
        super().__init__(env)
        space: Any = env.action_space
        low, high = (np.tile(bound, (chunk, 1)) for bound in (space.low, space.high))
        self.action_space = gymnasium.spaces.Box(low, high, dtype=space.dtype)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Step until the chunk or the episode ends."""
        total, n_steps = 0.0, 0
        for single in action:
            n_steps += 1
            observation, reward, terminated, truncated, _ = self.env.step(single)
            total += float(reward)
            if terminated or truncated:
                break
        return observation, total, terminated, truncated, {"n_steps": n_steps}


def task(name: str, *, fast: bool) -> EnvSpec:
    """Return the spec of a task: on EnvPool where it is (fast), or on Gymnasium."""
    if name != SPIN:
        return resolve(name, EnvOptions(backend="auto" if fast else "gymnasium"))
    return EnvSpec(
        id=SPIN, builder="dprl.envs.gymnasium:build", backend_id="dprl.experiments.benchmarks.rollout:Spinner!",
        observation_size=4, action_low=(-1.0, -1.0), action_high=(1.0, 1.0), max_episode_steps=1000, serial=True,
    )  # fmt: skip


def _single(spec: EnvSpec, chunk: int | None) -> gymnasium.Env[Any, Any]:
    env = make_single(spec.backend_id, spec.max_episode_steps)
    return env if chunk is None else Chunked(env, chunk)


@contextmanager
def vector(config: RolloutBenchmark, name: str, decide: Decide, *, processes: bool, inside: bool) -> Iterator[Round]:
    """`gymnasium.vector`, with a chunk executed inside the environment's process, or sent step by step."""
    make = partial(_single, task(name, fast=False), config.chunk if inside else None)
    env: Any = (AsyncVectorEnv if processes else SyncVectorEnv)([make] * config.n_envs)
    observation, _ = env.reset(seed=0)
    ended = np.zeros(config.n_envs, np.bool_)

    def once() -> int:
        nonlocal observation, ended
        actions, n_steps = decide(observation), 0
        for action in [actions] if inside else actions.swapaxes(0, 1):
            starting = ended  # these are reset now, and not stepped
            observation, _, terminated, truncated, info = env.step(action)
            n_steps += int(info.get("n_steps", ~starting)[~starting].sum())
            ended = terminated | truncated
        return n_steps

    try:
        yield once
    finally:
        env.close()


@contextmanager
def pool(make: Callable[[], RolloutPool], actor: Actor) -> Iterator[Round]:
    """One of our pools; 10 decisions a round."""
    with make() as built:
        yield lambda: int(built.collect(actor, 10).n_steps.sum())


@contextmanager
def physics(config: RolloutBenchmark, name: str) -> Iterator[Round]:
    """The floor: MuJoCo's own steps on all cores, by `mujoco.rollout`; no observations, no resets, no Python."""
    import mujoco
    from mujoco import rollout

    env: Any = make_single(task(name, fast=False).backend_id).unwrapped
    env.reset(seed=0)
    model, cores = env.model, available_cores()
    rng, n_steps = np.random.default_rng(0), 100
    low, high = model.actuator_ctrlrange.T
    control = rng.uniform(low, high, (config.n_envs, n_steps, model.nu))
    data = [mujoco.MjData(model) for _ in range(cores)]
    full = np.zeros(mujoco.mj_stateSize(model, mujoco.mjtState.mjSTATE_FULLPHYSICS))
    mujoco.mj_getState(model, env.data, full, mujoco.mjtState.mjSTATE_FULLPHYSICS)
    with contextlib.closing(env), rollout.Rollout(nthread=cores) as threads:

        def once() -> int:
            threads.rollout([model] * config.n_envs, data, np.tile(full, (config.n_envs, 1)), control)
            return int(config.n_envs * n_steps // env.frame_skip)

        yield once


# ----------------------------------------------------------------------------------------------------------- policies


@dataclass(frozen=True)
class RandomActor:
    """Acts at random; costs nothing."""

    n_action_steps: int
    action_size: int

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """One draw."""
        return 1, self.n_action_steps, self.action_size

    def sample(self, obs: TensorObservation, *, noise: Tensor) -> Chain:
        """Take the noise for actions."""
        assert noise.shape[1] == batch_size(obs)
        return Chain(noise[0][:, None], noise[0][:, None], noise[0].clamp(-1, 1))

    def cpu(self) -> RandomActor:
        """It is there."""
        return self


def random_decision(config: RolloutBenchmark, spec: EnvSpec) -> Decide:
    """Return actions at random; costs nothing."""
    rng = np.random.default_rng(0)
    low, high = np.asarray(spec.action_low, np.float32), np.asarray(spec.action_high, np.float32)
    shape = (config.n_envs, config.chunk, spec.action_size)
    return lambda observation: np.clip(rng.standard_normal(shape, np.float32), low, high)  # as `RandomActor` does


def our_policy(spec: EnvSpec, chunk: int, device: str = "cpu") -> DenoisingMDP:
    """The size of the reference's policy for locomotion: 512 x 3, 20 denoising steps of which 10 are tuned."""
    network = MLPConfig(hidden_size=HIDDEN)
    policy_config = DiffusionConfig(
        horizon=chunk, n_action_steps=chunk, num_train_timesteps=DENOISING_STEPS, denoiser=network
    )
    policy = DiffusionPolicy(Features(spec.observation_size, spec.action_size), policy_config).to(device)
    return DenoisingMDP(policy, TUNED_STEPS, ExplorationConfig())


def our_decision(config: RolloutBenchmark, spec: EnvSpec) -> Decide:
    """Our policy, outside a pool."""
    mdp = our_policy(spec, config.chunk, config.device)
    generator = torch_generator(0, "benchmark", device=config.device)

    def decide(observation: FloatArray) -> FloatArray:
        obs = torch.as_tensor(np.asarray(observation, np.float32))[:, None]
        actions: FloatArray = mdp.sample(obs, generator=generator).actions.cpu().numpy()
        return actions

    return decide


def reference_decision(path: Path, config: RolloutBenchmark, spec: EnvSpec) -> Decide:
    """The authors' policy, by their own code."""
    if str(path) not in sys.path:
        sys.path.insert(0, str(path))
    network = importlib.import_module("model.diffusion.mlp_diffusion").DiffusionMLP(
        action_dim=spec.action_size, horizon_steps=config.chunk, cond_dim=spec.observation_size, time_dim=16,
        mlp_dims=[HIDDEN] * 3, activation_type="ReLU", residual_style=True,
    )  # fmt: skip
    critic = importlib.import_module("model.common.critic").CriticObs(
        cond_dim=spec.observation_size, mlp_dims=[256] * 3, activation_type="Mish", residual_style=True
    )
    model = importlib.import_module("model.diffusion.diffusion_ppo").PPODiffusion(
        gamma_denoising=0.99, clip_ploss_coef=0.01, actor=network, critic=critic, ft_denoising_steps=TUNED_STEPS,
        horizon_steps=config.chunk, obs_dim=spec.observation_size, action_dim=spec.action_size,
        denoising_steps=DENOISING_STEPS, randn_clip_value=3, device=config.device,
    )  # fmt: skip

    @torch.no_grad()
    def decide(observation: FloatArray) -> FloatArray:
        cond = {"state": torch.from_numpy(np.asarray(observation, np.float32)[:, None]).to(config.device)}
        actions: FloatArray = model(cond=cond, deterministic=False, return_chain=True).trajectories.cpu().numpy()
        return actions

    return decide


# -------------------------------------------------------------------------------------------------------- measurement


def ways(config: RolloutBenchmark, name: str, *, policy: bool) -> dict[str, Callable[[], Any]]:
    """Return every way to run a task, as functions that open it."""
    spec = task(name, fast=True)
    actor: Actor = (
        our_policy(spec, config.chunk, config.device) if policy else RandomActor(config.chunk, spec.action_size)
    )
    decide = our_decision(config, spec) if policy else random_decision(config, spec)
    theirs = reference_decision(config.reference, config, spec) if policy and config.reference else decide
    found: dict[str, Callable[[], Any]] = {
        PROCESSES: partial(vector, config, name, theirs, processes=True, inside=False),
        INSIDE: partial(vector, config, name, theirs, processes=True, inside=True),
        "one after the other": partial(vector, config, name, decide, processes=False, inside=False),
        "pool, in process": partial(pool, partial(InProcessPool, spec, config.n_envs, slice_size=config.n_envs), actor),
        "pool, double buffer": partial(
            pool, partial(InProcessPool, spec, config.n_envs, slice_size=config.n_envs // 2, double_buffer=True), actor
        ),
    }
    for n in config.workers:
        found[f"pool, Ray, {n} worker{'s' * (n > 1)}"] = partial(pool, partial(_on_ray, config, spec, n), actor)
    if not policy and name != SPIN:
        found[ALONE] = partial(physics, config, name)
    return found


def _on_ray(config: RolloutBenchmark, spec: EnvSpec, num_workers: int) -> RolloutPool:
    from dprl.rollout.ray_pool import RayPool

    return RayPool(spec, config.n_envs, num_workers=num_workers, slice_size=config.n_envs // max(config.workers))


def measure(run: Round, seconds: float) -> float:
    """Return steps per second after a round to warm up."""
    run()
    steps, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds:
        steps += run()
    return steps / passed


def memory_mb() -> float:
    """Return the proportional set size of this process and all that it started."""
    total = 0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            total += process.memory_full_info().pss
    return total / 1e6


def figures(config: RolloutBenchmark) -> list[Figure]:
    """Measure everything."""
    found = []
    everything = [(name, policy) for name in config.envs for policy in (False, True) if not (policy and name == SPIN)]
    openers = {(name, policy): ways(config, name, policy=policy) for name, policy in everything}
    with ProgressBar("measure", config.repeats * sum(map(len, openers.values()))) as bar:
        for (name, policy), each in openers.items():
            speeds: dict[str, list[float]] = {way: [] for way in each}
            memory: dict[str, list[float]] = {way: [] for way in each}
            for _ in range(config.repeats):
                for way, opened in each.items():
                    bar.note(f"{name}, {way}")
                    before = memory_mb()
                    with opened() as run:
                        speeds[way].append(measure(run, config.seconds))
                        memory[way].append(memory_mb() - before)
                    bar.advance(1)
            found += [Figure(name, w, policy, tuple(speeds[w]), float(np.median(memory[w]))) for w in each]
    return found


def ratio(one: Figure, other: Figure) -> float:
    """Median of the ratios of measurements next to each other."""
    return float(np.median(np.divide(one.steps_per_s, other.steps_per_s)))


def checking_s(config: RolloutBenchmark, name: str, repeats: int = 2000) -> float:
    """Return the seconds of an environment step that a pool spends on asking whether all numbers are finite."""
    spec, n = task(name, fast=True), config.n_envs
    each_step = [np.zeros((n, spec.observation_size), np.float32), np.zeros(n, np.float32)]
    actions = np.zeros((n, config.chunk, spec.action_size), np.float32)
    start = time.perf_counter()
    for _ in range(repeats):
        for array in [*(each_step * config.chunk), actions]:
            assert np.isfinite(array).all()
    return (time.perf_counter() - start) / (repeats * n * config.chunk)


def main(config: RolloutBenchmark) -> None:
    """Measure and print one table."""
    found = figures(config)
    bases = tuple(f"times '{base}'" for base in (PROCESSES, INSIDE, ALONE))
    columns = ("environment", "policy", "way", "steps/s", *bases, "MB")
    table = Table(*columns, box=None)
    for figure in found:
        same = {f.way: f for f in found if (f.env, f.policy) == (figure.env, figure.policy)}
        table.add_row(
            figure.env,
            f"{HIDDEN} x 3, K = {DENOISING_STEPS}" if figure.policy else "none",
            figure.way,
            f"{np.median(figure.steps_per_s):,.0f}",
            *(
                "" if base is None else f"{ratio(figure, base):.2f}"
                for base in (same[PROCESSES], same[INSIDE], same.get(ALONE))
            ),
            f"{figure.memory_mb:,.0f}",
        )
    Console().print(table)
    theirs = "the authors' policy" if config.reference else "our policy"
    Console().print(
        f"{config.n_envs} environments, chunks of {config.chunk}; {theirs} beside gymnasium.vector's processes, ours "
        f"elsewhere; {config.repeats} times {config.seconds:g} s each; {available_cores()} cores; "
        f"policies on {config.device}"
    )
    for figure in found:
        if figure.way == "pool, in process" and not figure.policy:
            share = checking_s(config, figure.env) * float(np.median(figure.steps_per_s))
            Console().print(
                f"{figure.env}: checking observations, rewards and actions is {share:.2%} of that pool's time"
            )
    if config.json is not None:
        content = {"config": asdict(config), "figures": [asdict(figure) for figure in found]}
        config.json.write_text(json.dumps(content, indent=1, default=str), encoding="utf-8")


if __name__ == "__main__":
    command(main, RolloutBenchmark)
