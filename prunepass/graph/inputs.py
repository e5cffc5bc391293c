"""Which placeholders of a graph carry the tokens, and which one says where they are live."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch.fx import Graph, GraphModule, Node

from prunepass.errors import CaptureError, RefusalError
from prunepass.graph.modules import module_path

__all__ = [
    "ALIASES",
    "MASK_NAMES",
    "TOKENS_TO_TRACE",
    "TOKEN_SIZES",
    "WHOLE_MODEL",
    "ModelInputs",
    "Prompt",
    "TokenSizes",
    "check_mask",
    "check_mask_fits",
    "embedded",
    "fake_value",
    "given_inputs",
    "hint",
    "input_name",
    "is_cache",
    "is_symbolic",
    "no_tokens",
    "of_tokens",
    "source_name",
]

aten = torch.ops.aten

#: key of a graph's ``meta``: tokens of a row that it must be traced with, at least, to hold for all lengths
TOKENS_TO_TRACE = "prunepass_tokens_to_trace"

#: key of a pruned graph's ``meta``: the batch and the tokens of a row, before pruning, as the tracer has them
TOKEN_SIZES = "prunepass_token_sizes"


class TokenSizes(tuple[Any, Any]):
    """What stands there. A copy of the graph has the same symbols, which cannot be copied."""

    __slots__ = ()

    def __deepcopy__(self, memo: Any) -> TokenSizes:
        return self


#: what to do where a graph is a piece of a model
WHOLE_MODEL = (
    "Where torch.compile split the model into several graphs, compile it whole (fullgraph=True shows what splits it). "
    "A quantised key-value cache splits it, too: generate with the dynamic cache, transformers' default."
)

#: what models call the input that says which tokens are live
MASK_NAMES = ("attention_mask", "mask", "padding_mask", "patch_attention_mask")

#: masks of torch.nn, True where the others are 0
_PADDING_NAMES = ("src_key_padding_mask", "tgt_key_padding_mask", "key_padding_mask")
_LAST_KEY = re.compile(r"\['([^']+)'\][^\[]*$")
#: ops that hand their first argument on unchanged in content, so that a use can be followed through them
ALIASES = {
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten._to_copy.default,
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.view.default,
    aten.reshape.default,
    aten.lift_fresh_copy.default,
}
#: attentions, and a few others that do no harm: here they only tell streams apart
_ATTENTIONS = {
    aten.scaled_dot_product_attention.default,
    aten.softmax.int,
    aten._softmax.default,
    aten._safe_softmax.default,
}


@dataclass(frozen=True)
class Prompt:
    """What the outer call of a vision-language model says of its language model's inputs, see `graph.prompts`.

    Attributes:
        ids: [B, S] placeholder of the token ids.
        widths: for each stage of the plan how many slots it leaves, a number or its placeholder; empty where that
            follows from the length.
    """

    ids: Node
    widths: tuple[Node | int, ...] = ()


@dataclass(frozen=True)
class ModelInputs:
    """The inputs that matter to a pass.

    Attributes:
        tokens: ``input_ids`` (int, [B, S]) or ``inputs_embeds`` (float, [B, S, D]).
        source: the first value that holds token content: the embedding's output, or ``inputs_embeds`` itself.
        attention_mask: [B, S] placeholder, non-zero at live tokens; None where the graph takes none.
        sequence: every placeholder whose first two axes are (B, S), without those of another stream: a decoder's ids
            that were as long as the encoder's in the traced call.
        made_from: the placeholder that the model makes its tokens of (``pixel_values``, ``input_values``); None where
            tokens are given. Then ``tokens`` is ``source``, a value inside the graph, and ``attention_mask`` is what
            the model makes of its mask for those tokens.
        front: with ``made_from`` all that does not depend on the source: what makes the tokens, masks, tables.
        prefix: with ``made_from`` how many tokens at the start of each row are none of the image or the sound: class,
            register and distillation tokens.
        prompt: in the language model of a vision-language model, what the outer call says of these inputs.
    """

    tokens: Node
    source: Node
    attention_mask: Node | None
    sequence: tuple[Node, ...]
    made_from: Node | None = None
    front: frozenset[Node] = frozenset()
    prefix: int = 0
    prompt: Prompt | None = None

    @property
    def rows(self) -> Node:
        """The placeholder whose first axis is the batch."""
        return self.tokens if self.made_from is None else self.made_from

    @property
    def fixed_length(self) -> int | None:
        """Tokens of a row, where the model makes them and their number is a constant: of an image of one size."""
        length = fake_value(self.source).shape[1]
        return int(length) if self.made_from is not None and not is_symbolic(length) else None

    @property
    def token_ids(self) -> Node | None:
        """The ids, where the graph gets ids rather than embeddings, or both."""
        if self.prompt is not None:
            return self.prompt.ids
        return self.tokens if self.tokens is not self.source else None


def fake_value(node: Node) -> Any:
    """The fake tensor or symbolic number that the tracer left on a node (``val``, or Dynamo's ``example_value``)."""
    return node.meta.get("val", node.meta.get("example_value"))


def is_symbolic(size: Any) -> TypeGuard[torch.SymInt]:
    """Whether a size is open; one that the tracer took as open at first, and then had to fix, is not. Shapes are typed
    as plain ints, so that type checkers take an `isinstance` for False."""
    return isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None


def input_name(node: Node) -> str:
    """The user's own name of a placeholder: ``input_ids`` for Dynamo's ``L['kwargs']['input_ids']`` too."""
    if text := source_name(node):
        found = _LAST_KEY.search(text)
        return found.group(1) if found else text
    return str(node.meta.get("prunepass_name", node.target))


def source_name(node: Node) -> str:
    """Where Dynamo took a placeholder from, as Python code: ``L['encoder_outputs'].last_hidden_state``; "" for other
    tracers."""
    source = getattr(node.meta.get("grapharg"), "source", None)
    if source is None:
        return ""
    return str(source.name() if callable(source.name) else source.name)


def is_parameter(node: Node) -> bool:
    """Whether a placeholder is a lifted parameter or buffer rather than a model input."""
    if "_dynamo_static_input_type" in (node.meta.get("tensor_dict") or {}):
        return True
    if text := source_name(node):
        return "_parameters[" in text or "_buffers[" in text
    return isinstance(fake_value(node), torch.nn.Parameter)


def given_inputs(gm: GraphModule) -> list[Node]:
    """The placeholders that are tensors of a call, not parameters."""
    users = [n for n in gm.graph.nodes if n.op == "placeholder" and isinstance(fake_value(n), torch.Tensor)]
    return [n for n in users if not is_parameter(n)]


def of_tokens(gm: GraphModule, users: list[Node], tokens: Node, source: Node) -> ModelInputs:
    """The inputs that belong to given tokens. Raises `RefusalError` where the attention mask is not two-dimensional."""
    batch, length = fake_value(tokens).shape[:2]
    sequence = tuple(n for n in users if _leads_with(n, batch, length) and not is_cache(n))
    sequence = _of_stream(gm.graph, sequence, tokens, source)
    return ModelInputs(tokens, source, _attention_mask(users, tokens, sequence), sequence)


def embedded(graph: Graph, users: list[Node]) -> list[tuple[Node, Node]]:
    """Tokens that are given, with the first value that holds their content: ids, likeliest first, else states."""
    found = []
    for embedding in graph.find_nodes(op="call_function", target=aten.embedding.default):
        index = embedding.args[1]
        while isinstance(index, Node) and (index.target in ALIASES or _is_whole_slice(index)):
            index = index.args[0]
        if index not in users or fake_value(index).dim() != 2:
            continue
        if input_name(index) not in ("token_type_ids", "position_ids"):
            found.append((index, embedding))
    # an encoder's tokens before those of its decoder, however large the decoder is
    found = [pair for pair in found if not input_name(pair[0]).startswith("decoder_")] or found
    if found:  # a model may embed its tokens twice; the stream starts where most of it hangs
        return found if len(found) == 1 else sorted(found, key=lambda pair: -_reach(graph, pair[1]))
    states = [n for n in users if fake_value(n).dim() == 3 and fake_value(n).is_floating_point()]
    return [(node, node) for node in states]


def no_tokens(users: list[Node]) -> str:
    """Why no input holds tokens."""
    names = ", ".join(input_name(n) for n in users) or "none"
    whole = f" {WHOLE_MODEL}" if any("grapharg" in n.meta for n in users) or not users else ""  # Dynamo splits models
    wanted = (
        "input_ids of shape [batch, length] that feed an embedding, or inputs_embeds of shape [batch, length, width]"
    )
    ids = next((n for n in users if fake_value(n).dim() == 2 and not fake_value(n).is_floating_point()), None)
    if ids is not None and "mask" not in input_name(ids):
        readers = [n for n in ids.users if n.target is not aten.sym_size.int]
        reader = next((n for n in readers if n.target not in ALIASES), readers[0] if readers else ids)
        where = f" in {module_path(reader)}" if module_path(reader) else ""
        return (
            f"{input_name(ids)} is not looked up in an embedding as it is ({reader.target} reads it{where}), and "
            "prunepass starts from token embeddings. Pass inputs_embeds instead, where the model takes them." + whole
        )
    made = [input_name(n) for n in users if fake_value(n).is_floating_point()]
    if made:
        return (
            f"This model makes its tokens itself, from {', '.join(made)}; prunepass takes tokens as {wanted}. "
            f"Prune the part of the model that takes one of them.{whole}"
        )
    return f"No input of this graph looks like tokens: expected {wanted}. Inputs found: {names}.{whole}"


def _reach(graph: Graph, source: Node) -> int:
    """How many nodes depend on ``source``."""
    reached = {source}
    for node in graph.nodes:
        if any(a in reached for a in node.all_input_nodes):
            reached.add(node)
    return len(reached)


def _is_whole_slice(node: Node) -> bool:
    """``ids[:, -length:]``, as some models write to make room for a cache."""
    if node.target is not aten.slice.Tensor or not isinstance(node.args[0], Node):
        return False
    return [hint(n) for n in fake_value(node).shape] == [hint(n) for n in fake_value(node.args[0]).shape]


def _leads_with(node: Node, batch: Any, length: Any) -> bool:
    shape = fake_value(node).shape
    return len(shape) >= 2 and _same(shape[0], batch) and _same(shape[1], length)


def is_cache(node: Node) -> bool:
    """Keys and values of earlier calls, [B, heads, ...]: a call may have as many tokens as there are heads."""
    return "past_key_values" in (source_name(node) or str(node.target))


def _same(a: Any, b: Any) -> bool:
    """Whether two sizes are one in the traced call: torch.export may give each input its own symbol for the batch."""
    return hint(a) == hint(b)


def hint(size: Any) -> int:
    """A size in the traced call."""
    return int(size.node.hint) if is_symbolic(size) else int(size)


def _of_stream(graph: Graph, sequence: tuple[Node, ...], tokens: Node, source: Node) -> tuple[Node, ...]:
    """Of inputs of the tokens' length, those that belong to the tokens.

    An input whose length the graph ties to the tokens' is one of theirs. Where both are open, another stream's inputs
    are told by what they feed: an attention that holds nothing of the tokens. What the tokens' own first attention
    reads is theirs.
    """
    length = fake_value(tokens).shape[1]
    open_ones = {n for n in sequence if not _is_tied(fake_value(n).shape[1], length)}
    if not open_ones:
        return sequence
    reads: dict[Node, set[Node]] = {}
    own: set[Node] | None = None
    others: set[Node] = set()
    for node in graph.nodes:
        is_size = node.target is aten.sym_size.int  # all inputs share the batch
        above = [] if is_size else [reads[a] for a in node.all_input_nodes]
        reads[node] = {node}.intersection((*sequence, source)).union(*above)
        if node.target not in _ATTENTIONS:
            continue
        if source not in reads[node]:
            others |= reads[node]
        elif own is None:
            own = reads[node]
    if not others & open_ones - (own or set()):
        return sequence
    return tuple(n for n in sequence if n not in open_ones or n in (own or ()))


def _is_tied(one: Any, two: Any) -> bool:
    """Whether two sizes are one number in the graph: the same symbol, or two integers that its guards hold equal."""
    if is_symbolic(one) and is_symbolic(two):
        return bool(one.node.expr == two.node.expr)
    return not is_symbolic(one) and not is_symbolic(two)


def _attention_mask(users: list[Node], tokens: Node, sequence: tuple[Node, ...]) -> Node | None:
    for node in sequence:
        if input_name(node) in _PADDING_NAMES and node.users:
            raise RefusalError(
                "this mask is True at padding, as torch.nn's are, and prunepass reads masks that are 1 at live tokens.",
                where=input_name(node),
                hint="Put the model into a module that takes attention_mask and hands attention_mask == 0 on.",
            )
    named = [n for n in users if input_name(n) in MASK_NAMES]
    for node in named:
        _refuse_square(fake_value(node), fake_value(tokens), input_name(node))
        check_mask(fake_value(node), input_name(node))
        return node
    positional = [n for n in sequence if n is not tokens and _is_unnamed(n) and not _feeds_embedding(n)]
    if len(positional) > 1:
        raise CaptureError(
            "Several inputs passed by position could be the attention mask. Pass attention_mask by keyword."
        )
    return positional[0] if positional and fake_value(positional[0]).dim() == 2 else None


def check_mask_fits(inputs: ModelInputs) -> None:
    """Raises `RefusalError` where the attention mask has another length than the tokens: it belongs to other tokens, as
    an encoder's does where the decoder's are the ones given."""
    mask = inputs.attention_mask
    if mask is None or _same(fake_value(mask).shape[1], fake_value(inputs.tokens).shape[1]):
        return
    shapes = [f"[{', '.join(str(hint(n)) for n in fake_value(x).shape)}]" for x in (mask, inputs.tokens)]
    raise RefusalError(
        f"the attention mask has the shape {shapes[0]} and {input_name(inputs.tokens)} {shapes[1]}, so which tokens "
        "are live cannot be read from it.",
        where=input_name(mask),
        hint="Pass a mask of the tokens' own shape. In an encoder-decoder prune the encoder: pass its input_ids.",
    )


def _refuse_square(mask: torch.Tensor, tokens: torch.Tensor, name: str) -> None:
    batch, length = tokens.shape[:2]
    if mask.dim() == 2 and all(_same(size, length) for size in mask.shape) and not _same(length, batch):
        raise RefusalError(
            "the mask is [length, length] (which token attends to which), so which tokens are live cannot be read from "
            "it.",
            where=name,
            hint="Compute it inside the model, and pass a mask of shape [batch, length] that is 1 at live tokens.",
        )


def check_mask(mask: Any, name: str = "attention_mask") -> None:
    """Raises `RefusalError` for a mask that does not say which tokens are live."""
    if isinstance(mask, torch.Tensor) and mask.dim() != 2:
        raise RefusalError(
            f"the attention mask has {mask.dim()} dimensions, so which tokens are live cannot be read from it.",
            where=name,
            hint="Pass a mask of shape [batch, length] that is 1 at live tokens and 0 at padding.",
        )


def _is_unnamed(node: Node) -> bool:
    return not re.search(r"ids|embeds|labels|position", input_name(node))


def _feeds_embedding(node: Node) -> bool:
    return any(
        user.target is aten.embedding.default or (user.target in ALIASES and _feeds_embedding(user))
        for user in node.users
    )
