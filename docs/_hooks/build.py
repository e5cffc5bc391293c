"""What `mkdocs build` does besides: generated parts of pages, and a check that every public name is documented."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE))

import cli_reference
import public_names
import short_tables

GENERATED = {
    "cli": cli_reference.markdown,
    "long-texts": short_tables.long_texts,
    "all-tasks": short_tables.all_tasks,
    "times": short_tables.times,
    "int8": short_tables.int8,
    "search": short_tables.search,
    "agreement": short_tables.agreement,
    "recall": short_tables.recall,
    "generation-times": short_tables.generation_times,
}
_MARK = re.compile(r"<!-- generated: ([a-z0-9-]+) -->")
#: says to the tests of the docs that a block is not run; readers need not see it
_NOT_RUN = re.compile(r"^(\s*```python) no-test\b.*$", re.MULTILINE)


def on_startup(**_: Any) -> None:
    """Lay out the package as it is installed, for mkdocstrings; refuse to build where a public name is undocumented."""
    source = ROOT / "build" / "docs-source"
    shutil.rmtree(source, ignore_errors=True)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "prunepass", source / "prunepass", ignore=ignored)
    shutil.copytree(ROOT / "backends", source / "prunepass" / "backends", ignore=ignored)
    wrong = public_names.faults()
    if wrong:
        raise SystemExit("Public names without documentation:\n  " + "\n  ".join(wrong))


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in the generated parts of a page."""
    return _NOT_RUN.sub(r"\1", _MARK.sub(lambda found: GENERATED[found[1]](), markdown))
