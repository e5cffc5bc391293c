"""The inputs of a call against those of the traced one: brought into their form, or refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node
from torch.utils import _pytree as pytree

from prunepass.errors import OptionError
from prunepass.graph.inputs import MASK_NAMES, fake_value, is_symbolic

__all__ = ["Expected"]

BATCH, LENGTH = "batch", "length"


@dataclass(frozen=True)
class _Input:
    """A tensor of the traced call: its axes as "batch", "length", expressions of other open sizes, or numbers."""

    name: str
    shape: tuple[Any, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Expected:
    """What a traced program takes.

    Attributes:
        inputs: by the place among the leaves of ``(args, kwargs)``; None for what is no tensor.
        tokens: the place of the tokens, whose batch and length hold for all.
    """

    inputs: tuple[_Input | None, ...]
    tokens: int | None

    @classmethod
    def of(cls, program: ExportedProgram, tokens: Node | None) -> Expected:
        """From the program's own placeholders; ``tokens`` is the placeholder of the tokens in a graph made of it."""
        specs, nodes = program.graph_signature.input_specs, program.graph.find_nodes(op="placeholder")
        given = [n for spec, n in zip(specs, nodes, strict=True) if spec.kind is InputKind.USER_INPUT]
        at = [i for i, n in enumerate(given) if tokens is not None and str(n.target) == str(tokens.target)]
        leading = fake_value(given[at[0]]).shape[:2] if at else ()
        return cls(tuple(_of(str(n.target), fake_value(n), leading) for n in given), at[0] if at else None)

    def fitted(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The inputs with masks in the traced dtype and single rows spread over the batch.

        Raises:
            OptionError: a shape, dtype or device that the graph would not take, or not for what is meant.
        """
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if self.tokens is None:
            return args, kwargs
        if len(leaves) != len(self.inputs):
            raise OptionError(
                f"The call gives {len(leaves)} values, but the model was pruned with {len(self.inputs)}, of which each "
                "tensor must be one: not a list, a tuple or None."
            )
        sizes = self._sizes(leaves[self.tokens])
        fitted = [
            value if wanted is None else _fitted(wanted, value, sizes)
            for wanted, value in zip(self.inputs, leaves, strict=True)
        ]
        if all(a is b for a, b in zip(fitted, leaves, strict=True)):
            return args, kwargs
        made: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_unflatten(fitted, spec)
        return made

    def _sizes(self, tokens: Any) -> dict[Any, int]:
        """The batch and the length of this call, by the words that stand for them."""
        assert self.tokens is not None
        wanted = self.inputs[self.tokens]
        assert wanted is not None
        _check_kind(wanted, tokens)
        return dict(zip(wanted.shape[:2], tokens.shape[:2], strict=True))


def _of(name: str, value: Any, leading: Sequence[Any]) -> _Input | None:
    """``leading`` is the batch and the length of the tokens; other inputs may have symbols of their own for them."""
    if not isinstance(value, Tensor):
        return None
    shape: list[Any] = [s.node.expr if is_symbolic(s) else int(s) for s in value.shape]
    for axis, (size, own, word) in enumerate(zip(leading, value.shape, (BATCH, LENGTH), strict=False)):
        if word == LENGTH and name.startswith("decoder_"):
            continue  # a decoder's rows may have been as long as its encoder's in the example
        if is_symbolic(size) and is_symbolic(own) and size.node.hint == own.node.hint:
            shape[axis] = word
    return _Input(name, tuple(shape), value.dtype, value.device)


def _check_kind(wanted: _Input, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise OptionError(f"{wanted.name} must be a tensor, not {type(value).__name__}.")
    if value.dim() != len(wanted.shape):
        axes = "[batch, length" + ", ..." * (len(wanted.shape) > 2) + "]" if len(wanted.shape) > 1 else "one axis"
        raise OptionError(
            f"{wanted.name} has the shape {list(value.shape)}, but the model was pruned with one of "
            f"{len(wanted.shape)} axes ({axes}). Pass it like that, or prune the model with inputs like these."
        )
    if value.device != wanted.device:
        raise OptionError(
            f"{wanted.name} is on {value.device}, but the model was pruned on {wanted.device}. Move it there."
        )


def _fitted(wanted: _Input, value: Any, sizes: dict[Any, int]) -> Tensor:
    _check_kind(wanted, value)
    fitted = _in_dtype(wanted, value)
    expected = [sizes.get(size, size) for size in wanted.shape]
    if wanted.shape[:1] == (BATCH,) and fitted.shape[0] == 1:
        fitted = fitted.expand(expected[0], *fitted.shape[1:])
    for axis, (found, size) in enumerate(zip(fitted.shape, expected, strict=True)):
        if isinstance(size, int) and found != size:
            if wanted.shape[axis] in (BATCH, LENGTH):
                why = " as that of the tokens"
            else:
                why = ", as in the inputs that the model was pruned with. For another size prune the model again"
            raise OptionError(f"{wanted.name} has the shape {list(fitted.shape)}, but axis {axis} must be {size}{why}.")
    return fitted


def _in_dtype(wanted: _Input, value: Tensor) -> Tensor:
    """``value`` in the traced dtype, where that keeps what it means: a mask is non-zero at live tokens."""
    if value.dtype == wanted.dtype:
        return value
    whole = not (value.is_floating_point() or value.is_complex())
    if wanted.name in MASK_NAMES and not wanted.dtype.is_complex:
        return (value != 0).to(wanted.dtype)
    if whole and not wanted.dtype.is_floating_point and wanted.dtype != torch.bool:
        return value.to(wanted.dtype)
    was, now = (str(t).removeprefix("torch.") for t in (wanted.dtype, value.dtype))
    raise OptionError(
        f"{wanted.name} is {now}, but the model was pruned with {was}. Cast it with .to(torch.{was}), or prune "
        "the model with inputs like these."
    )
