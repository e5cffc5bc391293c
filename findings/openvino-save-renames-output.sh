#!/usr/bin/env bash
# Saving a model renames an output whose tensor has the name of an input.
#
# Guess: a name that the model in memory keeps and answers to is in the file, too; or such names are refused.
#
# What happens: an input and an output may share a tensor name in memory, and calls find both by it. save_model writes
# the output under another name, without a word, so that code which asks the loaded model for it by name fails:
#   in memory: inputs mask, states; outputs mask, product
#   from file: inputs mask, states; outputs mask_1, product
#
# Seen with: openvino 2026.4.1, numpy 2.4.6, Python 3.11, x86-64, CPU device.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet openvino==2026.4.1 numpy==2.4.6
"$folder/venv/bin/python" - "$folder/model.xml" <<'PY'
import sys

import numpy as np
import openvino as ov
import openvino.opset15 as op


def named(node, name):
    node.output(0).set_names({name})
    return node


mask, states = (named(op.parameter([-1, 4], np.float32), name) for name in ("mask", "states"))
results = [op.result(named(op.add(mask, states), "mask")), op.result(named(op.multiply(mask, states), "product"))]
core, model = ov.Core(), ov.Model(results, [mask, states], "names")
given = {"mask": np.full((2, 4), 3, np.float32), "states": np.full((2, 4), 2, np.float32)}
found = core.compile_model(model, "CPU")(given)
assert found["mask"][0, 0] == 5, "the output is found by its name"
assert found["product"][0, 0] == 6
ov.save_model(model, sys.argv[1])


def names(one):
    inputs, outputs = (", ".join(port.get_any_name() for port in ports) for ports in (one.inputs, one.outputs))
    return f"inputs {inputs}; outputs {outputs}"


before, after = names(model), names(core.read_model(sys.argv[1]))
print(f"in memory: {before}\nfrom file: {after}")
if before != "inputs mask, states; outputs mask, product":
    sys.exit("Changed: names in memory")
if after != "inputs mask, states; outputs mask_1, product":
    sys.exit("Changed: an output with the name of an input is saved under another one no longer")
PY
