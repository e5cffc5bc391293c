"""Post-training quantisation to int8, of OpenVINO models by nncf and of ONNX files by ONNX Runtime's own quantiser.

What chooses tokens stays in floating point: scores, trained predictors and the selection. They are found by where they
lead, as no runtime keeps the names of the nodes that were inserted: a node belongs to the choice if every path from it
to an output goes through a sort of tokens (both runtimes call it TopK).
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from prunepass.backends._programs import Shapes
from prunepass.backends._tensors import to_numpy
from prunepass.errors import ExportError, MissingExtraError, OptionError

if TYPE_CHECKING:
    from torch.export import ExportedProgram

__all__ = ["arrays", "batches_of", "choosing", "quantize_onnx", "quantize_openvino", "require"]

N = TypeVar("N", bound=Hashable)

#: what ONNX Runtime has int8 kernels for that compute faster than their float ones
_ONNX_KINDS = ("MatMul", "Gemm")
_HINT = "Give some tens of inputs like those the model will see: [{'input_ids': ..., 'attention_mask': ...}, ...]."


def require() -> Any:
    """The package ``nncf``, or `MissingExtraError`."""
    try:
        import nncf
    except ImportError:
        raise MissingExtraError("nncf", "int8", "int8 for OpenVINO") from None
    return nncf


def batches_of(int8: Any) -> list[Mapping[str, Any]]:
    """The calibration batches that a user gave, as a list with at least one in it.

    Raises:
        OptionError: there are none, or they are no mappings from input names to tensors.
    """
    if int8 is True:
        raise OptionError(f"int8 for OpenVINO needs calibration batches. {_HINT}")
    if isinstance(int8, (Mapping, str)) or not isinstance(int8, Iterable):
        raise OptionError(f"int8 takes a list of calibration batches, not {type(int8).__name__}. {_HINT}")
    batches = list(int8)
    if not batches:
        raise OptionError(f"int8 was given no calibration batches. {_HINT}")
    for i, batch in enumerate(batches):
        if not isinstance(batch, Mapping):
            raise OptionError(f"Calibration batch {i} is no mapping but {type(batch).__name__}. {_HINT}")
    return batches


def arrays(
    batches: Sequence[Mapping[str, Any]], names: Sequence[str], program: ExportedProgram
) -> list[dict[str, Any]]:
    """The batches as NumPy arrays of the model's inputs. Arguments that are no tensors are left out.

    Args:
        names: the program's inputs, in order.

    Raises:
        OptionError: an input is missing or unknown, or has a size that the program does not take.
    """
    shapes = Shapes.of(program)
    found = []
    for i, batch in enumerate(batches):
        tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
        if set(tensors) != set(names):
            raise OptionError(
                f"Calibration batch {i} has {', '.join(sorted(tensors)) or 'no tensors'}, but the exported model takes "
                f"{', '.join(names)}. Give those, or export with example_inputs of the names you have."
            )
        for name, dims in zip(names, shapes.inputs, strict=True):
            _check_size(f"Calibration batch {i}: {name}", dims, tensors[name].shape, shapes)
        found.append({name: to_numpy(tensors[name]) for name in names})
    return found


def _check_size(what: str, dims: Sequence[Any], shape: Sequence[int], shapes: Shapes) -> None:
    largest = [d if isinstance(d, int) else shapes.ranges.get(d, (0.0, math.inf))[1] for d in dims]
    fits = len(dims) == len(shape) and all(
        size == d if isinstance(d, int) else 0 < size <= high
        for d, high, size in zip(dims, largest, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(str(d) if isinstance(d, int) else f"1 to {h:g}" for d, h in zip(dims, largest, strict=True))
        raise OptionError(f"{what} is {list(shape)}, but the exported model takes [{wanted}].")


def choosing(nodes: Sequence[N], consumers: Callable[[N], Iterable[N]], sorts: Callable[[N], bool]) -> set[N]:
    """The nodes all of whose paths onward go through a sort.

    Args:
        nodes: in topological order; every consumer is among them.
        consumers: what reads a node's results; nothing reads an output.
    """
    found: set[N] = set()
    for node in reversed(nodes):
        readers = list(consumers(node))
        if readers and all(sorts(reader) or reader in found for reader in readers):
            found.add(node)
    return found


def quantize_openvino(model: Any, data: Sequence[Mapping[str, Any]]) -> Any:
    """A copy of an ``openvino.Model`` whose matrix products run in int8, with ranges measured on ``data``.

    Ranges lie around zero. nncf's default for transformers gives activations ranges with a zero point, which a product
    then has to take off again: BERT-base of 512 tokens takes 4 % longer so, pruned to a half or not, and MiniLM's
    embeddings come no nearer to those of float32 (mean cosine 0.994 in both).

    Args:
        model: as by ``openvino.convert``.
        data: arrays by input name, one mapping a call.

    Raises:
        MissingExtraError: nncf is not installed.
        ExportError: nncf cannot quantise the model.
    """
    nncf = require()
    by_name = {op.get_friendly_name(): op for op in model.get_ordered_ops()}

    def consumers(name: str) -> Iterator[str]:
        for port in by_name[name].outputs():
            for reader in port.get_target_inputs():
                yield reader.get_node().get_friendly_name()

    chosen = choosing(list(by_name), consumers, lambda name: by_name[name].get_type_name() == "TopK")
    ignored = [name for name in by_name if name in chosen and by_name[name].get_type_name() != "Constant"]
    try:
        with _quiet_nncf():
            return nncf.quantize(
                model,
                nncf.Dataset(list(data)),
                model_type=nncf.ModelType.TRANSFORMER,
                preset=nncf.QuantizationPreset.PERFORMANCE,
                subset_size=len(data),
                ignored_scope=nncf.IgnoredScope(names=ignored),
            )
    except Exception as e:  # nncf raises many kinds; the cause stays attached
        raise ExportError(f"nncf could not quantise the model: {type(e).__name__}: {e}") from e


@contextlib.contextmanager
def _quiet_nncf() -> Iterator[None]:
    """nncf draws progress bars on stdout, where scripts expect their own output."""
    log = logging.getLogger("nncf")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        log.setLevel(level)


def quantize_onnx(source: Path, target: Path, *, external_data: bool = False) -> None:
    """Write an int8 copy of an ONNX file: weights per channel, activations with ranges taken anew at every call.

    Measured against ranges that are fixed by calibration, this is both faster and nearer to the float model: a few
    channels of a transformer's activations are so large that one fixed range leaves the others few steps.

    Args:
        external_data: keep weights in a file of their own (models of more than 2 GB).

    Raises:
        MissingExtraError: onnx or onnxruntime is not installed.
        ExportError: the quantiser cannot take the model.
    """
    from prunepass.backends import onnxruntime as runtime

    onnx, quantization = runtime.require("onnx"), runtime.require("onnxruntime.quantization")
    graph = onnx.load(str(source), load_external_data=False).graph
    try:
        with _quiet_root():
            quantization.quantize_dynamic(
                source,
                target,
                op_types_to_quantize=list(_ONNX_KINDS),
                nodes_to_exclude=sorted(_choosing_onnx(graph)),
                per_channel=True,
                weight_type=quantization.QuantType.QInt8,
                use_external_data_format=external_data,
            )
    except Exception as e:  # the quantiser raises many kinds; the cause stays attached
        raise ExportError(f"ONNX Runtime could not quantise the model: {type(e).__name__}: {e}") from e


def _choosing_onnx(graph: Any) -> set[str]:
    kinds = {node.name: node.op_type for node in graph.node}
    readers: dict[str, list[str]] = defaultdict(list)
    for node in graph.node:
        for value in node.input:
            readers[value].append(node.name)
    for value in graph.output:
        readers[value.name].append("")  # an output is read by the caller, who sorts nothing
    results = {node.name: list(node.output) for node in graph.node}
    return choosing(
        list(kinds),
        lambda name: (reader for value in results[name] for reader in readers[value]),
        lambda name: kinds.get(name) == "TopK",
    )


@contextlib.contextmanager
def _quiet_root() -> Iterator[None]:
    """The quantiser recommends a preparation on the root logger that the exporter has done already."""

    def relevant(record: logging.LogRecord) -> bool:
        return "pre-processing before quantization" not in record.getMessage()

    root = logging.getLogger()
    root.addFilter(relevant)
    try:
        yield
    finally:
        root.removeFilter(relevant)
