"""Bringing models to one dialect: pre-dispatch ATen, functional, with fake-tensor metadata on every node."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from prunepass.errors import CaptureError
from prunepass.graph.counted import as_sizes, without_checks
from prunepass.graph.examples import checked, why_not
from prunepass.graph.experts import traced_as_units
from prunepass.graph.functional import make_functional
from prunepass.graph.implementations import refuse_implementation
from prunepass.graph.inputs import TOKENS_TO_TRACE, fake_value, is_symbolic
from prunepass.graph.sinks import name_sinks
from prunepass.graph.streams import only_as_traced
from prunepass.graph.wrappers import MARK, refuse_pruned, unwrapped

__all__ = [
    "Captured",
    "Inputs",
    "capture_dynamo",
    "capture_exported",
    "capture_module",
    "copy_with_nodes",
    "ensure_aten",
    "export_again",
    "export_module",
    "quiet_export",
]

logger = logging.getLogger(__name__)
aten = torch.ops.aten
#: functions beside ATen's operators that belong to the dialect, whatever they return
_DIALECT_NAMES = {"getitem", "sym_max", "sym_min", "sym_float", "sym_not", "_set_grad_enabled"}

#: operators that do what another one does, with the same arguments
_SYNONYMS: dict[Any, Any] = {
    aten.concat.default: aten.cat.default,
    aten.concatenate.default: aten.cat.default,
    aten.swapaxes.default: aten.transpose.int,
    aten.swapdims.default: aten.transpose.int,
    aten.moveaxis.int: aten.movedim.int,
    aten.moveaxis.intlist: aten.movedim.intlist,
    aten.multiply.Tensor: aten.mul.Tensor,
    aten.divide.Tensor: aten.div.Tensor,
    aten.subtract.Tensor: aten.sub.Tensor,
}

#: keyword arguments by name, or positional ones (a single tensor counts as one)
Inputs = Mapping[str, Any] | Sequence[Any] | torch.Tensor


@dataclass(frozen=True)
class Captured:
    """A model as a graph.

    Attributes:
        graph_module: ATen, pre-dispatch; parameters as ``get_attr``; batch and length read by ``aten.sym_size``.
        exported: the exported program it came from.
        inputs: the names of the model's inputs, in the graph's order.
    """

    graph_module: GraphModule
    exported: ExportedProgram
    inputs: tuple[str, ...]


def capture_module(model: nn.Module, example_inputs: Inputs) -> Captured:
    """Trace a module with `torch.export`, batch and length dynamic. Parameters are shared, not copied.

    Args:
        example_inputs: keyword arguments (a mapping) or positional ones (a sequence); tensors lead with (B, S). One
            row, or a length under 3, is repeated first, since `torch.export` would take 1 for a constant.

    Raises:
        OptionError: ``model`` is no module, or the inputs cannot be its own.
        RefusalError: it is pruned already, its code cannot be read (TorchScript, weights in shards), or its attention
            implementation cannot.
        CaptureError: the model could not be traced; the message carries torch's own.
    """
    model = unwrapped(model)
    refuse_pruned(model)
    refuse_implementation(model)
    args, kwargs = checked(model, example_inputs)
    captured = capture_exported(export_module(model, args, kwargs))
    if only_as_traced(captured.graph_module):
        captured = capture_exported(export_module(model, args, kwargs, open_axes=1))
    return captured


def capture_exported(program: ExportedProgram) -> Captured:
    """The editable graph of an exported program."""
    gm = program.module()
    if not isinstance(gm, GraphModule):
        raise CaptureError(f"Expected the exported program's module to be a GraphModule, found {type(gm).__name__}.")
    _tidy(gm)
    names = tuple(str(n.target) for n in gm.graph.find_nodes(op="placeholder"))
    return Captured(gm, program, names)


def export_module(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    open_axes: int = 2,
    extra: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> ExportedProgram:
    """`torch.export` with every batch and length left open (``Dim.AUTO``: named dims fail on ``topk`` of a length).

    Args:
        open_axes: 2, or 1 where only the batch is open.
        extra: further keyword arguments, whose sizes are fixed.
    """
    given = args, kwargs
    args, kwargs = _roomy(given)
    dims = _open_dims(args, {**kwargs, **extra}, open_axes, closed=extra)
    kwargs |= extra
    _refuse_packed(model)
    if isinstance(model, GraphModule):
        _drop_guards(model)
    try:
        with quiet_export(), traced_as_units():
            program = torch.export.export(
                _named(model, args, kwargs),
                args,
                kwargs,
                dynamic_shapes=dims,
                strict=False,
            )
    except Exception as e:  # torch.export raises many kinds; the cause stays attached
        raise CaptureError(why_not(model, *given, e)) from e
    return program


def _refuse_packed(model: nn.Module) -> None:
    """Eager quantisation packs weights into objects that `torch.export` cannot trace."""
    for name, module in model.named_modules():
        if type(module).__module__.startswith("torch.ao.nn.quantized"):
            raise CaptureError(
                f"{name or type(model).__name__} is quantised already ({type(module).__name__}), and its packed "
                "weights cannot be traced. Prune the float model and quantise what comes out: export(..., int8=...)."
            )


def export_again(
    gm: GraphModule,
    original: ExportedProgram,
    tokens: int,
    extra: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> ExportedProgram:
    """A rewritten graph as an exported program, with all metadata and the signature recomputed.

    It takes every length that the original takes, down to one row of one token: the guards and bounds found by a new
    export know less about floor divisions and would refuse some.

    Args:
        tokens: length of a row to trace with, at least, as far as the model takes it (`PrunePlan.tokens_to_trace`).
        extra: values of keyword inputs that the graph has and the original has not, see `graph.extra_input`.
    """
    if original.example_inputs is None:
        raise CaptureError("The exported program carries no example inputs; export it again with torch.export.")
    args, kwargs = _lengthened(original, tokens)
    for node in gm.graph.nodes:
        if MARK in node.meta:  # what torch.export keeps, in files too
            node.meta["custom"] = {**(node.meta.get("custom") or {}), MARK: "inserted"}
    with as_sizes(gm):
        program = without_checks(export_module(gm, tuple(args), dict(kwargs), extra=extra))
    program._guards_code = []
    program.graph_module.meta[TOKENS_TO_TRACE] = tokens
    before, after = (_user_inputs(p) for p in (original, program))
    for old, new in zip(before, after[: len(before)], strict=True):
        for bound, size in zip(old.shape, new.shape, strict=True):
            if is_symbolic(size) and is_symbolic(bound):
                program.range_constraints[size.node.expr] = original.range_constraints[bound.node.expr]
    return program


def _lengthened(program: ExportedProgram, tokens: int) -> Any:
    """The example inputs of a program with the tokens of each row repeated up to a length."""
    leaves, spec = torch.utils._pytree.tree_flatten(program.example_inputs)
    tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    for i, fake in zip(tensors, _user_inputs(program), strict=True):
        x, size = leaves[i], fake.shape[1] if fake.dim() > 1 else None
        if not is_symbolic(size):
            continue
        upper = program.range_constraints[size.node.expr].upper
        wanted = tokens if tokens <= upper else int(upper)
        if x.shape[1] < wanted:
            leaves[i] = x.index_select(1, torch.arange(wanted, device=x.device) % x.shape[1])
    return torch.utils._pytree.tree_unflatten(leaves, spec)


def _user_inputs(program: ExportedProgram) -> list[torch.Tensor]:
    names = set(program.graph_signature.user_inputs)
    values = [fake_value(n) for n in program.graph.find_nodes(op="placeholder") if n.name in names]
    return [v for v in values if isinstance(v, torch.Tensor)]


@contextlib.contextmanager
def quiet_export() -> Iterator[None]:
    """Hide what torch says beside its errors, which go on as ours.

    That is a hint about specialised sizes, which are resolved later (graph/lengths.py); a pointer to its documentation;
    and, printed rather than logged, the whole graph as far as it came.
    """
    from torch.export import _trace as trace  # which loads Dynamo

    logs = [logging.getLogger(name) for name in ("torch.fx.experimental.symbolic_shapes", trace.__name__)]
    levels = [log.level for log in logs]
    for log, level in zip(logs, (logging.ERROR, logging.CRITICAL), strict=True):
        log.setLevel(level)
    names = vars(trace)
    names["print"] = lambda *_, **__: None  # before the builtin, in that module alone
    try:
        yield
    finally:
        names.pop("print", None)
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


def capture_dynamo(gm: GraphModule) -> GraphModule:
    """Dynamo's graph of torch functions and methods as an ATen graph with the same placeholders.

    Every new node keeps the ``nn_module_stack`` and stack trace of the call it came from; placeholders keep all their
    metadata, so that a lifted parameter still says what it is.
    """
    placeholders = list(gm.graph.find_nodes(op="placeholder"))
    given = [fake_value(n) for n in placeholders]
    mode = next((v.fake_mode for v in given if hasattr(v, "fake_mode")), None)
    if mode is None:
        raise CaptureError("The graph carries no fake tensors (meta['example_value']); pass the graph Dynamo gave you.")
    with mode:
        values = [_settled(v) for v in given]
    with mode, torch.fx.traceback.preserve_node_meta():
        traced = make_fx(fx.Interpreter(gm).run, tracing_mode="real", pre_dispatch=True, _allow_non_fake_inputs=True)(
            *values
        )
    for old, value, new in zip(placeholders, values, traced.graph.find_nodes(op="placeholder"), strict=True):
        new.meta.update({k: v for k, v in old.meta.items() if k != "example_value"})
        new.meta["val"] = value
        new.name = old.name
    return _tidy(traced)


def _settled(value: Any) -> Any:
    """``value`` with plain integers for the sizes that Dynamo took as open at first and then had to fix.

    So it does where one input's length is open, seen to differ between calls, and another's, which is new in this call,
    is not: the two must be equal. Such a size is a SymInt still, but the graph holds at one length only.
    """
    if isinstance(value, torch.SymInt):
        number = value.node.maybe_as_int()
        return value if number is None else number
    if not isinstance(value, torch.Tensor):
        return value
    layout = [*value.shape, *value.stride()]
    settled = [_settled(n) for n in layout]
    if all(a is b for a, b in zip(layout, settled, strict=True)):
        return value
    shape, stride = settled[: value.dim()], settled[value.dim() :]
    return torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device, requires_grad=value.requires_grad)


def ensure_aten(gm: GraphModule) -> GraphModule:
    """``gm`` itself where it is ATen already, else its ATen form; never edits the caller's graph."""
    calls = [n for n in gm.graph.nodes if n.op in ("call_function", "call_method", "call_module")]
    if any(n.op != "call_function" or not _is_aten(n) for n in calls if n.target != "_guards_fn"):
        return capture_dynamo(gm)
    if any(fake_value(n) is None for n in gm.graph.find_nodes(op="placeholder")):
        raise CaptureError(
            "The graph has no metadata on its placeholders: pass a graph traced by Dynamo or torch.export."
        )
    return _tidy(copy_with_nodes(gm)[0])


