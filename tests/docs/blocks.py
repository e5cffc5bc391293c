"""The fenced code blocks of README.md and of the pages under docs/."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
_FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=indent)``` *$", re.MULTILINE | re.DOTALL)
_REASON = re.compile(r"<!--(?P<reason>.{10,}?)-->\s*\Z", re.DOTALL)
_INCLUDED = re.compile(r'^--8<-- "(?P<path>[^"]+)"$', re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        line: of its first line of code in the page.
        reason: the HTML comment right before the fence, which says why a block does not run.
    """

    page: Path
    line: int
    language: str
    flags: tuple[str, ...]
    code: str
    reason: str | None

    @property
    def runs(self) -> bool:
        return "no-test" not in self.flags

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def pages() -> list[Path]:
    """README.md and every page of the documentation."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, *languages: str) -> list[Block]:
    """The blocks of a page, in order, in one of the languages."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        language, *flags = match["info"].split() or [""]
        if language not in languages:
            continue
        reason = _REASON.search(text, 0, match.start())
        found.append(
            Block(
                page=page,
                line=text.count("\n", 0, match.start("body")) + 1,
                language=language,
                flags=tuple(flags),
                code=_INCLUDED.sub(_file, textwrap.dedent(match["body"])),
                reason=reason["reason"].strip() if reason else None,
            )
        )
    return found


def printed_after(block: Block) -> str | None:
    """What the page shows that a block prints: the text block that comes next, a line of words between them at most."""
    text = block.page.read_text(encoding="utf-8")
    later = [m for m in _FENCE.finditer(text) if text.count("\n", 0, m.start("body")) + 1 > block.line]
    if not later or later[0]["info"].split() != ["text"]:
        return None
    end = next(m.end() for m in _FENCE.finditer(text) if text.count("\n", 0, m.start("body")) + 1 == block.line)
    return later[0]["body"] if text[end : later[0].start()].count("\n\n") <= 2 else None


def _file(match: re.Match[str]) -> str:
    """What a page includes of the repository, as the build of the documentation puts it in."""
    return (ROOT / match["path"]).read_text(encoding="utf-8")
