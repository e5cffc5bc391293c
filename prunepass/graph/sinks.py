"""Attention sinks: a further score that takes a share of each softmax, and has no value.

Models write one more column beside the keys' scores, and drop it from the probabilities; or they scale what attention
gives by the share that the keys have, which is the same. That column is no token: read as a change of the sequence's
length it would hide what the softmax is over. ``prunepass::softmax_with_sinks`` says it in one operator, whose scores
and probabilities have the keys on their last axis. It is a composite of plain ones.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from prunepass.graph.inputs import fake_value

__all__ = ["SOFTMAX_WITH_SINKS", "name_sinks", "softmax_with_sinks"]

aten = torch.ops.aten
_LIBRARY = torch.library.Library("prunepass", "FRAGMENT")
_LIBRARY.define("softmax_with_sinks(Tensor scores, int dim, Tensor sinks, ScalarType? dtype=None) -> Tensor")


def softmax_with_sinks(scores: Tensor, dim: int, sinks: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The softmax of [..., queries, keys] and [..., queries, n] side by side, of which the keys' part is returned.

    Args:
        dim: the last axis.
        sinks: may have axes of one where all rows or queries share them.
    """
    sinks = sinks.expand(*scores.shape[:-1], sinks.shape[-1])
    probabilities = torch.cat([scores, sinks], dim=dim).softmax(dim, dtype)
    return probabilities.narrow(dim, 0, scores.shape[dim])


_LIBRARY.impl("softmax_with_sinks", softmax_with_sinks, "CompositeImplicitAutograd")
SOFTMAX_WITH_SINKS = torch.ops.prunepass.softmax_with_sinks.default


def name_sinks(gm: GraphModule) -> int:
    """``softmax(cat([scores, sinks], -1), -1)[..., :-n]`` -> ``softmax_with_sinks(scores, -1, sinks)``, in place.

    Before it ``softmax(x - max(x))`` -> ``softmax(x)``: a softmax takes off the maximum by itself. And
    ``(softmax(x) @ v) * sigmoid(logsumexp(x) - sinks)[..., None]`` -> ``softmax_with_sinks(x, -1, sinks) @ v``.

    Returns:
        The number of softmaxes changed.
    """
    count = sum(
        _name_scale(gm, node) for node in gm.graph.find_nodes(op="call_function", target=aten.logsumexp.default)
    )
    for node in list(gm.graph.find_nodes(op="call_function", target=aten.softmax.int)):
        if (scores := _less_their_maximum(node)) is not None:
            node.replace_input_with(node.args[0], scores)
            count += 1
        joined = _joined(node)
        parts: Any = joined.args[0] if joined is not None else ()
        if len(parts) != 2 or not all(isinstance(part, Node) for part in parts):
            continue
        scores, sinks = parts
        readers = [user for user in node.users if not _is_query(user)]
        if not readers or not all(_drops(user, sinks) for user in readers):
            continue
        with gm.graph.inserting_before(node):
            named = gm.graph.call_function(SOFTMAX_WITH_SINKS, (scores, -1, sinks, *node.args[2:]), node.kwargs)
        named.meta = {k: v for k, v in node.meta.items() if k not in ("val", "example_value", "tensor_meta")}
        named.meta["val"] = fake_value(readers[0])
        for reader in readers:
            reader.replace_all_uses_with(named)
            gm.graph.erase_node(reader)
        count += 1
    if count:
        gm.graph.eliminate_dead_code()
        gm.recompile()
    return count


#: what stands between parts of a scale, or between probabilities and their product with the values
_PASSING = {aten.to.dtype, aten._to_copy.default, aten.dropout.default, aten.clone.default, aten.alias.default}
_SCALE = [aten.sub.Tensor, aten.sigmoid.default, aten.unsqueeze.default, aten.mul.Tensor]


