#!/usr/bin/env bash
# Gemma 4 with shared keys and values runs only with per-layer embeddings.
#
# Guess: num_kv_shared_layers and hidden_size_per_layer_input are independent. Each has a default and a documented 0, so a
# configuration may share keys and values among its last layers and have no per-layer embeddings.
#
# What happens: building works, and so does a prompt of one token. Every longer prompt fails in forward(): the shared layers
# take the last tokens' part of the per-layer inputs, which there are none of.
#   1 token: logits
#   5 tokens: TypeError: 'NoneType' object is not subscriptable
#
# Seen with: transformers 5.23.0, torch 2.13.0, Python 3.11, x86-64. The script fails where a line is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
"$folder/venv/bin/python" - <<'PY'
import sys

import torch
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

torch.manual_seed(0)
model = Gemma4ForCausalLM(
    Gemma4TextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=0,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
).eval()
seen = []
for length in (1, 5):
    with torch.no_grad():
        try:
            model(input_ids=torch.arange(5, 5 + length)[None])
            seen.append("logits")
        except TypeError as error:
            seen.append(f"TypeError: {error}")
    print(f"{length} token{'s' * (length > 1)}: {seen[-1]}")
if seen != ["logits", "TypeError: 'NoneType' object is not subscriptable"]:
    sys.exit(f"Changed: one token and five gave {seen}.")
PY
