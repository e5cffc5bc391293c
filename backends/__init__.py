"""Lowering: how a graph reaches a runtime. One file a runtime, each behind its extra.

A *target* is anything with the two functions of `Target`. The modules beside this file are targets themselves, found by
the names of their files; those that begin with an underscore are not::

    def lower(graph_module, example_inputs, *, config=None): ...   # -> callable with the graph's own signature
    def fusion_counts(program): ...                                # -> FusionCounts

A runtime that reads past the end of a table, where others raise, says so with ``UNCHECKED_LOOKUPS = True`` beside the
functions: under torch.compile ids and positions are then looked at before each call.

To add a runtime, write such a module (or object) and name it in your package's metadata::

    [project.entry-points."prunepass.backends"]
    myruntime = "mypackage.myruntime"

Then ``torch.compile(model, backend="tokprune", options={"target": "myruntime"})`` finds it; the object itself will do
in the place of its name. A runtime that wants a `torch.export.ExportedProgram` of constant weights rather than Dynamo's
graph gets it, with caching, threads and changed weights taken care of, from `prunepass.backends._offline.OfflineGraph`.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Protocol, cast

from prunepass.backends._options import unknown
from prunepass.errors import OptionError

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.fx import GraphModule

__all__ = ["ENTRY_POINT_GROUP", "FusionCounts", "Target", "fusion_counts", "get_target", "target_names"]

ENTRY_POINT_GROUP = "prunepass.backends"
#: files of this folder that are no target, beside those whose names begin with an underscore
_SHARED = frozenset({"cache"})


@dataclass(frozen=True)
class FusionCounts:
    """How many attentions, layer normalisations and GELUs a runtime's optimised graph still has as one unit.

    Attributes:
        counts: what each number counts on this runtime, for readers of a report.
    """

    attention: int
    layer_norm: int
    gelu: int
    counts: str

    def to_dict(self) -> dict[str, Any]:
        """As plain numbers and strings, for JSON."""
        return asdict(self)


class Target(Protocol):
    """What a runtime offers."""

    def lower(
        self, graph_module: GraphModule, example_inputs: Sequence[Any], *, config: Mapping[str, Any] | None = None
    ) -> Callable[..., Any]:
        """A callable that takes the graph's placeholders, in order, and returns what the graph returns.

        Args:
            graph_module: Dynamo's graph or an ATen one; lifted parameters and symbolic sizes may be placeholders.
            example_inputs: one value a placeholder, as Dynamo hands them to a backend.
            config: the runtime's own settings; never changed. Unknown ones raise `OptionError`.
        """
        ...

    def fusion_counts(self, program: ExportedProgram) -> FusionCounts:
        """Compile ``program`` the way `lower` does and count the fused units of the result."""
        ...


def _built_in() -> set[str]:
    """Names of the files in this folder that are targets; nothing is imported."""
    return {file.name for file in pkgutil.iter_modules(__path__) if not file.name.startswith("_")} - _SHARED


def target_names() -> list[str]:
    """The targets that can be asked for: those built in, and then those of installed packages."""
    built_in = _built_in()
    return [*sorted(built_in), *sorted({e.name for e in entry_points(group=ENTRY_POINT_GROUP)} - built_in)]


def get_target(name: str | Target) -> Target:
    """The target called ``name`` (or given as an object). Its runtime is imported only when a graph is lowered.

    Raises:
        OptionError: no such target; the message has the nearest name.
    """
    if not isinstance(name, str):
        return _checked(name)
    if name in _built_in():
        return cast(Target, import_module(f"{__name__}.{name}"))
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        if entry.name == name:
            return _checked(entry.load())
    raise OptionError(unknown(name, "target", target_names()))


def _checked(target: Any) -> Target:
    if not callable(getattr(target, "lower", None)):
        raise OptionError(f"A target is a name or an object with a function lower(), not {target!r}.")
    return cast(Target, target)


def fusion_counts(target: str | Target, program: ExportedProgram) -> FusionCounts:
    """How many fused attentions, layer normalisations and GELUs ``program`` has once compiled for ``target``.

    Raises:
        MissingExtraError: the runtime is not installed.
        OptionError: no such target.
    """
    return get_target(target).fusion_counts(program)
