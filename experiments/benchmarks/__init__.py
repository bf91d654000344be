"""Benchmarks: ratios measured in one run, since absolute speeds of shared machines mean little."""
