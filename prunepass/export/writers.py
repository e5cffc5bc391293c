"""One writer a format: from an exported program of plain signature to the runtime's own files."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from prunepass.errors import ExportError, OptionError
from prunepass.plan.folders import writing
from prunepass.plan.levels import DEFAULT_LEVEL, LEVEL

if TYPE_CHECKING:
    from prunepass.export.programs import Exportable

__all__ = ["Int8", "Writer", "writer_for"]

Writer = Callable[["Exportable", Path], None]
#: False, True, or calibration batches: keyword arguments of the model
Int8 = bool | Iterable[Mapping[str, Any]]


def writer_for(to: str, *, compress_to_fp16: bool = False, int8: Int8 = False) -> Writer:
    """The function that writes format ``to`` into a folder. What is missing is reported here, before any work is done.

    Raises:
        OptionError: no such format, or an option that is not for it.
        MissingExtraError: the runtime's package is not installed, or nncf for int8 with OpenVINO.
    """
    from prunepass.backends._options import unknown

    writers: dict[str, Callable[[], Writer]] = {
        "openvino": lambda: _openvino_writer(compress_to_fp16, int8),
        "onnx": lambda: _onnx_writer(int8),
        "pt2": lambda: _write_pt2,
    }
    if to not in writers:
        raise OptionError(unknown(to, "export format", writers))
    if compress_to_fp16 and to != "openvino":
        raise OptionError(f"compress_to_fp16 is for to='openvino'; for {to!r} cast the model with model.half() first.")
    if int8 is not False and to == "pt2":
        raise OptionError("int8 is for to='openvino' and to='onnx'; a .pt2 program stays in the model's own precision.")
    return writers[to]()


def _openvino_writer(compress_to_fp16: bool, int8: Int8) -> Writer:
    from prunepass.backends import _int8
    from prunepass.backends import openvino as target
    from prunepass.backends._openvino_level import with_default
    from prunepass.backends._openvino_rows import open_batch, widen_masks
    from prunepass.backends._openvino_stateful import with_states

    target.require()
    batches = [] if int8 is False else _int8.batches_of(int8)
    if batches:
        _int8.require()

    def write(made: Exportable, folder: Path) -> None:
        data = _int8.arrays(_at_all_levels(batches, made), made.inputs, made.program)
        model = target.convert(made.program)  # its constants are the program's
        if made.levels is not None:
            with_default(model, LEVEL, DEFAULT_LEVEL)
        for ports, names in ((model.inputs, made.inputs), (model.outputs, made.outputs)):
            for port, name in zip(ports, names, strict=True):
                port.get_tensor().set_names({name, made.aliases.get(name, name)})
        if made.states:
            with_states(model, made.states, made.windows, made.limit)
        else:
            widen_masks(model, made.program, made.inputs)
            open_batch(model)
        if data:
            model = _int8.quantize_openvino(model, data)
        _save_openvino(model, folder / "openvino_model.xml", compress_to_fp16=compress_to_fp16)

    return write


def _onnx_writer(int8: Int8) -> Writer:
    from prunepass.backends import _int8
    from prunepass.backends import onnxruntime as target

    target.require("onnxscript")
    batches = []
    if int8 is not False:
        target.require("onnxruntime.quantization")
        batches = [] if int8 is True else _int8.batches_of(int8)

    def write(made: Exportable, folder: Path) -> None:
        target.refuse_bfloat16(made.program)
        _int8.arrays(_at_all_levels(batches, made), made.inputs, made.program)  # not needed, but checked
        converted = target.convert(made.program, input_names=made.inputs, output_names=made.outputs)
        target.name_axes(converted.model)
        if made.levels is not None:
            target.give_default(converted.model, LEVEL, [DEFAULT_LEVEL])
        large = target.weight_bytes(made.program) > target.INLINE_BYTES
        if int8 is False:
            with writing(folder / "model.onnx"):
                converted.save(folder / "model.onnx", external_data=large)
            return
        in_float = folder / "float"
        with writing(in_float):
            in_float.mkdir()
            converted.save(in_float / "model.onnx", external_data=large)
        _int8.quantize_onnx(in_float / "model.onnx", folder / "model.onnx", external_data=large)
        shutil.rmtree(in_float)

    return write


def _at_all_levels(batches: Sequence[Mapping[str, Any]], made: Exportable) -> list[Mapping[str, Any]]:
    """Calibration batches, each at the next of the levels in turn, as ranges are to hold at all of them."""
    if made.levels is None:
        return list(batches)
    import torch

    count = len(made.levels.plans) + 1
    return [{LEVEL: torch.tensor([i % count]), **batch} for i, batch in enumerate(batches)]


def _save_openvino(model: Any, file: Path, *, compress_to_fp16: bool) -> None:
    """Write an ``openvino.Model`` as ``file`` and ``.bin``.

    Raises:
        ExportError: the disk is full, or refuses.
    """
    from prunepass.backends._openvino_core import require

    try:
        require().save_model(model, file, compress_to_fp16=compress_to_fp16)
    except RuntimeError as e:  # it says "iostream error" of a full disk
        said = " ".join(str(e).split())[:200]
        left = shutil.disk_usage(file.parent).free / 1e6
        raise ExportError(f"OpenVINO could not write {file} ({said}). The disk has {left:.1f} MB left.") from e


def _write_pt2(made: Exportable, folder: Path) -> None:
    import torch

    file = folder / "model.pt2"
    with writing(file), file.open("wb") as stream:
        sink = _Sink(stream)
        torch.export.save(made.program, cast("IO[bytes]", sink))
        if sink.error is not None:
            raise sink.error


class _Sink(io.RawIOBase):
    """What PyTorch writes an archive to. It ends the process where a write fails, so that failures are kept for later.

    Attributes:
        error: of the first write that failed; what comes after it is thrown away.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__()
        self.error: OSError | None = None
        self._stream = stream

    def writable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True, which is asked before writing; nothing seeks before all is written."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Does nothing."""
        return 0

    def write(self, data: Any) -> int:
        """All of ``data``, whether or not the disk took it."""
        size = memoryview(data).nbytes
        if self.error is None:
            try:
                self._stream.write(data)
            except OSError as e:
                self.error = e
        return size
