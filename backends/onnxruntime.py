"""Target ``onnxruntime``: by way of `torch.export` and PyTorch's ONNX exporter, on the CPU provider.

Opset 23 is asked for because it has an ``Attention`` operator: attention reaches the runtime whole, which measured
1.0x to 1.4x faster than its pieces on the CPU.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node

from prunepass.backends import FusionCounts
from prunepass.backends._offline import OfflineGraph, refuse_dtypes
from prunepass.backends._onnx_ops import as_pytorch_computes
from prunepass.backends._options import check_mapping, unknown
from prunepass.backends._programs import Session, output_dtypes
from prunepass.backends._stored import Files, Notes
from prunepass.backends._tensors import from_numpy, to_numpy
from prunepass.errors import MissingExtraError, OptionError, PruneError
from prunepass.graph.capture import copy_with_nodes
from prunepass.graph.inputs import fake_value
from prunepass.graph.masks import put, same
from prunepass.graph.ops import SDPA

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.fx import GraphModule

__all__ = [
    "INLINE_BYTES",
    "OPSET",
    "convert",
    "fusion_counts",
    "give_default",
    "lower",
    "name_axes",
    "refuse_bfloat16",
    "require",
    "weight_bytes",
]

OPSET = 23
#: a protobuf message holds at most 2 GiB; larger weights go to a file of their own
INLINE_BYTES = 1 << 30


def lower(
    graph_module: GraphModule, example_inputs: Sequence[Any], *, config: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """Compile for ONNX Runtime's CPU provider with the weights as constants.

    Args:
        config: attributes of ``onnxruntime.SessionOptions``, such as ``{"intra_op_num_threads": 2}``.

    Raises:
        MissingExtraError: onnxruntime, onnx or onnxscript is not installed.
        OptionError: ``SessionOptions`` has no such attribute, or not with this value.
        PruneError: the graph cannot be exported or converted, or is bfloat16 (the provider has no kernels for it).
    """
    settings = check_mapping(config, "onnxruntime")
    _options(settings)  # complains now rather than at the first call
    build = functools.partial(_session, settings=settings)
    files = Files(
        save=functools.partial(_save, settings=settings),
        load=functools.partial(_load, settings=settings),
        packages=("onnxruntime", "onnx", "onnxscript"),
        settings=settings,
    )
    return OfflineGraph(graph_module, example_inputs, build, "onnxruntime", files)


def convert(
    program: ExportedProgram, *, input_names: Sequence[str] | None = None, output_names: Sequence[str] | None = None
) -> Any:
    """A ``torch.onnx.ONNXProgram`` with open dimensions kept.

    Raises:
        MissingExtraError: onnx or onnxscript is not installed.
        PruneError: an operator has no ONNX counterpart.
    """
    optimizer = require("onnxscript.optimizer")
    try:
        graph_module, _ = copy_with_nodes(program.graph_module)  # the caller's own may go to another runtime next
        program = program._update(graph_module, program.graph_signature)
        as_pytorch_computes(program)
        _widen_masks(program)
        with _quiet():
            converted = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                verbose=False,
                input_names=input_names,
                output_names=output_names,
                custom_translation_table=_translations(),
                optimize=False,
            )
            if converted is not None:
                # not the exporter's own optimize: it makes a RotaryEmbedding that fails for more than one row
                optimizer.optimize_ir(converted.model)
    except Exception as e:  # the exporter raises many kinds; the cause stays attached
        raise PruneError(f"The graph could not be converted to ONNX: {type(e).__name__}: {e}") from e
    if converted is None:
        raise PruneError("PyTorch's ONNX exporter returned no model.")
    return converted


_SYMBOL = re.compile(r"\b[su]\d+\b")


def name_axes(model: Any) -> None:
    """The open sizes of an ``onnx_ir.Model`` by their meaning: "batch" and "length" in place of "s18" and "s41"."""
    ir = require("onnx_ir")
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        for size, name in zip(value.shape or (), ("batch", "length"), strict=False):
            if isinstance(size, ir.SymbolicDim) and size.value is not None:
                names.setdefault(size.value, name)
    inner = (value for node in model.graph.all_nodes() for value in node.outputs)
    for value in (*model.graph.inputs, *inner):
        if value.shape is None:
            continue
        texts = [size.value if isinstance(size, ir.SymbolicDim) else size for size in value.shape]
        named = [_SYMBOL.sub(lambda m: names.get(m[0], m[0]), t) if isinstance(t, str) else t for t in texts]
        if named != texts:
            value.shape = ir.Shape(named)


def give_default(model: Any, name: str, values: Sequence[int]) -> None:
    """Let an input of an ``onnx_ir.Model`` be left out: an input that is an initializer, too, is optional."""
    ir = require("onnx_ir")
    value = next(one for one in model.graph.inputs if one.name == name)
    value.const_value = ir.tensor(list(values), dtype=ir.DataType.INT64, name=name)
    model.graph.register_initializer(value)


def _widen_masks(program: ExportedProgram) -> None:
    """A mask that is the same for all queries -> one with a row for each, which the runtime's ``Attention`` insists on.
    Heads and rows it spreads over by itself. Done in place, as the program computes the same afterwards."""
    wide: dict[tuple[Node, Any], Node] = {}
    for node in program.graph.find_nodes(op="call_function", target=SDPA):
        query: Any = node.args[0]
        mask = node.args[3] if len(node.args) > 3 else None
        if not isinstance(mask, Node) or not same(fake_value(mask).shape[-2], 1):
            continue
        size = fake_value(query).shape[-2]
        if same(size, 1):
            continue
        key = (mask, size.node.expr if isinstance(size, torch.SymInt) else size)
        if key not in wide:
            rows = put(node, size, torch.ops.aten.sym_size.int, query, -2) if isinstance(size, torch.SymInt) else size
            shape = [*fake_value(mask).shape[:-2], size, fake_value(mask).shape[-1]]
            value = fake_value(mask).expand(shape)
            wide[key] = put(node, value, torch.ops.aten.expand.default, mask, [-1] * (len(shape) - 2) + [rows, -1])
        node.update_arg(3, wide[key])
    program.graph_module.recompile()


@functools.cache
def _translations() -> dict[Any, Callable[..., Any]]:
    """Operators that PyTorch's exporter does not know. TopK keeps the order of equal values, as a stable sort does."""
    from onnxscript import opset23 as op
    from onnxscript.onnx_types import TensorType

    def sort_stable(self: TensorType, *, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
        value: Any = self  # onnxscript's own types of its operators do not fit together
        axis: Any = op.Constant(value_ints=[dim])
        size = op.Gather(op.Shape(value), axis)
        return op.TopK(self, size, axis=dim, largest=int(descending), sorted=1)

    return {torch.ops.aten.sort.stable: sort_stable}


def fusion_counts(program: ExportedProgram) -> FusionCounts:
    """Count the nodes of the graph that ONNX Runtime has after all its optimisations."""
    onnx = require("onnx")
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder, "optimised.onnx"))
        # the highest level adds only layouts for this machine's CPU, and a warning that the file depends on it
        _start(program, {"optimized_model_filepath": file, "graph_optimization_level": "ORT_ENABLE_EXTENDED"})
        kinds = Counter(n.op_type for n in onnx.load(file, load_external_data=False).graph.node)
    return FusionCounts(
        attention=sum(v for k, v in kinds.items() if k.endswith("Attention")),
        layer_norm=sum(v for k, v in kinds.items() if k.endswith(("LayerNormalization", "RMSNormalization"))),
        gelu=sum(v for k, v in kinds.items() if k.endswith("Gelu")),
        counts="nodes of ONNX Runtime's optimised graph",
    )


