#!/usr/bin/env bash
# The largest of nothing but minus infinities is a finite number in OpenVINO.
#
# Guess: ReduceMax gives one of the values it was shown, so the maximum of minus infinities is minus infinity.
#
# What happens: it gives float32's lowest finite number, for a row that holds no such value:
#   ReduceMax of [-inf -inf -inf -inf] = -3.4028234663852886e+38
# A mask that tests a row's maximum for minus infinity ("nothing here may be seen") finds no such row.
#
# Seen with: openvino 2026.4.1, numpy 2.4.6, Python 3.11, x86-64, CPU device, in float32.
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

x = op.parameter([1, 4], np.float32)
largest = op.reduce_max(x, op.constant(np.array([1], np.int64)), False)
compiled = ov.Core().compile_model(ov.Model([largest], [x], "largest"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
row = np.full((1, 4), -np.inf, np.float32)
found = float(compiled([row])[0][0])
print(f"ReduceMax of {row[0]} = {found}")
if found != float(np.finfo(np.float32).min):
    sys.exit("Changed: ReduceMax of minus infinities is no longer float32's lowest finite number")
PY
