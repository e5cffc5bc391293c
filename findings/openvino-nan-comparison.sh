#!/usr/bin/env bash
# On OpenVINO's CPU device NaN is greater than every number.
#
# Guess: comparisons follow IEEE 754: NaN is neither greater nor less than a number, nor equal to it, and the maximum of NaN and
# 0 is NaN, as in numpy.
#
# What happens: Greater and GreaterEqual are true, Less and LessEqual false, and Maximum gives 0:
#   NaN > 0 True, NaN >= 0 True, NaN < 0 False, NaN <= 0 False, NaN == 0 False, NaN != 0 True
#   max(NaN, 0) = 0.0
# A test such as x > 0 takes values that are no numbers for good ones. Only x == x tells them.
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


def first(operator):
    a, b = op.parameter([64], np.float32), op.parameter([64], np.float32)
    compiled = ov.Core().compile_model(ov.Model([operator(a, b)], [a, b], "m"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    values = compiled([np.full(64, np.nan, np.float32), np.zeros(64, np.float32)])[0]
    return values[0].item()


signs = {">": op.greater, ">=": op.greater_equal, "<": op.less, "<=": op.less_equal, "==": op.equal, "!=": op.not_equal}
found = {sign: bool(first(operator)) for sign, operator in signs.items()}
largest = first(op.maximum)
print(", ".join(f"NaN {sign} 0 {value}" for sign, value in found.items()))
print(f"max(NaN, 0) = {largest}")
if [sign for sign, value in found.items() if value] != [">", ">=", "!="] or largest != 0:
    sys.exit("Changed: NaN is no longer greater than a number")
PY
