"""Evaluation: a pure function of policy, task and seed. It builds environments of its own and leaves nothing behind."""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from dprl.cores import one_thread
from dprl.errors import EnvFaultError, LocatedEnvError, check, check_count
from dprl.guidance import Guide
from dprl.observations import put, take, to_tensors
from dprl.policy import InferenceConfig, Policy, RecedingHorizon, Scorer
from dprl.rollout.pool import MAX_SLICE, checked_slice_size, require_fit
from dprl.rollout.recording import Recorder, Trajectory
from dprl.seeding import torch_generator
from dprl.spec import BatchedEnv, EnvSpec, build, env_seeds, with_n_obs_steps

Z95 = 1.959963984540054
MAX_ENVS = 50
MAX_FAILURES = 3
LATENCY_CALLS = 30

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """How a policy did."""

    env: str
    episodes: int
    seed: int
    success_rate: float | None
    """Share of episodes with a success; None where the environment reports none."""
    success_ci95: tuple[float, float] | None
    """Wilson's interval."""
    return_mean: float
    return_ci95: tuple[float, float] | None
    """Mean ± 1.96 standard errors; None of a single episode."""
    episode_length_mean: float
    """Environment steps."""
    policy_latency_ms_p50: float
    """Median time of one decision for one environment, milliseconds."""

    @property
    def score(self) -> float:
        """What the best checkpoint is chosen by: success where there is one, else return."""
        return self.return_mean if self.success_rate is None else self.success_rate

    def metrics(self) -> dict[str, float]:
        """Return the figures for a log, without the timing."""
        values = {"return_mean": self.return_mean, "episode_length_mean": self.episode_length_mean}
        if self.success_rate is not None and self.success_ci95 is not None:
            low, high = self.success_ci95
            values |= {"success_rate": self.success_rate, "success_low": low, "success_high": high}
        return {f"eval/{name}": value for name, value in values.items()}

    def to_json(self) -> dict[str, Any]:
        """Return plain data for `json.dump`."""
        return asdict(self)


def evaluate(
    policy: Policy,
    spec: EnvSpec,
    episodes: int,
    seed: int,
    *,
    inference: InferenceConfig | None = None,
    guide: Guide | None = None,
    scorer: Scorer | None = None,
    on_progress: Callable[[int], None] | None = None,
    max_failures: int = MAX_FAILURES,
) -> Evaluation:
    """Play `episodes` episodes without exploration noise.

    Episode i starts from a state that depends on `seed` and i alone.

    Args:
        policy: what acts.
        spec: the task; its observation history is set to the policy's.
        episodes: how many.
        seed: of the start states and of the policy's noise.
        inference: how the policy acts. Default: its own way.
        guide: moves its denoising steps, see `dprl.guidance`.
        scorer: chooses among candidates. Default: the policy's own.
        on_progress: called with the number of episodes that just ended.
        max_failures: how often it is made again after an environment has failed.

    Raises:
        ConfigError: an argument of another kind, or a setting of `inference` that the policy does not have.
        EnvError: the policy's sizes are not the environment's.
    """
    check_evaluation(policy, spec, episodes, seed)
    control = RecedingHorizon(policy, inference, guide=guide, scorer=scorer)
    progress = _Progress(on_progress)
    for failures in itertools.count(1):
        try:
            outcomes = play(control, spec, episodes, seed, on_progress=progress.again())
            break
        except EnvFaultError as fault:
            if failures > max_failures:
                raise
            log.warning("%s; the evaluation is made again (failure %d)", fault, failures)
    return summary(control, spec, seed, outcomes)


def check_evaluation(policy: Policy, spec: EnvSpec, episodes: int, seed: int) -> None:
    """Raise ConfigError unless the arguments of an evaluation are what they must be, and EnvError where they misfit."""
    remedy = f"must be a policy{': the MDP has it as .policy' if hasattr(policy, 'tuned_steps') else ''}"
    check(isinstance(policy, Policy), "policy", type(policy).__name__, remedy)
    check(isinstance(spec, EnvSpec), "spec", spec, "must be an EnvSpec, as dprl.spec.resolve(name) returns it")
    check_count("episodes", episodes)
    check_count("seed", seed, 0)
    require_fit(policy, spec)


class _Progress:
    """Says how many episodes have ended, those of an evaluation that is made again only once."""

    def __init__(self, on_progress: Callable[[int], None] | None) -> None:
        self._say, self._said, self._played = on_progress, 0, 0

    def again(self) -> Callable[[int], None]:
        """Count from the first episode on."""
        self._played = 0
        return self._advance

    def _advance(self, n: int) -> None:
        self._played += n
        if self._say is not None and self._played > self._said:
            self._say(self._played - self._said)
            self._said = self._played


class Outcome(NamedTuple):
    """How one episode ended."""

    success: bool
    episode_return: float
    length: int
    """Environment steps."""


