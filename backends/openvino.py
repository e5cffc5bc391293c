"""Target ``openvino``: Intel's runtime, by way of `torch.export` and ``openvino.convert_model``.

torch.compile's own ``openvino`` backend is not used: it runs eager, or crashes, in several of its modes. Attention
stays whole until OpenVINO's own passes see it, so that they find it.

Precision is the runtime's default: bfloat16 where the CPU has matrix units for it. For float32 pass
``config={"INFERENCE_PRECISION_HINT": "f32"}``.
"""

from __future__ import annotations

import functools
import logging
import math
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from prunepass.backends import FusionCounts
from prunepass.backends._offline import OfflineGraph, refuse_dtypes
from prunepass.backends._openvino_attention import add_masks, zero_where_nothing_is_seen
from prunepass.backends._openvino_core import core, require
from prunepass.backends._openvino_forms import extensions, use_own_forms
from prunepass.backends._openvino_gates import divides_by_zero, keep_apart
from prunepass.backends._openvino_numbers import as_pytorch_counts
from prunepass.backends._openvino_ops import spell_out
from prunepass.backends._options import check_mapping, unknown
from prunepass.backends._plain import outputs_apart
from prunepass.backends._programs import Session, Shapes, output_dtypes
from prunepass.backends._stored import Files, Notes
from prunepass.backends._tensors import from_numpy, to_numpy
from prunepass.errors import OptionError, PruneError
from prunepass.graph.inputs import fake_value

if TYPE_CHECKING:
    from torch.export import ExportedProgram

__all__ = ["UNCHECKED_LOOKUPS", "convert", "fusion_counts", "lower", "require"]

logger = logging.getLogger(__name__)

#: an index outside of a table gives other values, and no error
UNCHECKED_LOOKUPS = True


