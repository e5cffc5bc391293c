#!/usr/bin/env bash
# ONNX Runtime's Attention takes no mask that is the same for all queries, [batch, 1, 1, keys].
#
# Guess: it does, as ONNX says that the mask need only be broadcastable to [batch, heads, queries, keys]. It is what a mask of
# padding is. ONNX's own reference computes it.
#
# What happens:
#   [2, 1, 5, 7]: as the reference has it
#   [1, 1, 5, 7]: as the reference has it
#   [2, 1, 1, 7]: inconsistent q_sequence_length (between attn_mask and Q)
#
# Seen with: onnxruntime 1.31.1, onnx 1.23.2, numpy 2.4.6, Python 3.11, x86-64, CPU provider.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnxruntime==1.31.1 onnx==1.23.2 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PY'
import sys

import numpy as np
import onnx
import onnxruntime
from onnx.reference import ReferenceEvaluator

BATCH, HEADS, QUERIES, KEYS, WIDTH = 2, 3, 5, 7, 4
FLOAT = onnx.TensorProto.FLOAT
random = np.random.default_rng(0)
sizes = {"q": QUERIES, "k": KEYS, "v": KEYS}
given = {n: random.standard_normal((BATCH, HEADS, s, WIDTH)).astype(np.float32) for n, s in sizes.items()}
onnxruntime.set_default_logger_severity(4)


def answer(shape):
    values = {**given, "mask": np.where(random.random(shape) < 0.3, -1e4, 0).astype(np.float32)}
    inputs = [onnx.helper.make_tensor_value_info(n, FLOAT, v.shape) for n, v in values.items()]
    output = onnx.helper.make_tensor_value_info("y", FLOAT, given["q"].shape)
    graph = onnx.helper.make_graph([onnx.helper.make_node("Attention", list(values), ["y"])], "g", inputs, [output])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    (expected,) = ReferenceEvaluator(model).run(None, values)
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        (found,) = session.run(None, values)
    except Exception as e:
        return str(e).strip().splitlines()[0].split(" was false. ")[-1]
    return "as the reference has it" if np.abs(found - expected).max() < 1e-5 else "other values"


shapes = [(BATCH, 1, QUERIES, KEYS), (1, 1, QUERIES, KEYS), (BATCH, 1, 1, KEYS)]
found = {shape: answer(shape) for shape in shapes}
for shape, what in found.items():
    print(f"{list(shape)}: {what}")
if [what == "as the reference has it" for what in found.values()] != [True, True, False]:
    sys.exit("Changed: a mask with one row for all queries is taken, or another one is not")
PY
