"""Ray Data as the engine, where it is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exported import expected, shared, texts

pytest.importorskip("openvino")
pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq

from prunepass.bulk import Embedder
from prunepass.bulk.files import embed_files
from prunepass.errors import MissingExtraError, OptionError, PruneError

FULL: dict[str, Any] = {"precision": "f32", "tokens": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared("encoder", tmp_path_factory)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    pq.write_table(pa.table({"id": range(40), "text": [*texts(39), None]}), tmp_path / "in.parquet")
    return tmp_path / "in.parquet"


def test_ray_that_is_not_installed(folder: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(
        MissingExtraError, match=r'needs the package ray. Install it with: pip install "prunepass\[ray\]"'
    ):
        embed_files(folder, [table], tmp_path / "out", engine="ray")
    assert not (tmp_path / "out").exists()


def test_an_actor_answers_what_goes_wrong(folder: Path, table: Path, tmp_path: Path) -> None:
    """Ray would try the same again."""
    from prunepass.bulk.ray_data import Actor

    out = tmp_path / "out"
    embed_files(folder, [table], out, rows=10, cpus=1, **FULL)
    actor = Actor(str(out), 1)
    table.write_bytes(b"")
    found = actor({"shard": np.array([1])})
    assert found["error"][0].startswith("DataError: ")
    assert "has changed since the run began" in found["error"][0]
    with pytest.raises(PruneError, match="is not there on this node; Ray needs storage that all nodes share"):
        Actor(str(tmp_path / "elsewhere"), 1)


@pytest.mark.slow
class TestRay:
    def test_the_same_files_and_one_engine_goes_on_with_the_others_run(
        self, folder: Path, table: Path, tmp_path: Path
    ) -> None:
        pytest.importorskip("ray")
        one, two = tmp_path / "one", tmp_path / "two"
        summary = embed_files(folder, [table], one, rows=10, engine="ray", workers=2, **FULL)
        assert (summary.documents, summary.rows, summary.wrong) == (40, 39, 1)
        local = embed_files(folder, [table], two, rows=10, cpus=1, **FULL)
        assert local.tokens == summary.tokens
        names = [f"part-0000{i}.parquet" for i in range(4)]
        assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)
        (two / "_done.json").unlink()
        (two / names[2]).unlink()
        assert embed_files(folder, [table], two, rows=10, resume=True, engine="ray", **FULL).rows == 39
        assert (one / names[2]).read_bytes() == (two / names[2]).read_bytes()

    def test_an_actor_that_dies(self, folder: Path, table: Path, tmp_path: Path) -> None:
        """Ray starts it anew, and the shard with it; the file stands once, and the attempt is counted."""
        pytest.importorskip("ray")
        out = tmp_path / "out"
        embed_files(folder, [table], out, rows=10, cpus=1, **FULL)
        (out / "_done.json").unlink()
        before = (out / "part-00003.parquet").read_bytes()
        for part in out.glob("part-*"):
            part.unlink()

        class Dying:
            """The actor, whose process ends in the middle of the last shard, once."""

            def __init__(self, output: str, cpus: int) -> None:
                from prunepass.bulk.ray_data import Actor

                self.actor, self.flag = Actor(output, cpus), Path(output).with_name("died")

            def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
                import os

                if batch["shard"].tolist() == [3] and not self.flag.exists():
                    self.flag.touch()
                    self.actor._output.mark(3)
                    os._exit(1)
                return self.actor(batch)

        import prunepass.bulk.ray_data as engine

        kept, engine.Actor = engine.Actor, Dying  # type: ignore[assignment,misc]  # another class in its place
        try:
            summary = embed_files(folder, [table], out, rows=10, resume=True, engine="ray", **FULL)
        finally:
            engine.Actor = kept  # type: ignore[misc]  # a class is no variable
        assert (tmp_path / "died").exists()
        assert (summary.rows, summary.repeated) == (39, 10)
        assert (out / "part-00003.parquet").read_bytes() == before

    def test_more_cores_than_there_are(self, folder: Path, table: Path, tmp_path: Path) -> None:
        pytest.importorskip("ray")
        with pytest.raises(OptionError, match=r"workers=4 of 1000 cores each are more than the \d+ that Ray has"):
            embed_files(folder, [table], tmp_path / "out", rows=10, engine="ray", workers=9, cpus=1000)

    def test_the_class_itself_maps_batches(self, folder: Path, tmp_path: Path) -> None:
        ray = pytest.importorskip("ray")
        pytest.importorskip("ray.data")
        given = texts(30, 9)
        ray.init(log_to_driver=False, logging_level="ERROR", include_dashboard=False)
        try:
            found = ray.data.from_items([{"text": text} for text in given]).map_batches(
                Embedder,
                fn_constructor_args=(str(folder),),
                fn_constructor_kwargs={"cpus": 1, **FULL},
                batch_size=10,
                num_cpus=1,
                compute=ray.data.ActorPoolStrategy(size=1),
            )
            rows = {row["text"]: row["vector"] for row in found.iter_rows()}
        finally:
            ray.shutdown()
        assert np.abs(np.stack([rows[text] for text in given]) - expected(folder, given)).max() < 1e-4
