"""Why a graph cannot be read, in words: what was found, at which operator, in which module."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import networkx as nx
import torch
from torch._ops import OpOverload
from torch.fx import Node

from prunepass.errors import CaptureError, PruneError, RefusalError
from prunepass.graph.inputs import WHOLE_MODEL
from prunepass.graph.kinds import kind_of, name_of
from prunepass.graph.modules import module_path
from prunepass.graph.ops import SOFTMAX, int_argument, mixes_tokens
from prunepass.graph.sizes import AxisKind, Sizes

__all__ = ["no_attention", "no_raw_errors", "no_replay"]

#: operators whose output's size depends on values, by a part of their name
_BY_VALUES = ("nonzero", "unique", "masked_select", "bincount", "histc", "repeat_interleave.Tensor")
_LATER = "Place the stages after this layer, or compile with fallback='dense' to run the model unpruned."
_OTHER = "prunepass prunes models with scaled dot-product attention, fused or as a softmax over the keys."


def no_replay(node: Node, message: str, before: Sequence[Node], sizes: Sizes, length: int) -> RefusalError:
    """Why a graph does not run at another length than the traced one.

    Args:
        node: where it fails.
        message: how.
        before: all that it depends on, in the graph's order.
        sizes: of ``before``.
        length: tokens of a row in the traced call.
    """
    where = module_path(node) or node.name
    if any(key in name_of(node) or key in message for key in _BY_VALUES):
        reason = f"{name_of(node)} ({node.name}) gives as many elements as its values say"
        return RefusalError(f"{reason}, so sizes after it cannot be told from the length.", where=where, hint=_UNREAD)
    unknown = [a for a in node.all_input_nodes if a in sizes.first.values and sizes.first.values[a] is None]
    if unknown:
        reason = (
            f"{name_of(node)} ({node.name}) takes a size, {unknown[0].name}, that was read from the values of a tensor"
        )
        return RefusalError(f"{reason}, so it cannot be told from the length.", where=where, hint=_UNREAD)
    steps = _steps(node, before, length)
    if steps:
        return RefusalError(
            f"a recurrence over the sequence: a loop of {length} steps was unrolled when the model was traced "
            f"({name_of(steps)}, {steps.name}), one for each token, and each step needs those before it.",
            where=module_path(steps) or steps.name,
            hint="prunepass prunes models whose tokens are mixed by attention alone.",
        )
    cause = next((a for a in (*before, node) if _changes_length(a, sizes)), None)
    if cause is not None:
        kind = kind_of(cause)
        what = f"{name_of(cause)} ({cause.name}) " + (f"is {kind}" if kind else "changes the length of the sequence")
        return RefusalError(
            f"{what}, and what follows fits the traced length only ({node.name}: {message}).",
            where=module_path(cause) or cause.name,
            hint="prunepass prunes models whose tokens keep their number from the embeddings to the output.",
        )
    pool = next((a for a in node.graph.nodes if a not in (*before, node) and "pool" in (kind_of(a) or "")), None)
    further = f" Further on {name_of(pool)} ({module_path(pool) or pool.name}) is {kind_of(pool)}." if pool else ""
    return RefusalError(
        f"at other lengths than the traced {length} tokens {name_of(node)} ({node.name}) fails: {message}.{further}",
        where=where,
        hint="The length may be written into the model there, or the sequence be cut into pieces of a fixed size. "
        "Where torch.compile traced the graph, dynamic=True keeps lengths open.",
    )


_UNREAD = "prunepass follows sizes that depend on the shapes of the inputs alone."


def _steps(node: Node, before: Sequence[Node], length: int) -> Node | None:
    """The first node of a loop over the tokens that one line of code made; None where there is none."""
    made = {n: _line(n) for n in node.graph.nodes if isinstance(n.target, OpOverload) and n.meta.get("stack_trace")}
    counts = Counter(made.values())
    near = [n for n in (*before, node) if n in made]
    return next((n for n in near if _counts_tokens(counts[made[n]], length)), None)


def _line(node: Node) -> tuple[str, str, str]:
    """The operator, the module that ran it, and the line of code it stands in."""
    return str(node.target), module_path(node), str(node.meta["stack_trace"])


def _counts_tokens(count: int, length: int) -> bool:
    """Whether a line ran once for each token (or for each but the first)."""
    return length > 3 and count >= length - 1


def _changes_length(node: Node, sizes: Sizes) -> bool:
    if node not in sizes.first.values or node not in sizes.second.values or sizes.number(node) is not None:
        return False
    if kind_of(node) is not None and any(
        sizes.follows_length(a) for a in node.all_input_nodes if a in sizes.first.values
    ):
        return True
    return any(axis.kind is AxisKind.DERIVED for axis in sizes.axes(node) or ())


def no_attention(flow: nx.DiGraph, nodes: Sequence[Node], sizes: Sizes) -> RefusalError:
    """Why no attention was found: what mixes the tokens instead, and where.

    Args:
        flow: the data flow from the embeddings to the output.
        nodes: of the graph, in order.
    """
    inside = [n for n in nodes if n in flow]
    local = next((n for n in inside if n.target in SOFTMAX and _is_over_a_window(n, sizes)), None)
    if local is not None:
        return RefusalError(
            f"the attention here is block-local: {name_of(local)} ({local.name}) is a softmax over a window of fixed "
            "size, so the scores have no axis of all tokens to leave tokens out of.",
            where=module_path(local) or local.name,
            hint=_OTHER,
        )
    for node in inside:
        reason = mixes_tokens(node, sizes)
        if reason:
            return RefusalError(
                f"no attention was found between the token embeddings and the output; {reason} ({node.name}).",
                where=module_path(node) or node.name,
                hint=_OTHER,
            )
    zeros = next((n for n in inside if n.target is torch.ops.aten.zeros_like.default and sizes.follows_length(n)), None)
    if zeros is not None:
        return RefusalError(
            f"no attention was found between the token embeddings and the output: here the model computes zeros "
            f"({name_of(zeros)}, {zeros.name}) in place of one, as it does where the kernel of its own that its "
            "attention needs is not loaded.",
            where=module_path(zeros) or zeros.name,
            hint=_OTHER,
        )
    return RefusalError(
        "no attention was found between the token embeddings and the output: in this graph no operator mixes tokens, "
        "each is computed by itself.",
        hint=f"{_OTHER} {WHOLE_MODEL}",
    )


def _is_over_a_window(node: Node, sizes: Sizes) -> bool:
    """Whether a softmax of attention runs over an axis of fixed size: [batch, heads, blocks, window, keys] and such."""
    axes = sizes.axes(node) or ()
    dim = int_argument(node, 1) % len(axes) if axes else 0
    return len(axes) > 3 and dim == len(axes) - 1 and not axes[dim].follows_length and sizes.follows_length(node)


@contextmanager
def no_raw_errors() -> Iterator[None]:
    """What a library raises while a graph is read or edited leaves as a `CaptureError` that says so."""
    try:
        yield
    except PruneError:
        raise
    except Exception as e:  # torch and networkx raise many kinds; the cause stays attached
        lines = [line.strip() for line in str(e).splitlines() if line.strip()]
        raise CaptureError(
            f"The graph could not be read: {type(e).__name__}: {lines[0] if lines else 'no message'}. This is a fault "
            "of prunepass: please report it with the model's class. fallback='dense' of torch.compile runs it unpruned."
        ) from e
