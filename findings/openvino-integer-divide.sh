#!/usr/bin/env bash
# OpenVINO's CPU device divides whole numbers in float32.
#
# Guess: Divide on int32 or int64 tensors gives the exact quotient; dividing by one changes nothing.
#
# What happens: above 2^24 the quotient is that of the rounded numbers, and 2147483647 / 1 changes its sign:
#   int32: 16777217 / 1 = 16777216, 2147483647 / 1 = -2147483648
#   int64: 16777217 / 1 = 16777216, 2147483647 / 1 = -2147483648
# Nothing warns, and INFERENCE_PRECISION_HINT=f32 does not help. An index that is divided is wrong without a trace.
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

numbers = [16777217, 2147483647]
changed = []
for dtype in (np.int32, np.int64):
    dividend, divisor = op.parameter([2], dtype), op.parameter([2], dtype)
    model = ov.Model([op.divide(dividend, divisor)], [dividend, divisor], "divide")
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    quotients = compiled([np.array(numbers, dtype), np.ones(2, dtype)])[0].tolist()
    print(f"{np.dtype(dtype)}: " + ", ".join(f"{n} / 1 = {q}" for n, q in zip(numbers, quotients)))
    if quotients != [16777216, -2147483648]:
        changed.append(f"{np.dtype(dtype)}")
if changed:
    sys.exit("Changed: integer division is no longer that of float32 for " + " and ".join(changed))
PY
