"""Mixtures of experts as token-wise operators.

transformers sorts the rows of a batch by expert, multiplies each group by its expert's weights, and sorts back. In a
graph that reads as many operators that mix tokens, though each token's result depends on that token alone. So while a
model is traced its experts are computed by ``prunepass::expert_linear``, a product with weights chosen by token, in the
form that transformers' interface of experts takes (`install`).

The operator is a composite of plain ones: graphs keep it whole until they are lowered, and compilers, gradients and
decompositions then see the same sorted products as in transformers' own form.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

__all__ = ["EXPERT_LINEAR", "experts_forward", "install", "traced_as_units"]

_LIBRARY = torch.library.Library("prunepass", "FRAGMENT")
_LIBRARY.define("expert_linear(Tensor x, Tensor weight, Tensor? bias, Tensor experts, bool transposed) -> Tensor")
#: the names under which transformers runs experts in a form that does not show tokens apart
_GROUPED = ("grouped_mm", "eager")


# -- the products of groups of rows ------------------------------------------------------------------------------------


@torch.library.custom_op("prunepass::grouped_product", mutates_args=())
def _grouped_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows ``ends[e - 1]`` to ``ends[e]`` of x [N, in] by ``weight[e]`` [in, out]: [N, out]."""
    out = x.new_empty(x.shape[0], weight.shape[2])
    start = 0
    for e, end in enumerate(ends.tolist()):
        if start < end:
            torch.mm(x[start:end], weight[e], out=out[start:end])
        start = end
    return out


@_grouped_product.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


@torch.library.custom_op("prunepass::grouped_product_of_weights", mutates_args=())
def _grouped_product_of_weights(x: Tensor, gradient: Tensor, ends: Tensor) -> Tensor:
    """The gradient of `_grouped_product` by its weight: [E, in, out]."""
    out = x.new_zeros(ends.shape[0], x.shape[1], gradient.shape[1])
    start = 0
    for e, end in enumerate(ends.tolist()):
        if start < end:
            torch.mm(x[start:end].T, gradient[start:end], out=out[e])
        start = end
    return out


