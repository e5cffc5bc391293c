"""The messages that docs quote are those of the code, and what docs name is there."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest
from blocks import ROOT, pages

TROUBLESHOOTING = ROOT / "docs" / "reliability" / "troubleshooting.md"
_QUOTED = re.compile(r"^### `(.+)`$", re.MULTILINE)
_HOLE = "\0"


def quoted() -> list[str]:
    return _QUOTED.findall(TROUBLESHOOTING.read_text(encoding="utf-8"))


@cache
def messages() -> tuple[str, ...]:
    """Every text in the code, with a mark where a value is put in."""
    files = [*(ROOT / "prunepass").rglob("*.py"), *(ROOT / "backends").glob("*.py")]
    return tuple(
        {
            text
            for file in files
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            if isinstance(node, (ast.Constant, ast.JoinedStr, ast.BinOp)) and (text := _text(node))
        }
    )


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) if isinstance(part, ast.Constant) else _HOLE for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return (_text(node.left) or _HOLE) + (_text(node.right) or _HOLE)
    return ""


def is_in_the_code(message: str) -> bool:
    """Whether some text of the code holds all parts of ``message`` between its dots, in order."""
    parts = [part.strip() for part in message.split("...") if len(part.strip()) > 2]
    pattern = re.compile(".*?".join(re.escape(part) for part in parts), re.DOTALL)
    return any(pattern.search(text) for text in messages())


@pytest.mark.parametrize("message", quoted())
def test_a_quoted_message_is_one_of_the_code(message: str) -> None:
    assert is_in_the_code(message)


def test_there_are_messages_and_others_are_told_from_them() -> None:
    assert len(quoted()) > 40
    assert len(set(quoted())) == len(quoted())
    assert not is_in_the_code("the model is too large to be pruned.")
    assert not is_in_the_code("keep falls from ... to ....")


def test_files_that_docs_name_are_there() -> None:
    named = {
        (page, path)
        for page in [*pages(), ROOT / "CONTRIBUTING.md"]
        for path in re.findall(
            r"`((?:tests|examples|benchmarks|prunepass|findings)/[\w/.-]+)`", page.read_text("utf-8")
        )
    }
    assert not [f"{page.relative_to(ROOT)}: {path}" for page, path in named if not (ROOT / path).exists()]


def test_links_from_the_front_door_lead_somewhere() -> None:
    broken = []
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        text = page.read_text(encoding="utf-8")
        anchors = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)$", text, re.M)}
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            target, _, anchor = link.partition("#")
            if link.startswith("http"):
                continue
            fine = (ROOT / target).exists() if target else anchor in anchors
            broken += [] if fine else [f"{page.name}: {link}"]
    assert not broken


def test_the_front_door_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 250


def test_pages_show_no_failed_run() -> None:
    """Output is pasted from runs: one that failed, or that names places on a machine, is no output to show."""
    shown = re.compile(r'Traceback \(most recent call last\)|File "/|Loading weights:|@OUT')
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    assert not [str(page.relative_to(ROOT)) for page in pages if shown.search(page.read_text(encoding="utf-8"))]
