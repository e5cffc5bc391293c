"""The registry: every module in this folder is a benchmark task."""
