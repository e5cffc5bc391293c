#!/usr/bin/env bash
# Past its window Moshi's decoder gives other logits with a key-value cache than without one.
#
# Guess: generating with a cache is only faster; each new token's logits are those of the whole text without a cache.
#
# What happens: with MoshiForCausalLM that holds as long as the text fits into the model's sliding window. Beyond it the
# first call still agrees, and every later one is far off:
#   window of 64, 24 tokens: first call 0e+00, later ones below 1e-12
#   window of 5, 24 tokens:  first call 0e+00, later ones 1.2e+00
# Differences in float64, of a small random model whose logits are of the order of 1.
#
# Seen with: transformers 5.23.0, torch 2.13.0, Python 3.11, CPU.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
"$folder/venv/bin/python" - <<'PY'
import sys

import torch
from transformers import MoshiConfig, MoshiForCausalLM

PROMPT, TOKENS = 20, 24
SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, head_dim=8, ffn_dim=64)


@torch.no_grad()
def gaps(window):
    torch.manual_seed(0)
    config = MoshiConfig(vocab_size=64, audio_vocab_size=16, max_position_embeddings=128, sliding_window=window, **SIZES)
    model = MoshiForCausalLM(config).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ids = torch.randint(0, 64, (1, TOKENS))
    whole = model(ids, use_cache=False).logits[0]
    found = model(ids[:, :PROMPT], use_cache=True)
    differences = [float((found.logits[0, -1] - whole[PROMPT - 1]).abs().max())]
    for place in range(PROMPT, TOKENS):
        found = model(ids[:, place : place + 1], past_key_values=found.past_key_values, use_cache=True)
        differences.append(float((found.logits[0, -1] - whole[place]).abs().max()))
    return differences[0], max(differences[1:])


within, beyond = gaps(64), gaps(5)
print(f"window of 64, {TOKENS} tokens: first call {within[0]:.0e}, later ones {within[1]:.1e}")
print(f"window of 5, {TOKENS} tokens:  first call {beyond[0]:.0e}, later ones {beyond[1]:.1e}")
if max(*within, beyond[0]) > 1e-12:
    sys.exit("Changed: the logits differ within the window, or in the first call")
if beyond[1] < 1e-3:
    sys.exit("Changed: with a cache the logits beyond the window are those without one")
PY
