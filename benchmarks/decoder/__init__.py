"""What pruning a causal model's prompt costs in quality: real text, completions and recall, at equal FLOPs.

``python -m benchmarks.decoder`` trains predictors, measures, and makes the table under benchmarks/results/decoder/.
"""
