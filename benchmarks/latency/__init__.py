"""How fast pruned models are: against the dense model, and against what pruning could give at most on the same runtime.

Run from the repository root as ``python -m benchmarks.latency run``, then ``python -m benchmarks.latency table``.
Models have random weights and the shapes of well-known ones, so nothing is downloaded. One process times all ways of a
cell in turns; see `cells` for what is timed and `ideal` for the bound.
"""
