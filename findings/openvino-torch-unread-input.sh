#!/usr/bin/env bash
# Converting an exported program to OpenVINO drops an input that nothing reads, but only where it is the first.
#
# Guess: the converted model has the program's inputs, in order; or, if inputs that nothing reads are dropped, it drops each of them.
#
# What happens:
#   reads only the first of three: ['a', 'b', 'c']
#   reads only the second of three: ['b', 'c']
# Whoever passes inputs by position gives each value to the wrong input.
#
# Seen with: openvino 2026.4.1, torch 2.13.0, numpy 2.4.6, packaging 26.4, Python 3.11, x86-64, CPU device.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet openvino==2026.4.1 torch==2.13.0 numpy==2.4.6 packaging==26.4
"$folder/venv/bin/python" -W ignore - <<'PY'
import sys

import openvino as ov
import torch


class Reads(torch.nn.Module):
    def __init__(self, which):
        super().__init__()
        self.which = which

    def forward(self, a, b, c):
        return (a, b, c)[self.which] * 2


found = []
for which, word in enumerate(("first", "second")):
    program = torch.export.export(Reads(which), tuple(torch.ones(2, 3) for _ in range(3)))
    names = [port.get_any_name() for port in ov.convert_model(program).inputs]
    print(f"reads only the {word} of three: {names}")
    found.append(names)
if found != [["a", "b", "c"], ["b", "c"]]:
    sys.exit("Changed: an unread first input is no longer treated otherwise than unread later ones")
PY
