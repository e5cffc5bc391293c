"""Target ``eager``: run the graph as it is. Nothing is compiled; gradients, devices and dtypes are PyTorch's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prunepass.backends import FusionCounts
from prunepass.backends._options import check_mapping
from prunepass.errors import OptionError

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.fx import GraphModule

__all__ = ["fusion_counts", "lower"]


def lower(
    graph_module: GraphModule, example_inputs: Sequence[Any], *, config: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """The graph itself; where tokens were pruned, its feed-forward parts run on a slice of long rows at a time.

    Raises:
        OptionError: a config is given: there is nothing to set.
    """
    if settings := check_mapping(config, "eager"):
        raise OptionError(f"Target 'eager' has no settings, but config names {', '.join(settings)}. Leave config out.")
    from prunepass.backends._slices import in_slices

    # without stages, a graph is what others are compared with
    return in_slices(graph_module) if any("prunepass" in n.meta for n in graph_module.graph.nodes) else graph_module


def fusion_counts(program: ExportedProgram) -> FusionCounts:
    """Operator calls of the graph: PyTorch runs each of them as one kernel."""
    from torch import ops

    targets = [n.target for n in program.graph.nodes]
    return FusionCounts(
        attention=targets.count(ops.aten.scaled_dot_product_attention.default),
        layer_norm=targets.count(ops.aten.layer_norm.default),
        gelu=targets.count(ops.aten.gelu.default),
        counts="calls of ATen's fused operators",
    )
