#!/usr/bin/env bash
# Converting an exported program to OpenVINO fails where it puts out one value twice, or a value and its clone.
#
# Guess: the converted model has two outputs with the same value, as the program has. Models put out their last state twice
# where they put out the states of all layers as well.
#
# What happens:
#   twice: Tensor name is not a number: add:0
#   with a clone: Tensor name is not a number: add:0
#   squeezed again: 2 outputs
#
# Seen with: openvino 2026.4.1, torch 2.13.0, numpy 2.4.6, packaging 26.4, Python 3.11, x86-64, CPU device.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet openvino==2026.4.1 torch==2.13.0 numpy==2.4.6 packaging==26.4
"$folder/venv/bin/python" -W ignore - <<'PY'
import sys

import openvino as ov
import torch


class PutsOut(torch.nn.Module):
    def __init__(self, again):
        super().__init__()
        self.again = again

    def forward(self, x):
        y = x + 1
        return y, self.again(y)


def converted(again):
    program = torch.export.export(PutsOut(again), (torch.zeros(2, 3),))
    try:
        return f"{len(ov.convert_model(program).outputs)} outputs"
    except Exception as e:
        return str(e).strip().splitlines()[-1]


again = {"twice": lambda y: y, "with a clone": torch.clone, "squeezed again": lambda y: y.unsqueeze(0).squeeze(0)}
found = {name: converted(function) for name, function in again.items()}
for name, what in found.items():
    print(f"{name}: {what}")
fails = ["not a number" in what for what in found.values()]
if fails != [True, True, False]:
    sys.exit("Changed: a value that is put out twice, or with its clone, is converted")
PY
