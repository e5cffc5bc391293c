"""Tokens that a model makes itself, of an image or of sound: where the residual stream begins.

The source is the last value that every path to the output goes through before the first attention. What stands before
it (patch or frame convolutions, class and register tokens, positions) is never changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx
import torch
from torch.fx import Graph, GraphModule, Node
from torch.utils._python_dispatch import _disable_current_modes

from prunepass.errors import RefusalError
from prunepass.graph.flow import ancestors
from prunepass.graph.inputs import MASK_NAMES, fake_value, hint, input_name, is_cache
from prunepass.graph.kinds import kind_of, name_of
from prunepass.graph.modules import module_path

__all__ = ["Made", "asks", "attentions_in", "depends_on", "live_frames", "made_tokens", "prefix_of", "value_from"]

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
_SOFTMAX = {aten.softmax.int, aten._softmax.default, aten._safe_softmax.default}
_PRODUCTS = {aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.einsum.default}
_CONVOLUTIONS = {
    aten.conv1d.default,
    aten.conv1d.padding,
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.conv3d.default,
    aten.convolution.default,
}
#: how far above a softmax its scores' product stands at most: scale, mask, biases, casts
_STEPS_TO_PRODUCT = 12


@dataclass(frozen=True)
class Made:
    """Tokens that a model makes of one input.

    Attributes:
        given: the placeholder.
        source: [B, T, D], where the stream begins; None where there is no attention to prune before.
        reason: with no source, why.
        attentions: those that depend on the input, in the graph's order.
        convolved: whether a convolution stands between the two.
    """

    given: Node
    source: Node | None
    reason: RefusalError | None
    attentions: tuple[Node, ...]
    convolved: bool = False


def made_tokens(gm: GraphModule, given: Sequence[Node]) -> list[Made]:
    """What a model makes tokens of, among its inputs: pixels, samples, spectrograms.

    A floating input of shape [batch, tokens, width] that no convolution reads is no such input: it holds states. Pixels
    may be bytes: models of transformers cast them.
    """
    found = []
    for node in given:
        value = fake_value(node)
        of_bytes = value.dtype == torch.uint8 and value.dim() > 3
        if not (value.is_floating_point() or of_bytes) or value.dim() < 2:
            continue
        if input_name(node) in MASK_NAMES or is_cache(node):
            continue
        content = depends_on(gm.graph, node)
        attentions = tuple(n for n in attentions_in(gm.graph) if n in content)
        if attentions and not asks(attentions[0], content):
            continue  # a mask, or keys of a cache
        convolved = any(n.target in _CONVOLUTIONS for n in content)
        if (value.dim() == 3 and not convolved) or not (attentions or value.dim() == 4):
            continue
        if not attentions:
            found.append(Made(node, None, _no_attention(node, content), ()))
            continue
        found.append(_made(gm.graph, node, content, attentions))
    return found


def attentions_in(graph: Graph) -> list[Node]:
    """Fused attentions, and softmaxes along the last axis of a product: before sizes are known, by operators alone."""
    return [n for n in graph.nodes if n.op == "call_function" and (n.target is SDPA or _products(n))]


def depends_on(graph: Graph, source: Node) -> set[Node]:
    """What holds content of ``source``, itself included. Sizes carry none."""
    reached = {source}
    for node in graph.nodes:
        if any(a in reached for a in node.all_input_nodes) and not _is_number(node):
            reached.add(node)
    return reached


def _made(graph: Graph, given: Node, content: set[Node], attentions: tuple[Node, ...]) -> Made:
    chain = _stream(graph, given, content, attentions)
    if chain is None:
        reason = RefusalError(
            f"no output depends on attention over {input_name(given)}.", hint="prunepass prunes up to the output."
        )
        return Made(given, None, reason, attentions)
    above = ancestors(attentions[0])
    source = [node for node in chain if node in above][-1]
    convolved = any(node.target in _CONVOLUTIONS for node in above & content)
    if fake_value(given).dim() == 3 and (source is given or not convolved):
        return Made(given, None, None, attentions)
    return Made(given, source, _not_tokens(given, source, attentions[0]), attentions, convolved)


def _not_tokens(given: Node, source: Node, attention: Node) -> RefusalError | None:
    """Why the value that the stream begins with holds no tokens: it has another shape than [batch, tokens, width]."""
    value, batch = fake_value(source), fake_value(given).shape[0]
    shape = [hint(n) for n in value.shape] if isinstance(value, torch.Tensor) else []
    if len(shape) == 3 and shape[0] == hint(batch) and value.is_floating_point():
        return None
    if len(shape) == 4:
        what = "a grid of rows and columns, of which attention sees windows or other parts"
    elif shape and shape[0] != hint(batch) and shape[0] % hint(batch) == 0:
        what = "pieces of an image as rows of the batch, each attended to by itself"
    else:
        what = "no tokens of the shape [batch, tokens, width]"
    return RefusalError(
        f"the last value before attention that every path to the output goes through is {shape}: {what}.",
        where=module_path(attention) or attention.name,
        hint="prunepass prunes models whose attention is over all tokens of an image or of a sound at once.",
    )


def _no_attention(given: Node, content: set[Node]) -> RefusalError:
    """Why a model that sees or hears has no tokens: what it has in place of attention."""
    mixers = [n for n in given.graph.nodes if n in content and kind_of(n) is not None]
    last = mixers[-1] if mixers else None
    said = f" Its last step that looks around is {name_of(last)} ({last.name})." if last is not None else ""
    return RefusalError(
        f"no attention was found between {input_name(given)} and the output, so there are no tokens to leave out."
        f"{said}",
        where=(module_path(last) or last.name) if last is not None else None,
        hint="prunepass prunes models with scaled dot-product attention, fused or as a softmax over the keys.",
    )


def _stream(graph: Graph, given: Node, content: set[Node], attentions: Sequence[Node]) -> list[Node] | None:
    """The dominators from an input to the output that most of what depends on its attention leads to."""
    output = next(iter(graph.find_nodes(op="output")))
    sinks = [n for n in output.all_input_nodes if n in content]
    above = {n: ancestors(n) & content for n in sinks}
    sinks = [n for n in sinks if attentions[0] in above[n]]
    if not sinks:
        return None
    sink = max(sinks, key=lambda n: len(above[n]))
    flow = nx.DiGraph()
    for node in above[sink]:
        flow.add_edges_from((a, node) for a in node.all_input_nodes if a in content and node is not given)
    idom = nx.immediate_dominators(flow, given)
    chain = [sink]
    while chain[-1] is not given:
        chain.append(idom[chain[-1]])
    return chain[::-1]


def _is_number(node: Node) -> bool:
    return isinstance(fake_value(node), (int, float, torch.SymInt, torch.SymFloat, torch.SymBool))


def _products(node: Node) -> list[Node]:
    """The product that a softmax's scores are computed from; none for a softmax along another axis."""
    value = fake_value(node)
    if node.target not in _SOFTMAX or not isinstance(value, torch.Tensor) or value.dim() < 3:
        return []
    dim: Any = node.args[1]
    if dim % value.dim() != value.dim() - 1:
        return []
    near, edge = {node}, [node]
    for _ in range(_STEPS_TO_PRODUCT):
        edge = [a for n in edge for a in n.all_input_nodes if a not in near]
        near.update(edge)
        if found := [n for n in edge if n.target in _PRODUCTS]:
            return found
    return []


