"""The cache on disk: what is found again, what is not, damaged entries, and two processes at once."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import runtimes
import torch
from runtimes import CONFIG, OFFLINE, assert_same, predictor, text
from torch import Tensor, nn

import prunepass
from prunepass import PrunePlan, ScorerSpec, Stage
from prunepass.backends import _offline, cache
from prunepass.backends._stored import session_key
from prunepass.errors import OptionError

PLAN = PrunePlan([Stage(1, 0.6)])
INPUTS = text(2, 9)
bert = partial(runtimes.bert, num_layers=2)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cache, "_info", cache.CacheInfo())
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model: nn.Module, folder: Path | None, target: str = "openvino", plan: Any = PLAN, **options: Any) -> Any:
    """As a new process would: Dynamo has forgotten what it saw."""
    torch._dynamo.reset()
    options = {"plan": plan, "target": target, "config": CONFIG.get(target, {}), "cache_dir": folder, **options}
    return torch.compile(model, backend="tokprune", dynamic=True, options=options)


def call(model: nn.Module, folder: Path | None, target: str = "openvino", plan: Any = PLAN, **options: Any) -> Any:
    with torch.no_grad():
        return compiled(model, folder, target, plan, **options)(**INPUTS)


def counts() -> tuple[int, ...]:
    """hits, misses, damaged, skipped"""
    return astuple(prunepass.cache_info())


@pytest.fixture(scope="module", name="written")
def _written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """By target, a folder with one entry, and what the model gave."""
    folders = {target: tmp_path_factory.mktemp(target) for target in OFFLINE}
    return {target: (folder, call(bert(), folder, target)) for target, folder in folders.items()}


@pytest.mark.parametrize("target", ["openvino", pytest.param("onnxruntime", marks=pytest.mark.slow)])
def test_the_second_time_nothing_is_exported(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = bert()
    first = call(model, tmp_path, target)
    assert counts() == (0, 1, 0, 0)

    def fail(*_: Any, **__: Any) -> Any:
        raise AssertionError("exported again")

    longer = prunepass_reference(model, text(3, 33))
    monkeypatch.setattr(_offline, "export", fail)
    with caplog.at_level(logging.INFO, logger="prunepass"):
        fast = compiled(bert(), tmp_path, target)
        with torch.no_grad():
            assert_same(fast(**INPUTS), first, within=1e-6)
            assert_same(fast(**text(3, 33)), longer)
    assert counts() == (1, 1, 0, 0)
    assert f"{target}: a session from {tmp_path}" in caplog.text
    assert len(list(tmp_path.iterdir())) == 1


def prunepass_reference(model: nn.Module, inputs: dict[str, Tensor]) -> Any:
    return prunepass.prune(model, PLAN, INPUTS)(**inputs)


def test_whatever_changes_the_result_changes_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[str] = []

    def only_the_key(self: Any, args: Any, *, dynamic: bool) -> Any:
        keys.append(session_key(self._graph_module, self._roles, args, self._files, dynamic=dynamic))
        raise RuntimeError("the key is all that is asked for")

    monkeypatch.setattr(_offline.OfflineGraph, "_build_variant", only_the_key)

    def key(model: nn.Module, **options: Any) -> str:
        with pytest.raises(Exception, match="all that is asked"):
            call(model, tmp_path, **options)
        return keys[-1]

    def mlp(seed: int) -> PrunePlan:
        return PrunePlan([Stage(1, 0.6)], scorer=ScorerSpec("mlp"), weights=predictor(seed))

    def small(seed: int = 0) -> nn.Module:
        return bert(seed, num_layers=2)

    changed = small()
    with torch.no_grad():
        changed.encoder.layer[1].output.dense.weight[0, 0] += 1e-3
    different = [
        key(small()),
        key(changed),
        key(small(), plan=PrunePlan([Stage(1, 0.5)])),
        key(small(), plan=mlp(0)),
        key(small(), plan=mlp(1)),
        key(small(), config={**CONFIG["openvino"], "INFERENCE_NUM_THREADS": 1}),
        key(small(), target="onnxruntime"),
    ]
    assert len(set(different)) == len(different)
    assert key(small()) == different[0]


@pytest.mark.parametrize(
    "damage", ["entry", *(pytest.param(d, marks=pytest.mark.slow) for d in ("flipped", "cut", "gone", "garbage"))]
)
@pytest.mark.parametrize("target", ["openvino", pytest.param("onnxruntime", marks=pytest.mark.slow)])
def test_damaged_entries_are_written_anew(
    target: str,
    damage: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    written: dict[str, tuple[Path, Any]],
) -> None:
    intact, first = written[target]
    folder = Path(shutil.copytree(intact, tmp_path / "copy"))
    (entry,) = folder.iterdir()
    largest = max(entry.iterdir(), key=lambda f: f.stat().st_size)
    content = largest.read_bytes()
    if damage == "cut":
        largest.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        largest.write_bytes(content[:-100] + bytes([content[-100] ^ 1]) + content[-99:])
    elif damage == "gone":
        largest.unlink()
    elif damage == "entry":
        text = (entry / "entry.json").read_text()
        (entry / "entry.json").write_text(text.replace("64", "65"))
    else:
        (entry / "entry.json").write_text("{")
    with caplog.at_level(logging.WARNING, logger="prunepass"):
        assert_same(call(bert(), folder, target), first, within=1e-6)
    assert "is damaged and will be written anew" in caplog.text
    assert counts() == (0, 1, 1, 0)
    assert_same(call(bert(), folder, target), first, within=1e-6)
    assert counts() == (1, 1, 1, 0)
    assert len(list(folder.iterdir())) == 1


@pytest.mark.slow
def test_an_entry_with_another_model_in_it_is_not_believed(
    tmp_path: Path, written: dict[str, tuple[Path, Any]]
) -> None:
    (one,) = Path(shutil.copytree(written["openvino"][0], tmp_path / "copy")).iterdir()
    call(bert(seed=1), one.parent)
    (two,) = set(one.parent.iterdir()) - {one}
    (one / "compiled.blob").write_bytes((two / "compiled.blob").read_bytes())
    assert_same(call(bert(), one.parent), prunepass_reference(bert(), INPUTS))
    assert prunepass.cache_info().damaged == 1


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_costs_the_cache_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level(logging.WARNING, logger="prunepass"):
        assert_same(call(bert(), tmp_path / "file" / "cache"), prunepass_reference(bert(), INPUTS))
    assert "cannot be written" in caplog.text


@pytest.mark.slow
def test_the_environment_names_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: dict[str, tuple[Path, Any]]
) -> None:
    monkeypatch.setenv("PRUNEPASS_CACHE", str(tmp_path / "env"))
    call(bert(), None)
    assert len(list((tmp_path / "env").iterdir())) == 1
    shutil.rmtree(tmp_path / "env")
    call(bert(), written["openvino"][0])
    assert not (tmp_path / "env").exists(), "the option goes before"
    assert counts() == (1, 1, 0, 0)


def test_without_a_folder_nothing_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PRUNEPASS_CACHE", raising=False)
    call(bert(), None)
    assert counts() == (0, 0, 0, 0)


def test_graphs_without_a_key_run_all_the_same(tmp_path: Path) -> None:
    class Sized(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x * 2, x.shape[0]

    from prunepass.backends import get_target

    with cache.using(tmp_path):
        lower = get_target("openvino").lower
        fast = torch.compile(Sized(), backend=lambda gm, inputs: lower(gm, inputs), dynamic=True)
        found, rows = fast(torch.ones(3, 4))
    assert rows == 3
    torch.testing.assert_close(found, torch.full((3, 4), 2.0))
    assert prunepass.cache_info().hits == 0


@pytest.mark.parametrize("target", ["inductor", "eager"])
def test_other_targets_say_that_they_keep_nothing(target: str, tmp_path: Path) -> None:
    from prunepass.dynamo.backend import Options

    with pytest.raises(OptionError, match="TORCHINDUCTOR_CACHE_DIR"):
        Options.parse({"target": target, "cache_dir": tmp_path})
    with pytest.raises(OptionError, match="must be a folder"):
        Options.parse({"target": "openvino", "cache_dir": 3})


def test_what_killed_processes_left_is_removed_after_a_day(tmp_path: Path) -> None:
    entries = cache.Entries(tmp_path)
    for name, age in ((".old", 2 * 24 * 3600), (".new", 0)):
        (tmp_path / name).mkdir()
        then = (tmp_path / name).stat().st_mtime - age
        os.utime(tmp_path / name, (then, then))
    entries.write("key", lambda folder: (folder / "file").write_text("content"))
    assert {p.name for p in tmp_path.iterdir()} == {".new", "key"}
    assert entries.read("key", lambda folder, notes: (folder / "file").read_text()) == "content"


def test_names_of_nodes_and_symbols_do_not_matter() -> None:
    from prunepass.backends._graph_key import graph_text

    texts = []
    for length in (9, 12):
        graphs: list[Any] = []
        torch._dynamo.reset()
        torch.compile(bert(), backend=lambda gm, inputs, graphs=graphs: graphs.append(gm) or gm, dynamic=True)(
            **text(2, length)
        )
        texts.append(json.dumps(graph_text(graphs[0])))
    assert texts[0] == texts[1]


_PROCESS = """
import json, sys
sys.path.insert(0, {tests!r})
import torch
from runtimes import CONFIG, bert, text
import prunepass
plan = prunepass.PrunePlan([prunepass.Stage(1, 0.6)])
options = {{"plan": plan, "target": "openvino", "config": CONFIG["openvino"], "cache_dir": {folder!r}}}
fast = torch.compile(bert(), backend="tokprune", dynamic=True, options=options)
with torch.no_grad():
    total = fast(**text(2, 9)).last_hidden_state.double().abs().sum().item()
info = prunepass.cache_info()
print(json.dumps([total, info.hits, info.misses, info.damaged]))
"""


def test_two_processes_at_once_and_one_after_them(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    code = _PROCESS.format(tests=str(Path(__file__).parent.parent), folder=str(folder))

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], stdout=subprocess.PIPE, text=True)

    results = [json.loads(p.communicate()[0].splitlines()[-1]) for p in (start(), start())]
    last = json.loads(start().communicate()[0].splitlines()[-1])
    assert [p.name for p in folder.iterdir() if p.name.startswith(".")] == []
    assert len(list(folder.iterdir())) == 1, "the same key in every process"
    assert all(r[3] == 0 and r[1] + r[2] == 1 for r in results)
    assert last[1:] == [1, 0, 0]
    assert all(r[0] == pytest.approx(last[0], rel=1e-5) for r in results)
