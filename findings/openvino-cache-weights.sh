#!/usr/bin/env bash
# OpenVINO's model cache answers with old weights when only the .bin file has changed.
#
# Guess: with CACHE_DIR, a compiled model is looked up by all that it was read from, so new weights beside the same .xml
# are compiled anew.
#
# What happens: the .xml alone decides. A .bin with other weights of the same shapes goes unnoticed; an .xml that is written
# again, seconds later and with the same text, is noticed. With CACHE_MODE=OPTIMIZE_SIZE the new weights count:
#   OPTIMIZE_SPEED: weights of 1 give 4.0, weights of 2 give 4.0, from the cache: True
#   OPTIMIZE_SIZE: weights of 1 give 4.0, weights of 2 give 8.0, from the cache: False
# OPTIMIZE_SPEED is what a caller gets who sets CACHE_DIR only.
#
# Seen with: openvino 2026.4.1, numpy 2.4.6, Python 3.11, x86-64, CPU device.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet openvino==2026.4.1 numpy==2.4.6
"$folder/venv/bin/python" - "$folder" <<'PY'
import pathlib
import shutil
import sys
import time

import numpy as np
import openvino as ov
import openvino.opset15 as op

folder = pathlib.Path(sys.argv[1])


def save(name, weight):
    x = op.parameter([1, 4], np.float32, name="x")
    product = op.matmul(x, op.constant(np.full((4, 4), weight, np.float32)), False, False)
    ov.save_model(ov.Model([product], [x], "product"), folder / f"{name}.xml", compress_to_fp16=False)


def answer(mode):
    core = ov.Core()  # a new one, as in a new process
    core.set_property({"CACHE_DIR": str(folder / f"cache-{mode}"), "CACHE_MODE": mode})
    compiled = core.compile_model(folder / "model.xml", "CPU")
    return float(compiled([np.ones((1, 4), np.float32)])[0][0, 0]), compiled.get_property("LOADED_FROM_CACHE")


seen = {}
for mode in ("OPTIMIZE_SPEED", "OPTIMIZE_SIZE"):
    save("model", 1.0)
    old, _ = answer(mode)
    time.sleep(2)  # the two files of weights differ in time as well
    save("other", 2.0)
    shutil.copyfile(folder / "other.bin", folder / "model.bin")
    new, cached = answer(mode)
    print(f"{mode}: weights of 1 give {old}, weights of 2 give {new}, from the cache: {cached}")
    seen[mode] = (old, new, cached)
if seen["OPTIMIZE_SPEED"] != (4.0, 4.0, True):
    sys.exit("Changed: the cache no longer answers with the weights of the replaced .bin file")
if seen["OPTIMIZE_SIZE"] != (4.0, 8.0, False):
    sys.exit("Changed: OPTIMIZE_SIZE no longer notices that the .bin file was replaced")
PY
