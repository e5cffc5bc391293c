"""An exported program with a plain signature: tensors in by name, a dict of tensors out, sizes open or fixed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import Dim, ExportedProgram
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from prunepass.backends._binding import open_downwards, stand_in
from prunepass.errors import ExportError
from prunepass.graph.capture import quiet_export
from prunepass.graph.counted import as_sizes, without_checks
from prunepass.graph.inputs import TOKENS_TO_TRACE, fake_value, hint, is_symbolic
from prunepass.graph.spelled import spelled_out

__all__ = ["Signature", "output_names", "outputs_apart", "plain"]


@dataclass(frozen=True)
class Signature:
    """The names of the tensors that go in and come out, in order."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


#: types of a model that callers in NumPy cannot give or read as numbers, or not without loss
_HALF = (torch.float16, torch.bfloat16)


def plain(
    program: ExportedProgram, *, length: int | None, batch: int | None, limit: int | None, widen: bool = False
) -> tuple[Signature, ExportedProgram]:
    """The program with keyword tensors in and a plain dict of tensors out, so that it loads with torch alone.

    Arguments that are not tensors (``use_cache=False``) are part of it; sizes are open up to ``limit`` or fixed.

    Args:
        widen: whether inputs and outputs in half precision become float32; what lies between stays as it is.
    """
    gm = program.module(check_guards=False)
    signature, graph_module, fakes = _with_plain_signature(spelled_out(gm), output_names(program))
    if widen:
        _widen(graph_module, fakes)
    sizes = _Sizes.of(program, fakes.values(), (batch, length), limit)
    values = {name: torch.zeros(sizes.concrete(fake), dtype=fake.dtype) for name, fake in fakes.items()}
    dims = {name: sizes.open(fake) for name, fake in fakes.items()}
    try:
        with torch.no_grad(), quiet_export(), as_sizes(graph_module):
            exported = without_checks(torch.export.export(graph_module, (), values, dynamic_shapes=dims))
    except Exception as e:  # torch.export raises many kinds; the cause stays attached
        wishes = {"batch": batch, "length": length}
        asked = "".join(f" with {name}={value}" for name, value in wishes.items() if value is not None)
        reason = str(e).strip().splitlines()[0]
        raise ExportError(f"The graph could not be exported{asked}: {type(e).__name__}: {reason}") from e
    _drop_incidental_guards(exported)
    if TOKENS_TO_TRACE in program.graph_module.meta:
        open_downwards(exported)
    return signature, exported


#: bounds of an input's size, and inputs that share a size
_GUARD = re.compile(r"L\['\w+'\]\.size\(\)\[\d+\] (<=|==) (\d+|L\['\w+'\]\.size\(\)\[\d+\])")


def _drop_incidental_guards(program: ExportedProgram) -> None:
    """Keep the checks that say what the model takes, out of those that ``torch.export`` writes into a program.

    The others record how the traced sizes compared ("the kept tokens are not as many as all tokens"), which fake
    kernels ask for their strides. The operators hold without them; with them a text of one token would be refused.
    """
    guards = getattr(program, "_guards_code", None)
    if guards:
        program._guards_code = [guard for guard in guards if _GUARD.fullmatch(guard)]


def _with_plain_signature(
    gm: GraphModule, output_names: Sequence[str]
) -> tuple[Signature, GraphModule, dict[str, Any]]:
    """A copy of the graph whose forward takes tensors by name and returns a dict, and the fake tensors it takes."""
    graph = Graph()
    nodes: dict[Node, Any] = {}
    leaves = pytree.tree_leaves(graph.graph_copy(gm.graph, nodes))
    outputs = {name: leaf for name, leaf in zip(output_names, leaves, strict=True) if isinstance(leaf, Node)}
    graph.output(outputs)
    fakes: dict[str, Any] = {}
    for old in gm.graph.find_nodes(op="placeholder"):
        value = fake_value(old)
        if isinstance(value, torch.Tensor):
            fakes[str(old.target)] = value
        elif nodes[old].users:
            raise ExportError(f"Input {old.target!r} is a number, not a tensor. Fix its value before you export.")
        else:
            graph.erase_node(nodes[old])
    copy = GraphModule(gm, graph)
    outputs_apart(copy)
    return Signature(tuple(fakes), tuple(outputs)), copy, fakes


def outputs_apart(gm: GraphModule) -> None:
    """A value that is put out again goes through two operators that leave it as it is.

    Models put out their last state among those of all layers as well. OpenVINO's converter (2026.4) takes no value
    twice, nor a clone of it; in ONNX it would have one name.
    """
    output = gm.graph.output_node()
    seen: set[Node] = set()

    def once(value: Node) -> Node:
        if value not in seen or not isinstance(fake_value(value), torch.Tensor):
            seen.add(value)
            return value
        with gm.graph.inserting_before(output):
            wider = gm.graph.call_function(torch.ops.aten.unsqueeze.default, (value, 0))
            again = gm.graph.call_function(torch.ops.aten.squeeze.dim, (wider, 0))
        again.meta = dict(value.meta)
        wider.meta = {**value.meta, "val": fake_value(value).unsqueeze(0)}
        return again

    output.args = torch.fx.map_arg(output.args, once)
    gm.recompile()


