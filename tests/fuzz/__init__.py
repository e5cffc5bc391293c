"""A seeded fuzzer: what is drawn (`cases`), how it is checked (`checks`, `ways`), and a command line.

``PYTHONPATH=tests python -m fuzz --cases 10000`` runs it at length; `tests/test_fuzz.py` runs the first of them.
"""
