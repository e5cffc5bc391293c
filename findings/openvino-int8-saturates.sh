#!/usr/bin/env bash
# On OpenVINO's CPU device sums and products of 8-bit whole numbers stop at the largest number.
#
# Guess: Add and Multiply on uint8 and int8 wrap around, as in numpy, PyTorch and C, and as int32 does here.
#
# What happens: they saturate:
#   uint8: 200 + 200 = 255, 16 * 17 = 255
#   int8: 100 + 100 = 127, -100 - 100 = -128
#   int32: 2147483647 + 1 = -2147483648
# A count or a hash held in 8 bits differs from that of the framework the model came from.
#
# Seen with: openvino 2026.4.1, numpy 2.4.6, Python 3.11, x86-64, CPU device.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet openvino==2026.4.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import sys

import numpy as np
import openvino as ov
import openvino.opset15 as op


def computed(operator, dtype, one, two):
    a, b = op.parameter([2], dtype), op.parameter([2], dtype)
    compiled = ov.Core().compile_model(ov.Model([operator(a, b)], [a, b], "m"), "CPU")
    return compiled([np.full(2, one, dtype), np.full(2, two, dtype)])[0][0].item()


found = (
    computed(op.add, np.uint8, 200, 200),
    computed(op.multiply, np.uint8, 16, 17),
    computed(op.add, np.int8, 100, 100),
    computed(op.add, np.int8, -100, -100),
    computed(op.add, np.int32, 2147483647, 1),
)
print(f"uint8: 200 + 200 = {found[0]}, 16 * 17 = {found[1]}")
print(f"int8: 100 + 100 = {found[2]}, -100 - 100 = {found[3]}")
print(f"int32: 2147483647 + 1 = {found[4]}")
if found != (255, 255, 127, -128, -2147483648):
    sys.exit("Changed: whole numbers of 8 bits no longer saturate while those of 32 wrap around")
PY
