#!/usr/bin/env bash
# Attention with a key-value cache takes about three times as long with a mask of bools as with one that is added.
#
# Guess: the two take as long; if anything the mask of bools is faster, as it is a quarter of the bytes.
#
# What happens: attention whose keys and values are states becomes one operator of the CPU plugin, in which a mask of
# bools with a row for each query costs more than all else. The values are equal.
#   bool: 156.0 ms, f32: 53.0 ms
#
# Seen with: openvino 2026.4.1, numpy 2.4.6, Python 3.11, x86-64 (AMD EPYC with AVX-512, without AMX), one thread, float32.
# Medians of calls in turns. The script fails where the mask of bools takes less than 1.5 times as long, or values differ.
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
import openvino.opset13 as op

LENGTH, HEADS, WIDTH = 1024, 4, 128


def grown(name, new, beam):
    """Past and new tokens, and what keeps them for the next call."""
    rows = op.gather(op.shape_of(new), op.constant(np.array([0])), op.constant(0))
    shape = op.concat([rows, op.constant(np.array([HEADS, 0, WIDTH]))], 0)
    past = op.read_value(
        op.broadcast(op.constant(np.float32(0)), shape), name, ov.Type.f32, ov.PartialShape([-1, HEADS, -1, WIDTH])
    )
    both = op.concat([op.gather(past, beam, op.constant(0)), new], 2)
    return both, op.assign(both, name)


def attention(kind):
    query, key, value = (op.parameter([-1, HEADS, -1, WIDTH], np.float32, name=name) for name in "qkv")
    beam = op.parameter([-1], np.int32, name="beam")
    mask = op.parameter([-1, 1, -1, -1], kind, name="mask")
    keys, keep_keys = grown("keys", key, beam)
    values, keep_values = grown("values", value, beam)
    out = op.result(op.scaled_dot_product_attention(query, keys, values, mask))
    return ov.Model([out], [keep_keys, keep_values], [query, key, value, beam, mask], "attention")


random = np.random.default_rng(0)
states = [random.standard_normal((1, HEADS, LENGTH, WIDTH)).astype(np.float32) for _ in "qkv"]
sees = np.tril(np.ones((LENGTH, LENGTH), bool))[None, None]
masks = {"bool": sees, "f32": np.where(sees, 0, -np.inf).astype(np.float32)}
settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
core = ov.Core()
kinds = {"bool": bool, "f32": np.float32}
requests = {name: core.compile_model(attention(kinds[name]), "CPU", settings).create_infer_request() for name in masks}
times, found = {name: [] for name in masks}, {}
for _ in range(11):
    for name, request in requests.items():
        request.reset_state()
        began = time.perf_counter()
        found[name] = request.infer([*states, np.zeros(1, np.int32), masks[name]])[0].copy()
        times[name].append(1000 * (time.perf_counter() - began))
milliseconds = {name: statistics.median(taken[1:]) for name, taken in times.items()}
print(", ".join(f"{name}: {taken:.1f} ms" for name, taken in milliseconds.items()))
if not np.array_equal(found["bool"], found["f32"]):
    sys.exit("Changed: the values differ.")
if milliseconds["bool"] < 1.5 * milliseconds["f32"]:
    sys.exit("Changed: the mask of bools is about as fast.")
PY
