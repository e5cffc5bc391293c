#!/usr/bin/env bash
# torch.export under autocast records no casts: the program computes in the model's own type outside of the block.
#
# Guess: torch.export records what runs. Under autocast a linear layer runs in bfloat16, so the program holds the casts
# and gives bfloat16 wherever it is called.
#
# What happens: the graph is one aten.linear whose metadata says bfloat16. Called outside of autocast it gives float32:
#   metadata: torch.bfloat16, called outside: torch.float32, operators: ['aten.linear.default']
#
# Seen with: torch 2.13.0, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import sys

import torch

model, x = torch.nn.Linear(4, 4).eval(), torch.randn(2, 4)
with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
    program = torch.export.export(model, (x,))
operators = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
said = next(n for n in program.graph.nodes if n.op == "call_function").meta["val"].dtype
with torch.no_grad():
    given = program.module()(x).dtype
print(f"torch {torch.__version__}: metadata: {said}, called outside: {given}, operators: {operators}")
if (said, given, operators) != (torch.bfloat16, torch.float32, ["aten.linear.default"]):
    sys.exit("Changed: the program's metadata and what it gives agree, or the casts are in it")
PY
