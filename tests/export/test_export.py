"""Exported folders: what is in them, what they compute with the runtime alone, and when nothing is written."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from runtimes import POSITIONS, assert_same, bert, text
from torch import Tensor, nn
from typer.testing import CliRunner

import prunepass
from prunepass import Protect, PrunePlan, Stage
from prunepass.cli.options import ModelOptions
from prunepass.errors import ExportError, MissingExtraError, OptionError, PruneError
from prunepass.export import programs
from prunepass.graph.capture import capture_module

PLAN = PrunePlan([Stage(1, 0.6), Stage(2, 0.3)])
FORMATS = ("openvino", "onnx", "pt2")
OUTPUTS = ("last_hidden_state", "pooler_output")


def load(folder: Path) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    """The model in ``folder``, run by its own runtime in float32."""
    if (folder / "model.pt2").is_file():
        module = torch.export.load(folder / "model.pt2").module()
        return lambda inputs: dict(module(**inputs))
    if (folder / "model.onnx").is_file():
        import onnxruntime

        session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        names = [o.name for o in session.get_outputs()]

        def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            values = session.run(names, {k: v.numpy() for k, v in inputs.items()})
            return {k: torch.from_numpy(v) for k, v in zip(names, values, strict=True)}

        return run
    import openvino

    config = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(folder / "openvino_model.xml", "CPU", config)
    names = [port.get_any_name() for port in compiled.outputs]

    def infer(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        results = compiled({k: v.numpy() for k, v in inputs.items()})
        return {name: torch.from_numpy(results[name].copy()) for name in names}

    return infer


def full(rows: int, length: int) -> dict[str, Tensor]:
    """All inputs that BERT's config tells of."""
    inputs = text(rows, length)
    return {**inputs, "token_type_ids": torch.zeros_like(inputs["input_ids"])}


def small() -> tuple[nn.Module, PrunePlan]:
    """Where what it computes does not matter."""
    return bert(num_layers=2), PrunePlan([Stage(1, 0.6)])


@pytest.mark.parametrize("to", FORMATS)
def test_any_batch_and_length(to: str, tmp_path: Path) -> None:
    model = bert()
    folder = prunepass.export(model, PLAN, tmp_path / "out", to=to)
    reference = prunepass.prune(model, PLAN, full(2, 9))
    run = load(folder)
    with torch.no_grad():
        for size in ((1, 1), (3, 7), (5, 5), (2, POSITIONS)):
            found = run(full(*size))
            assert tuple(found) == OUTPUTS
            assert_same(found, reference(**full(*size)))
        assert (run(full(2, 30))["pooler_output"] - model(**full(2, 30)).pooler_output).abs().max() > 1e-3


@pytest.mark.parametrize("to", [*(pytest.param(to, marks=pytest.mark.slow) for to in FORMATS if to != "pt2"), "pt2"])
@pytest.mark.parametrize(
    "protect",
    [
        Protect(first=5),
        pytest.param(Protect(first=POSITIONS), marks=pytest.mark.slow),
        pytest.param(Protect(first=2, last=1, last_share=Fraction(1, 5)), marks=pytest.mark.slow),
    ],
    ids=["some", "all", "share"],
)
def test_any_length_with_more_than_one_protected_token(to: str, protect: Protect, tmp_path: Path) -> None:
    """How many stay is then a minimum and a maximum of sizes."""
    model, plan = bert(), replace(PLAN, protect=protect)
    run = load(prunepass.export(model, plan, tmp_path / "out", to=to))
    reference = prunepass.prune(model, plan, full(2, 9))
    with torch.no_grad():
        for size in ((1, 1), (3, 4), (2, 5), (2, 6), (3, 21), (2, POSITIONS)):
            assert_same(run(full(*size)), reference(**full(*size)))


