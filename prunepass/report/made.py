"""What a report says of tokens that a model makes itself: how many, what they are called, which are live."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from prunepass.graph.inputs import MASK_NAMES, ModelInputs, fake_value, hint, input_name
from prunepass.graph.sources import value_from
from prunepass.graph.streams import find_inputs, streams_of

__all__ = ["MadeTokens", "stream_lines"]


@dataclass(frozen=True)
class MadeTokens:
    """The tokens that a graph makes of one input of the example.

    Attributes:
        count: of a row of the example.
        size: what the length of the graph counts: those tokens where their number is a constant, else the samples.
        live: [B, T] bool.
        names: of each token of a row.
        prefix: how many class and register tokens stand before the patches or frames.
        grid: rows and columns of the patches of an image; None where they are not known.
        image: the input that holds the images, [B, channels, height, width]; None for other tokens.
    """

    count: int
    size: int
    live: Tensor
    names: tuple[str, ...]
    prefix: int = 0
    grid: tuple[int, int] | None = None
    image: str | None = None

    @classmethod
    def of(cls, gm: GraphModule, stream: str | None, given: Mapping[str, Any]) -> MadeTokens | None:
        """From the graph of the dense model; None where the tokens are given themselves."""
        inputs = find_inputs(gm, stream)
        if inputs.made_from is None:
            return None
        count = hint(fake_value(inputs.source).shape[1])
        x = given[input_name(inputs.made_from)]
        live = torch.ones(len(x), count, dtype=torch.bool)
        mask = inputs.attention_mask
        if mask is not None:
            from_user = next(n for n in gm.graph.find_nodes(op="placeholder") if input_name(n) in MASK_NAMES)
            live = value_from(gm, mask, {from_user: given[input_name(from_user)]}) != 0
        size = count if inputs.fixed_length is not None else x.shape[1]
        image = fake_value(inputs.made_from).dim() == 4
        grid = _grid(inputs, count - inputs.prefix) if image else None
        names = tuple(_names(inputs, live.shape[1], grid, image))
        shown = input_name(inputs.made_from) if image else None
        return cls(live.shape[1], size, live, names, inputs.prefix, grid, shown)


def _names(inputs: ModelInputs, count: int, grid: tuple[int, int] | None, image: bool) -> list[str]:
    """``class token``, ``register 2``, ``patch (3, 5)`` by row and column; ``frame 12`` of a sound."""
    special = ["class token", *(f"register {i}" for i in range(1, inputs.prefix))][: inputs.prefix]
    rest = count - inputs.prefix
    if grid is not None:
        return [*special, *(f"patch ({i // grid[1]}, {i % grid[1]})" for i in range(rest))]
    return [*special, *(f"{'patch' if image else 'frame'} {i}" for i in range(rest))]


def _grid(inputs: ModelInputs, patches: int) -> tuple[int, int] | None:
    """Rows and columns of patches: the last convolution that gives so many says it."""
    for node in sorted(inputs.front, reverse=True):
        value = fake_value(node)
        if "conv" in str(node.target) and isinstance(value, Tensor) and value.dim() == 4:
            rows, columns = hint(value.shape[2]), hint(value.shape[3])
            if rows * columns == patches:
                return rows, columns
    return None


def stream_lines(gm: GraphModule, inputs: ModelInputs | None) -> tuple[str, ...]:
    """The streams of a graph, and what is known of the one that is read. Empty for a text model of one stream."""
    found = streams_of(gm)
    if inputs is None or (inputs.made_from is None and len(found) < 2):
        return ()
    lines = []
    for stream in found:
        chosen = stream.given.name == inputs.rows.name
        what = f"{stream}{': ' + _described(inputs) if chosen and inputs.made_from is not None else ''}"
        lines.append(what + (", pruned here" if chosen and len(found) > 1 else ""))
    return tuple(lines)


def _described(inputs: ModelInputs) -> str:
    fixed = inputs.fixed_length
    count = f"{fixed} tokens" if fixed is not None else "as many tokens as the input is long"
    if not inputs.prefix:
        return count
    special = "1 class token" if inputs.prefix == 1 else f"{inputs.prefix} class and register tokens"
    return f"{count}, {special} among them"
