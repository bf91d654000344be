"""Simulators, one a file. Imported as `dprl.envs`, never under its bare name (that would make a second copy)."""

if __name__ != "dprl.envs":
    raise ImportError("import this package as 'dprl.envs', not as 'envs'")
