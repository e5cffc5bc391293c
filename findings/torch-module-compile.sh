#!/usr/bin/env bash
# Module.compile() on a module made of PyTorch's own layers compiles nothing and does not say so.
#
# Guess: module.compile(backend=f) does what torch.compile(module, backend=f) does: f gets the module's graph.
#
# What happens: f is never called for nn.TransformerEncoder, nn.Sequential or nn.Linear, in training or in eval; the call
# runs eagerly and nothing warns. A subclass of the user's own is compiled. torch.compile(module) compiles all of them:
#   Linear: module.compile() 0 graphs, torch.compile(module) 1 graphs, 0 warnings
#   Sequential: module.compile() 0 graphs, torch.compile(module) 1 graphs, 0 warnings
#   TransformerEncoder: module.compile() 0 graphs, torch.compile(module) 1 graphs, 0 warnings
#   Own: module.compile() 1 graphs, torch.compile(module) 1 graphs, 0 warnings
# All frames that are entered lie in torch.nn, whose files are skipped unless torch.compile was given the module.
#
# Seen with: torch 2.13.0, numpy 2.4.6, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import sys
import warnings

import torch
from torch import nn


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x):
        return self.linear(x)


def graphs(module, by_method):
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    torch._dynamo.reset()
    if by_method:
        module.compile(backend=backend)
    else:
        module = torch.compile(module, backend=backend)
    with torch.no_grad():
        module(torch.randn(1, 5, 16))
    return len(seen)


layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
modules = [nn.Linear(16, 16), nn.Sequential(nn.Linear(16, 16), nn.ReLU()), nn.TransformerEncoder(layer, 2), Own()]
changed = []
for module in modules:
    module.eval()
    name = type(module).__name__
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        whole = graphs(module, by_method=False)
        method = graphs(module, by_method=True)
    print(f"{name}: module.compile() {method} graphs, torch.compile(module) {whole} graphs, {len(warned)} warnings")
    if (method, whole, len(warned)) != (int(name == "Own"), 1, 0):
        changed.append(name)
if changed:
    sys.exit("Changed: Module.compile() no longer behaves as described for " + ", ".join(changed))
PY
