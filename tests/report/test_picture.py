"""The picture in a report: which patches each stage keeps, over the example's first image."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

import prunepass
import senses
from prunepass import PrunePlan, Stage
from prunepass.pipeline import kept_tokens
from prunepass.report.data import Drawn, Picture
from prunepass.report.picture import _png, _shown, picture_figures

PLAN = PrunePlan([Stage(1, 0.5, leave="merge"), Stage(3, 0.25)], "norm")


def test_a_report_draws_what_stages_keep(tmp_path: Path) -> None:
    model, x = senses.tiny("deit"), senses.example("deit")
    report = prunepass.explain(model, PLAN, x)
    picture = report.picture
    assert picture is not None
    assert (picture.rows, picture.columns) == (6, 6)
    assert [drawn.merges for drawn in picture.stages] == [True, False]
    for drawn, kept in zip(picture.stages, kept_tokens(model, report.plan, x), strict=True):
        assert [i for i in range(36) if kept[0, 2 + i]] == list(drawn.kept), "two tokens stand before the patches"
    page = report.to_html(tmp_path / "report.html").read_text()
    assert "Patches kept at each stage" in page
    assert page.count("<svg viewBox") == 2
    assert f"before block 3: {len(picture.stages[1].kept)} of 36 patches" in page
    assert page.count("data:image/png;base64,") == 1, "the picture is there once"
    assert json.loads(json.dumps(report.to_dict()))["picture"]["columns"] == 6


def test_what_has_no_patches_has_no_picture() -> None:
    assert prunepass.explain(senses.tiny("ast"), PLAN, senses.example("ast")).picture is None
    assert prunepass.explain(senses.tiny("vit"), PrunePlan(()), senses.example("vit")).picture is None


def test_patches_that_left_lie_under_a_shade() -> None:
    page = picture_figures(Picture("AAAA", 2, 3, (Drawn("before <1>", (0, 4), True), Drawn("later", (4,), False))))
    shades = re.findall(r'<path class="(\w+)" d="([^"]*)"', page)
    assert [kind for kind, _ in shades] == ["merged", "dropped"]
    assert shades[0][1] == "M1 0h1v1h-1zM2 0h1v1h-1zM0 1h1v1h-1zM2 1h1v1h-1z"
    assert "before &lt;1&gt;: 2 of 6 patches" in page
    assert 'viewBox="0 0 3 2"' in page


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pixels_become_a_png(channels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(channels, 5, 7, generator=generator) * 4 - 2
    shown = _shown(image)
    opened = Image.open(io.BytesIO(_png(shown)))
    opened.load()
    assert opened.size == (7, 5)
    assert torch.equal(torch.frombuffer(bytearray(opened.tobytes()), dtype=torch.uint8), shown.flatten())
    assert (int(shown.min()), int(shown.max())) == (0, 255)


def test_large_pictures_are_made_smaller() -> None:
    assert _shown(torch.randn(3, 1024, 512)).shape == (336, 168, 3)
    assert base64.b64encode(_png(_shown(torch.zeros(3, 8, 8)))), "one colour is a picture, too"