def require(package: str) -> Any:
    """The package, or module, by name. Raises `MissingExtraError`."""
    from importlib import import_module

    try:
        return import_module(package)
    except ImportError:
        raise MissingExtraError(package.partition(".")[0], "onnx", "ONNX") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the exporter's notices about packages it does not need, and folds that its optimiser tries in vain."""
    logs = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


def _options(settings: Mapping[str, Any]) -> Any:
    ort = require("onnxruntime")
    options = ort.SessionOptions()
    known = [n for n in dir(options) if not n.startswith("_") and not callable(getattr(options, n))]
    for key, value in settings.items():
        if key not in known:
            raise OptionError(unknown(key, "setting of target 'onnxruntime'", known))
        if key == "graph_optimization_level" and isinstance(value, str):
            value = getattr(ort.GraphOptimizationLevel, value, value)
        try:
            setattr(options, key, value)
        except TypeError as e:
            raise OptionError(f"Setting {key!r} of target 'onnxruntime' cannot be {value!r}: {e}") from None
    return options


def _start(program: ExportedProgram, settings: Mapping[str, Any]) -> Any:
    """An ``InferenceSession`` of the program."""
    refuse_bfloat16(program)
    if weight_bytes(program) < INLINE_BYTES:
        return _open(convert(program).model_proto.SerializeToString(), settings)
    with tempfile.TemporaryDirectory() as folder:
        return _open(_write(program, Path(folder)), settings)


