#!/usr/bin/env bash
# torch 2.11: torch.compiler.is_exporting() is True in what torch.compile traces.
#
# Guess: inside torch.compile, is_compiling() is True and is_exporting() is False; only torch.export makes the latter True.
#
# What happens: Dynamo takes the two for one. A function that asks both while torch.compile traces it is told:
#   compiling: True, exporting: True
# A library that treats exported programs in another way than compiled ones then does so in torch.compile, without an
# error. torch 2.13 and 2.15 answer False to the second question.
#
# Seen with: torch 2.11.0, Python 3.11, Linux x86-64.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.11.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import sys

import torch


def asked(x):
    return x + torch.compiler.is_compiling() + 10 * torch.compiler.is_exporting()


found = int(torch.compile(asked, backend="eager")(torch.zeros(())))
compiling, exporting = bool(found % 10), found >= 10
print(f"compiling: {compiling}, exporting: {exporting}")
if not (compiling and exporting):
    sys.exit("Changed: torch 2.11.0 no longer says that it exports inside torch.compile")
PY
