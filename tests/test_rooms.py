"""The rooms of the package: what stands at the door, who may import whom, how long a file is."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from long_tests import COLLECTED, LONG

ROOT = Path(__file__).parent.parent
#: from the ground up: a file imports its own room and those before it
ROOMS = (
    "errors",
    "graph",
    "scorers",
    "plan",
    "passes",
    "pipeline",
    "generation",
    "backends",
    "dynamo",
    "cost",
    "report",
    "export",
    "training",
    "bulk",
    "cli",
    "__main__",
)
#: within training, likewise
TRAINING = ("data", "methods", "loop")
MAX_LINES = 450


def _module(path: Path) -> str:
    relative = path.relative_to(ROOT).with_suffix("")
    parts = relative.parts if relative.parts[0] == "prunepass" else ("prunepass", *relative.parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _files() -> dict[str, Path]:
    found = [*(ROOT / "prunepass").rglob("*.py"), *(ROOT / "backends").rglob("*.py")]
    return {_module(path): path for path in found}


def _imports() -> dict[str, set[str]]:
    """Of each file the files that it names in an import, anywhere in it."""
    files = _files()
    out: dict[str, set[str]] = {}
    for module, path in files.items():
        names: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names |= {
                    f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in files else node.module for a in node.names
                }
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{module} imports relatively"
        out[module] = names & files.keys() - {module}
    return out


def test_a_room_imports_those_before_it_alone() -> None:
    def floor(module: str) -> int:
        return ROOMS.index(module.split(".")[1])

    wrong = [
        f"{one} imports {other}"
        for one, others in _imports().items()
        for other in others
        if one != "prunepass" and other != "prunepass" and floor(other) > floor(one)
    ]
    assert not wrong


def test_a_room_of_training_imports_those_before_it_alone() -> None:
    def floor(module: str) -> int | None:
        parts = module.split(".")
        return TRAINING.index(parts[2]) if parts[1:2] == ["training"] and len(parts) > 2 else None

    pairs = [(one, other) for one, others in _imports().items() for other in others]
    wrong = [(a, b) for a, b in pairs if (i := floor(a)) is not None and (j := floor(b)) is not None and j > i]
    assert not wrong


def test_no_two_files_import_each_other() -> None:
    found = _imports()
    assert not [(one, other) for one in found for other in found[one] if one < other and one in found[other]]


def test_no_file_imports_itself_by_way_of_others() -> None:
    """The door apart, whose names are loaded when they are asked for."""
    found = {one: others - {"prunepass"} for one, others in _imports().items() if one != "prunepass"}
    TopologicalSorter(found).prepare()  # its error names the circle


def test_the_top_level_is_the_door_alone() -> None:
    top = {path.name for path in (ROOT / "prunepass").glob("*.py")}
    assert top == {"__init__.py", "__main__.py", "errors.py", "pipeline.py"}


def test_files_are_short() -> None:
    own = [*_files().values(), *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in own}
    assert not {name: count for name, count in lengths.items() if count > MAX_LINES}


def test_long_cases_are_tests_that_there_are(request: pytest.FixtureRequest) -> None:
    """A test that is renamed would be a quick one again without a word; a case of one, too, as far as all of the file's
    were collected."""
    found = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")}
    whole = not any("::" in asked for asked in request.config.args)
    collected = request.config.stash[COLLECTED]
    files = {name.partition("::")[0] for name in collected} if whole else set()
    for name in LONG:
        file, _, rest = name.partition("::")
        function = rest.split("::")[-1].split("[")[0]
        assert f"def {function}(" in found[file], name
        assert name in collected or file not in files, name


def test_test_files_have_names_of_their_own() -> None:
    """pytest imports them by name alone, and folders of tests are no packages."""
    names = [file.name for file in Path(__file__).parent.rglob("test_*.py")]
    assert sorted(set(names)) == sorted(names)
