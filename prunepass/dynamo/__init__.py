"""The torch.compile backend ``tokprune``."""

from prunepass.dynamo.backend import Compilation, Options, compilations, tokprune

__all__ = ["Compilation", "Options", "compilations", "tokprune"]
