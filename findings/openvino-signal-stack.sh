#!/usr/bin/env bash
# An openvino.Core changes the stack on which its thread runs signal handlers.
#
# Guess: making a Core changes nothing of the thread that makes it.
#
# What happens: with its first use of the CPU device it gives the thread an alternate signal stack (sigaltstack) of its own,
# in place of the one that Python's faulthandler had set, and puts back the one it found when the Core ends:
#   with faulthandler: set; with a Core: another; after its end: the first again
# Each Core does so by itself. In a long process that had several of them, the thread was left with a stack that no longer
# existed, and the process ended without any message at the next signal that Python handles, such as the end of a child
# process after a data loader of PyTorch had run. One Core that lives as long as the process avoids that.
#
# Seen with: openvino 2026.4.1, Python 3.11, Linux x86-64, CPU device.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet openvino==2026.4.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import ctypes
import faulthandler
import gc
import sys

import openvino as ov


class Stack(ctypes.Structure):
    _fields_ = [("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]


def start():
    stack = Stack()
    ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack))
    return stack.start


faulthandler.enable()
first = start()
core = ov.Core()
core.get_property("CPU", "FULL_DEVICE_NAME")
during = start()
del core
gc.collect()
after = start()
print(
    f"with faulthandler: {'set' if first else 'none'}; with a Core: {'the same' if during == first else 'another'}; "
    f"after its end: {'the first again' if after == first else 'another'}"
)
if not first or during == first or after != first:
    sys.exit("Changed: a Core no longer changes the stack of signal handlers and puts it back")
PY
