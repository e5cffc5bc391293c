#!/usr/bin/env bash
# networkx 3.6.1 leaves the start out of immediate_dominators.
#
# Guess: the start node is its own immediate dominator, as it was in 3.5, so idom[node] can be followed
# upwards until idom[node] == node.
#
# What happens: the start is no longer a key, and that walk ends in a KeyError:
#   networkx 3.5: {0: 0, 1: 0, 2: 1}
#   networkx 3.6.1: {1: 0, 2: 1}
#
# Seen with: networkx 3.5 and 3.6.1, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
for version in 3.5 3.6.1; do
    "$folder/venv/bin/pip" install --quiet "networkx==$version"
    "$folder/venv/bin/python" - "$version" <<'PY'
import sys

import networkx as nx

expected = {"3.5": {0: 0, 1: 0, 2: 1}, "3.6.1": {1: 0, 2: 1}}[sys.argv[1]]
found = dict(sorted(nx.immediate_dominators(nx.DiGraph([(0, 1), (1, 2)]), 0).items()))
print(f"networkx {nx.__version__}: {found}")
if found != expected:
    sys.exit(f"Changed: networkx {nx.__version__} no longer answers {expected}")
PY
done
