"""A causal model's cache as OpenVINO's own states, with the inputs that its generators pass.

What `openvino-genai` and `optimum-intel` call: ``input_ids``, ``attention_mask`` over past and present tokens,
``position_ids`` and ``beam_idx`` (which row of the states each row goes on from); ``logits`` come back.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from prunepass.backends._openvino_core import require
from prunepass.backends._openvino_windows import attend_by_blocks
from prunepass.generation.stateful import FILLED, TOKEN_AXIS

__all__ = ["with_states"]


def with_states(
    model: Any, states: Mapping[str, str], windows: Mapping[str, int] | None = None, limit: int | None = None
) -> None:
    """States in place of inputs and outputs of an ``openvino.Model``, which is edited. They are empty at first and
    after ``reset_state``.

    Args:
        model: of `generation.stateful.StatefulProgram`, its inputs and outputs by that program's names.
        states: by name of the input, the name of the output that takes its place in the next call.
        windows: by name of the input that holds a layer's keys, how many of the last tokens its queries see at most.
        limit: how many positions the model has; the runtime refuses a longer ``attention_mask``.
    """
    from openvino._offline_transformations import apply_make_stateful_transformation

    for port in (*model.inputs, *model.outputs):
        port.get_node().set_friendly_name(port.get_any_name())
    _open(model, states)
    _split_mask(model, limit)
    _follow_beams(model, states)
    apart = attend_by_blocks(model, windows or {}, _goes_on(model))
    apart |= {name for name in states if name.startswith(FILLED)}
    apply_make_stateful_transformation(model, dict(states))
    _begin_empty(model, {name + states[name] for name in apart})
    model.validate_nodes_and_infer_types()


def _open(model: Any, states: Mapping[str, str]) -> None:
    """Sizes that tracing could not leave open: no past at all, and a single row or token."""
    ov = require()
    shapes = {}
    for port in model.inputs:
        shape = port.get_partial_shape()
        shape[0] = ov.Dimension()
        shape[TOKEN_AXIS if port.get_any_name() in states else 1] = ov.Dimension()
        shapes[port] = shape
    model.reshape(shapes)


def _split_mask(model: Any, limit: int | None) -> None:
    """One mask over past and present tokens in place of two: [B, P + S] -> [B, P], [B, S]."""
    ov, ops = require(), _ops()
    own, past = (_parameter(model, name) for name in ("attention_mask", "past_mask"))
    ids = _parameter(model, "input_ids")
    length = ov.Dimension() if limit is None else ov.Dimension(1, limit)
    whole = ops.parameter(ov.PartialShape([ov.Dimension(), length]), own.get_element_type(), name="attention_mask")
    own.set_friendly_name("own_mask")
    one, axis = ops.constant([1]), ops.constant([1])

    def tokens(node: Any) -> Any:
        return ops.gather(ops.shape_of(node, output_type="i64"), ops.constant([1]), ops.constant(0))

    total = tokens(whole)
    border = ops.subtract(total, tokens(ids))
    _replace(past, ops.slice(whole, ops.constant([0]), border, one, axis))
    _replace(own, ops.slice(whole, border, total, one, axis))
    for old in (own, past):
        model.remove_parameter(old)
    whole.output(0).get_tensor().set_names({"attention_mask"})
    model.add_parameters([whole])


def _follow_beams(model: Any, states: Mapping[str, str]) -> None:
    """Each state's rows in the order that ``beam_idx`` [B] names."""
    ov, ops = require(), _ops()
    beams = ops.parameter(ov.PartialShape([-1]), ov.Type.i32, name="beam_idx")
    beams.output(0).get_tensor().set_names({"beam_idx"})
    for name in states:
        state = _parameter(model, name)
        readers = state.output(0).get_target_inputs()
        ordered = ops.gather(state, beams, ops.constant(0))
        if name.startswith(FILLED):
            ordered = _only_after_a_past(model, ordered)
        for reader in readers:
            reader.replace_source_output(ordered.output(0))
    model.add_parameters([beams])


def _only_after_a_past(model: Any, state: Any) -> Any:
    """A state, or its first 0 tokens in a call whose mask holds none but its own.

    After ``reset_state`` the CPU plugin (2026.4) reads a state of open length as it was, where it should be empty.
    """
    ops = _ops()
    length = ops.gather(ops.shape_of(state, output_type="i64"), ops.constant([TOKEN_AXIS]), ops.constant(0))
    end = ops.select(_goes_on(model), length, ops.constant([0]))
    return ops.slice(state, ops.constant([0]), end, ops.constant([1]), ops.constant([TOKEN_AXIS]))


def _goes_on(model: Any) -> Any:
    """[1] bool: whether a call's mask holds tokens before its own."""
    ops = _ops()
    whole, ids = (ops.shape_of(_parameter(model, n), output_type="i64") for n in ("attention_mask", "input_ids"))
    at, first = ops.constant([1]), ops.constant(0)
    return ops.greater(ops.gather(whole, at, first), ops.gather(ids, at, first))


def _begin_empty(model: Any, apart: Set[str]) -> None:
    """States start with no tokens, for as many rows as the call has.

    The variables ``apart`` are left without a first value, which is no tokens, too. With a computed one the CPU plugin
    (2026.4) cannot read the marks of filled slots again from its model cache or by ``import_model``; and in float16 it
    takes the first value's 0 tokens for the only length of a state that no attention of its own holds.
    """
    ops = _ops()
    ids = _parameter(model, "input_ids")
    rows = ops.gather(ops.shape_of(ids, output_type="i64"), ops.constant([0]), ops.constant(0))
    for op in model.get_ops():
        if op.get_type_name() != "ReadValue" or op.get_variable_id() in apart:
            continue
        shape = op.get_output_partial_shape(0)
        heads, width = (shape[i].get_length() for i in (1, 3))
        sizes = ops.concat([rows, ops.constant([heads, 0, width])], axis=0)
        zero = ops.convert(ops.constant(0.0, dtype="float32"), op.get_output_element_type(0))  # numpy has no bfloat16
        op.set_arguments([ops.broadcast(zero, sizes)])


def _parameter(model: Any, name: str) -> Any:
    return model.input(name).get_node()


def _replace(old: Any, new: Any) -> None:
    for reader in old.output(0).get_target_inputs():
        reader.replace_source_output(new.output(0))


def _ops() -> Any:
    from openvino import opset13

    return opset13
