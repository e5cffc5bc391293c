"""Target ``inductor``: PyTorch's own compiler, as ``torch.compile`` uses it. Trains, and runs on any of its devices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from prunepass.backends import FusionCounts
from prunepass.backends._options import check_mapping, unknown
from prunepass.errors import OptionError

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.fx import GraphModule

__all__ = ["fusion_counts", "lower"]

#: what SDPA becomes on the devices Inductor knows
_ATTENTION = (
    "scaled_dot_product_attention",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)


def lower(
    graph_module: GraphModule, example_inputs: Sequence[Any], *, config: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """Compile with Inductor, in grad mode (forward and backward) or without.

    Args:
        config: Inductor settings for this graph alone, such as ``{"max_autotune": True}``.

    Raises:
        OptionError: Inductor has no such setting.
    """
    from torch._inductor.compile_fx import compile_fx

    patches = check_mapping(config, "inductor")
    known = torch._inductor.config.get_config_copy() if patches else {}
    for key in patches:
        if key.replace("-", "_") not in known:
            raise OptionError(unknown(key, "setting of target 'inductor'", known))
    return compile_fx(graph_module, list(example_inputs), config_patches=patches or None)


def fusion_counts(program: ExportedProgram) -> FusionCounts:
    """Count in the graph that Inductor receives after its pattern matcher, without generating code.

    Layer norm and GELU are decomposed there and fused into loops later, so their cores are counted: the variance
    with its mean, and erf (or the tanh form's ``1 + tanh``).
    """
    from torch._inductor.compile_fx import compile_fx

    seen: list[GraphModule] = []

    def keep_graph(gm: GraphModule, example_inputs: Any, **_: Any) -> Callable[..., Any]:
        seen.append(gm)
        return gm.forward

    gm = program.module(check_guards=False)
    args, kwargs = program.example_inputs or ((), {})
    flat = [a for a in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
    with torch.no_grad():
        compile_fx(_flat(gm), flat, inner_compile=keep_graph)
    if not seen:
        raise OptionError("Inductor did not compile this program, so there is nothing to count.")
    return _count(seen[-1])
