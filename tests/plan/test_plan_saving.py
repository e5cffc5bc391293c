"""Saved plans: their weights, and that a reader sees the old plan or the new one, never a mixture."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from trained_plans import one_line, predictor, trained

from prunepass.errors import ExportError, OptionError, WeightsError
from prunepass.plan import PrunePlan, Stage
from prunepass.plan import files as plan_files
from prunepass.plan.files import PLAN_FILE, WEIGHTS_FILE

# -- weights -----------------------------------------------------------------------------------------------------------


def damaged(**changes: Tensor | None) -> dict[str, Tensor]:
    found = {k: v for k, v in (predictor() | changes).items() if v is not None}
    return {k: v.contiguous() for k, v in found.items()}


WEIGHTS: dict[str, tuple[dict[str, Tensor], str]] = {
    "NaN": (damaged(**{"stages.0.fc1.weight": torch.full((3, 4), torch.nan)}), "fc1.weight holds NaN"),
    "infinity": (damaged(**{"stages.0.fc2.bias": torch.tensor([torch.inf])}), "fc2.bias holds NaN or inf"),
    "whole numbers": (damaged(**{"stages.0.fc1.bias": torch.ones(3, dtype=torch.int64)}), "floating"),
    "one missing": (damaged(**{"stages.0.fc1.bias": None}), "needs trained weights"),
    "one extra": (damaged(**{"stages.0.fc3.bias": torch.ones(3)}), "needs trained weights"),
    "a wrong width": (damaged(**{"stages.0.fc2.weight": torch.ones(1, 4)}), "do not fit together"),
    "a wrong bias": (damaged(**{"stages.0.fc1.bias": torch.ones(4)}), "do not fit together"),
    "three outputs": (
        damaged(**{"stages.0.fc2.weight": torch.ones(3, 3), "stages.0.fc2.bias": torch.ones(3)}),
        "do not fit together",
    ),
    "wrong positions": (damaged(**{"stages.0.position.weight": torch.ones(3, 3)}), "do not fit together"),
    "another stage": (damaged(**{"stages.1.fc1.bias": torch.ones(3)}), "belongs to no stage"),
    "a stage with zeros": (damaged(**{"stages.00.fc1.bias": torch.ones(3)}), "belongs to no stage"),
    "a stage in other digits": (damaged(**{"stages.\u00b2.fc1.bias": torch.ones(3)}), "belongs to no stage"),
    "a stage of many digits": (damaged(**{f"stages.{'1' * 5000}.fc1.bias": torch.ones(3)}), "belongs to no stage"),
    "half a lens": (damaged(**{"stages.0.lens.up.bias": torch.ones(4)}), "lens"),
    "a wrong lens": (
        damaged(
            **{
                "stages.0.lens.up.bias": torch.ones(4),
                "stages.0.lens.up.weight": torch.ones(4, 2),
                "stages.0.lens.down.weight": torch.ones(3, 4),
            }
        ),
        "lens .* do not fit together",
    ),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_wrong_weights_are_neither_read_nor_written(name: str, tmp_path: Path) -> None:
    tensors, words = WEIGHTS[name]
    PrunePlan((Stage(1, 0.5),), "mlp").save_pretrained(tmp_path)
    save_file(tensors, tmp_path / WEIGHTS_FILE, metadata={"format": "prunepass-predictors"})
    with pytest.raises(WeightsError, match=words) as error:
        PrunePlan.from_pretrained(tmp_path)
    assert WEIGHTS_FILE in one_line(error)
    with pytest.raises(WeightsError, match=words):
        PrunePlan((Stage(1, 0.5),), "mlp", weights=tensors).save_pretrained(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


def test_weights_of_a_scorer_that_takes_none(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="'norm' takes none"):
        PrunePlan((Stage(1, 0.5),), "norm", weights=predictor()).save_pretrained(tmp_path)


def test_weights_that_share_memory_are_written_apart(tmp_path: Path) -> None:
    both = torch.randn(2, 3, 4)
    weights = predictor(0) | predictor(1) | {"stages.0.fc1.weight": both[0], "stages.1.fc1.weight": both[1]}
    plan = PrunePlan((Stage(1, 0.5), Stage(2, 0.25)), "mlp", weights=weights)
    plan.save_pretrained(tmp_path)
    assert PrunePlan.from_pretrained(tmp_path) == plan


# -- saving ------------------------------------------------------------------------------------------------------------


def test_modes_are_those_of_the_umask(tmp_path: Path) -> None:
    for mask in (0o022, 0o077, 0o002):
        before = os.umask(mask)
        try:
            trained().save_pretrained(tmp_path / str(mask))
        finally:
            os.umask(before)
        for file in (tmp_path / str(mask)).iterdir():
            assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~mask


def test_what_else_lies_in_the_folder_stays(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    trained().save_pretrained(tmp_path)
    PrunePlan((Stage(1, 0.5),)).save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt", PLAN_FILE]
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["with spaces", "mëßig ünicode", "a/b"])
def test_names_of_folders(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    plan = trained()
    for place in (name, Path(name), f"~/{name}", tmp_path / name):
        plan.save_pretrained(place)
        assert PrunePlan.from_pretrained(place) == plan
    assert sorted(p.name for p in (tmp_path / name).iterdir()) == [WEIGHTS_FILE, PLAN_FILE]


def test_links_and_read_only_files(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    trained(0.5).save_pretrained(tmp_path / "link")
    assert sorted(p.name for p in (tmp_path / "real").iterdir()) == [WEIGHTS_FILE, PLAN_FILE]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / PLAN_FILE).symlink_to("../real/prunepass.json")
    trained(0.25).save_pretrained(tmp_path / "other")  # the link is replaced, and not what it leads to
    assert PrunePlan.from_pretrained(tmp_path / "real").stages[0].keep == Fraction(1, 2)
    (tmp_path / "real" / PLAN_FILE).chmod(0o444)
    with pytest.raises(OptionError, match="read-only"):
        trained(0.25).save_pretrained(tmp_path / "real")
    assert PrunePlan.from_pretrained(tmp_path / "real").stages[0].keep == Fraction(1, 2)


class Interrupted(BaseException):
    """As if the process ended here."""


NEW = {"with weights": trained(0.25), "without": PrunePlan((Stage(2, 0.5),), "norm")}


@pytest.mark.parametrize("new", NEW)
@pytest.mark.parametrize("old", ["with weights", "without"])
def test_at_any_moment_a_reader_sees_the_old_plan_or_the_new_one(
    old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = trained(0.5) if old == "with weights" else PrunePlan((Stage(1, 0.5),), "norm")
    second, seen = NEW[new], []

    def watching(act: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            seen.append(PrunePlan.from_pretrained(tmp_path))
            result = act(*args, **kwargs)
            seen.append(PrunePlan.from_pretrained(tmp_path))
            return result

        return run

    first.save_pretrained(tmp_path)
    with monkeypatch.context() as patched:
        for name in ("replace", "unlink"):
            patched.setattr(Path, name, watching(getattr(Path, name)))
        second.save_pretrained(tmp_path)
    assert len(seen) >= 2
    assert all(plan in (first, second) for plan in seen)
    assert [plan == second for plan in seen] == sorted(plan == second for plan in seen)
    assert PrunePlan.from_pretrained(tmp_path) == second
    assert {p.name for p in tmp_path.iterdir()} == {PLAN_FILE} | ({WEIGHTS_FILE} if second.weights else set())


@pytest.mark.parametrize("new", NEW)
@pytest.mark.parametrize("step", range(4))
def test_a_writer_that_ends_half_way(new: str, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it leaves reads as one of the two, saving goes on from there, and old readers find the usual names."""
    first, second, count = trained(0.5), NEW[new], 0

    def ending(act: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count > step:
                raise Interrupted
            return act(*args, **kwargs)

        return run

    first.save_pretrained(tmp_path)
    with monkeypatch.context() as patched:
        for name in ("replace", "unlink"):
            patched.setattr(Path, name, ending(getattr(Path, name)))
        with suppress(Interrupted):
            second.save_pretrained(tmp_path)
    assert PrunePlan.from_pretrained(tmp_path) in (first, second)
    third = trained(0.125)
    third.save_pretrained(tmp_path)
    assert PrunePlan.from_pretrained(tmp_path) == third
    assert {p.name for p in tmp_path.iterdir()} == {PLAN_FILE, WEIGHTS_FILE}
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    assert all(torch.equal(tensors[name], value) for name, value in third.weights.items())


def test_a_plan_saved_anew_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = trained(0.5), trained(0.25)
    first.save_pretrained(tmp_path)
    load, left = plan_files.load, [1]

    def late(*args: Any) -> Any:
        if left.pop() if left else 0:
            second.save_pretrained(tmp_path)  # between the JSON and the weights
        return load(*args)

    monkeypatch.setattr(plan_files, "load", late)
    assert PrunePlan.from_pretrained(tmp_path) == second


def test_a_json_changed_by_hand_keeps_its_weights(tmp_path: Path) -> None:
    plan = trained(0.5)
    plan.save_pretrained(tmp_path)
    file = tmp_path / PLAN_FILE
    file.write_text(file.read_text().replace("1/2", "1/3"))
    changed = PrunePlan.from_pretrained(tmp_path)
    assert changed.stages[0].keep == Fraction(1, 3)
    assert changed.weights.keys() == plan.weights.keys()


def test_a_json_changed_by_hand_after_an_interrupted_saving_is_not_guessed_at(tmp_path: Path) -> None:
    trained(0.5).save_pretrained(tmp_path)
    file = tmp_path / PLAN_FILE
    file.write_text(file.read_text().replace("1/2", "1/3"))
    (tmp_path / "predictors-0123456789abcdef.safetensors").write_bytes(b"")
    with pytest.raises(WeightsError, match="not clear which weights"):
        PrunePlan.from_pretrained(tmp_path)


@pytest.mark.parametrize("call", ["fsync", "mkdir", "replace"])
def test_a_disk_that_refuses_leaves_the_old_plan(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = trained(0.5)
    first.save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path if call == "replace" else os, call, refuse)
        with pytest.raises(ExportError, match="No space left on device") as error:
            trained(0.25).save_pretrained(tmp_path)
        one_line(error)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
