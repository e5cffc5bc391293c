"""What operators are called in messages, and those that are known to mix tokens."""

from __future__ import annotations

from torch.fx import Node

__all__ = ["int_argument", "is_assertion", "kind_of", "name_of"]

#: what operators that mix tokens do, by a part of their name
_KINDS = {
    "conv": "a convolution over the sequence",
    "fft": "a Fourier transform over the sequence",
    "lstm": "a recurrence over the sequence",
    "gru": "a recurrence over the sequence",
    "rnn": "a recurrence over the sequence",
    "associative_scan": "a recurrence over the sequence",
    "scan": "a recurrence over the sequence",
    "while_loop": "a recurrence over the sequence",
    "pool": "a pooling over the sequence",
    "interpolate": "a resampling of the sequence",
    "upsample": "a resampling of the sequence",
    "unfold": "a sliding window over the sequence",
    "cumsum": "a running sum over the sequence",
    "cumprod": "a running product over the sequence",
    "cummax": "a running maximum over the sequence",
    "roll": "a shift of the sequence",
    "flip": "a reversal of the sequence",
    "pad": "a padding of the sequence",
    "flex_attention": "flex attention (load the model with attn_implementation='sdpa')",
    "choose_qparams": "quantisation with a range taken over all tokens (quantise with fixed ranges, or after pruning)",
    "flash_attention": "lowered attention (prune before lowering, on the pre-dispatch graph)",
}


def kind_of(node: Node) -> str | None:
    """What an operator that is known to mix tokens does; None for one that is known to leave them apart, or unknown."""
    name = name_of(node).removeprefix("aten.")
    return next((text for key, text in _KINDS.items() if key in name), None) if node.op == "call_function" else None


def name_of(node: Node) -> str:
    """``aten.conv1d.default``."""
    return str(node.target)


def int_argument(node: Node, index: int) -> int:
    """An integer that stands in a node's positional arguments as a literal, such as the axis it works along."""
    value = node.args[index]
    assert isinstance(value, int), f"argument {index} of {node} is no literal integer"
    return value


def is_assertion(node: Node) -> bool:
    """Whether a node only checks something: it gives no value, and a model that runs runs without it."""
    name = getattr(getattr(node.target, "_schema", None), "name", "")
    return name.startswith(("aten::_assert_", "aten::sym_constrain_range", "aten::_functional_assert"))
