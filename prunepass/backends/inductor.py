"""Target ``inductor``: PyTorch's own compiler, as ``torch.compile`` uses it. Trains, and runs on any of its devices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.fx import Node
from torch.utils import _pytree as pytree

from prunepass.backends import FusionCounts
from prunepass.backends._options import check_mapping, unknown
from prunepass.errors import OptionError, PruneError

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
    return cast("Callable[..., Any]", compile_fx(graph_module, list(example_inputs), config_patches=patches or None))


def fusion_counts(program: ExportedProgram) -> FusionCounts:
    """Count in the graph that Inductor receives after its pattern matcher, without generating code.

    Layer norm and GELU are decomposed there and fused into loops later, so their cores are counted: the variance
    with its mean, and erf (or the tanh form's ``1 + tanh``).
    """
    from torch._inductor.compile_fx import compile_fx

    seen: list[GraphModule] = []

    def keep_graph(gm: GraphModule, example_inputs: Any, **_: Any) -> Any:
        seen.append(gm)
        return gm.forward

    args, kwargs = program.example_inputs or ((), {})
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    with torch.no_grad():
        compile_fx(program.module(check_guards=False), tensors, inner_compile=keep_graph)
    if not seen:
        raise PruneError("Inductor was given no graph for this program, so there is nothing to count.")
    return _count(seen[-1])


def _count(gm: GraphModule) -> FusionCounts:
    names = Counter(_name(n) for n in gm.graph.nodes)
    return FusionCounts(
        attention=sum(names[name] for name in _ATTENTION),
        layer_norm=names["var_mean"] + names["native_layer_norm"] + names["rsqrt"] * ("var_mean" not in names),
        gelu=names["gelu"] + names["erf"] + sum(map(_is_tanh_gelu, gm.graph.nodes)),
        counts="attention kernels, and the cores of layer norms and GELUs, in the graph that Inductor fuses into loops",
    )


def _name(node: Node) -> str:
    return str(getattr(node.target, "overloadpacket", node.target)).removeprefix("aten.")


def _is_tanh_gelu(node: Node) -> bool:
    """The tanh of ``x / 2 * (1 + tanh(...))``, told from other uses of tanh by the 1."""
    if _name(node) != "tanh":
        return False
    return any(_name(user) == "add" and 1 in (a for a in user.args if not isinstance(a, Node)) for user in node.users)