@pytest.mark.parametrize("to", [*(pytest.param(f, marks=pytest.mark.slow) for f in ("openvino", "onnx")), "pt2"])
def test_lengths_at_which_a_stage_keeps_one_token_and_others(to: str, tmp_path: Path) -> None:
    """A size of one must not be taken for a constant, whatever the length that the model was traced with."""
    model, plan = bert(), PrunePlan((Stage(1, Fraction(1, 2)), Stage(2, Fraction(1, 20))), PLAN.scorer)
    reference = prunepass.prune(model, plan, full(2, POSITIONS))
    run = load(prunepass.export(model, plan, tmp_path / "out", to=to))
    with torch.no_grad():
        for size in ((2, 9), (3, 21), (2, POSITIONS), (1, 1)):
            assert_same(run(full(*size)), reference(**full(*size)))


@pytest.mark.parametrize("to", ["openvino", *(pytest.param(f, marks=pytest.mark.slow) for f in ("onnx", "pt2"))])
def test_fixed_batch_and_length(to: str, tmp_path: Path) -> None:
    model = bert()
    folder = prunepass.export(model, PLAN, tmp_path / "out", to=to, length=16, batch=3)
    with torch.no_grad():
        assert_same(load(folder)(full(3, 16)), prunepass.prune(model, PLAN, full(2, 9))(**full(3, 16)))
    with pytest.raises(Exception, match=r"\d"):
        load(folder)(full(3, 17))


@pytest.mark.parametrize("plan", [None, PrunePlan(())], ids=["no plan", "no stages"])
def test_without_stages_the_model_is_written_as_it_is(plan: PrunePlan | None, tmp_path: Path) -> None:
    model = bert()
    folder = prunepass.export(model, plan, tmp_path / "out", to="pt2")
    with torch.no_grad():
        assert_same(load(folder)(full(3, 20)), model(**full(3, 20)), within=1e-6)


def test_bounds_and_names_of_openvino(tmp_path: Path) -> None:
    import openvino

    prunepass.export(*small(), tmp_path / "out")
    model = openvino.Core().read_model(tmp_path / "out" / "openvino_model.xml")
    shapes = {port.get_any_name(): str(port.partial_shape) for port in model.inputs}
    assert shapes == dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), f"[1..,1..{POSITIONS}]")
    weights = {
        op.get_element_type() for op in model.get_ops() if op.get_type_name() == "Constant" and len(op.shape) == 2
    }
    assert openvino.Type.f16 not in weights


@pytest.mark.slow
def test_openvino_weights_in_half_on_request(tmp_path: Path) -> None:
    sizes = []
    for half in (False, True):
        prunepass.export(bert(), PLAN, tmp_path / str(half), compress_to_fp16=half)
        sizes.append((tmp_path / str(half) / "openvino_model.bin").stat().st_size)
    assert sizes[1] < 0.6 * sizes[0]


def test_an_exported_program_and_a_pruned_module(tmp_path: Path) -> None:
    model = bert()
    pruned = prunepass.prune(model, PLAN, text(2, 9))
    prunepass.export(capture_module(model, text(2, 9)).exported, PLAN, tmp_path / "program", to="pt2")
    prunepass.export(pruned, None, tmp_path / "module", to="pt2")
    with torch.no_grad():
        for name in ("program", "module"):
            assert_same(load(tmp_path / name)(text(3, 20)), pruned(**text(3, 20)), within=1e-5)
    with pytest.raises(ExportError, match="pruned already"):
        prunepass.export(pruned, PrunePlan([Stage(1, 0.1)]), tmp_path / "twice", to="pt2")


