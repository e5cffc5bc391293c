"""What a graph costs: FLOPs from shapes, per node and over a corpus of real lengths."""

from prunepass.cost.corpus import CorpusFlops, corpus_flops
from prunepass.cost.flops import FlopCounter

__all__ = ["CorpusFlops", "FlopCounter", "corpus_flops"]
