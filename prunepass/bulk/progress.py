"""How far a run is, of what its workers say."""

from __future__ import annotations

import threading
from collections.abc import Callable

from prunepass.bulk.output import Counts

__all__ = ["Told"]

#: told of documents that are done, of how many, and of tokens that were read for them
Telling = Callable[[int, int, int], None]


class Told:
    """Gathers what workers say of their shards; a shard that is begun anew counts anew.

    Args:
        telling: is told of each change.
        documents: of all shards.
        done: documents of shards that an earlier run has done.
    """

    def __init__(self, telling: Telling | None, documents: int, done: int) -> None:
        self._telling = telling or (lambda done, documents, tokens: None)
        self._documents = documents
        self._done, self._tokens = done, 0
        self._within: dict[int, tuple[int, int]] = {}
        self._lock = threading.Lock()

    def begin(self) -> None:
        """What an earlier run has done is told."""
        with self._lock:
            self._tell()

    def reached(self, number: int, documents: int, tokens: int) -> None:
        """So much of a shard is done."""
        with self._lock:
            self._within[number] = (documents, tokens)
            self._tell()

    def finished(self, number: int, counts: Counts) -> None:
        """All of it is."""
        with self._lock:
            self._within.pop(number, None)
            self._done += counts.rows + counts.wrong
            self._tokens += counts.tokens
            self._tell()

    def lost(self, number: int) -> None:
        """It will begin anew."""
        with self._lock:
            self._within.pop(number, None)
            self._tell()

    def _tell(self) -> None:
        documents = self._done + sum(documents for documents, _ in self._within.values())
        tokens = self._tokens + sum(tokens for _, tokens in self._within.values())
        self._telling(documents, self._documents, tokens)
