#!/usr/bin/env bash
# openvino.convert_model forks the Python process about ten times, to report its use.
#
# Guess: converting a model runs in the process that asks for it, and starts no other.
#
# What happens: openvino-telemetry, which openvino installs, sends each event of a conversion from a fork of its own
# (Linux). In a process of some gigabytes and many threads that takes time, and a fork that hangs holds the memory it
# shares. Without the module there is no fork; `opt_in_out --opt_out`, which the package installs, stops the reports too.
#   with openvino-telemetry: import and first conversion fork: True, a second conversion: True
#   without it:              import and first conversion fork: False, a second conversion: False
# A process whose environment says CI=true is left alone, so the script takes that away.
#
# Seen with: openvino 2026.4.1, openvino-telemetry 2025.2.0, torch 2.13.0, Python 3.11, Linux x86-64.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 openvino==2026.4.1 openvino-telemetry==2025.2.0 numpy==2.4.6 packaging
cat > "$folder/forks.py" <<'PY'
import os
import sys

forks, fork = [], os.fork


def counted():
    pid = fork()
    if pid:
        forks.append(pid)
    return pid


os.fork = counted
if sys.argv[1] == "without":
    sys.modules["openvino_telemetry"] = None
import openvino as ov
import torch

program = torch.export.export(torch.nn.Linear(4, 4), (torch.ones(2, 4),))
ov.convert_model(program)
first = len(forks)
ov.convert_model(program)
print(first > 0, len(forks) > first)
PY
forks() { # a home of its own: a person's choice is not to decide
  env -u CI -u TF_BUILD -u JENKINS_URL HOME="$folder" PYTHONWARNINGS=ignore "$folder/venv/bin/python" "$folder/forks.py" "$1" 2>/dev/null | tail -n 1
}
with=$(forks with)
without=$(forks without)
echo "with openvino-telemetry: import and first conversion fork: ${with% *}, a second conversion: ${with#* }"
echo "without it:              import and first conversion fork: ${without% *}, a second conversion: ${without#* }"
[ "$with" = "True True" ] || { echo "Changed: a conversion no longer forks the process"; exit 1; }
[ "$without" = "False False" ] || { echo "Changed: a conversion forks the process without openvino-telemetry, too"; exit 1; }
