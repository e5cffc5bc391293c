#!/usr/bin/env bash
# A mask of bools takes more memory in attention on the CPU than one of the query's own dtype.
#
# Guess: scaled_dot_product_attention reads a bool mask of one byte a pair where it lies; a mask in bfloat16 takes two, in
# float32 four.
#
# What happens: each call first makes a copy of the bool mask in the query's dtype, so it holds both. With 4,096 tokens and
# float32 that are 16 MiB of bools and 64 MiB of copy, in every layer anew. A float mask is read where it lies.
#   bool: 64 MiB more, float32: 0 MiB more
#
# Seen with: torch 2.13.0 (CPU build), Python 3.11, x86-64. What is counted is what operators inside the call return in the
# shape of the mask. The script fails where a bool mask is no longer copied, or a float one is.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import sys

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Copies(TorchDispatchMode):
    """Bytes of new tensors of the mask's shape."""

    def __init__(self, mask):
        super().__init__()
        self.mask, self.bytes = mask, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.numel() == self.mask.numel():
            if out.untyped_storage().data_ptr() != self.mask.untyped_storage().data_ptr():
                self.bytes += out.numel() * out.element_size()
        return out


length = 4096
query = torch.randn(1, 2, length, 16)
keep = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
masks = {"bool": keep, "float32": torch.zeros(1, 1, length, length).masked_fill(~keep, float("-inf"))}
more = {}
for name, mask in masks.items():
    with torch.no_grad(), Copies(mask) as copies:
        torch.nn.functional.scaled_dot_product_attention(query, query, query, mask)
    more[name] = copies.bytes // 2**20
print(", ".join(f"{name}: {size} MiB more" for name, size in more.items()))
if more["bool"] < 64 or more["float32"] > 0:
    sys.exit(f"Changed: MiB of copies are {more}.")
PY