def test_what_lies_beside_the_model(tmp_path: Path) -> None:
    source = tmp_path / "source"
    model, plan = small()
    model.save_pretrained(source)
    (source / "tokenizer.json").write_text("{}")
    (source / "notes.txt").write_text("not the tokenizer's")
    folder = prunepass.export(type(model).from_pretrained(source), plan, tmp_path / "out", to="pt2")
    names = {p.name for p in folder.iterdir()}
    assert names == {"model.pt2", "config.json", "prunepass.json", "tokenizer.json"}
    assert json.loads((folder / "config.json").read_text())["model_type"] == "bert"
    assert PrunePlan.from_pretrained(folder) == plan
    usual = (folder / "model.pt2").stat().st_mode & 0o777
    assert {stat.S_IMODE(p.stat().st_mode) for p in folder.iterdir()} == {usual}


_ALONE = """
import sys
sys.modules["prunepass"] = None
sys.modules["transformers"] = None
import numpy
values = {name: numpy.ones((2, 9), dtype=numpy.int64) for name in ("input_ids", "attention_mask", "token_type_ids")}
"""
_RUN = {
    "openvino": """
import openvino
results = openvino.Core().compile_model("openvino_model.xml", "CPU")(values)
print(results["last_hidden_state"].shape)
assert "torch" not in sys.modules
""",
    "onnx": """
import onnxruntime
session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
print(session.run(["last_hidden_state"], values)[0].shape)
assert "torch" not in sys.modules
""",
    "pt2": """
import torch
module = torch.export.load("model.pt2").module()
print(tuple(module(**{k: torch.from_numpy(v) for k, v in values.items()})["last_hidden_state"].shape))
""",
}


@pytest.mark.parametrize("to", FORMATS)
def test_the_runtime_alone_runs_the_files(to: str, tmp_path: Path) -> None:
    folder = prunepass.export(bert(), PLAN, tmp_path / "out", to=to)
    command = [sys.executable, "-I", "-W", "ignore", "-c", _ALONE + _RUN[to]]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.strip() == "(2, 9, 32)"