def _tidy(gm: GraphModule) -> GraphModule:
    """Guards, regions and in-place operators out of a graph."""
    _drop_guards(gm)
    _drop_dtype_checks(gm)
    _inline_regions(gm)
    _drop_regions(gm)
    for node in gm.graph.nodes:
        node.target = _SYNONYMS.get(node.target, node.target)
    make_functional(gm)
    name_sinks(gm)
    return gm


def _drop_dtype_checks(gm: GraphModule) -> None:
    """What torch.export notes beside a cast, the dtype that it met, does not hold under autocast; the cast does."""
    check = torch.ops.aten._assert_tensor_metadata.default
    for node in list(gm.graph.find_nodes(op="call_function", target=check)):
        gm.graph.erase_node(node)


def copy_with_nodes(gm: GraphModule) -> tuple[GraphModule, dict[Node, Node]]:
    """A copy of the graph over the same parameters, with its metadata, and the copy of each node but the output."""
    graph = fx.Graph()
    env: dict[Node, Node] = {}
    output = graph.graph_copy(gm.graph, env)
    graph.output(output)
    for old, new in env.items():
        new.meta = dict(old.meta)
    graph._codegen = gm.graph._codegen
    copy = GraphModule(gm, graph)
    copy.meta = dict(gm.meta)
    return copy, env


