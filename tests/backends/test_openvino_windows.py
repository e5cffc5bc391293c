"""Attention in a window by blocks, on a model of that attention alone."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("openvino")

import numpy as np
import openvino as ov
from openvino import opset13 as op

from prunepass.backends import _openvino_windows
from prunepass.backends._openvino_windows import attend_by_blocks

WINDOW, HEADS, OWN, WIDTH = 5, 4, 2, 8
FULL = {"INFERENCE_PRECISION_HINT": "f32"}


def attention(kind: Any) -> Any:
    """Heads that share keys, a cache as an input, and a mask for all heads: bool, or added where ``kind`` is float."""
    query = op.parameter([-1, HEADS, -1, WIDTH], np.float32, name="query")
    seen = op.parameter([-1, 1, -1, -1], bool, name="seen")
    inputs, joined, results = [query, seen], [], []
    for name in ("key", "value"):
        past, own = (op.parameter([-1, OWN, -1, WIDTH], np.float32, name=f"{of}_{name}") for of in ("past", "own"))
        inputs += [past, own]
        both = op.concat([past, own], 2)
        both.output(0).get_tensor().set_names({f"present_{name}"})
        results.append(op.result(both))
        groups = op.constant(np.array([1, 1, HEADS // OWN, 1, 1]))
        repeated = op.broadcast(op.unsqueeze(both, op.constant(2)), groups, broadcast_spec="BIDIRECTIONAL")
        joined.append(op.reshape(repeated, op.constant(np.array([0, HEADS, -1, WIDTH])), True))
    added = op.select(seen, op.constant(np.float32(0)), op.constant(np.float32(-np.inf)))
    out = op.scaled_dot_product_attention(query, *joined, added if kind is float else seen)
    return ov.Model([op.result(out), *results], inputs, "attention")


def in_window(queries: int, past: int = 0) -> Any:
    """[1, 1, Q, P + Q] bool."""
    slots = np.arange(past + queries)
    distance = slots[past:, None] - slots[None]
    return ((distance >= 0) & (distance < WINDOW))[None, None]


def call(model: Any, seen: Any, queries: int, past: int = 0, rows: int = 1) -> list[Any]:
    random = np.random.default_rng(0)
    given: dict[str, Any] = {"seen": np.broadcast_to(seen, (rows, *seen.shape[1:]))}
    for name, heads, tokens in (
        ("query", HEADS, queries),
        *((f"past_{name}", OWN, past) for name in ("key", "value")),
        *((f"own_{name}", OWN, queries) for name in ("key", "value")),
    ):
        given[name] = random.standard_normal((rows, heads, tokens, WIDTH)).astype(np.float32)
    found = ov.Core().compile_model(model, "CPU", FULL)(given)
    return [found[i] for i in range(3)]


def changed(kind: Any) -> Any:
    model = attention(kind)
    past = op.gather(op.shape_of(model.input("past_key")), op.constant([2]), op.constant(0))
    goes_on = op.greater(past, op.constant([0]))
    assert attend_by_blocks(model, {"past_key": WINDOW}, goes_on) == {"past_key", "past_value"}
    return model


@pytest.mark.parametrize("kind", [float, bool])
@pytest.mark.parametrize("length", [2, 256])
def test_values_are_the_same(kind: Any, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of prompts around twice the window and of many windows, of a chat's next turn, of one token, and of rows."""
    monkeypatch.setattr(_openvino_windows, "LENGTH", length)
    whole, blocks = attention(kind), changed(kind)
    for queries, past, rows in ((10, 0, 1), (11, 0, 1), (12, 0, 3), (64, 0, 2), (12, 7, 1), (1, 9, 1), (1, 0, 1)):
        seen = in_window(queries, past)
        exact, found = (call(model, seen, queries, past, rows)[0] for model in (whole, blocks))
        assert np.abs(found - exact).max() < 1e-5


def test_keys_behind_the_window_are_not_read() -> None:
    """A mask that shows them, too, has no say in a long prompt: blocks hold no such keys."""
    whole, blocks = attention(float), changed(float)
    seen = np.tril(np.ones((64, 64), dtype=bool))[None, None]
    exact, found = (call(model, seen, 64)[0] for model in (whole, blocks))
    assert np.abs(found - exact)[:, :, :WINDOW].max() < 1e-5
    assert np.abs(found - exact)[:, :, 3 * WINDOW : -1].max(axis=(1, 3)).min() > 1e-3
    assert np.abs(found - exact)[:, :, -1].max() < 1e-5  # the last query attends to all keys


def test_caches_keep_what_a_later_token_may_see(monkeypatch: pytest.MonkeyPatch) -> None:
    """A single row's, from the next call on."""
    monkeypatch.setattr(_openvino_windows, "SPARE", 2)
    model = changed(float)
    for queries, past, rows, kept in ((20, 0, 1, 20), (1, 20, 1, 8), (6, 0, 1, 6), (1, 30, 1, 8), (1, 20, 2, 21)):
        for cache in call(model, in_window(queries, past), queries, past, rows)[1:]:
            assert cache.shape[2] == kept


def test_a_row_left_of_a_batch_keeps_its_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its tokens are slots that were empty beside a longer row: the window reaches over them."""
    monkeypatch.setattr(_openvino_windows, "SPARE", 2)
    seen = np.zeros((1, 1, 1, 31), dtype=bool)
    seen[..., [3, 4, 30]] = True
    whole, blocks = attention(float), changed(float)
    exact, found = (call(model, seen, 1, past=30) for model in (whole, blocks))
    assert found[1].shape[2] == 31
    assert np.abs(found[0] - exact[0]).max() < 1e-5


def test_other_layers_stay() -> None:
    model = attention(float)
    assert attend_by_blocks(model, {}, op.constant([True])) == set()
    assert sum(op_.get_type_name() == "ScaledDotProductAttention" for op_ in model.get_ops()) == 1
