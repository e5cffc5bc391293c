#!/usr/bin/env bash
# T5Gemma's sequence classifier gives a padded row other logits than the same row alone.
#
# Guess: with an attention mask, padding at the right changes a row's logits by rounding only.
#
# What happens: they differ far beyond rounding. The encoder is not to blame (its states are equal). The classifier reads
# the decoder one place after the last token, since the decoder's input is shifted by one; a row alone is too short for
# that place, so its last one is read instead, and only the padded row is answered from the state that has seen all of it:
#   encoder states differ by at most: 0.0
#   logits differ by more than 0.001: True
#   logits padded by 1 and by 4 places differ by more than 1e-9: False
#
# Seen with: transformers 5.23.0, torch 2.13.0, numpy 2.4.6, Python 3.11, a tiny random model in float64.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.23.0 torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import sys

import torch
import transformers

PAD = 1
stack = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    vocab_size=97, query_pre_attn_scalar=8, layer_types=["full_attention"] * 2, max_position_embeddings=64,
)
config = transformers.T5GemmaConfig(
    encoder=dict(stack), decoder=dict(stack), vocab_size=97, pad_token_id=PAD, dropout_rate=0.0, attention_dropout=0.0,
    classifier_dropout_rate=0.0, use_cache=False, attn_implementation="eager",
)
torch.manual_seed(0)
model = transformers.T5GemmaForSequenceClassification(config).double().eval()
row = torch.randint(3, 97, (1, 9))


@torch.no_grad()
def answer(padding):
    ids = torch.cat([row, torch.full((1, padding), PAD)], 1)
    inputs = dict(input_ids=ids, attention_mask=(ids != PAD).long())
    return model.model.encoder(**inputs).last_hidden_state[:, :9], model(**inputs).logits


(states, alone), (_, one), (padded_states, four) = answer(0), answer(1), answer(4)
encoder = float((states - padded_states).abs().max())
differ = bool((alone - four).abs().max() > 1e-3)
among = bool((one - four).abs().max() > 1e-9)
print("encoder states differ by at most:", encoder)
print("logits differ by more than 0.001:", differ)
print("logits padded by 1 and by 4 places differ by more than 1e-9:", among)
if encoder > 1e-12 or not differ or among:
    sys.exit("Changed: the logits of a row alone and padded no longer differ by the place that is read")
PY