def asks(attention: Node, content: set[Node]) -> bool:
    """Whether the queries of an attention are in ``content``."""
    if attention.target is SDPA:
        return attention.args[0] in content
    return any(all(a in content for a in product.all_input_nodes) for product in _products(attention))


# -- tokens that come from nothing ---------------------------------------------------------------------------------


def prefix_of(source: Node, content: set[Node]) -> int:
    """How many tokens at the start of each row do not depend on the image or the sound: class and register tokens."""
    told = _from_input(source, content, {})
    return next((i for i, here in enumerate(told) if here), 0)


def _from_input(node: Node, content: set[Node], memo: dict[Node, list[bool]]) -> list[bool]:
    """For each place along axis 1 of a [B, T, ...] value whether it depends on the input."""
    if node not in memo:
        memo[node] = _places(node, content, memo)
    return memo[node]


def _places(node: Node, content: set[Node], memo: dict[Node, list[bool]]) -> list[bool]:
    value = fake_value(node)
    length = hint(value.shape[1]) if isinstance(value, torch.Tensor) and value.dim() > 1 else 1
    if node not in content:
        return [False] * length
    args: Any = node.args
    if node.target is aten.cat.default and len(args) > 1 and args[1] % value.dim() == 1:
        return [here for part in args[0] for here in _from_input(part, content, memo)]
    if node.target is aten.slice.Tensor:
        before = _from_input(args[0], content, memo)
        start, end = (*args[2:4], *(None,) * (4 - len(args[2:4]) - 2))[:2] if len(args) > 2 else (None, None)
        along = len(args) > 1 and args[1] % value.dim() == 1
        return (
            before[start:end]
            if along and isinstance(start, int | None) and isinstance(end, int | None)
            else (before if not along else [True] * length)
        )
    inputs = [a for a in node.all_input_nodes if isinstance(fake_value(a), torch.Tensor)]
    same = [a for a in inputs if fake_value(a).dim() == value.dim()]
    token_wise = node.target in _TOKEN_WISE or torch.Tag.pointwise in getattr(node.target, "tags", ())
    if not token_wise or any(a in content and a not in same for a in inputs):
        return [True] * length
    told = [_from_input(a, content, memo) for a in same if a in content]
    return [any(t[i] if len(t) == length else t[0] for t in told) for i in range(length)]


