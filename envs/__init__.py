"""Simulators, one a file. Imported as `dprl.envs`, never under its bare name (that would make a second copy)."""

import contextlib

if __name__ != "dprl.envs":
    raise ImportError("import this package as 'dprl.envs', not as 'envs'")

with contextlib.suppress(ImportError):  # not `import gymnasium`: that name is a module of this package
    from gymnasium import register as _register

    for _id in ("Avoid-v0", "AvoidPixels-v0"):
        _register(f"dprl/{_id}", "dprl.envs.avoid_env:AvoidEnv", max_episode_steps=100, kwargs={"env_id": _id})
