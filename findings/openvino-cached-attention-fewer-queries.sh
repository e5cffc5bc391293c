#!/usr/bin/env bash
# Attention with a key-value cache fails where a call has fewer queries than new keys, such as the last query alone.
#
# Guess: it takes any number of queries, as the operator does that the model is made of, and as the same model does whose
# cache is an input. To ask for the last token alone is how one would save the rest of a prompt's last layer.
#
# What happens: with states, the CPU plugin makes one operator of the attention and what appends to the cache, which
# takes the cache to have grown by as many tokens as there are queries. It compiles, and the first call raises.
#   as inputs: (1, 2, 1, 8)
#   as states: attention_mask do not match q and k
#
# Seen with: openvino 2026.4.1, numpy 2.4.6, Python 3.11, x86-64. The script fails where the call with states works, or
# the one with inputs does not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet openvino==2026.4.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import sys

import numpy as np
import openvino as ov
import openvino.opset13 as op

TOKENS, HEADS, WIDTH = 5, 2, 8
SHAPE = [-1, HEADS, -1, WIDTH]


def last_query(stateful):
    """Attention of the last of the new tokens, over all past and new ones."""
    query, key, value = (op.parameter(SHAPE, np.float32, name=name) for name in "qkv")
    mask, beam = op.parameter([-1, 1, -1, -1], np.float32, name="mask"), op.parameter([-1], np.int32, name="beam")
    inputs, kept, joined = [query, key, value, mask, beam], [], []
    for name, new in (("keys", key), ("values", value)):
        if stateful:
            rows = op.gather(op.shape_of(new), op.constant(np.array([0])), op.constant(0))
            empty = op.concat([rows, op.constant(np.array([HEADS, 0, WIDTH]))], 0)
            past = op.read_value(op.broadcast(op.constant(np.float32(0)), empty), name, ov.Type.f32, ov.PartialShape(SHAPE))
        else:
            past = op.parameter(SHAPE, np.float32, name=name)
            inputs.append(past)
        joined.append(op.concat([op.gather(past, beam, op.constant(0)), new], 2))
        if stateful:
            kept.append(op.assign(joined[-1], name))
    last = op.slice(query, *(op.constant(np.array([n])) for n in (-1, 2**31 - 1, 1, 2)))
    out = op.result(op.scaled_dot_product_attention(last, *joined, mask))
    return ov.Model([out], kept, inputs, "last query")


random = np.random.default_rng(0)
new = [random.standard_normal((1, HEADS, TOKENS, WIDTH)).astype(np.float32) for _ in "qkv"]
given = [*new, np.zeros((1, 1, 1, TOKENS), np.float32), np.zeros(1, np.int32)]
core, settings = ov.Core(), {"INFERENCE_PRECISION_HINT": "f32"}
empty = [np.zeros((1, HEADS, 0, WIDTH), np.float32)] * 2
print("as inputs:", core.compile_model(last_query(False), "CPU", settings)([*given, *empty])[0].shape)
request = core.compile_model(last_query(True), "CPU", settings).create_infer_request()
try:
    request.infer(given)
except RuntimeError as e:
    if "attention_mask do not match q and k" not in str(e):
        sys.exit(f"Changed: another message: {e}")
    print("as states: attention_mask do not match q and k")
else:
    sys.exit("Changed: the call with states works.")
PY
