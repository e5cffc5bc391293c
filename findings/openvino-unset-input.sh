#!/usr/bin/env bash
# An input that was never given a value is an empty tensor where its size is open, and no error.
#
# Guess: a call that leaves an input out is refused, as PyTorch and ONNX Runtime refuse it.
#
# What happens: with an open size the model runs on an empty tensor, and what it computes from it is empty, or what an
# operator makes of nothing: a sum is 0. A request keeps the value of its last call: leaving the input out later takes that
# one again.
#   open, never set: sum of nothing is 0.0, shape (0,)
#   open, set before: sum is 6.0, shape (3,)
#
# Seen with: openvino 2026.4.1, numpy 2.4.6, Python 3.11, x86-64, CPU device. The script fails where a line is another.
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

x = op.parameter([-1], np.float32, name="x")
total = op.reduce_sum(x, op.constant(np.int64(0)), keep_dims=False)
model = ov.Model([total.output(0), op.multiply(x, op.constant(np.float32(1))).output(0)], [x], "sum")
request = ov.Core().compile_model(model, "CPU").create_infer_request()
try:
    request.infer({})
    never = (float(request.get_output_tensor(0).data), request.get_output_tensor(1).data.shape)
    print(f"open, never set: sum of nothing is {never[0]}, shape {never[1]}")
    request.infer({"x": np.array([1, 2, 3], np.float32)})
    request.infer({})
    before = (float(request.get_output_tensor(0).data), request.get_output_tensor(1).data.shape)
    print(f"open, set before: sum is {before[0]}, shape {before[1]}")
except RuntimeError as error:
    sys.exit(f"Changed: a call without the input is refused: {error}")
if never != (0.0, (0,)) or before != (6.0, (3,)):
    sys.exit(f"Changed: never set {never}, set before {before}.")
PY
