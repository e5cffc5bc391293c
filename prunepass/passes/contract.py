"""What a pass is: a step on one graph, with what must hold before and after it.

``requires`` and ``ensures`` are read off the graph's form and cost little, so they are always checked. ``verify`` says
what takes a run to tell, on tensors without data or on a few random numbers; it is checked with PRUNEPASS_VERIFY=1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from prunepass.passes.state import Rewrite, Site

__all__ = ["Fault", "Pass", "SitePass", "is_ours", "layout_faults"]


@dataclass(frozen=True)
class Fault:
    """One thing that does not hold.

    Attributes:
        what: in one sentence, with its full stop.
        node: where; None where it is no node's.
    """

    what: str
    node: Node | None = None


@dataclass(frozen=True)
class Pass(ABC):
    """One step from the dense graph to the pruned one. Values of a pass are its options; what it finds and makes goes
    into the state."""

    #: for reports, dumps and the marks on added nodes
    name: ClassVar[str] = ""
    #: name of the pass that this one runs before, in every graph; empty where the pipeline itself says when it runs
    before: ClassVar[str] = ""

    @property
    def label(self) -> str:
        """The name, with the place in the model where the pass works at one."""
        return self.name

    def requires(self, state: Rewrite) -> Iterable[Fault]:
        """What is not as this pass must find it."""
        return ()

    @abstractmethod
    def run(self, state: Rewrite) -> int:
        """Edit ``state.graph``; returns how many places changed."""

    def ensures(self, state: Rewrite) -> Iterable[Fault]:
        """What is not as this pass must leave it."""
        return ()

    def verify(self, state: Rewrite) -> Iterable[Fault]:
        """`ensures`, for what costs more than a look at the graph."""
        return ()


@dataclass(frozen=True)
class SitePass(Pass):
    """A pass that works at one stage's place."""

    site: Site

    @property
    def label(self) -> str:
        """``narrow before block 3``."""
        return f"{self.name} {self.site.place}"

    def is_mine(self, node: object) -> bool:
        """Whether this pass added a node, at this site."""
        mark = node.meta.get("prunepass") if isinstance(node, Node) else None
        return mark is not None and mark["pass"] == self.name and mark["stage"] == self.site.index


def is_ours(node: Node) -> bool:
    """Whether a pass added a node."""
    return "prunepass" in node.meta


def layout_faults(
    state: Rewrite, node: Node | None, name: str, shape: tuple[str | int, ...], dtype: torch.dtype | None = None
) -> Iterator[Fault]:
    """What is wrong with a value that a pass traced into the graph.

    Args:
        name: of the value, for the message.
        shape: its axes, open sizes by the names that they had in the trace ("B", "S", "T", "K").
        dtype: of its elements; None for any floating one.
    """
    if node is None:
        yield Fault(f"There is no {name}.")
        return
    layout = node.meta.get("layout")
    if layout is None:
        yield Fault(f"The {name} were not traced into the graph.", node)
        return
    wanted = tuple(1 if axis == "B" and state.sizes.one_row else axis for axis in shape)
    found = tuple(_axis(reading) for reading in layout.shape)
    if found != wanted:
        yield Fault(f"The {name} have the shape {_shown(found)} in place of {_shown(wanted)}.", node)
    if layout.dtype != dtype and not (dtype is None and layout.dtype.is_floating_point):
        yield Fault(f"The {name} are {layout.dtype} in place of {dtype or 'a floating type'}.", node)


def _axis(reading: tuple[int, tuple[str, ...], tuple[str, ...]]) -> str | int:
    constant, factors, terms = reading
    if terms:
        return f"{'*'.join(factors)}({' + '.join((*terms, str(constant)))})"
    if not factors:
        return constant
    return "*".join((*factors, *([str(constant)] if constant != 1 else [])))


def _shown(shape: tuple[str | int, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"