def _name_scale(gm: GraphModule, total: Node) -> bool:
    """The keys' share beside sinks, ``sigmoid(logsumexp(x) - sinks)``, into the softmax that it scales."""
    scores: Any = total.args[0]
    if not isinstance(scores, Node) or len(total.args) > 2 or not _is_last(scores, _only(total.args[1])):
        return False
    softmax = next((user for user in scores.users if user.target is aten.softmax.int), None)
    chain = _chain(total)
    if softmax is None or [node.target for node in chain] != _SCALE or not _is_last(scores, softmax.args[1]):
        return False
    less, _, wide, product = chain
    sinks: Any = less.args[1]
    if (
        less.kwargs
        or _behind(less.args[0]) is not total
        or not isinstance(sinks, Node)
        or wide.args[1] not in (-1, _rank(wide) - 1)
    ):
        return False
    read = next((a for a in product.all_input_nodes if _behind(a) is not wide), None)
    if (
        read is None
        or read.target not in (aten.matmul.default, aten.bmm.default)
        or _behind(read.args[0]) is not softmax
    ):
        return False
    if len(read.users) > 1 or [user for user in _behind_users(softmax) if user is not read]:
        return False  # the probabilities are wanted, too
    with gm.graph.inserting_before(softmax):
        column = gm.graph.call_function(aten.unsqueeze.default, (sinks, -1))
        named = gm.graph.call_function(SOFTMAX_WITH_SINKS, (scores, -1, column, *softmax.args[2:]), softmax.kwargs)
    column.meta = {"val": fake_value(sinks).unsqueeze(-1)}
    named.meta = dict(softmax.meta)
    softmax.replace_all_uses_with(named)
    product.replace_all_uses_with(read)
    return True


def _only(dim: Any) -> Any:
    return dim[0] if isinstance(dim, (list, tuple)) and len(dim) == 1 else dim


def _chain(node: Node) -> list[Node]:
    """The nodes that read ``node`` and each other in turn, where one alone does; without those that pass a value on."""
    found: list[Node] = []
    while len(readers := [user for user in node.users if not _is_query(user)]) == 1:
        (node,) = readers
        if node.target not in _PASSING:
            found.append(node)
        if node.target is aten.mul.Tensor:
            break
    return found


def _behind(node: Any) -> Any:
    """Where a value comes from, before it was only passed on."""
    while isinstance(node, Node) and node.target in _PASSING:
        node = node.args[0]
    return node


def _behind_users(node: Node) -> list[Node]:
    """What reads a value, as it is or passed on."""
    found: list[Node] = []
    for user in node.users:
        found += _behind_users(user) if user.target in _PASSING else [user]
    return found


def _rank(node: Node) -> int:
    value = fake_value(node)
    return value.dim() if isinstance(value, Tensor) else 0


def _is_last(node: Node, dim: Any) -> bool:
    rank = _rank(node)
    return isinstance(dim, int) and rank > 2 and dim % rank == rank - 1


def _less_their_maximum(softmax: Node) -> Node | None:
    """The scores of a softmax that is given them less their maximum over its axis, [..., 1]."""
    x: Any = softmax.args[0]
    if not isinstance(x, Node) or not _is_last(x, softmax.args[1]):
        return None
    if x.target is not aten.sub.Tensor or len(x.args) != 2 or x.kwargs:
        return None
    scores, top = x.args
    if isinstance(top, Node) and top.target is operator.getitem and top.args[1] == 0:
        top = top.args[0]  # max.dim gives values and places
    if not isinstance(top, Node) or not isinstance(scores, Node) or top.args[0] is not scores:
        return None
    if top.target not in (aten.max.dim, aten.amax.default) or len(top.args) < 3 or top.args[2] is not True:
        return None
    dim: Any = top.args[1]
    return scores if _is_last(scores, dim[0] if isinstance(dim, (list, tuple)) and len(dim) == 1 else dim) else None


def _joined(softmax: Node) -> Node | None:
    """The scores with the sinks beside them."""
    x: Any = softmax.args[0]
    if not isinstance(x, Node) or x.target is not aten.cat.default or not _is_last(x, softmax.args[1]):
        return None
    return x if _is_last(x, x.args[1] if len(x.args) > 1 else 0) else None


def _is_query(node: Node) -> bool:
    """Whether a node only asks for sizes."""
    return node.target is aten.sym_size.int and not node.users


def _drops(reader: Node, sinks: Node) -> bool:
    """Whether ``reader`` is the probabilities without those of the sinks."""
    if reader.target is not aten.slice.Tensor or len(reader.args) < 4 or len(reader.args) > 4:
        return False
    source, dim, start, end = reader.args
    width = fake_value(sinks).shape[-1]
    return isinstance(source, Node) and _is_last(source, dim) and start in (0, None) and end == -width