def _is_aten(node: Node) -> bool:
    target = node.target
    if isinstance(target, (torch._ops.OpOverload, torch._ops.HigherOrderOperator)):
        return True
    if getattr(target, "__name__", "") in _DIALECT_NAMES:
        return True
    # so does other arithmetic on symbolic numbers
    return getattr(target, "__module__", "") in ("_operator", "math", "torch") and not isinstance(
        fake_value(node), torch.Tensor
    )


def _drop_guards(gm: GraphModule) -> None:
    """Remove the export's input check: it pins the very lengths that a pass changes."""
    for node in list(gm.graph.nodes):
        if node.op == "call_module" and node.target == "_guards_fn":
            gm.graph.erase_node(node)
    if hasattr(gm, "_guards_fn"):
        del gm._guards_fn


def _inline_regions(gm: GraphModule) -> None:
    """``wrap_with_set_grad_enabled(flag, body, *xs)`` and disabled autocast regions -> the body's own nodes.

    Both only say how to *trace* what is inside; the casts that matter are explicit in the body.
    """
    names = ("wrap_with_set_grad_enabled", "wrap_with_autocast")
    wrappers = {getattr(torch.ops.higher_order, name, None) for name in names}
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or node.target not in wrappers:
            continue
        at = next(i for i, a in enumerate(node.args) if isinstance(a, Node) and a.op == "get_attr")
        if at > 1 and node.args[2] is True:  # autocast that is switched on changes what the body computes
            continue
        body_attr = node.args[at]
        body = gm.get_submodule(str(body_attr.target))
        assert isinstance(body, GraphModule)
        env: dict[Node, Any] = dict(zip(body.graph.find_nodes(op="placeholder"), node.args[at + 1 :], strict=True))
        with gm.graph.inserting_before(node):
            for inner in body.graph.nodes:
                if inner.op == "placeholder":
                    continue
                if inner.op == "output":
                    results = fx.map_arg(inner.args[0], env.__getitem__)
                    break
                env[inner] = gm.graph.node_copy(inner, env.__getitem__)
                if inner.op == "get_attr":
                    env[inner].target = f"{body_attr.target}.{inner.target}"
        for user in list(node.users):
            user.replace_all_uses_with(results[user.args[1]])
            gm.graph.erase_node(user)
        gm.graph.erase_node(node)
        if not body_attr.users:
            gm.graph.erase_node(body_attr)
    gm.recompile()


