#!/usr/bin/env bash
# A state of open length that starts from a first value of no tokens cannot grow.
#
# Guess: the variable's own shape, which has an open length, says what the state may become; the first value is where it
# starts. A key-value cache is such a state.
#
# What happens: where no attention holds the state, the CPU plugin takes the length of the first value, 0, for the only
# one. The model compiles, and the first call raises. Without a first value, which is an empty state too, it grows.
#   without a first value: (1, 2, 3, 8), then (1, 2, 6, 8)
#   with one of no tokens: Can not clone with new dims
#
# Seen with: openvino 2026.4.1, numpy 2.4.6, Python 3.11, x86-64, float32. The script fails where the call with a first
# value works, or those without one do not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet openvino==2026.4.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import sys

import numpy as np
import openvino as ov
import openvino.opset13 as op

HEADS, WIDTH = 2, 8
SHAPE = ov.PartialShape([-1, HEADS, -1, WIDTH])


def cache(first_value):
    """New tokens behind those of the calls before, times two."""
    new, order = op.parameter(SHAPE, np.float32, name="new"), op.parameter([-1], np.int32, name="order")
    if first_value:
        rows = op.gather(op.shape_of(new), op.constant(np.array([0])), op.constant(0))
        sizes = op.concat([rows, op.constant(np.array([HEADS, 0, WIDTH]))], 0)
        past = op.read_value(op.broadcast(op.constant(np.float32(0)), sizes), "cache", ov.Type.f32, SHAPE)
    else:
        past = op.read_value("cache", ov.Type.f32, SHAPE)
    both = op.concat([op.gather(past, order, op.constant(0)), new], 2)
    return ov.Model([op.result(op.multiply(both, op.constant(np.float32(2))))], [op.assign(both, "cache")], [new, order], "m")


given = [np.ones((1, HEADS, 3, WIDTH), np.float32), np.zeros(1, np.int32)]
core = ov.Core()


def request(first_value):
    return core.compile_model(cache(first_value), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).create_infer_request()


without = request(False)
print("without a first value:", ", then ".join(str(without.infer(given)[0].shape) for _ in range(2)))
with_one = request(True)
try:
    with_one.infer(given)
except RuntimeError as e:
    if "Can not clone with new dims" not in str(e):
        sys.exit(f"Changed: another message: {e}")
    print("with one of no tokens: Can not clone with new dims")
else:
    sys.exit("Changed: the state grows.")
PY
