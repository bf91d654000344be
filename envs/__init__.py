"""Simulators, one a file. Imported as `dprl.envs`, never under its bare name (that would make a second copy)."""

import contextlib

if __name__ != "dprl.envs":
    raise ImportError("import this package as 'dprl.envs', not as 'envs'")

from dprl.envs import avoid, maze

with contextlib.suppress(ImportError):  # not `import gymnasium`: that name is a module of this package
    from gymnasium import register as _register

    for _id, _limit in [
        *((_id, avoid.MAX_EPISODE_STEPS) for _id in avoid.IDS),
        *((_id, maze.layout_of(_id).max_episode_steps) for _id in maze.IDS),
    ]:
        _register(f"dprl/{_id}", "dprl.envs.single:SingleEnv", max_episode_steps=_limit, kwargs={"env_id": _id})