def _drop_regions(gm: GraphModule) -> None:
    """Remove grad-mode switches and *disabled* autocast brackets that tracing left in a flat graph."""
    opened: dict[Node, bool] = {}
    for node in list(gm.graph.nodes):
        name = getattr(node.target, "__name__", "")
        if name == "_set_grad_enabled":
            gm.graph.erase_node(node)
        elif name == "_enter_autocast":
            opened[node] = bool(node.args[2]) if len(node.args) > 2 else True
        elif name == "_exit_autocast" and not opened[node.args[0]]:
            gm.graph.erase_node(node)
    for node, enabled in opened.items():
        if not enabled:
            gm.graph.erase_node(node)
    gm.recompile()


def _roomy(inputs: Any) -> Any:
    """Repeat rows and tokens until there are at least 2 and 3: torch.export takes sizes 0 and 1 for constants. The
    second axis of images, and of keys and values, counts channels and heads, which stay."""

    def widen(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or x.dim() == 0:
            return x
        repeats = [1] * x.dim()
        if x.shape[0] < 2:
            repeats[0] = 2
        if x.dim() > 1 and x.shape[1] < 3 and not (x.dim() == 4 and x.is_floating_point()):
            repeats[1] = 3
        return x.repeat(repeats) if max(repeats) > 1 else x

    return torch.utils._pytree.tree_map(widen, inputs)


def _open_dims(args: tuple[Any, ...], kwargs: dict[str, Any], axes: int, closed: Iterable[str] = ()) -> Any:
    """``Dim.AUTO`` for the first axes of every input."""

    def dims(x: Any) -> Any:
        return dict.fromkeys(range(min(x.dim(), axes)), Dim.AUTO) if isinstance(x, torch.Tensor) else None

    named = {k: None if k in closed else dims(v) for k, v in kwargs.items()}
    if args and kwargs:
        return (tuple(map(dims, args)), named)
    return tuple(map(dims, args)) if args else named


class _Named(nn.Module):
    """A module that takes its inputs as ``**kwargs`` (adapters do), with their names in the signature of ``forward``.

    torch.export reads names there and cannot open the sizes of what hides behind ``**``.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        super().__init__()
        self.model = model
        parameters = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in names]

        def forward(**kwargs: Any) -> Any:
            return self.model(**kwargs)

        forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # read by inspect
        self.forward = forward


def _named(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> nn.Module:
    """``model``, or `_Named` where some of the given keywords are not in its signature."""
    if args or isinstance(model, GraphModule):
        return model
    parameters = inspect.signature(model.forward).parameters
    return model if all(name in parameters for name in kwargs) else _Named(model, kwargs)
