"""Named runs and everything the command line starts. Imported as `dprl.experiments`."""

if __name__ != "dprl.experiments":
    raise ImportError("import this package as 'dprl.experiments', not as 'experiments'")