def refuse_bfloat16(program: ExportedProgram) -> None:
    """Raises `PruneError` where the program has inputs, weights or values in bfloat16."""
    refuse_dtypes(program, {torch.bfloat16}, "ONNX Runtime's CPU provider has no kernels for that", inside=True)


def _open(model: bytes | Path, settings: Mapping[str, Any]) -> Any:
    ort = require("onnxruntime")
    options = _options(settings)
    try:
        return ort.InferenceSession(model, sess_options=options, providers=["CPUExecutionProvider"])
    except Exception as e:  # its errors have no class in common; the cause stays attached
        reason = str(e).strip().splitlines()[0]
        if "NOT_IMPLEMENTED" in reason:
            raise PruneError(
                "ONNX Runtime's CPU provider has no kernel for an operator of the graph in its dtype (many have none "
                "in float64). Cast the model and its inputs first, for instance with model.float(), or choose another "
                f"target. Its own words: {reason}"
            ) from e
        raise PruneError(f"ONNX Runtime could not read the converted graph: {reason}") from e


def _write(program: ExportedProgram, folder: Path) -> Path:
    convert(program).save(folder / _FILE, external_data=weight_bytes(program) >= INLINE_BYTES)
    return folder / _FILE


_FILE = "model.onnx"


def _save(program: ExportedProgram, folder: Path, *, settings: Mapping[str, Any]) -> Session:
    refuse_bfloat16(program)
    session = _open(_write(program, folder), settings)
    return _calls(session, program.graph_signature.user_inputs, output_dtypes(program))


def _load(folder: Path, notes: Notes, *, settings: Mapping[str, Any]) -> Session:
    return _calls(_open(folder / _FILE, settings), notes.inputs, notes.dtypes)


def weight_bytes(program: ExportedProgram) -> int:
    """The size of the program's parameters, buffers and constants."""
    tensors = [*program.state_dict.values(), *program.constants.values()]
    return sum(t.nbytes for t in tensors if isinstance(t, Tensor))


def _session(program: ExportedProgram, *, settings: Mapping[str, Any]) -> Session:
    return _calls(_start(program, settings), program.graph_signature.user_inputs, output_dtypes(program))


def _calls(session: Any, inputs: Sequence[str], dtypes: Sequence[torch.dtype]) -> Session:
    """The session as a function of tensors in the order of ``inputs``; the exporter may have left some out."""
    names = [i.name for i in session.get_inputs()]
    position = {name: i for i, name in enumerate(inputs)}
    # the optimiser renames an input that is an output, too, as a window's length beside a cache is
    position |= {f"{name}_orig": i for i, name in enumerate(inputs)}

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        feeds = {name: to_numpy(tensors[position[name]]) for name in names}
        return [from_numpy(array, dtype) for array, dtype in zip(session.run(None, feeds), dtypes, strict=True)]

    return run
