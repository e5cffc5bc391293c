"""`explain` with a plan for each part of a vision-language model, against what runs and what `prune()` keeps."""

from __future__ import annotations

import json
import math
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tower_oracle import PACKED, TOWER, plans_of
from vision_oracle import PLAN, ROWS

import prunepass
import vision
import zoo
from prunepass import PrunePlan, Report, Stage
from prunepass.errors import OptionError, PlanError, RefusalError
from prunepass.passes.pruned_vision import PrunedVision
from prunepass.pipeline import kept_tokens

BOTH = {"vision_tower": TOWER, "language_model": PLAN}
VISION, LANGUAGE = "model.vision_tower", "model.language_model"


@cache
def prompt(name: str = "llava") -> dict[str, Any]:
    return vision.prompt(name, ROWS)


@cache
def report(name: str = "llava") -> Report:
    return prunepass.explain(vision.tiny(name), plans_of(name, PLAN), prompt(name))


def spent(model: nn.Module, inputs: dict[str, Any]) -> int:
    """FLOPs of a run, as torch counts them."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(**inputs)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["llava", pytest.param("gemma3", marks=pytest.mark.slow), "idefics3"])
def test_flops_are_those_of_what_runs(name: str) -> None:
    whole = report(name).whole
    assert whole is not None
    assert whole.dense == spent(vision.tiny(name), prompt(name))
    assert whole.pruned == spent(prunepass.prune(vision.tiny(name), plans_of(name, PLAN), prompt(name)), prompt(name))
    assert (whole.dense, whole.pruned) == tuple(sum(getattr(p, k) for p in whole.parts) for k in ("dense", "pruned"))
    tower, beside, language = whole.parts
    assert tower.dense > tower.pruned
    assert beside.dense == beside.pruned > 0
    assert language.dense > language.pruned


def test_each_part_has_its_own_stages() -> None:
    tower, language = report().parts
    assert (tower.part, tower.model, language.part, language.model) == (
        VISION,
        "CLIPVisionModel",
        LANGUAGE,
        "LlamaModel",
    )
    assert [(s.place, s.count) for s in tower.stages] == [("before block 1", math.ceil(0.4 * 17))]
    assert [block.path for block in tower.blocks] == [f"{VISION}.encoder.layers.{i}" for i in range(2)]
    assert tower.streams[0].startswith(f"{VISION}.encoder (from pixel_values): 17 tokens")
    assert [s.path for s in language.stages] == [f"{LANGUAGE}.layers.{i}" for i in (1, 2)]
    # the longest row has 15 tokens of text, and 32 of two images
    counts = [(s.place, s.kept, s.count) for s in language.stages]
    assert counts == [("before block 1", "S - I + ceil(I/2)", 31), ("before block 2", "S - I + ceil(I/5)", 22)]
    assert [block.count_in for block in language.blocks] == [47, 31, 22, 22]
    assert all(block.pruned_flops < block.dense_flops for block in language.blocks[1:])
    assert language.blocks[0].pruned_flops == language.blocks[0].dense_flops
    assert language.plan.protect.only_ids == (vision.IMAGE,)
    assert "32, 16, 0 in the rows of the example" in language.streams[0]


def test_counts_are_the_pruned_models() -> None:
    pruned = prunepass.prune(vision.tiny("llava"), BOTH, prompt())
    assert isinstance(pruned, PrunedVision)
    names = set(pruned.result.kept)
    found = {}

    class Kept(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n.name in names:
                found[n.name] = value
            return value

    call = pruned.language_inputs(**prompt())
    with torch.no_grad():
        Kept(pruned.graph_module).run(*(call[n.target] for n in pruned.graph_module.graph.find_nodes(op="placeholder")))
    language = report().parts[1]
    assert [found[name].shape[1] for name in pruned.result.kept] == [s.count for s in language.stages]
    sentence = language.sentence
    assert sentence is not None
    assert sentence.words == tuple(map(str, prompt()["input_ids"][0].tolist())), "the first row has no padding"
    for name, block in zip(pruned.result.kept, (1, 2), strict=True):
        assert found[name][0].tolist() == [i for i, last in enumerate(sentence.last_block) if last >= block]


def test_patches_that_the_tower_keeps_are_drawn() -> None:
    tower, language = report().parts
    assert tower.picture is not None
    assert language.picture is None
    (kept,) = kept_tokens(vision.tiny("llava").model.vision_tower, TOWER, {"pixel_values": prompt()["pixel_values"]})
    assert list(tower.picture.stages[0].kept) == kept[0, 1:].nonzero()[:, 0].tolist()


def test_text_page_and_json(tmp_path: Path) -> None:
    shown = str(report())
    assert f"\n{VISION} (CLIPVisionModel)\n" in shown
    assert f"\n{LANGUAGE} (LlamaModel)\n" in shown
    assert re.search(rf"\n  {VISION} +\d", shown)
    assert re.search(r"\n  the whole model +\d", shown)
    assert "all but ids 90" in shown
    page = report().to_html(tmp_path / "report.html").read_text()
    assert page.count('<h2 class="part">') == 2
    assert "FLOPs of the whole model" in page
    assert '<g id="example-0">' in page
    assert page.count('<use href="#example-0"/>') == 1
    assert "not measured" not in page
    data = json.loads(json.dumps(report().to_dict()))
    assert [part["part"] for part in data["parts"]] == [VISION, LANGUAGE]
    assert data["parts"][0]["plan"] == TOWER.to_dict()
    assert data["whole"]["pruned"] < data["whole"]["dense"]
    assert repr(report()).startswith(f"Report(LlavaForConditionalGeneration: {VISION}, 1 stages in 2 blocks; ")


@pytest.mark.parametrize(
    ("plan", "part"), [(PLAN, LANGUAGE), pytest.param({"vision_tower": TOWER}, VISION, marks=pytest.mark.slow)]
)
def test_one_part(plan: Any, part: str) -> None:
    model = vision.tiny("llava")
    alone = prunepass.explain(model, plan, prompt())
    assert [part.part for part in alone.parts] == [part]
    assert alone.whole is not None
    assert alone.whole.pruned == spent(prunepass.prune(model, plan, prompt()), prompt())


@pytest.mark.parametrize("part", [VISION, pytest.param(LANGUAGE, marks=pytest.mark.slow)])
def test_a_plan_that_a_part_refuses(part: str) -> None:
    plans = {VISION: TOWER, LANGUAGE: PLAN, part: PrunePlan([Stage(7, 0.5)], "norm")}
    found = prunepass.explain(vision.tiny("llava"), plans, prompt())
    assert [(refusal.where, refusal.fault) for refusal in found.refusals] == [(part, "plan")]
    assert found.whole is None
    assert [len(part.blocks) for part in found.parts] == [2, vision.LAYERS]
    assert str(found).count("Refused: ") == 1


class TestRefused:
    def test_a_stream_that_is_not_there(self) -> None:
        with pytest.raises(PlanError, match=r"'tower' names no module of LlavaForConditionalGeneration"):
            prunepass.explain(vision.tiny("llava"), {"tower": TOWER}, prompt())

    def test_no_images(self) -> None:
        with pytest.raises(OptionError, match="with input_ids and pixel_values"):
            prunepass.explain(vision.tiny("llava"), BOTH, vision.prompt("llava", [[12]]))

    @pytest.mark.parametrize("given", [{"lengths": [4]}, {"max_length": 9}, {"text": "a", "tokenizer": object()}])
    def test_what_is_of_texts(self, given: dict[str, Any]) -> None:
        with pytest.raises(OptionError, match=rf"explain\({next(iter(given))}=\.\.\.\) is of rows of text"):
            prunepass.explain(vision.tiny("llava"), BOTH, prompt(), **given)

    def test_all_images_in_one_row(self) -> None:
        name = next(iter(PACKED))
        with pytest.raises(RefusalError, match="patches of all images in one row"):
            prunepass.explain(vision.tiny(name), {"visual": TOWER}, prompt(name))

    def test_other_models(self) -> None:
        with pytest.raises(PlanError, match="'vision_tower' holds no stream of tokens of this model"):
            prunepass.explain(zoo.tiny("bert"), BOTH, zoo.batch([5]))


@pytest.mark.slow
def test_fusions_of_each_part() -> None:
    pytest.importorskip("openvino")
    model = vision.tiny("llava", torch.float32)
    inputs = {k: v.float() if v.is_floating_point() else v for k, v in prompt().items()}
    tower, language = prunepass.explain(model, BOTH, inputs, target="openvino").parts
    for part, blocks in ((tower, 2), (language, vision.LAYERS)):
        assert part.fusions is not None
        assert part.fusions.rows[0].dense == part.fusions.rows[0].pruned == blocks