@_grouped_product_of_weights.register_fake
def _(x: Tensor, gradient: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(ends.shape[0], x.shape[1], gradient.shape[1])


def _remember(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight, ends = ctx.saved_tensors
    gradient = gradient.contiguous()
    by_x = _grouped_product(gradient, weight.transpose(1, 2), ends)
    return by_x, _grouped_product_of_weights(x, gradient, ends), None


_grouped_product.register_autograd(_backward, setup_context=_remember)


def _by_groups(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x [N, in], sorted by expert, times weight [E, in, out]: PyTorch's kernel for groups where it has one."""
    fused = getattr(torch.nn.functional, "grouped_mm", None)
    if fused is not None and x.dtype == weight.dtype == torch.bfloat16 and _has_kernel(x, weight):
        out: Tensor = fused(x, weight, offs=ends)
        return out
    product: Tensor = _grouped_product(x, weight, ends)
    return product


def _has_kernel(x: Tensor, weight: Tensor) -> bool:
    """Whether PyTorch's kernel takes these: rows of a multiple of 16 bytes, and on a GPU one that is recent enough."""
    if any(width % 8 for width in weight.shape[1:]):
        return False
    if x.device.type == "cuda":
        return torch.cuda.get_device_capability(x.device) >= (8, 0)
    return x.device.type == "cpu"


# -- the operator ------------------------------------------------------------------------------------------------------


def _expert_linear(x: Tensor, weight: Tensor, bias: Tensor | None, experts: Tensor, transposed: bool) -> Tensor:
    """``out[t, j] = x[t, j] @ weight[experts[t, j]].T + bias[experts[t, j]]``.

    Args:
        x: [T, in], the same for each of a token's experts, or [T, k, in].
        weight: [E, out, in], or [E, in, out] where ``transposed``.
        bias: [E, out].
        experts: [T, k] int64 in [0, E).

    Returns:
        [T, k, out] in the weight's dtype.
    """
    tokens, k = experts.shape
    width = weight.shape[2] if transposed else weight.shape[1]
    if x.device.type == "meta" and not isinstance(x, FakeTensor):
        return weight.new_empty(tokens, k, width)
    ids, order = experts.reshape(-1).sort(stable=True)
    each = torch.arange(weight.shape[0], device=ids.device, dtype=ids.dtype)
    ends = torch.searchsorted(ids, each, right=True, out_int32=True)
    rows = x[order // k] if x.dim() == 2 else x.flatten(0, 1)[order]
    products = _by_groups(rows.to(weight.dtype), weight if transposed else weight.transpose(1, 2), ends)
    if bias is not None:
        products = products + bias[ids]
    back = torch.empty_like(order).scatter(0, order, torch.arange(order.shape[0], device=order.device))
    out: Tensor = products[back].unflatten(0, (tokens, k))
    return out


_LIBRARY.impl("expert_linear", _expert_linear, "CompositeImplicitAutograd")
EXPERT_LINEAR = torch.ops.prunepass.expert_linear.default


# -- transformers' interface -------------------------------------------------------------------------------------------


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts of a layer, in the form of ``transformers.integrations.moe``.

    Args:
        self: the module with the experts' weights.
        hidden_states: [T, D].
        top_k_index: [T, k] int64, the experts of each token.
        top_k_weights: [T, k], what each counts.

    Returns:
        [T, D] in the dtype of the hidden states.
    """

    def product(name: str, x: Tensor) -> Tensor:
        bias = getattr(self, f"{name}_bias") if self.has_bias else None
        out: Tensor = torch.ops.prunepass.expert_linear(x, getattr(self, name), bias, top_k_index, self.is_transposed)
        return out

    if self.has_gate:
        inner = self._apply_gate(product("gate_up_proj", hidden_states))
    else:
        inner = self.act_fn(product("up_proj", hidden_states))
    out = product("down_proj", inner)
    if getattr(self, "has_post_expert_norm", False):  # transformers 5.17 has no such norm yet
        out = self.post_expert_norm(out)
    return (out * top_k_weights.unsqueeze(-1)).sum(1).to(hidden_states.dtype)


def _while_compiling(present: Callable[..., Tensor] | None, ours: Callable[[], bool]) -> Callable[..., Tensor]:
    # run, not traced: what is traced cannot ask who traces it
    for_us = torch.compiler.assume_constant_result(ours)

    def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """`experts_forward` while torch.compile traces for us, the form given otherwise.

        Programs of torch.export are left alone: saved, they would need prunepass to load. They are not traced for us;
        ``torch.compiler.is_exporting()`` would not tell, which is True inside torch.compile in torch 2.11.
        """
        if torch.compiler.is_compiling() and not getattr(self, "_is_expert_parallel", False) and for_us():
            return experts_forward(self, hidden_states, top_k_index, top_k_weights)
        if present is None:
            return _own_forward(self)(self, hidden_states, top_k_index, top_k_weights)
        return present(self, hidden_states, top_k_index, top_k_weights)

    forward.prunepass = True  # type: ignore[attr-defined]  # so that it is wrapped once
    return forward


def _own_forward(module: Any) -> Callable[..., Tensor]:
    """The ``forward`` that transformers' decorator stands in front of."""
    found: list[Any] = [vars(cls).get("forward") for cls in type(module).__mro__]
    own: Callable[..., Tensor] = next(f.__wrapped__ for f in found if hasattr(f, "__wrapped__"))
    return own


def _interface() -> Any:
    """transformers' table of forms; None where transformers is not in use, or too old for one."""
    if "transformers.modeling_utils" not in sys.modules:
        return None
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError:
        return None
    return ALL_EXPERTS_FUNCTIONS


def install(ours: Callable[[], bool]) -> None:
    """Have torch.compile trace transformers' experts as token-wise units, where ``ours`` says that it traces for us.

    What runs without torch.compile, or is compiled with another backend, stays as it is.
    """
    if (table := _interface()) is None:
        return
    for name in _GROUPED:
        present = table.get(name)
        if not getattr(present, "prunepass", False):
            table.register(name, _while_compiling(present, ours))


@contextmanager
def traced_as_units() -> Iterator[None]:
    """Within it every form of experts, those too that only a GPU has, is `experts_forward`.

    Experts that are spread over several devices stay as they are.
    """
    if (table := _interface()) is None:
        yield
        return
    present = {name: table[name] for name in table}

    def form(name: str) -> Callable[..., Tensor]:
        def forward(self: Any, *args: Tensor) -> Tensor:
            if not getattr(self, "_is_expert_parallel", False):
                return experts_forward(self, *args)
            return present[name](self, *args) if name in present else _own_forward(self)(self, *args)

        return forward

    names = {*present, "eager"}
    for name in names:
        table[name] = form(name)
    try:
        yield
    finally:
        for name in names:
            del table[name]  # what was set here; a form that the user had set was set over
            if name in present and table.get(name) is not present[name]:
                table[name] = present[name]
