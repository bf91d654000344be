"""The names users type, and the specs behind them."""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace
from typing import Any

import numpy as np

from dprl.envs import avoid, envpool, maze, metaworld, pusht
from dprl.errors import EnvError, MissingDependencyError, check, did_you_mean
from dprl.spec import EnvOptions, EnvSpec

# Gymnasium's MuJoCo v5 tasks that EnvPool steps too.
MUJOCO = (
    "Ant-v5", "HalfCheetah-v5", "Hopper-v5", "Humanoid-v5", "HumanoidStandup-v5", "InvertedDoublePendulum-v5",
    "InvertedPendulum-v5", "Pusher-v5", "Reacher-v5", "Swimmer-v5", "Walker2d-v5",
)  # fmt: skip
METAWORLD = tuple(f"metaworld/{task}-v3" for task in metaworld.TASKS)
METAWORLD_PIXELS = tuple(f"{name}-pixels" for name in METAWORLD)
NAMES = avoid.IDS + maze.IDS + pusht.IDS + METAWORLD + MUJOCO + METAWORLD_PIXELS


def resolve(name: str, options: EnvOptions) -> EnvSpec:
    """Return the spec of any name in `NAMES` or any id registered with Gymnasium.

    Raises:
        EnvError: unknown; the message offers the nearest names. Or its spaces do not suit.
        ConfigError: an option that the task cannot have.
    """
    for names, make_spec in (
        (avoid.IDS, avoid.make_spec),
        (maze.IDS, maze.make_spec),
        (pusht.IDS, pusht.make_spec),
        (METAWORLD_PIXELS, _metaworld_pixels),
    ):
        if name in names:
            check(options.backend != "envpool", "backend", options.backend, f"EnvPool here has no '{name}'")
            return make_spec(name, options)
    if name in METAWORLD:
        return _metaworld(name, options)
    return _gymnasium(name, options)


def _metaworld(name: str, options: EnvOptions) -> EnvSpec:
    task = name.removeprefix("metaworld/")
    on_envpool = _use_envpool(name, options)
    return EnvSpec(
        id=name,
        builder="dprl.envs.envpool:build" if on_envpool else "dprl.envs.gymnasium:build",
        backend_id=metaworld.envpool_id(task) if on_envpool else f"dprl.envs.metaworld_env:make_single!{task}",
        observation_size=metaworld.OBSERVATION_SIZE,
        action_low=(-1.0,) * metaworld.ACTION_SIZE,
        action_high=(1.0,) * metaworld.ACTION_SIZE,
        max_episode_steps=options.max_episode_steps or metaworld.MAX_EPISODE_STEPS,
        reward=options.reward or "sparse",
        has_success=True,
        vectorization=options.vectorization,
        serial=not on_envpool and options.vectorization == "sync",
    )


def _metaworld_pixels(name: str, options: EnvOptions) -> EnvSpec:
    task = name.removeprefix("metaworld/").removesuffix("-pixels")
    with_state = _metaworld(f"metaworld/{task}", replace(options, backend="gymnasium"))
    return replace(
        with_state,
        id=name,
        backend_id=f"dprl.envs.metaworld_env:make_pixels!{task}",
        observation_size=metaworld.HAND_SIZE,
        cameras=(metaworld.PIXELS,),
    )


def _gymnasium(name: str, options: EnvOptions) -> EnvSpec:
    try:
        import gymnasium
    except ImportError as error:
        raise MissingDependencyError("gymnasium", "envs", f"the environment '{name}'") from error
    from dprl.envs import gymnasium as backend

    if ":" not in name and name not in gymnasium.registry:
        known = dict.fromkeys([*NAMES, *gymnasium.registry])
        if f"metaworld/{name}" in known:
            raise EnvError(f"unknown environment '{name}'. Did you mean metaworld/{name}?")
        raise EnvError(
            f"unknown environment '{name}'.{did_you_mean(name, known)} "
            "'dprl list envs' shows the names; any id registered with Gymnasium works too."
        )
    on_envpool = name in MUJOCO and _use_envpool(name, options)
    check(options.backend != "envpool" or on_envpool, "backend", options.backend, f"EnvPool here has no '{name}'")
    env = backend.make_single(name)
    try:
        low, high = _box_bounds(name, env.action_space)
        layout = backend.Layout.of(env.observation_space)
        observation_size = layout.state_size
        limit = env.spec.max_episode_steps if env.spec is not None else None
        replayable = env.spec is None or not env.spec.nondeterministic
        has_success = _reports_success(name, env)
    finally:
        env.close()
    max_episode_steps = options.max_episode_steps or limit
    if max_episode_steps is None:
        raise EnvError(f"'{name}' has no time limit of its own: state one with max_episode_steps")
    return EnvSpec(
        id=name,
        builder="dprl.envs.envpool:build" if on_envpool else "dprl.envs.gymnasium:build",
        backend_id=name,
        observation_size=observation_size,
        action_low=low,
        action_high=high,
        max_episode_steps=max_episode_steps,
        reward=options.reward or ("sparse" if has_success else "dense"),
        has_success=has_success,
        vectorization=options.vectorization,
        serial=not on_envpool and options.vectorization == "sync",
        replayable=replayable,
        cameras=layout.cameras,
    )


def _use_envpool(name: str, options: EnvOptions) -> bool:
    """Whether to step `name` with EnvPool; says so where the slower backend must do."""
    if options.backend == "gymnasium":
        return False
    if envpool.available():
        return True
    if options.backend == "envpool":
        raise MissingDependencyError("envpool", "envs", f"backend 'envpool' for {name}")
    reason = (
        "is not installed: pip install '.[envs]' in the checkout"
        if sys.platform == "linux"
        else "has Linux wheels only"
    )
    warnings.warn(f"EnvPool {reason}. {name} runs on its own Python environment, about ten times slower.", stacklevel=3)
    return False


def _box_bounds(name: str, space: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    import gymnasium

    if not isinstance(space, gymnasium.spaces.Box) or not np.issubdtype(space.dtype, np.floating):
        needs = "a diffusion policy needs continuous actions (a Box of floats)"
        raise EnvError(f"'{name}' has the action space {space}: {needs}")
    low, high = np.ravel(space.low).tolist(), np.ravel(space.high).tolist()
    return tuple(map(float, low)), tuple(map(float, high))


def _reports_success(name: str, env: Any) -> bool:
    """One step tells: Gymnasium has no other word for it.

    Raises:
        EnvError: the environment fails in it.
    """
    from dprl.envs.chunked import SUCCESS_KEYS

    try:
        env.reset(seed=0)
        env.action_space.seed(0)
        info = env.step(env.action_space.sample())[4]
        return any(key in info for key in SUCCESS_KEYS)
    except Exception as error:  # it may fail in any way
        raise EnvError(f"'{name}' fails in its first step: {type(error).__name__}: {error}") from error
