"""What pruning costs in accuracy: tasks of several kinds, dense models for them, and the ways of pruning side by side.

Run from the repository root as ``python -m benchmarks.accuracy``. The data sets are read from the folder that the
environment variable PRUNEPASS_DATA names; nothing is downloaded.
"""
