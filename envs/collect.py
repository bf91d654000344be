"""Demonstrations: an expert plays, with noise, in a batched environment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from dprl.data import Episodes
from dprl.envs.chunked import Privileged
from dprl.envs.experts import Expert
from dprl.errors import check
from dprl.observations import Observation, images_of, map_parts, state_of, take
from dprl.seeding import numpy_generator
from dprl.spec import ChunkStep, EnvSpec, FloatArray, build, env_seeds, with_n_obs_steps
from dprl.training.progress import ProgressBar

MAX_ENVS = 20
LATEST = (slice(None), -1)


@dataclass
class _Episode:
    """An episode while it is played."""

    observations: list[Observation] = field(default_factory=list)
    actions: list[FloatArray] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    terminated: bool = False
    success: bool = False


def collect_episodes(
    spec: EnvSpec,
    expert: Expert,
    noise: float,
    n_episodes: int,
    seed: int,
    *,
    transitions: int | None = None,
    progress_bar: bool = False,
) -> Episodes:
    """Play one episode in each of `n_episodes` environments and return them, failures included.

    Args:
        spec: the task.
        expert: who plays.
        noise: standard deviation of the Gaussian noise added to every action; actions are clipped afterwards, and
            stored as they were executed.
        n_episodes: how many.
        seed: of start states and noise. Episode i depends on `seed` and i alone.
        transitions: play until there are so many environment steps, in place of `n_episodes`; the last one is whole.
        progress_bar: show one.
    """
    check(n_episodes >= 1, "n_episodes", n_episodes, "must be at least 1")
    spec = with_n_obs_steps(spec, 1)
    seeds: list[int] = []
    episodes: list[_Episode] = []
    count = _count_episodes if transitions is None else _count_steps
    with ProgressBar("collect", transitions or n_episodes, shown=progress_bar) as bar:
        while not _enough(episodes, n_episodes, transitions):
            n = min(MAX_ENVS, n_episodes - len(seeds)) if transitions is None else MAX_ENVS
            new = env_seeds(seed, n, first=len(seeds), purpose="demonstrations")
            episodes += _play(spec, expert, noise, new, seed, len(seeds), lambda step: bar.advance(count(step)))
            seeds += new
    if transitions is not None:
        last = int(np.searchsorted(np.cumsum([len(e.actions) for e in episodes]), transitions))
        episodes, seeds = episodes[: last + 1], seeds[: last + 1]
    observations = _stack([o for e in episodes for o in e.observations[:-1]])
    final_observations = _stack([e.observations[-1] for e in episodes])
    return Episodes(
        observations=_state(observations, int(sum(len(e.actions) for e in episodes))),
        actions=np.concatenate([np.stack(e.actions) for e in episodes]),
        rewards=np.concatenate([np.asarray(e.rewards, np.float32) for e in episodes]),
        final_observations=_state(final_observations, len(episodes)),
        ends=np.cumsum([len(e.actions) for e in episodes]),
        terminated=np.array([e.terminated for e in episodes]),
        success=np.array([e.success for e in episodes]),
        seeds=np.array(seeds, np.int64),
        env_id=spec.id,
        images=images_of(observations),
        final_images=images_of(final_observations),
        success_known=spec.has_success,
        reward_kind=spec.reward,
    )


def _enough(episodes: list[_Episode], n_episodes: int, transitions: int | None) -> bool:
    if transitions is None:
        return len(episodes) >= n_episodes
    return sum(len(e.actions) for e in episodes) >= transitions


def _count_episodes(step: ChunkStep) -> int:
    return int(step.ended.sum())


def _count_steps(step: ChunkStep) -> int:
    return len(step.ended)


def _stack(observations: list[Observation]) -> Observation:
    """One observation with a new leading axis."""
    stacked: Observation = map_parts(lambda *parts: np.stack(parts), *observations)
    return stacked


def _state(observation: Observation, n: int) -> FloatArray:
    """(n, D); of no numbers, where there are images alone."""
    state: FloatArray | None = state_of(observation)
    return np.zeros((n, 0), np.float32) if state is None else state


def _play(
    spec: EnvSpec,
    expert: Expert,
    noise: float,
    seeds: list[int],
    seed: int,
    first: int,
    on_step: Callable[[ChunkStep], None],
) -> list[_Episode]:
    env = build(spec, seeds)
    streams = [numpy_generator(seed, "action noise", first + i) for i in range(len(seeds))]
    low, high = np.asarray(spec.action_low, np.float32), np.asarray(spec.action_high, np.float32)
    latest = take(env.reset(), LATEST)
    episodes = [_Episode([take(latest, i)]) for i in range(len(seeds))]
    playing = np.arange(len(seeds))
    try:
        while len(playing):
            draws = np.stack([streams[i].standard_normal(spec.action_size) for i in playing])
            view = env.privileged(playing) if isinstance(env, Privileged) else None
            if view is None:
                view = _state(_stack([episodes[i].observations[-1] for i in playing]), len(playing))
            actions = np.clip(expert.act(view) + noise * draws, low, high).astype(np.float32)
            step = env.step_chunk(actions[:, None], playing, autoreset=False)
            latest = take(step.final_observation, LATEST)
            for row, i in enumerate(playing):
                episodes[i].observations.append(take(latest, row))
                episodes[i].actions.append(actions[row])
                episodes[i].rewards.append(float(step.reward[row]))
                episodes[i].terminated = bool(step.terminated[row])
                episodes[i].success = bool(step.success[row])
            on_step(step)
            playing = playing[~step.ended]
    finally:
        env.close()
    return episodes
