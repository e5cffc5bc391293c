"""``prunepass embed``: what it prints and refuses. What it writes is tested with `embed_files`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("openvino")
pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq
from typer.testing import CliRunner, Result

import prunepass
from prunepass import PrunePlan, Stage
from prunepass.cli.app import app
from prunepass.cli.embed import _short
from vocabulary import save_model, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import AutoModel

    root = tmp_path_factory.mktemp("model")
    model = AutoModel.from_pretrained(save_model(root, head="base", num_hidden_layers=2))
    given = {"tokenizer": tiny_tokenizer(), "pooled": True, "pooling": "mean"}
    return str(
        prunepass.export(model, PrunePlan([Stage(1, 0.5)], scorer="norm", restore="mean"), root / "out", **given)
    )


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "in.txt").write_text("the cat\nwho sat\n" + "cat " * 99 + "\n")
    return str(tmp_path / "in.txt")


def run(*args: str) -> Result:
    return CliRunner().invoke(app, ["embed", *args])


def refused(*args: str) -> str:
    """The one line of a call that must end with exit code 2."""
    result = run(*args)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return " ".join(result.stderr.split())


def test_what_it_says_and_writes(folder: str, file: str, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    result = run(folder, file, out, "--cpus", "1")
    assert result.exit_code == 0, result.output
    assert f"3 documents: 2 in {out}, 8 tokens" in " ".join(result.stdout.split())
    assert "1 went wrong; " in result.stderr
    assert pq.read_table(out)["id"].to_pylist() == [f"{file}:0", f"{file}:1"]
    assert "that has finished" in refused(folder, file, out)
    again = run(folder, file, out, "--cpus", "1", "--resume", "--json")
    assert json.loads(again.stdout)["rows"] == 2


def test_no_result_at_all_is_told_by_the_exit_code(folder: str, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("cat " * 99 + "\n")
    result = run(folder, str(tmp_path / "in.txt"), str(tmp_path / "out"), "--cpus", "1")
    assert (result.exit_code, result.stderr.split()[:3]) == (1, ["1", "went", "wrong;"])


def test_refusals_name_flags(folder: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = str(tmp_path / "out")
    assert "Export it again with --pooled" not in refused(str(tmp_path), file, out)
    assert "holds no exported model" in refused(str(tmp_path), file, out)
    assert "no file" in refused(folder, "none.txt", out)
    table = tmp_path / "in.parquet"
    pq.write_table(pa.table({"body": ["x"]}), table)
    assert "there are 'body'. Choose one with --column" in refused(folder, str(table), out)
    assert "--max-length 65 is more than the 64 tokens" in refused(folder, file, out, "--max-length", "65")
    assert "There is no engine 'spark'; choose one of local, ray" in refused(folder, file, out, "--engine", "spark")
    assert "--workers must be a whole number of at least 1" in refused(folder, file, out, "--workers", "0")
    for package, extra in (("ray", "ray"), ("pyarrow", "bulk")):
        monkeypatch.setitem(sys.modules, package, None)
        said = refused(folder, file, out, "--engine", "ray")
        assert f'needs the package {package}. Install it with: pip install "prunepass[{extra}]"' in said


@pytest.mark.parametrize(("count", "text"), [(950, "950"), (1234, "1.2k"), (3_400_000, "3.4M"), (2 * 10**9, "2.0G")])
def test_counts_in_short(count: int, text: str) -> None:
    assert _short(count) == text
