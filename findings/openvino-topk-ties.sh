#!/usr/bin/env bash
# OpenVINO runs ONNX's TopK without ONNX's rule for ties.
#
# Guess: ONNX promises that among equal values the lower index comes first, so every runtime picks the same indices.
#
# What happens: of 40 values 0, 1, 2, 0, 1, 2, ... the 20 largest are other ones than the standard says; ONNX Runtime keeps
# the rule. Not just the order differs, but which of the equal values are taken:
#   the standard, not OpenVINO: [1]
#   OpenVINO, not the standard: [28]
#   TopK as the ONNX reader made it: stable=False
# OpenVINO's own TopK has an option for a stable sort, which keeps the rule; the ONNX reader does not set it.
#
# Seen with: openvino 2026.4.1, onnxruntime 1.31.1, onnx 1.23.2, numpy 2.4.6, Python 3.11, x86-64, CPU device.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet openvino==2026.4.1 onnxruntime==1.31.1 onnx==1.23.2 numpy==2.4.6
"$folder/venv/bin/python" - "$folder/topk.onnx" <<'PY'
import sys

import numpy as np
import onnx
import onnxruntime
import openvino as ov
from onnx import TensorProto, helper

path, kept = sys.argv[1], 20
node = helper.make_node("TopK", ["x", "k"], ["values", "indices"], axis=-1, largest=1, sorted=1)
outputs = [
    helper.make_tensor_value_info("values", TensorProto.FLOAT, [1, kept]),
    helper.make_tensor_value_info("indices", TensorProto.INT64, [1, kept]),
]
inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 40])]
graph = helper.make_graph([node], "topk", inputs, outputs, [helper.make_tensor("k", TensorProto.INT64, [1], [kept])])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
onnx.checker.check_model(model)
onnx.save(model, path)

x = (np.arange(40, dtype=np.float32) % 3).reshape(1, 40)
standard = set(np.argsort(-x[0], kind="stable")[:kept].tolist())
runtime = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})
ours = ov.Core().compile_model(path, "CPU")([x])
found = set(ours[1][0].tolist())
print("OpenVINO's values are the largest:", np.array_equal(ours[0], runtime[0]))
print("ONNX Runtime keeps the rule:", set(runtime[1][0].tolist()) == standard)
print("the standard, not OpenVINO:", sorted(standard - found))
print("OpenVINO, not the standard:", sorted(found - standard))
read = [node for node in ov.Core().read_model(path).get_ops() if node.get_type_name() == "TopK"]
print(f"TopK as the ONNX reader made it: stable={read[0].get_attributes()['stable']}")
if set(runtime[1][0].tolist()) != standard:
    sys.exit("Changed: ONNX Runtime no longer takes the lowest index among equal values")
if found == standard:
    sys.exit("Changed: OpenVINO now takes the same indices as the ONNX standard")
PY
