#!/usr/bin/env bash
# An exported program of a model that uses torch.vmap calls Python functions that are no operators.
#
# Guess: what torch.export writes down calls operators alone (torch.ops), whatever the model was written with, so a pass
# may ask each call for its schema.
#
# What happens: each vmap leaves its own bookkeeping in the graph, functions of functorch that open and close a level of
# batching, and the values between them have one axis less than what runs. run_decompositions() writes it without them.
# transformers 5.23 makes some attention masks with vmap (Gemma 3 with images).
#   exported: 10 functions, among them _add_batch_dim, _remove_batch_dim, _vmap_decrement_nesting, _vmap_increment_nesting
#   decomposed: 0 functions
#
# Seen with: torch 2.13.0 (CPU build), Python 3.11, x86-64, strict or not. The script fails where the numbers are others.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import operator
import sys

import torch


class Causal(torch.nn.Module):
    """Which of the earlier places each place sees, by two nested vmaps."""

    def forward(self, x):
        place = torch.arange(x.shape[1])
        by_key = torch.vmap(lambda query, key: key <= query, (None, 0))
        return torch.vmap(by_key, (0, None))(place, place)


def functions(program):
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    known = vars(operator).values()
    return [call.__name__ for call in calls if not isinstance(call, torch._ops.OpOverload) and call not in known]


x = torch.zeros(2, 6)
length = torch.export.Dim("length", min=2, max=99)
for strict in (False, True):
    program = torch.export.export(Causal(), (x,), dynamic_shapes=({1: length},), strict=strict)
    found, left = functions(program), functions(program.run_decompositions())
    named = sorted(name for name in set(found) if "dim" in name or "nesting" in name)
    print(f"exported: {len(found)} functions, among them {', '.join(named)}")
    print(f"decomposed: {len(left)} functions")
    if len(found) != 10 or left:
        sys.exit(f"Changed: {len(found)} and {len(left)} functions, strict={strict}.")
PY
