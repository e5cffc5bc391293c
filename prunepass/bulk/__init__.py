"""Many texts through an exported folder, with its runtime alone: on one machine, or on many."""

from prunepass.bulk.embedder import Embedder
from prunepass.bulk.files import embed_files
from prunepass.bulk.output import Summary

__all__ = ["Embedder", "Summary", "embed_files"]
