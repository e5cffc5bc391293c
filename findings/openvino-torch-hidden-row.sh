#!/usr/bin/env bash
# An attention row that may see nothing: zeros in PyTorch, NaN in the model that OpenVINO converted from it.
#
# Guess: the converted scaled_dot_product_attention gives PyTorch's zeros where a row of the mask hides every key.
#
# What happens: that row is NaN, with a boolean mask and with minus infinities alike; the other rows agree:
#   boolean mask: PyTorch [0.0, 0.0, 0.0, 0.0], OpenVINO [nan, nan, nan, nan], other rows agree: True
#   minus infinities: PyTorch [0.0, 0.0, 0.0, 0.0], OpenVINO [nan, nan, nan, nan], other rows agree: True
# A padded batch has such rows wherever padding attends by a window, and the next layer's keys carry the NaN to all.
#
# Seen with: openvino 2026.4.1, torch 2.13.0, numpy 2.4.6, packaging 26.4, Python 3.11, x86-64, CPU device, in float32.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet openvino==2026.4.1 torch==2.13.0 numpy==2.4.6 packaging==26.4
"$folder/venv/bin/python" -W ignore - <<'PY'
import sys

import numpy as np
import openvino as ov
import torch


class Attend(torch.nn.Module):
    def forward(self, query, key, value, mask):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)


torch.manual_seed(0)
qkv = tuple(torch.randn(1, 1, 3, 4) for _ in range(3))
seen = torch.ones(1, 1, 3, 3, dtype=torch.bool)
seen[0, 0, 1] = False  # the second query sees no key
added = torch.zeros(1, 1, 3, 3).masked_fill(~seen, -torch.inf)
changed = []
for name, mask in (("boolean mask", seen), ("minus infinities", added)):
    inputs = (*qkv, mask)
    right = Attend()(*inputs)[0, 0].numpy()
    program = torch.export.export(Attend().eval(), inputs)
    compiled = ov.Core().compile_model(ov.convert_model(program), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = compiled([tensor.numpy() for tensor in inputs])[0][0, 0]
    agree = np.allclose(found[[0, 2]], right[[0, 2]], atol=1e-5)
    print(f"{name}: PyTorch {right[1].tolist()}, OpenVINO {found[1].tolist()}, other rows agree: {agree}")
    if not (agree and np.isnan(found[1]).all() and (right[1] == 0).all()):
        changed.append(name)
if changed:
    sys.exit("Changed: a row that sees nothing is no longer zeros in PyTorch and NaN in OpenVINO for " + ", ".join(changed))
PY
