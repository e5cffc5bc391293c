#!/usr/bin/env bash
# A running count of a boolean mask, converted from PyTorch to OpenVINO, is itself boolean and wraps at 256.
#
# Guess: mask.cumsum(1) counts in int64 after conversion, as PyTorch says it does.
#
# What happens: the result's type is boolean, and it is counted in 8 bits: entry 255 of a mask of ones, where the count is
# 256, reads as false, the others as true. The same from torch.export and from tracing; mask.cumsum(1, dtype=torch.int64)
# is right:
#   PyTorch: torch.int64, largest 300, entries of zero: []
#   OpenVINO: bool, largest 1, entries of zero: [255]
#   OpenVINO with dtype=torch.int64: int64, largest 300, entries of zero: []
# Positions that a model derives from its attention mask like this are silently wrong.
#
# Seen with: openvino 2026.4.1, torch 2.13.0, numpy 2.4.6, packaging 26.4, Python 3.11, x86-64, CPU device.
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


class Count(torch.nn.Module):
    def __init__(self, dtype=None):
        super().__init__()
        self.dtype = dtype

    def forward(self, mask):
        return mask.cumsum(1, dtype=self.dtype)


def converted(module, mask):
    program = torch.export.export(module.eval(), (mask,))
    return np.array(ov.compile_model(ov.convert_model(program), "CPU")([mask.numpy()])[0])


def show(name, counts):
    zeros = np.flatnonzero(np.asarray(counts)[0] == 0).tolist()
    print(f"{name}: {counts.dtype}, largest {int(counts.max())}, entries of zero: {zeros}")
    return str(counts.dtype), int(counts.max()), zeros


mask = torch.ones(1, 300, dtype=torch.bool)
show("PyTorch", Count()(mask))
plain = show("OpenVINO", converted(Count(), mask))
told = show("OpenVINO with dtype=torch.int64", converted(Count(torch.int64), mask))
if plain != ("bool", 1, [255]):
    sys.exit("Changed: the count of a boolean mask is no longer boolean with a false entry at 255")
if told != ("int64", 300, []):
    sys.exit("Changed: a count that is told its type is no longer right")
PY
