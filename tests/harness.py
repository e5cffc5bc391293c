"""Help for tests that run pruned graphs: one capture a model, plans pruned on it, outputs compared at live tokens."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn

import oracle
import zoo
from prunepass import PrunePlan, Stage
from prunepass.graph.capture import Captured, capture_module
from prunepass.pipeline import PruneResult, prune_graph

aten = torch.ops.aten


def captured(name: str, head: str = "base", inputs: tuple[str, ...] = ("input_ids", "attention_mask")) -> Captured:
    """The graph of a tiny model, traced once in a test session. Passes work on copies, so it can be shared.

    Its softmax is float64's, whichever test comes first.
    """
    return _captured(name, head, tuple(inputs))


@cache  # by all arguments: the same ones by name, by position and left out would each be a key of their own
def _captured(name: str, head: str, inputs: tuple[str, ...]) -> Captured:
    with oracle.float64_softmax():
        return capture_module(zoo.tiny(name, head), example(inputs))


def example(inputs: tuple[str, ...] = ("input_ids", "attention_mask")) -> dict[str, Tensor]:
    known = zoo.with_positions(zoo.batch([11, 7]))
    return {name: known[name] for name in inputs}


def pruned(source: Captured, plan: PrunePlan, mode: str = "gather") -> PruneResult:
    return prune_graph(source.graph_module, plan, mode=mode, metadata=False)


def run(module: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
    with torch.no_grad():
        return module(**inputs)


def tensors(output: Any) -> dict[str, Tensor]:
    """The tensors of a model's output by name."""
    if isinstance(output, Tensor):
        return {"output": output}
    pairs = output.items() if isinstance(output, Mapping) else enumerate(output)
    found: dict[str, Tensor] = {}
    for name, value in pairs:
        if isinstance(value, Tensor):
            found[str(name)] = value
        elif isinstance(value, (tuple, list)):
            found.update({f"{name}.{k}": v for k, v in tensors(value).items()})
    return found


def difference(one: Any, two: Any, live: Tensor) -> float:
    """Largest difference between two outputs, at live tokens where a value has them. NaN anywhere gives infinity.

    Args:
        live: bool [B, S].
    """
    a, b = tensors(one), tensors(two)
    assert a.keys() == b.keys(), f"outputs differ in names: {sorted(a)} and {sorted(b)}"
    assert a, "the model gave no tensor"
    worst = 0.0
    for name in a:
        assert a[name].shape == b[name].shape, f"{name}: {tuple(a[name].shape)} and {tuple(b[name].shape)}"
        assert a[name].dtype == b[name].dtype, f"{name}: {a[name].dtype} and {b[name].dtype}"
        gap = (a[name].detach().double() - b[name].detach().double()).abs()
        # a value without a sequence axis is read from the first slot: nothing to compare where padding stands there
        gap = gap[live] if gap.shape[:2] == live.shape else gap[live[:, 0]]
        if gap.numel():
            worst = max(worst, float(gap.max().nan_to_num(nan=torch.inf)))
    return worst


def attention_widths(gm: fx.GraphModule, inputs: Mapping[str, Tensor]) -> list[tuple[int, int]]:
    """(queries, keys) of every attention in the order in which it runs, read off the values of a real run."""
    seen: list[tuple[int, int]] = []

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n.target is aten.scaled_dot_product_attention.default:
                query, key, *_ = self.map_nodes_to_values(n.args, n)
                seen.append((query.shape[-2], key.shape[-2]))
            elif n.target in (aten.softmax.int, aten._softmax.default) and not n.meta.get("prunepass"):
                seen.append((value.shape[-2], value.shape[-1]))
            return value

    names = [str(n.target) for n in gm.graph.find_nodes(op="placeholder")]
    with torch.no_grad():
        Watch(gm).run(*(inputs[name] for name in names), enable_io_processing=False)
    return seen


def ops(gm: fx.GraphModule) -> list[str]:
    """What a graph computes, in order."""
    return [str(n.target) for n in gm.graph.nodes if n.op != "placeholder"]


def mlp_weights(plan_stages: tuple[Stage, ...], width: int = zoo.HIDDEN) -> dict[str, Tensor]:
    """Random predictors for every stage, under the names of the scorer's own parameters."""
    from prunepass.scorers.mlp import MlpScorer

    generator = torch.Generator().manual_seed(3)
    names = {name: p.shape for name, p in MlpScorer(width, hidden=12).named_parameters()}
    return {
        f"stages.{i}.{name}": torch.randn(shape, generator=generator)
        for i, stage in enumerate(plan_stages)
        if stage.scorer is not None and stage.scorer.name == "mlp"
        for name, shape in names.items()
    }


def dynamo_graph(model: nn.Module) -> fx.GraphModule:
    """A whole call as Dynamo traces it: with a key-value cache, which torch.export does not take."""
    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, _: Any) -> fx.GraphModule:
        graphs.append(gm)
        return gm

    torch._dynamo.reset()
    run(torch.compile(model, backend=keep, dynamic=True), example())
    return graphs[0]
