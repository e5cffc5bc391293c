"""Sessions through the cache on disk: found by their key, or made, written and read again."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sympy  # type: ignore[import-untyped]  # it ships no types
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from prunepass.backends import cache
from prunepass.backends._binding import Layout, Roles, open_inputs
from prunepass.backends._graph_key import NoKeyError, digest, environment, graph_text, tensor_digest
from prunepass.backends._programs import Session, Shapes, output_dtypes
from prunepass.graph.inputs import fake_value

__all__ = ["Files", "Notes", "Stored", "layout_of", "session_key"]

#: to be raised when entries are to mean something else
_FORMAT = 2


@dataclass(frozen=True)
class Notes:
    """What a session needs to know of the program it was made of.

    Attributes:
        inputs: names of the program's inputs, in order.
        dtypes: of the outputs, in order.
    """

    inputs: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]


@dataclass(frozen=True)
class Files:
    """How a runtime keeps a converted model on disk.

    Attributes:
        save: writes the model of a program into a folder, and makes its session.
        load: makes a session of such a folder, without the program.
        packages: whose versions the files depend on.
        settings: the user's, on which the files depend.
    """

    save: Callable[[ExportedProgram, Path], Session]
    load: Callable[[Path, Notes], Session]
    packages: tuple[str, ...]
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Stored:
    """What an entry gives: a session, how its outputs are arranged, and the sizes it holds for."""

    session: Session
    layout: Layout
    shapes: Shapes

    @classmethod
    def read(cls, entries: cache.Entries, key: str, files: Files, gm: GraphModule) -> Stored | None:
        """The session of an entry; None where there is none."""

        def load(folder: Path, content: Any) -> Stored:
            notes, shapes = _from_plain(content)
            return cls(files.load(folder, notes), layout_of(gm), shapes)

        return entries.read(key, load)

    @classmethod
    def write(
        cls, entries: cache.Entries, key: str, files: Files, gm: GraphModule, program: ExportedProgram
    ) -> Stored | None:
        """Make the session of a program, and an entry of it; None where the disk refuses before there is a session.

        Raises:
            NoKeyError: the program's sizes cannot be written down.
        """
        notes = _to_plain(program)
        made: list[Session] = []

        def save(folder: Path) -> Any:
            made.append(files.save(program, folder))
            return notes

        entries.write(key, save)
        return cls(made[0], layout_of(gm), _from_plain(notes)[1]) if made else None


def session_key(gm: GraphModule, roles: Roles, args: Sequence[Any], files: Files, *, dynamic: bool) -> str:
    """The key of the session that would be made of a graph and its inputs.

    Pruning is in the graph by now, so the plan and its predictors need no mention of their own.

    Args:
        args: real values for all placeholders.
        dynamic: as for `prunepass.backends._binding.export`.

    Raises:
        NoKeyError: the graph holds something that only this process knows.
    """
    layout_of(gm)
    fakes = [fake_value(n) for n in gm.graph.find_nodes(op="placeholder")]
    present = [args[i] for i in roles.tensors]
    sizes = open_inputs(gm, [fakes[i] for i in roles.tensors], present)[0] if dynamic else present
    return digest(
        [
            _FORMAT,
            *environment(files.packages),
            sorted(files.settings.items()),
            graph_text(gm),
            _autocast(),
            [list(roles.tensors), list(roles.constants), sorted(roles.sizes.items()), list(roles.scalars)],
            [[str(t.dtype), list(t.shape)] for t in sizes],
            dynamic,
            [repr(args[i].item() if isinstance(args[i], Tensor) else args[i]) for i in roles.scalars],
            [tensor_digest(args[i]) for i in roles.constants],
        ]
    )


def _autocast() -> list[str]:
    """What `torch.autocast` is on for. It holds no node of the graph, but says in which dtypes operators compute."""
    types = ("cpu", "cuda")
    return [f"{t} {torch.get_autocast_dtype(t)}" for t in types if torch.is_autocast_enabled(t)]


def layout_of(gm: GraphModule) -> Layout:
    """How the graph arranges its outputs, read off the graph rather than learnt by tracing it.

    Raises:
        NoKeyError: one of them is a size, which a trace at fixed sizes may turn into a number.
    """
    leaves, spec = pytree.tree_flatten(gm.graph.output_node().args[0])
    values = [fake_value(leaf) if isinstance(leaf, Node) else leaf for leaf in leaves]
    if any(isinstance(leaf, Node) and not isinstance(v, Tensor) for leaf, v in zip(leaves, values, strict=True)):
        raise NoKeyError("an output is a size")
    layout = Layout()
    layout.learn(spec, values)
    return layout


def _to_plain(program: ExportedProgram) -> Any:
    shapes = Shapes.of(program)
    if not all(isinstance(dim, int) or dim.is_Symbol for dims in shapes.inputs for dim in dims):
        raise NoKeyError("an input's size is computed from others")
    return {
        "inputs": list(program.graph_signature.user_inputs),
        "dtypes": [str(dtype).removeprefix("torch.") for dtype in output_dtypes(program)],
        "dims": [[dim if isinstance(dim, int) else str(dim) for dim in dims] for dims in shapes.inputs],
        "ranges": {str(k): [low, None if math.isinf(high) else high] for k, (low, high) in shapes.ranges.items()},
    }


def _from_plain(content: Any) -> tuple[Notes, Shapes]:
    dtypes = tuple(getattr(torch, name) for name in content["dtypes"])
    inputs = tuple(tuple(d if isinstance(d, int) else sympy.Symbol(d) for d in dims) for dims in content["dims"])
    ranges = {
        sympy.Symbol(k): (low, math.inf if high is None else high) for k, (low, high) in content["ranges"].items()
    }
    return Notes(tuple(content["inputs"]), dtypes), Shapes(inputs, ranges)
