#!/usr/bin/env bash
# A stable TopK on the CPU is up to two hundred times slower than one that is not.
#
# Guess: keeping equal values in order costs a little, as in other sorts: perhaps a third more.
#
# What happens: with stable=True finding half of a row of float32 took 4 to 44 times as long at 512 elements, and 56 to 210
# times as long at 8,192, on one thread, in two runs on a machine that did other work as well. The values were drawn at
# random, with hardly any equal ones among them.
#   512: 0.16 ms, stable 0.589 ms
#   8192: 0.89 ms, stable 188 ms
#
# Seen with: openvino 2026.4.1, numpy 2.4.6, Python 3.11, x86-64 (AVX-512), CPU device. The script fails where the ratio
# at 8,192 falls below 5.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet openvino==2026.4.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import statistics
import sys
import time

import numpy as np
import openvino as ov
import openvino.opset15 as op

core, random = ov.Core(), np.random.default_rng(0)


def compiled(length, stable):
    x = op.parameter([1, length], np.float32)
    best = op.topk(x, op.constant(np.int64(length // 2)), 1, "max", "value", "i64", stable)
    return core.compile_model(ov.Model([best.output(1)], [x], "topk"), "CPU", {"INFERENCE_NUM_THREADS": 1})


for length in (512, 8192):
    row = random.standard_normal((1, length), dtype=np.float32)
    models = {stable: compiled(length, stable) for stable in (False, True)}
    chosen = {stable: set(model(row)[0][0].tolist()) for stable, model in models.items()}
    assert chosen[False] == chosen[True], "both choose the same"
    seconds = {stable: [] for stable in models}
    for _ in range(9):
        for stable, model in models.items():
            start = time.perf_counter()
            model(row)
            seconds[stable].append(time.perf_counter() - start)
    plain, stable = (1e3 * statistics.median(seconds[which]) for which in (False, True))
    print(f"{length}: {plain:.2g} ms, stable {stable:.3g} ms")
if stable < 5 * plain:
    sys.exit("Changed: a stable TopK costs less than five times one that is not")
PY
