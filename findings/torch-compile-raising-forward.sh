#!/usr/bin/env bash
# A forward that raises for a call has its inner modules compiled before it raises, and no graph break is counted.
#
# Guess: where a module's own check raises (an image of the wrong size), torch.compile lets the exception through; a
# backend is not called for a call that has no result, or the split is counted as a graph break.
#
# What happens: Dynamo meets the exception, gives the outer frame up and runs it in Python, so that the modules inside
# are compiled one by one until the exception is raised. The backend gets graphs of parts of the model that it has got
# as a whole before, and torch._dynamo.utils.counters["graph_break"] is empty:
#   images of 8 pixels:  graphs [['conv2d', 'sin']], graph breaks 0
#   images of 16 pixels: graphs [['conv2d']], graph breaks 0, ValueError: only 8 pixels
#
# Seen with: torch 2.13.0, Python 3.11, CPU.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import sys

import torch
from torch import nn
from torch._dynamo.utils import counters

graphs = []


def backend(module, inputs):
    called = (getattr(n.target, "__name__", str(n.target)) for n in module.graph.nodes if n.op.startswith("call"))
    graphs.append(list(called))
    return module.forward


class Patches(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 2, 2)

    def forward(self, pixels):
        return self.conv(pixels)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = Patches()

    def forward(self, pixels):
        patches = self.patches(pixels)
        if pixels.shape[-1] != 8:
            raise ValueError("only 8 pixels")
        return patches.sin()


def call(size):
    graphs.clear()
    counters.clear()
    said = ""
    try:
        model(torch.zeros(1, 3, size, size))
    except ValueError as e:
        said = f", ValueError: {e}"
    breaks = sum(counters["graph_break"].values())
    print(f"images of {size} pixels: graphs {graphs}, graph breaks {breaks}{said}")
    return [list(graph) for graph in graphs], breaks, said


model = torch.compile(Model(), backend=backend)
whole, _, raised = call(8)
if len(whole) != 1 or len(whole[0]) != 2 or raised:
    sys.exit("Changed: a call that does not raise is no longer one graph of two operators")
parts, breaks, raised = call(16)
if not raised:
    sys.exit("Changed: the exception does not come through")
if not parts:
    sys.exit("Changed: the backend is not called where forward raises")
if breaks:
    sys.exit("Changed: the split is counted as a graph break")
PY
