"""What sessions are made of: the sizes an exported program holds for, and the dtypes it gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from prunepass.graph.inputs import fake_value

__all__ = ["Session", "Shapes", "output_dtypes"]

#: a compiled program: tensors in, tensors of fresh memory out; safe to call from several threads at once
Session = Callable[[Sequence[Tensor]], list[Tensor]]


@dataclass(frozen=True)
class Shapes:
    """The input sizes that a program holds for: a number, or a symbol with its range, for each dimension."""

    inputs: tuple[tuple[Any, ...], ...]
    ranges: dict[Any, tuple[float, float]]

    @classmethod
    def of(cls, program: ExportedProgram) -> Shapes:
        """What `torch.export` found out about the program's user inputs."""
        names = set(program.graph_signature.user_inputs)
        values = [fake_value(n) for n in program.graph.find_nodes(op="placeholder") if n.name in names]
        inputs = tuple(tuple(s.node.expr if isinstance(s, torch.SymInt) else s for s in v.shape) for v in values)
        ranges = {k: (float(r.lower), float(r.upper)) for k, r in program.range_constraints.items()}
        return cls(inputs, ranges)

    def cover(self, sizes: Sequence[Sequence[int]]) -> bool:
        """Whether inputs of these sizes may be given to the program."""
        bound: dict[Any, int] = {}
        for dims, shape in zip(self.inputs, sizes, strict=True):
            if len(dims) != len(shape):
                return False
            for dim, size in zip(dims, shape, strict=True):
                if not self._fits(dim, size, bound):
                    return False
        return True

    def _fits(self, dim: Any, size: int, bound: dict[Any, int]) -> bool:
        if isinstance(dim, int):
            return dim == size
        if not dim.is_Symbol:
            return bool(dim.subs(bound) == size)
        low, high = self.ranges.get(dim, (0.0, math.inf))
        return low <= size <= high and bound.setdefault(dim, size) == size


def output_dtypes(program: ExportedProgram) -> list[torch.dtype]:
    """The dtypes that the program promises for its outputs, in order."""
    return [fake_value(n).dtype for n in program.graph.output_node().args[0]]