def lower(
    graph_module: GraphModule, example_inputs: Sequence[Any], *, config: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """Compile for OpenVINO's CPU (or ``config["DEVICE"]``) with the weights as constants.

    Args:
        config: properties for ``compile_model``, and ``DEVICE`` (default "CPU").

    Raises:
        MissingExtraError: OpenVINO is not installed.
        OptionError: the runtime does not know a property.
        PruneError: the graph cannot be exported or converted.
    """
    require()
    settings = check_mapping(config, "openvino")
    _check_properties(settings)
    device, properties = _split(settings)
    make = functools.partial(_converted, apart=divides_by_zero(core(), device, properties))
    build = functools.partial(_session, make=make, settings=settings)
    files = Files(
        save=functools.partial(_save, make=make, settings=settings),
        load=functools.partial(_load, settings=settings),
        packages=("openvino",),
        settings={**settings, "gates apart": make.keywords["apart"]},
    )
    return OfflineGraph(graph_module, example_inputs, build, "openvino", files)


def convert(program: ExportedProgram) -> Any:
    """An ``openvino.Model`` of an exported program: open dimensions with their bounds, inputs by their names.

    The model's constants share the program's memory: keep the program alive as long as the model.

    Raises:
        PruneError: an operator has no OpenVINO counterpart, or the program computes in float64.
    """
    ov = require()
    refuse_dtypes(program, {torch.float64}, "OpenVINO's CPU plugin would compute it in float32")
    shapes = Shapes.of(program)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's own, on its way through a program
            model = ov.convert_model(_decoder(program), extension=extensions())
    except Exception as e:  # the converter raises many kinds; the cause stays attached
        raise PruneError(f"OpenVINO could not convert the graph: {type(e).__name__}: {e}") from e
    model = _with_first_input(model, program)
    # conversion forgets sizes and bounds, and both let the plugin plan better
    model.reshape({port: _partial_shape(dims, shapes) for port, dims in zip(model.inputs, shapes.inputs, strict=True)})
    return model


def _with_first_input(model: Any, program: ExportedProgram) -> Any:
    """The model with all inputs of the program: OpenVINO (2026.4) drops the first one where nothing reads it, which in
    TorchScript would be the module itself. Others that nothing reads stay."""
    ov = require()
    wanted = [n for n in program.graph.find_nodes(op="placeholder") if n.name in program.graph_signature.user_inputs]
    if len(model.inputs) == len(wanted):
        return model
    from openvino.frontend.pytorch.utils import pt_to_ov_type_map

    first = fake_value(wanted[0])
    kind = pt_to_ov_type_map[str(first.dtype)]
    unread = ov.op.Parameter(kind, ov.PartialShape([-1] * first.dim()))
    unread.set_friendly_name(wanted[0].name)
    unread.output(0).get_tensor().set_names({wanted[0].name})
    return ov.Model(
        model.get_results(), model.get_sinks(), [unread, *model.get_parameters()], model.get_friendly_name()
    )


def _decoder(program: ExportedProgram) -> Any:
    """What ``openvino.convert_model`` would make of the program itself, by its own table of decompositions.

    It decomposes by tracing. Done before sizes are spelled out, that takes a fifth of the time: in arithmetic that the
    converter knows they are long formulas, which tracing compares again and again.
    """
    from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder
    from openvino.frontend.pytorch.torchdynamo.export_decompositions import ops_to_not_decompose

    table = torch.export.default_decompositions()
    for op in ops_to_not_decompose():
        if op in table:
            table.pop(op)
    program = program.run_decompositions(table)
    as_pytorch_counts(program)
    spell_out(program)
    use_own_forms(program)
    zero_where_nothing_is_seen(program)  # masks are in their smallest form by now
    add_masks(program)
    gm = program.module(check_guards=False)
    assert isinstance(gm, GraphModule)
    outputs_apart(gm)
    return TorchFXPythonDecoder(gm, dynamic_shapes=True)


def fusion_counts(program: ExportedProgram) -> FusionCounts:
    """Count in the graph that the CPU plugin executes: attention is one tokenised subgraph (or one SDPA node), layer
    norm one MVN (or RMS) node; GELU has no node of its own when it is fused, so its name is looked for."""
    compiled = _compile(convert(program), {})
    nodes = [_executed(op) for op in compiled.get_runtime_model().get_ordered_ops()]
    return FusionCounts(
        attention=sum(kind in ("Subgraph", "ScaledDotProductAttention") and "Softmax" in of for kind, of in nodes),
        layer_norm=sum(kind in ("MVN", "RMS", "RMSNorm") for kind, _ in nodes),
        gelu=sum("/Gelu" in of for _, of in nodes),
        counts="nodes of the graph that OpenVINO's CPU plugin executes",
    )


def _executed(op: Any) -> tuple[str, str]:
    """What kind of node the plugin runs, and the names of the model's operators that it stands for."""
    info = op.get_rt_info()
    return str(info["layerType"].value), f"{op.get_friendly_name()},{info['originalLayersNames'].value}"


def _partial_shape(dims: Sequence[Any], shapes: Shapes) -> Any:
    ov = require()
    return ov.PartialShape([ov.Dimension(*_bounds(dim, shapes)) for dim in dims])


def _bounds(dim: Any, shapes: Shapes) -> tuple[int, int]:
    """Smallest and largest size, -1 for no limit. A program exported at 2 or more runs at 1 as well."""
    if isinstance(dim, int):
        return dim, dim
    low, high = shapes.ranges.get(dim, (0.0, math.inf))
    return (1 if low <= 2 else int(low)), (int(high) if high < 2**31 else -1)


def _check_properties(settings: Mapping[str, Any]) -> None:
    if settings.get("DEVICE", "CPU") != "CPU":
        return  # other devices check for themselves when they compile
    known = {*core().get_property("CPU", "SUPPORTED_PROPERTIES"), "DEVICE", "CACHE_DIR", "CONFIG_FILE"}
    for key in settings:
        if key not in known:
            raise OptionError(unknown(key, "setting of target 'openvino'", known))


def _compile(model: Any, settings: Mapping[str, Any]) -> Any:
    """A compiled model of an ``openvino.Model`` or, where ``model`` is bytes, of what another one has exported."""
    device, properties = _split(settings)
    start = core().import_model if isinstance(model, bytes) else core().compile_model
    try:
        return start(model, device, properties)
    except RuntimeError as e:
        reason = str(e).strip().splitlines()[-1]
        kind = OptionError if "Wrong value" in reason or "Unsupported property" in reason else PruneError
        raise kind(f"OpenVINO could not compile the graph for {device}: {reason}") from e


def _split(settings: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The device, and its properties."""
    properties = dict(settings)
    return properties.pop("DEVICE", "CPU"), properties


def _converted(program: ExportedProgram, *, apart: bool) -> Any:
    model = convert(program)
    if apart:
        keep_apart(model)
    return model


def _session(
    program: ExportedProgram, *, make: Callable[[ExportedProgram], Any], settings: Mapping[str, Any]
) -> Session:
    return _Session(_compile(make(program), settings), output_dtypes(program), program)


#: the compiled model; a device that exports none leaves its IR instead
_BLOB, _IR = "compiled.blob", "openvino_model.xml"


def _save(
    program: ExportedProgram, folder: Path, *, make: Callable[[ExportedProgram], Any], settings: Mapping[str, Any]
) -> Session:
    model = make(program)
    compiled = _compile(model, settings)
    try:
        blob = compiled.export_model()
    except RuntimeError as e:
        logger.debug("this device exports no compiled model: %s", e)
        try:
            require().save_model(model, folder / _IR, compress_to_fp16=False)
        except RuntimeError as refused:
            raise OSError(str(refused)) from refused  # a full disk, of which the cache takes care
    else:
        (folder / _BLOB).write_bytes(blob.getvalue())
    return _Session(compiled, output_dtypes(program), program)


def _load(folder: Path, notes: Notes, *, settings: Mapping[str, Any]) -> Session:
    blob = folder / _BLOB
    model = blob.read_bytes() if blob.is_file() else core().read_model(folder / _IR)
    return _Session(_compile(model, settings), notes.dtypes)


class _Session:
    """A compiled model. Each call takes an idle infer request, or makes one; results are copied out of it.

    Args:
        owner: has the memory of the constants; kept alive.
    """

    def __init__(self, compiled: Any, dtypes: Sequence[torch.dtype], owner: Any = None) -> None:
        self._owner = owner
        self._compiled = compiled
        self._dtypes = dtypes
        self._idle: deque[Any] = deque()

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        try:
            request = self._idle.pop()
        except IndexError:
            request = self._compiled.create_infer_request()
        try:
            inputs = [_input(tensor) for tensor in tensors]
            results = request.infer(inputs, share_inputs=True, share_outputs=False)
            arrays = [results[i] for i in range(len(self._dtypes))]
            return [from_numpy(a, dtype) for a, dtype in zip(arrays, self._dtypes, strict=True)]
        finally:
            self._idle.append(request)


def _input(tensor: Tensor) -> Any:
    array = to_numpy(tensor)
    if tensor.dtype != torch.bfloat16:
        return array
    ov = require()
    return ov.Tensor(array.view("float16"), list(tensor.shape), ov.Type.bf16)