_TOKEN_WISE = {
    aten.dropout.default,
    aten.layer_norm.default,
    aten.linear.default,
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten._to_copy.default,
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
}


# -- which frames are live -----------------------------------------------------------------------------------------


def live_frames(gm: GraphModule, given: Sequence[Node], made: Node, attentions: Sequence[Node]) -> Node | None:
    """What the model makes of its attention mask over samples: [B, T], non-zero at live frames. None where it takes no
    mask, or hides nothing by it.

    Args:
        given: the inputs.
        made: where the tokens begin.
        attentions: those over the tokens, in order.

    Raises:
        RefusalError: the mask reaches attention, and no value between says which frames are live.
    """
    mask = next((n for n in given if input_name(n) in MASK_NAMES), None)
    if mask is None:
        return None
    content = {n for x in given if x is not mask for n in depends_on(gm.graph, x)}
    told = depends_on(gm.graph, mask) - content - depends_on(gm.graph, made)
    reader = next((n for n in attentions if told & ancestors(n) - ancestors(made)), None)
    if reader is None:
        return None
    wanted = [hint(n) for n in fake_value(made).shape[:2]]
    inside = ancestors(reader) & told
    before = ancestors(made)  # positions may be made of the mask as well
    outside = [n for n in ancestors(reader) - told - before if not _is_number(n)]
    ends = {a for n in outside for a in n.all_input_nodes if a in told} or {reader}
    flow = nx.DiGraph()
    for node in inside:
        flow.add_edges_from((a, node) for a in node.all_input_nodes if a in inside)
    flow.add_edges_from((n, reader) for n in ends if n is not reader)
    idom = nx.immediate_dominators(flow, mask)
    chain = [idom[reader]]
    while chain[-1] is not mask:
        chain.append(idom[chain[-1]])
    frames: Node
    for frames in chain:
        value = fake_value(frames)
        fits = isinstance(value, torch.Tensor) and [hint(n) for n in value.shape] == wanted
        if fits and _says_live(gm, frames, mask):
            return frames
    raise RefusalError(
        f"{input_name(mask)} reaches the attention, and the model computes no value of shape {wanted} (batch, tokens) "
        "from it that is non-zero at live tokens.",
        where=module_path(reader) or reader.name,
        hint="Call the model without the mask, one sound or image at a time.",
    )


def _says_live(gm: GraphModule, node: Node, mask: Node) -> bool:
    """Whether a value is non-zero at live tokens: the graph is run for a row without padding and one that is half
    padding. Only the mask's own values are needed."""
    shape = [hint(n) for n in fake_value(mask).shape]
    found = []
    for live_samples in (shape[1], shape[1] // 2):
        rows = torch.ones(shape, dtype=fake_value(mask).dtype)
        rows[:, live_samples:] = 0
        try:
            with torch.no_grad():
                found.append(value_from(gm, node, {mask: rows}) != 0)
        except Exception:  # it needs more than the mask
            return False
    whole, half = found
    count = int(half[0].sum())
    return bool(whole.all()) and 0 < count < half.shape[1] and bool(half[:, :count].all() and not half[:, count:].any())


def value_from(gm: GraphModule, wanted: Node, known: Mapping[Node, torch.Tensor]) -> torch.Tensor:
    """A value that depends on ``known`` alone, besides the sizes of other inputs."""
    values: dict[Node, Any] = dict(known)
    needed = ancestors(wanted)
    with _disable_current_modes():
        for node in gm.graph.nodes:
            if node not in needed or node in values:
                continue
            if node.op == "placeholder":
                value = fake_value(node)
                is_tensor = isinstance(value, torch.Tensor)
                values[node] = torch.zeros([hint(n) for n in value.shape]) if is_tensor else hint(value)
            elif node.op == "get_attr":
                values[node] = _attribute(gm, str(node.target))
            else:
                args, kwargs = (torch.fx.map_arg(x, values.__getitem__) for x in (node.args, node.kwargs))
                assert callable(node.target)
                values[node] = node.target(*args, **kwargs)
    found: torch.Tensor = values[wanted]
    return found


def _attribute(gm: GraphModule, target: str) -> Any:
    value: Any = gm
    for name in target.split("."):
        value = getattr(value, name)
    return value
