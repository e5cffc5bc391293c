"""Every causal type of transformers, built small: is it pruned right, in `prune()` and in `generate()`?

``make sweep`` runs all, an hour on two cores, and writes the table of docs/reliability/architectures.md;
`tests/test_sweep.py` runs a dozen. `models` builds them, `checks` compares them with the hook oracle, `table` writes.
"""
