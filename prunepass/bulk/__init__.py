"""Many texts through an exported folder, with its runtime alone: on one machine, or on many."""

from prunepass.bulk.embedder import Embedder

__all__ = ["Embedder"]
