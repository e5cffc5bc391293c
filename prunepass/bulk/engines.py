"""The runtimes: a compiled folder that runs batches at the same time and hands out what each has put out."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from prunepass.bulk.batches import Batch
from prunepass.errors import ExportError, MissingExtraError, OptionError, PruneError, option

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float32]
    Feed = Mapping[str, NDArray[np.int64]]

__all__ = ["LEVEL", "Engine", "Ports", "Settings", "open_engine"]

#: name of the input that chooses among several plans, as `prunepass.export` has it; that would bring torch along
LEVEL = "level"
_FILES = {"openvino": "openvino_model.xml", "onnxruntime": "model.onnx"}
#: of OpenVINO by the names that are said here
PRECISIONS = ("f32", "bf16", "f16")


@dataclass(frozen=True)
class Ports:
    """What a compiled model takes and puts out.

    Attributes:
        inputs: their names.
        outputs: by name the rank.
        batch, length: sizes of ``input_ids``, where they are fixed.
        longest: tokens of the longest row; None where the file says nothing.
        levels: whether it takes `LEVEL` besides, which chooses among several plans.
    """

    inputs: tuple[str, ...]
    outputs: Mapping[str, int]
    batch: int | None
    length: int | None
    longest: int | None
    levels: bool = False


@dataclass(frozen=True)
class Settings:
    """How a runtime runs.

    Attributes:
        cpus: threads, all together.
        streams: batches at a time.
        precision: of OpenVINO's arithmetic; None leaves it the choice.
        config: properties of ``openvino.Core.compile_model``, or attributes of ``onnxruntime.SessionOptions``.
    """

    cpus: int
    streams: int
    precision: str | None
    config: Mapping[str, Any]


class Engine(Protocol):
    """A compiled model."""

    name: str
    ports: Ports

    def run(
        self, output: str, batches: Iterable[Batch], feed: Callable[[Batch], Feed], take: Callable[[Batch, Array], None]
    ) -> None:
        """Run all batches, several at a time; ``take`` gets one output of each, in no order, by one thread at a time.

        Of a batch that fails nothing is taken, and the others go on.

        Args:
            feed: makes the model's inputs of a batch.
            take: must copy the array.
        """

    def one(self, output: str, feed: Feed) -> Array:
        """One output of one call.

        Raises:
            PruneError: it fails.
        """


def open_engine(folder: Path, settings: Settings) -> Engine:
    """Compile the model in a folder.

    Raises:
        ExportError: there is none of a format that runs here, or the runtime cannot read it.
        OptionError: the runtime does not know a setting.
        MissingExtraError: the runtime is not installed.
    """
    if not folder.is_dir():
        raise ExportError(f"There is no folder {folder}. Write one with prunepass export.")
    found = [name for name, file in _FILES.items() if (folder / file).is_file()]
    if not found:
        pt2 = "a .pt2 program, which runs in torch" if (folder / "model.pt2").is_file() else "no exported model"
        raise ExportError(
            f"{folder} holds {pt2}. Write one for OpenVINO or ONNX Runtime: prunepass export MODEL FOLDER "
            "--to openvino."
        )
    return _OpenVINO(folder, settings) if found[0] == "openvino" else _OnnxRuntime(folder, settings)


class _OpenVINO:
    name = "openvino"

    def __init__(self, folder: Path, settings: Settings) -> None:
        try:
            import openvino
        except ImportError:
            raise MissingExtraError("openvino", "openvino", f"{folder}") from None
        from prunepass.backends._openvino_core import core as shared_core

        self._ov = openvino
        properties: dict[str, Any] = {
            "PERFORMANCE_HINT": "THROUGHPUT",
            "INFERENCE_NUM_THREADS": settings.cpus,
            "NUM_STREAMS": settings.streams,
            # processes beside each other would all pin their threads to the first cores
            "ENABLE_CPU_PINNING": False,
        }
        if settings.precision is not None:
            properties["INFERENCE_PRECISION_HINT"] = settings.precision
        properties |= settings.config
        core, file = shared_core(), folder / _FILES["openvino"]
        try:
            model = core.read_model(file)
        except RuntimeError as e:
            raise ExportError(f"OpenVINO {_version(openvino)} cannot read {file}: {_last(e)}") from None
        if settings.cpus <= settings.streams and str(properties.get("INFERENCE_PRECISION_HINT")) != "f32":
            from prunepass.backends._openvino_gates import keep_apart

            keep_apart(model)
        try:
            self._compiled = core.compile_model(model, "CPU", properties)
        except RuntimeError as e:
            if any(key in str(e) for key in settings.config):
                raise OptionError(f"OpenVINO does not take {option('config')}: {_last(e)}") from None
            raise ExportError(f"OpenVINO {_version(openvino)} cannot compile {file}: {_last(e)}") from None
        self.ports = self._ports(file)
        #: one more than run at a time, so that none waits for Python
        self._jobs = self._compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS") + 1

    def _ports(self, file: Path) -> Ports:
        inputs = {port.get_any_name(): port for port in self._compiled.inputs}
        ids = inputs.get("input_ids")
        if ids is None or len(ids.get_partial_shape()) != 2:
            raise ExportError(f"{file} takes {', '.join(inputs) or 'nothing'} and no input_ids [batch, tokens].")
        batch, length = ids.get_partial_shape()
        outputs = {name: len(port.get_partial_shape()) for port in self._compiled.outputs for name in port.get_names()}
        return Ports(
            tuple(name for name in inputs if name != LEVEL),
            outputs,
            batch.get_length() if batch.is_static else None,
            length.get_length() if length.is_static else None,
            length.get_max_length() if length.get_max_length() > 0 else None,
            LEVEL in inputs,
        )

    def run(
        self, output: str, batches: Iterable[Batch], feed: Callable[[Batch], Feed], take: Callable[[Batch, Array], None]
    ) -> None:
        # not AsyncInferQueue: after one failed call it fails for ever, and its last callback may outlive the model
        running: deque[tuple[Any, Batch]] = deque()

        def finish() -> Any:
            request, batch = running.popleft()
            try:
                request.wait()
            except RuntimeError:
                return self._compiled.create_infer_request()
            take(batch, request.get_tensor(output).data)
            return request

        try:
            for batch in batches:
                full = len(running) >= self._jobs
                request = finish() if full else self._compiled.create_infer_request()
                with contextlib.suppress(RuntimeError):
                    request.start_async(dict(feed(batch)))
                    running.append((request, batch))
            while running:
                finish()
        finally:
            for request, _ in running:
                with contextlib.suppress(RuntimeError):
                    request.wait()

    def one(self, output: str, feed: Feed) -> Array:
        request = self._compiled.create_infer_request()
        try:
            request.infer(dict(feed))
        except RuntimeError as e:
            raise PruneError(f"OpenVINO failed: {_last(e)}") from None
        found: Array = request.get_tensor(output).data.copy()
        return found


class _OnnxRuntime:
    name = "onnxruntime"

    def __init__(self, folder: Path, settings: Settings) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise MissingExtraError("onnxruntime", "onnx", f"{folder}") from None
        if settings.precision not in (None, "f32"):
            raise OptionError(
                f"{option('precision', settings.precision)} is for OpenVINO; {folder} is for ONNX Runtime."
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = max(1, settings.cpus // settings.streams)
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # a failed call is told of by its error
        for key, value in settings.config.items():
            if not hasattr(options, key):
                raise OptionError(f"ONNX Runtime has no setting {key!r} ({option('config')}).")
            try:
                setattr(options, key, value)
            except TypeError:
                raise OptionError(f"ONNX Runtime's setting {key!r} does not take {value!r}.") from None
        file = folder / _FILES["onnxruntime"]
        try:
            self._session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        except Exception as e:  # it has a kind of its own for each code
            raise ExportError(f"ONNX Runtime {_version(onnxruntime)} cannot read {file}: {_last(e)}") from None
        inputs = {port.name: port.shape for port in self._session.get_inputs()}
        if len(inputs.get("input_ids", ())) != 2:
            raise ExportError(f"{file} takes {', '.join(inputs) or 'nothing'} and no input_ids [batch, tokens].")
        batch, length = (size if isinstance(size, int) else None for size in inputs["input_ids"])
        outputs = {port.name: len(port.shape) for port in self._session.get_outputs()}
        chooses = any(port.name == LEVEL for port in self._session.get_overridable_initializers())
        self.ports = Ports(tuple(inputs), outputs, batch, length, length, chooses)
        self._streams = settings.streams

    def run(
        self, output: str, batches: Iterable[Batch], feed: Callable[[Batch], Feed], take: Callable[[Batch, Array], None]
    ) -> None:
        def call(batch: Batch) -> None:
            try:
                found = self.one(output, feed(batch))
                with lock:
                    take(batch, found)
            except PruneError:
                pass
            finally:
                idle.release()

        lock, idle = threading.Lock(), threading.Semaphore(2 * self._streams)
        with ThreadPoolExecutor(self._streams, "prunepass-onnx") as pool:
            for batch in batches:
                idle.acquire()
                pool.submit(call, batch)

    def one(self, output: str, feed: Feed) -> Array:
        try:
            (found,) = self._session.run([output], dict(feed))
        except Exception as e:
            raise PruneError(f"ONNX Runtime failed: {_last(e)}") from None
        array: Array = found
        return array


def _last(error: Exception) -> str:
    """The last line, which is the reason; those before it are places in the runtime."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


def _version(module: Any) -> str:
    return str(module.__version__).split("-")[0]