def _widen(gm: GraphModule, fakes: dict[str, Any]) -> None:
    """``f(x)`` -> ``f(x.half()).float()`` for the inputs and outputs in half precision; edits both arguments."""
    aten, graph = torch.ops.aten, gm.graph
    inputs = list(graph.find_nodes(op="placeholder"))
    for node in inputs:
        fake = fakes[str(node.target)]
        if fake.dtype in _HALF:
            with graph.inserting_after(inputs[-1]):
                narrow = graph.call_function(aten.to.dtype, (node, fake.dtype))
            node.replace_all_uses_with(narrow, delete_user_cb=lambda user, own=narrow: user is not own)
            fakes[str(node.target)] = fake.to(torch.float32)
    output = graph.output_node()
    outputs: Any = output.args[0]  # names to nodes, as they were written
    with graph.inserting_before(output):
        wide = {
            name: graph.call_function(aten.to.dtype, (node, torch.float32)) if _is_half(node) else node
            for name, node in outputs.items()
        }
    output.args = (wide,)
    gm.recompile()


def _is_half(node: Node) -> bool:
    value = fake_value(node)
    return isinstance(value, torch.Tensor) and value.dtype in _HALF


def output_names(program: ExportedProgram) -> list[str]:
    """A name for each leaf of the output: its key in the model's own output, or its place in a tuple."""
    spec = program.call_spec.out_spec
    if spec is None:
        raise ExportError(
            "The exported program does not say how its outputs are arranged. Export it with torch.export."
        )
    names: dict[int, str] = {}
    _name_leaves(pytree.tree_unflatten(range(spec.num_leaves), spec), "", names)
    return [names.get(i, f"output_{i}") for i in range(spec.num_leaves)]


def _name_leaves(tree: Any, name: str, names: dict[int, str]) -> None:
    if isinstance(tree, int):
        names[tree] = name or "output"
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            _name_leaves(value, f"{name}_{key}" if name else str(key), names)
    elif isinstance(tree, (tuple, list)):
        for i, value in enumerate(tree):
            _name_leaves(value, f"{name or 'output'}_{i}", names)


#: sizes to trace with where batch and length stay open; the same for all inputs, which is what a model expects
_TRACED = (7, 11)


@dataclass(frozen=True)
class _Sizes:
    """What becomes of each symbolic size.

    Attributes:
        fixed: symbols that become a number.
        limits: the largest value of those that stay open.
        traced: the numbers to trace with.
    """

    fixed: Mapping[Any, int]
    limits: Mapping[Any, int]
    traced: dict[Any, int]

    @classmethod
    def of(
        cls, program: ExportedProgram, fakes: Iterable[Any], wanted: Sequence[int | None], limit: int | None
    ) -> _Sizes:
        """Batch and length are the first two axes of every input, which may have symbols of its own for them.

        Args:
            wanted: batch and length, None where they stay open.
            limit: the largest length the model takes, if it has one.
        """
        limits = {k: int(r.upper) for k, r in program.range_constraints.items() if r.upper < 2**31}
        fixed: dict[Any, int] = {}
        traced: dict[Any, int] = {}
        fakes = list(fakes)
        # a sound has samples, of which convolutions need more than a text has tokens: as many as in the traced call
        samples = [hint(f.shape[1]) for f in fakes if f.dim() > 1 and f.is_floating_point() and is_symbolic(f.shape[1])]
        enough = (_TRACED[0], max(_TRACED[1], program.graph_module.meta.get(TOKENS_TO_TRACE, 0), *samples))
        for fake in fakes:
            for axis, size in enumerate(fake.shape[:2]):
                if not is_symbolic(size):
                    _check_fixed(int(size), wanted[axis], axis)
                    continue
                symbol = size.node.expr
                if axis == 1 and limit is not None:
                    limits[symbol] = min(limit, limits.get(symbol, limit))
                if (number := wanted[axis]) is not None:
                    fixed[symbol] = number
                traced[symbol] = wanted[axis] or min(enough[axis], limits.get(symbol, enough[axis]))
        for symbol, number in fixed.items():
            if number > limits.get(symbol, number):
                raise ExportError(f"A size of {number} is more than the {limits[symbol]} that this model takes.")
        return cls(fixed, limits, traced)

    def concrete(self, fake: Any) -> list[int]:
        """The sizes of one input to trace with."""
        return [stand_in(size, self.traced) for size in fake.shape]

    def open(self, fake: Any) -> dict[int, Any]:
        """The axes of one input that stay open, with their limits."""
        free = {i: s.node.expr for i, s in enumerate(fake.shape) if is_symbolic(s)}
        return {
            i: Dim.AUTO(max=self.limits[e]) if e in self.limits else Dim.AUTO
            for i, e in free.items()
            if e not in self.fixed
        }


def _check_fixed(present: int, wanted: int | None, axis: int) -> None:
    if wanted is not None and present not in (wanted, 1):
        raise ExportError(f"The program's {('batch', 'length')[axis]} is {present} already and cannot become {wanted}.")
