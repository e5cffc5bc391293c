"""Reading graphs: capture, lengths, sequence axes, cuts and blocks. Knows nothing of pruning."""
