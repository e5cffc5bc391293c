"""The documentation builds without a warning, and every public name has its place and its words there."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from blocks import ROOT

pytest.importorskip("typer")
pytest.importorskip("transformers")

sys.path.insert(0, str(ROOT / "docs" / "_hooks"))

import cli_reference
import public_names
import short_tables


def test_every_public_name_is_documented() -> None:
    assert not public_names.faults()
    assert len(public_names.public()) > 40


def test_arguments_are_documented_one_by_one_under_their_names() -> None:
    """What `make docs` refuses, which takes too long for these tests."""
    wrong = []
    for path, value in public_names.public().items():
        for name, thing in [(path, value), *public_names._members(path, value)]:
            found = re.search(r"^Args:\n((?: {4}.*\n?|\n)+)", inspect.getdoc(thing) or "", re.MULTILINE)
            if found and callable(thing):
                known = inspect.signature(thing).parameters
                named = re.findall(r"^ {4}(\S[^:]*):", found[1], re.MULTILINE)
                assert named, name
                wrong += [f"{name}: {one}" for one in named if one not in known]
    assert not wrong


class Undocumented:
    def method(self) -> None: ...

    @property
    def value(self) -> int:
        return 0

    @classmethod
    def make(cls) -> None: ...

    def _private(self) -> None: ...


def test_a_name_without_a_docstring_is_found() -> None:
    Undocumented.__doc__ = None
    found = public_names.undocumented({"x": Undocumented})
    assert found == ["x: no docstring", "x.method: no docstring", "x.value: no docstring", "x.make: no docstring"]


def test_a_public_name_that_no_page_has_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some.md").write_text("# Some\n\n::: prunepass.prune\n", encoding="utf-8")
    monkeypatch.setattr(public_names, "REFERENCE", tmp_path)
    found = public_names.faults()
    assert "prunepass.explain: not in docs/reference" in found
    assert "prunepass.prune: not in docs/reference" not in found


def test_the_command_line_is_documented_from_itself() -> None:
    text = cli_reference.markdown()
    for part in (
        "## prunepass bench",
        "`--batch-size` *number*",
        "| `16` |",
        "*openvino, onnx, pt2*",
        "`--no-stateful`",
    ):
        assert part in text


@pytest.mark.parametrize(
    "make", ["long_texts", "all_tasks", "times", "int8", "search", "agreement", "recall", "generation_times"]
)
def test_short_tables_are_found_in_the_long_ones(make: str) -> None:
    rows = getattr(short_tables, make)().splitlines()
    assert len(rows) >= 6
    assert len({row.count("|") for row in rows}) == 1
    assert any(re.search(r"\d\.\d|\d\d", row) for row in rows[2:])


#: tasks of README's table, as the tables call them
TASKS = {
    "20 Newsgroups": "20newsgroups",
    "CoNLL-2003, by document": "conll2003",
    "Cranfield retrieval": "cranfield",
    "SQuAD": "squad",
    "SST-2": "sst2",
}


def test_the_figures_of_the_front_door_are_those_of_the_tables() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = {row[0]: row[1:] for row in cells(readme) if row[0] in TASKS}
    quality = {row[0]: row for row in cells(short_tables.all_tasks())}
    times = dict(short_tables.sections("deployed.md"))["Milliseconds a text"]
    speed = {row[0]: row[times[0].index("speedup")] for row in times}
    assert set(rows) == set(TASKS)
    for task, (_, _, dense, pruned, cut, faster) in rows.items():
        name = TASKS[task]
        found = [quality[name][i].strip("*").split(" @")[0].strip("*") for i in (1, 4, 2)]
        assert [dense, pruned, cut] == found
        assert f"{faster}x" == speed[name]


def test_the_headline_is_what_the_demo_measured() -> None:
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    head, _, dense, pruned, *others = cells(short_tables.search())
    trained, cut = (next(row for row in others if row[0].startswith(start)) for start in ("trained", "cut to"))

    def of(row: list[str], name: str) -> str:
        return row[head.index(name)]

    assert f"**{of(pruned, 'speedup')} times as fast**" in readme
    assert f"this plan was {of(trained, 'speedup')} times as fast" in readme
    found = [of(row, "found").replace("%", " %") for row in (pruned, dense, cut)]
    assert f"({found[0]} against {found[1]}; texts cut short to the same FLOPs: {found[2]})" in readme
    stay = [f"{10 * float(of(row, 'overlap@10')):.1f}" for row in (pruned, cut)]
    assert f"of the ten best answers to a query, {stay[0]} stay the same ({stay[1]} with texts cut short)" in readme
    assert f"{of(pruned, 'FLOPs').removeprefix('1 / ')} times fewer FLOPs" in readme
    for page in ("index.md", "getting-started/embeddings.md", "guides/plan.md"):
        text = " ".join((ROOT / "docs" / page).read_text(encoding="utf-8").split())
        assert f"{of(pruned, 'speedup')} times as fast" in text, page
        assert page == "guides/plan.md" or f"({found[0]} against {found[1]})" in text, page


def cells(markdown: str) -> list[list[str]]:
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.slow
def test_the_documentation_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    page = (tmp_path / "site" / "reference" / "api.html").read_text(encoding="utf-8")
    assert 'id="prunepass.explain"' in page
    assert "<!-- generated" not in (tmp_path / "site" / "reference" / "cli.html").read_text(encoding="utf-8")
