"""Programs that score a query's passages, one a way, timed in turns by the task ``rerank``."""