class NoConfig(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class TestNothingIsWritten:
    """In every case of failure the folder, and the one beside it, stay as they were."""

    def check(self, tmp_path: Path, error: type[Exception], message: str, *arguments: Any, **options: Any) -> None:
        before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
        with pytest.raises(error, match=message):
            prunepass.export(*arguments, **options)
        assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == before

    def test_the_folder_exists(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine.txt").write_text("mine")
        self.check(tmp_path, ExportError, "exists already", bert(), PLAN, tmp_path / "out")
        self.check(tmp_path, ExportError, "exists already", bert(), PLAN, tmp_path / "out" / "mine.txt")

    def test_an_unknown_format(self, tmp_path: Path) -> None:
        self.check(tmp_path, OptionError, "Did you mean 'openvino'", bert(), PLAN, tmp_path / "out", "openvin")

    def test_a_length_beyond_the_model(self, tmp_path: Path) -> None:
        self.check(tmp_path, ExportError, f"the {POSITIONS} positions", bert(), PLAN, tmp_path / "out", length=65)

    def test_a_plan_that_does_not_fit(self, tmp_path: Path) -> None:
        self.check(tmp_path, PruneError, "7", bert(), PrunePlan([Stage(7, 0.5)]), tmp_path / "out")

    def test_a_model_without_a_config(self, tmp_path: Path) -> None:
        self.check(tmp_path, ExportError, "example_inputs", NoConfig(), PLAN, tmp_path / "out")

    def test_half_weights_elsewhere(self, tmp_path: Path) -> None:
        options = {"to": "onnx", "compress_to_fp16": True}
        self.check(tmp_path, OptionError, r"model\.half\(\)", bert(), PLAN, tmp_path / "out", **options)

    @pytest.mark.parametrize(("to", "package"), [("openvino", "openvino"), ("onnx", "onnxscript")])
    def test_a_missing_package(self, to: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in [n for n in sys.modules if n == package or n.startswith(f"{package}.")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, package, None)
        self.check(tmp_path, MissingExtraError, rf'"prunepass\[{to}\]"', bert(), PLAN, tmp_path / "out", to)

    def test_a_writer_that_fails(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise OSError("no space left on device")

        monkeypatch.setattr(torch.export, "save", fail)
        self.check(tmp_path, ExportError, "no space left", bert(), PLAN, tmp_path / "out", "pt2")

    @pytest.mark.parametrize("to", [pytest.param("openvino", marks=pytest.mark.slow), "onnx"])
    def test_a_disk_that_takes_small_files_only(self, to: str, tmp_path: Path) -> None:
        resource = pytest.importorskip("resource")
        model, (soft, hard) = bert(), resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (16_384, hard))  # Python ignores the signal, writers get an error
        try:
            words = rf"^(OpenVINO could not write )?{tmp_path}/out/[a-z_]*model\.(xml|onnx)[^\n]*$"
            self.check(tmp_path, ExportError, words, model, PLAN, tmp_path / "out", to)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    def test_a_disk_that_fills_up_while_a_program_is_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """PyTorch's own writer ends the process there, so that it must not have the file itself."""
        make = Path.open

        class Full:
            def __init__(self, stream: Any) -> None:
                self.stream, self.left = stream, 10_000

            def __enter__(self) -> Full:
                return self

            def __exit__(self, *_: object) -> None:
                self.stream.close()

            def write(self, data: Any) -> int:
                self.left -= memoryview(data).nbytes
                if self.left < 0:
                    raise OSError(28, "No space left on device")
                return int(self.stream.write(data))

        def opened(path: Path, *args: Any, **options: Any) -> Any:
            stream = make(path, *args, **options)
            return Full(stream) if path.suffix == ".pt2" else stream

        monkeypatch.setattr(Path, "open", opened)
        words = rf"^{tmp_path}/out/model\.pt2 could not be written: No space left on device\.$"
        self.check(tmp_path, ExportError, words, *small(), tmp_path / "out", "pt2")

    def test_a_tokenizer_that_cannot_be_written(self, tmp_path: Path) -> None:
        class Tokenizer:
            def save_pretrained(self, folder: Path) -> None:
                raise Exception("No space left on device\n(os error 28)")  # as the tokenizers package does

        options = {"to": "pt2", "tokenizer": Tokenizer()}
        words = r"The tokenizer could not be written: No space left on device \(os error 28\)"
        self.check(tmp_path, ExportError, words, *small(), tmp_path / "out", **options)


class TestBeforeAnyWork:
    """A folder that cannot be written is refused before the model is looked at."""

    @pytest.fixture(autouse=True)
    def _no_work(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def work(*_: Any, **__: Any) -> Any:
            raise AssertionError("the model was traced")

        monkeypatch.setattr(programs, "_program", work)
        monkeypatch.setattr(ModelOptions, "load", work)

    def test_too_little_space(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model = bert()
        needed = sum(p.numel() * p.element_size() for p in model.parameters())
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed // 2))
        with pytest.raises(ExportError, match=r"out needs .* of space, but the disk .* left"):
            prunepass.export(model, PLAN, tmp_path / "out", to="pt2")
        assert list(tmp_path.iterdir()) == []

    def test_the_name_of_a_tokenizer(self, tmp_path: Path) -> None:
        with pytest.raises(OptionError, match=r"AutoTokenizer\.from_pretrained\(\.\.\.\), not str"):
            prunepass.export(bert(), PLAN, tmp_path / "out", tokenizer="name")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("command", ["export", "explain"])
    def test_the_command_line_ends_with_two(
        self, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: Any, **__: Any) -> Any:
            raise OSError(30, "Read-only file system")

        from prunepass.cli.app import app

        monkeypatch.setattr(tempfile, "mkdtemp", refuse)
        out = str(tmp_path / "out")
        result = CliRunner().invoke(app, [command, "none", *(["--html", out] if command == "explain" else [out])])
        assert result.exit_code == 2
        assert "Read-only file system. Choose another folder" in result.stderr
        assert result.stderr.count("\n") == 1
        assert list(tmp_path.iterdir()) == []
