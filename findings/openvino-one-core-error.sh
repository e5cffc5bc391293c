#!/usr/bin/env bash
# On a single core, a call whose operator raises returns the values of the call before, and raises nothing.
#
# Guess: adding three numbers to five raises, whatever the process runs on.
#
# What happens: with two cores it does. Where the process may use one core only, the call returns as if it had worked,
# with what the call before it had put into the output:
#   cores 2: 3 + 3 numbers [0.0, 2.0, 4.0], then 3 + 5 numbers raises RuntimeError
#   cores 1: 3 + 3 numbers [0.0, 2.0, 4.0], then 3 + 5 numbers [0.0, 2.0, 4.0]
# On a machine with one core there is no first line.
#
# Seen with: openvino 2026.4.1, Python 3.11, Linux, CPU.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet openvino==2026.4.1 numpy==2.4.6
cat > "$folder/add.py" <<'PY'
import os
import sys

cores = sorted(os.sched_getaffinity(0))[: int(sys.argv[1])]
os.sched_setaffinity(0, cores)  # before the runtime looks at them

import numpy as np
import openvino
from openvino import opset13 as op

left, right = op.parameter([-1], np.float32), op.parameter([-1], np.float32)
compiled = openvino.Core().compile_model(openvino.Model([op.add(left, right)], [left, right]), "CPU")
request = compiled.create_infer_request()


def add(one, other):
    return request.infer({0: np.arange(one, dtype=np.float32), 1: np.arange(other, dtype=np.float32)})[0].tolist()


first = add(3, 3)
try:
    second = str(add(3, 5))
except RuntimeError:
    second = "raises RuntimeError"
print(f"cores {len(cores)}: 3 + 3 numbers {first}, then 3 + 5 numbers {second}")
PY
if [ "$(nproc)" -gt 1 ]; then
  two=$("$folder/venv/bin/python" "$folder/add.py" 2)
  echo "$two"
  [[ "$two" == *"raises RuntimeError" ]] || { echo "Changed: with two cores the call no longer raises"; exit 1; }
fi
one=$("$folder/venv/bin/python" "$folder/add.py" 1)
echo "$one"
[[ "$one" == *"then 3 + 5 numbers [0.0, 2.0, 4.0]" ]] || { echo "Changed: with one core the call raises, or returns other values"; exit 1; }
