"""The one hook around every pass: contracts, counts, times, dumps."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import IntEnum

from torch.fx import Graph, GraphModule, Node

from prunepass.errors import ContractError, OptionError, PruneError
from prunepass.graph.modules import module_path
from prunepass.passes.contract import Fault, Pass
from prunepass.passes.dump import hook_from_environment
from prunepass.passes.state import Rewrite

__all__ = ["VARIABLE", "Checks", "Hook", "Runner", "checks_from_environment"]

logger = logging.getLogger("prunepass.pipeline")

Hook = Callable[[str, GraphModule], None]
VARIABLE = "PRUNEPASS_VERIFY"


class Checks(IntEnum):
    """Which contracts are checked."""

    NONE = 0
    FORM = 1
    ALL = 2


def checks_from_environment() -> Checks:
    """What PRUNEPASS_VERIFY asks for: 1 all, 0 none, and where it is not set those that only look at the graph.

    Raises:
        OptionError: another value.
    """
    value = os.environ.get(VARIABLE, "")
    known = {"": Checks.FORM, "0": Checks.NONE, "1": Checks.ALL}
    if value not in known:
        raise OptionError(
            f"The environment variable {VARIABLE} is {value!r}. It takes 1 (check all contracts of the passes) or 0 "
            "(check none); unset, those that cost little are checked."
        )
    return known[value]


class Runner:
    """Runs passes on one graph.

    Attributes:
        changes: places changed, by pass, summed over the stages.
        seconds: wall time, by pass; that of contracts is not in it.
        done: labels of the passes that ran, in order.
    """

    def __init__(self, gm: GraphModule, hook: Hook | None = None) -> None:
        self.gm = gm
        self.changes: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self.done: list[str] = []
        self._hook = hook or hook_from_environment()
        self._checks = checks_from_environment()

    def run(self, work: Pass, state: Rewrite) -> None:
        """One pass, with its contract.

        Raises:
            ContractError: the graph is not as the pass must find it, or not as it must leave it.
        """
        before = tuple(self.done)
        if self._checks:
            self._hold(work.requires(state), work.label, before, "Before")
        with self.step(work.name, work.label):
            count = work.run(state)
            self._count(work.name, count)
        if self._checks:
            self._hold(work.ensures(state), work.label, before)
        if self._checks is Checks.ALL:
            self._hold(work.verify(state), work.label, before)

    def read(self, name: str, work: Callable[[], int]) -> None:
        """A step that comes before there is a state: reading the graph, or bringing it into a simpler form."""
        with self.step(name):
            self._count(name, work())

    @contextmanager
    def step(self, name: str, label: str | None = None) -> Iterator[None]:
        """Time what is done inside, and see that it leaves a graph that can run."""
        start = time.perf_counter()
        with self._named(label or name):
            yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        self._lint(label or name)
        if self._hook is not None:
            self._hook(f"{len(self.done):02d}_{name}", self.gm)
        self.done.append(label or name)

    @contextmanager
    def _named(self, label: str) -> Iterator[None]:
        """An error that is none of ours says which pass it came from."""
        try:
            yield
        except PruneError:
            raise
        except Exception as e:  # of any kind: it goes on as it is
            e.add_note(f"Raised in the pass {label} of prunepass, after: {', '.join(self.done) or 'none'}.")
            raise

    def _count(self, name: str, count: int) -> None:
        self.changes[name] = self.changes.get(name, 0) + count
        logger.debug("%s changed %d places", name, count)

    def _hold(self, faults: Iterable[Fault], label: str, before: tuple[str, ...], when: str = "After") -> None:
        for fault in faults:
            raise _error(fault, label, before, when)

    def _lint(self, label: str) -> None:
        try:
            self.gm.graph.lint()
        except RuntimeError as e:
            raise _error(Fault(f"{e}.", _misplaced(self.gm.graph)), label, tuple(self.done), "After") from e


def _error(fault: Fault, label: str, before: tuple[str, ...], when: str) -> ContractError:
    node = fault.node
    return ContractError(
        fault.what,
        pass_name=label,
        before=before,
        node=None if node is None else node.name,
        where=None if node is None else module_path(node) or None,
        when=when,
    )


def _misplaced(graph: Graph) -> Node | None:
    """The first node that reads one that stands after it, or in another graph."""
    seen: set[Node] = set()
    nodes: list[Node] = list(graph.nodes)
    for node in nodes:
        if not seen.issuperset(node.all_input_nodes):
            return node
        seen.add(node)
    return None