def seats(episodes: int) -> list[slice]:
    """Return the environments of an evaluation, slice by slice: what can be played apart."""
    n = min(episodes, MAX_ENVS)
    size = checked_slice_size(n, None)
    slices = n // size if 2 * size >= MAX_SLICE else math.ceil(n / MAX_SLICE)  # of unequal size, rather than of a few
    edges = [n * i // slices for i in range(slices + 1)]
    return [slice(first, last) for first, last in itertools.pairwise(edges)]


def play(
    control: RecedingHorizon,
    spec: EnvSpec,
    episodes: int,
    seed: int,
    part: slice | None = None,
    num_threads: int = 0,
    *,
    on_progress: Callable[[int], None] | None = None,
) -> dict[int, Outcome]:
    """Play the episodes of the environments `part`, one of `seats` (default: of all); return them by their numbers.

    An episode is the same in both cases. See `evaluate`.
    """
    with _environments(control.policy, spec, episodes, seed, part, num_threads) as env:
        try:
            return _play(control, env, episodes, seed, part, on_progress)
        except LocatedEnvError as error:
            raise error.counted_from(part.start if part else 0) from error


def summary(control: RecedingHorizon, spec: EnvSpec, seed: int, outcomes: dict[int, Outcome]) -> Evaluation:
    """Sum up what `play` returned."""
    episodes = len(outcomes)
    success, returns, lengths = (
        np.asarray(column) for column in zip(*(outcomes[i] for i in sorted(outcomes)), strict=True)
    )
    rate = float(success.mean()) if spec.has_success else None
    mean = float(returns.mean())
    half = Z95 * float(returns.std(ddof=1)) / math.sqrt(episodes) if episodes > 1 else None
    return Evaluation(
        env=spec.id,
        episodes=episodes,
        seed=seed,
        success_rate=rate,
        success_ci95=None if rate is None else wilson(int(success.sum()), episodes),
        return_mean=mean,
        return_ci95=None if half is None else (mean - half, mean + half),
        episode_length_mean=float(lengths.mean()),
        policy_latency_ms_p50=_latency_ms(control),
    )


def record(
    policy: Policy,
    spec: EnvSpec,
    episodes: int,
    seed: int,
    *,
    inference: InferenceConfig | None = None,
    guide: Guide | None = None,
    scorer: Scorer | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> list[Trajectory]:
    """Play the same episodes as `evaluate` does and return them step by step."""
    check_evaluation(policy, spec, episodes, seed)
    control = RecedingHorizon(policy, inference, guide=guide, scorer=scorer)
    with _environments(policy, spec, episodes, seed) as env:
        recorder = Recorder(env)
        _play(control, recorder, episodes, seed, None, on_progress)
    n = env.n_envs
    return [recorder.trajectories[i % n][i // n] for i in range(episodes)]


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a rate (E. B. Wilson, 1927)."""
    rate, z2 = successes / n, Z95**2
    centre = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(rate * (1 - rate) / n + z2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


@contextmanager
def _environments(
    policy: Policy, spec: EnvSpec, episodes: int, seed: int, part: slice | None = None, num_threads: int = 0
) -> Iterator[BatchedEnv]:
    spec = with_n_obs_steps(spec, policy.config.n_obs_steps)
    part = part or slice(0, min(episodes, MAX_ENVS))
    env = build(spec, env_seeds(seed, part.stop - part.start, part.start, purpose="evaluation"), num_threads)
    try:
        yield env
    finally:
        env.close()


def _play(
    control: RecedingHorizon,
    env: BatchedEnv,
    episodes: int,
    seed: int,
    part: slice | None,
    on_progress: Callable[[int], None] | None,
) -> dict[int, Outcome]:
    """Episode i is number i div M of environment i mod M, of M environments of which `env` has the `part`."""
    n, everywhere = env.n_envs, min(episodes, MAX_ENVS)
    first = part.start if part else 0
    whole = seats(episodes)
    numbers = [i for i, seat in enumerate(whole) if first <= seat.start < first + n]
    slices = [slice(whole[i].start - first, whole[i].stop - first) for i in numbers]
    generators = [torch_generator(seed, "evaluation", i) for i in numbers]
    memories = [control.start(s.stop - s.start) for s in slices]
    observation = env.reset()
    quota = np.array([len(range(first + i, episodes, everywhere)) for i in range(n)])
    played = np.zeros(n, np.int64)
    outcomes: dict[int, Outcome] = {}
    while (played < quota).any():
        chunks = []
        for i, own in enumerate(slices):  # whole slices, so that a row's batch does not depend on who still plays
            with one_thread():
                chunk, memories[i] = control.plan(to_tensors(take(observation, own)), memories[i], generators[i])
            chunks.append(chunk.cpu())
        rows = np.flatnonzero(played < quota)
        step = env.step_chunk(torch.cat(chunks).numpy()[rows], rows, autoreset=False)
        put(observation, rows, step.observation)
        for i in np.flatnonzero(step.ended):
            episode = first + int(rows[i]) + everywhere * int(played[rows[i]])
            outcomes[episode] = Outcome(
                bool(step.success[i]), float(step.episode_return[i]), int(step.episode_length[i])
            )
        ended = rows[step.ended]
        played[ended] += 1
        fresh = torch.from_numpy(np.isin(np.arange(n), ended))
        memories = [memory.forget(fresh[own]) for memory, own in zip(memories, slices, strict=True)]
        again = ended[played[ended] < quota[ended]]
        if len(again):
            put(observation, again, env.reset(again))
        if on_progress is not None and len(ended):
            on_progress(len(ended))
    return outcomes


def _latency_ms(control: RecedingHorizon) -> float:
    policy = control.policy
    obs = policy.blank_observation(1)
    generator = torch_generator(0, "latency", device=policy.device)
    memory, times = control.start(1), []
    with one_thread():
        for _ in range(LATENCY_CALLS):
            start = time.perf_counter()
            actions, memory = control.plan(obs, memory, generator)
            actions.cpu()
            times.append(time.perf_counter() - start)
    return 1000 * float(np.median(times))
