"""`explain` on tiny models: counts and FLOPs against hand formulas, tokens against the graph's own, refusals."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoo
from prunepass.cost import CorpusFlops
from prunepass.errors import OptionError
from prunepass.pipeline import kept_tokens
from prunepass.plan import Protect, PrunePlan, Stage
from prunepass.report.build import Report, explain

PLAN = PrunePlan([Stage(1, 0.5), Stage(2, 0.25, after_attention=True)], scorer="norm")
LENGTHS = [11, 7]


@cache
def model(name: str = "bert") -> nn.Module:
    return zoo.tiny(name)


def example() -> dict[str, Tensor]:
    return zoo.batch(LENGTHS)


@cache
def report(plan: PrunePlan = PLAN, name: str = "bert") -> Report:
    return explain(model(name), plan, example(), lengths=(4, 9, 30), batch_size=2)


class Words:
    """Stands in for a tokenizer: one word an id."""

    model_max_length = 40

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [f"word{i}" for i in ids]

    def __call__(self, text: str, **_: Any) -> dict[str, Tensor]:
        ids = torch.tensor([[5 + len(word) for word in text.split()]])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}


@cache
def with_text() -> Report:
    return explain(model(), PLAN, example(), tokenizer=Words(), text="a sentence of five words")


@cache
def positional() -> Report:
    """Inputs by position, with more protected ids than the first row has room for."""
    inputs = zoo.batch(LENGTHS, high=50)
    inputs["input_ids"][0, 2:8] = 50
    plan = PrunePlan([Stage(1, 0.5)], scorer="norm", protect=Protect(token_ids=(50,)))
    return explain(model(), plan, tuple(inputs.values()))


def kept(length: int, quarters: int) -> int:
    return -(-length * quarters // 4)


def block_flops(batch: int, in_attention: int, after: int) -> int:
    projections = 2 * in_attention * 4 * zoo.HIDDEN**2
    attention = 4 * in_attention**2 * zoo.HIDDEN
    feed_forward = 2 * after * 2 * zoo.HIDDEN * zoo.INTERMEDIATE
    return batch * (projections + attention + feed_forward)


def encoder_flops(batch: int, length: int, *, pruned: bool) -> int:
    half, quarter = kept(length, 2), kept(length, 1)
    widths = [(length, length), (half, half), (half, quarter), (quarter, quarter)]
    pooler = 2 * batch * zoo.HIDDEN**2
    return pooler + sum(block_flops(batch, *w) for w in (widths if pruned else [(length, length)] * zoo.LAYERS))


# -- what is found and where ----------------------------------------------------------------------------------------


def test_blocks_and_the_tokens_in_them() -> None:
    blocks = report().blocks
    assert [b.path for b in blocks] == [f"encoder.layer.{i}" for i in range(zoo.LAYERS)]
    assert {b.attention for b in blocks} == {"scaled_dot_product_attention"}
    half, quarter = "ceil(S/2)", "ceil(S/4)"
    assert [(b.tokens_in, b.tokens_out) for b in blocks] == [
        ("S", "S"),
        (half, half),
        (half, quarter),
        (quarter, quarter),
    ]
    assert [(b.count_in, b.count_out) for b in blocks] == [(11, 11), (6, 6), (6, 3), (3, 3)]


def test_stages() -> None:
    found = report().stages
    assert [(s.place, s.path, s.scorer, s.keep, s.kept, s.count) for s in found] == [
        ("before block 1", "encoder.layer.1", "norm", "1/2", "ceil(S/2)", 6),
        ("after the attention of block 2", "encoder.layer.2", "norm", "1/4", "ceil(S/4)", 3),
    ]


def test_passes_say_what_they_changed_and_added() -> None:
    passes = report().passes
    assert sum(p.changes for p in passes) > 0
    assert sum(p.nodes_added for p in passes) > 0
    assert all(p.seconds >= 0 for p in passes)


# -- FLOPs ----------------------------------------------------------------------------------------------------------


def test_flops_of_each_block() -> None:
    widths = [(11, 11), (6, 6), (6, 3), (3, 3)]
    blocks = report().blocks
    assert [b.dense_flops for b in blocks] == [block_flops(2, 11, 11)] * zoo.LAYERS
    assert [b.pruned_flops for b in blocks] == [block_flops(2, *w) for w in widths]


def test_flops_against_three_denominators() -> None:
    flops = report().flops
    assert flops is not None
    for pruned, counted in ((False, flops.dense), (True, flops.pruned)):
        by_max = [encoder_flops(2, zoo.POSITIONS, pruned=pruned), encoder_flops(1, zoo.POSITIONS, pruned=pruned)]
        by_batch = [encoder_flops(2, 9, pruned=pruned), encoder_flops(1, 30, pruned=pruned)]
        real = [encoder_flops(1, n, pruned=pruned) for n in (4, 9, 30)]
        assert counted == CorpusFlops(sum(by_max), sum(by_batch), sum(real))
    assert (flops.rows, flops.tokens, flops.max_length, flops.batch_size) == (3, 43, zoo.POSITIONS, 2)
    assert flops.example_pruned == encoder_flops(2, 11, pruned=True)


def test_a_scorer_without_products_adds_no_flops_but_moves_elements() -> None:
    flops = report().flops
    assert flops is not None
    assert flops.scoring == 0
    assert flops.moved > 0


def test_the_attention_scorers_own_work_is_counted() -> None:
    flops = report(PrunePlan([Stage(2, 0.5)], scorer="attention")).flops
    assert flops is not None
    # Scores of every pair once more, for the one block before the stage.
    assert flops.scoring == 2 * 2 * 11 * 11 * zoo.HIDDEN
    widths = [(11, 11), (11, 11), (6, 6), (6, 6)]
    pooler = 2 * 2 * zoo.HIDDEN**2
    assert flops.example_pruned == flops.scoring + pooler + sum(block_flops(2, *w) for w in widths)


def test_lengths_of_the_example_are_the_default_corpus() -> None:
    flops = with_text().flops
    assert flops is not None
    assert (flops.rows, flops.tokens) == (2, sum(LENGTHS))
    assert flops.dense.real_tokens == sum(encoder_flops(1, n, pruned=False) for n in LENGTHS)


def test_with_every_keep_at_one_nothing_changes() -> None:
    found = report(PrunePlan([Stage(1, 1)], scorer="norm"))
    assert found.flops is not None
    assert found.flops.pruned == found.flops.dense
    assert found.flops.moved == 0
    assert found.sentence is not None
    assert set(found.sentence.last_block) == {zoo.LAYERS - 1}


def test_shared_layers_are_told_apart() -> None:
    found = report(PLAN, "albert")
    assert len(found.blocks) == zoo.LAYERS
    assert [b.dense_flops for b in found.blocks] == [block_flops(2, 11, 11)] * zoo.LAYERS
    assert [b.pruned_flops for b in found.blocks] == [block_flops(2, *w) for w in [(11, 11), (6, 6), (6, 3), (3, 3)]]


# -- the sentence ---------------------------------------------------------------------------------------------------


def test_sentence_follows_the_live_tokens_of_the_first_row() -> None:
    sentence = report().sentence
    assert sentence is not None
    assert sentence.words == tuple(str(int(i)) for i in example()["input_ids"][0])
    after = [sum(last >= block for last in sentence.last_block) for block in range(zoo.LAYERS)]
    assert after == [11, 6, 6, 3]  # alive in block 2 until its attention has run
    first = {k: v[:1] for k, v in example().items()}
    masks = kept_tokens(model(), PLAN, first)
    assert [last >= 3 for last in sentence.last_block] == masks[1][0].tolist()


def test_text_is_followed_with_its_words() -> None:
    found = with_text()
    assert found.sentence is not None
    assert found.sentence.words == ("word6", "word13", "word7", "word9", "word10")
    assert sum(last == zoo.LAYERS - 1 for last in found.sentence.last_block) == kept(5, 1)
    assert found.flops is not None
    assert found.flops.max_length == Words.model_max_length


def test_text_needs_a_tokenizer() -> None:
    with pytest.raises(OptionError, match="tokenizer"):
        explain(model(), PLAN, example(), text="a sentence")


# -- messages -------------------------------------------------------------------------------------------------------


def test_a_refused_model_is_reported_not_raised() -> None:
    found = report(PLAN, "convbert")
    assert len(found.refusals) == 1
    assert "encoder.layer" in (found.refusals[0].where or "")
    assert found.refusals[0].reason in " ".join(str(found).split())
    assert found.flops is None


def test_a_layer_out_of_range_is_reported() -> None:
    found = report(PrunePlan([Stage(zoo.LAYERS, 0.5)], scorer="norm"))
    (refusal,) = found.refusals
    assert str(zoo.LAYERS) in refusal.reason


def test_protected_ids_beyond_the_budget_are_warned_of() -> None:
    (warning,) = (w for w in positional().warnings if "row 0" in w)  # the first token and six by id, room for 6 of 11
    assert "7 tokens of row 0" in warning
    assert "room for 6" in warning


# -- forms ----------------------------------------------------------------------------------------------------------


def test_every_form_holds_the_same_figures(tmp_path: Path) -> None:
    found = report()
    assert found.flops is not None
    data = json.loads(json.dumps(found.to_dict()))
    assert data["flops"]["pruned"] == asdict(found.flops.pruned)
    ratio = f"{found.flops.dense.real_tokens / found.flops.pruned.real_tokens:.2f}x"
    assert ratio in str(found)
    assert ratio in found.to_html(tmp_path / "report.html").read_text(encoding="utf-8")


def test_positional_inputs() -> None:
    found = positional()
    assert [b.count_out for b in found.blocks] == [11, 6, 6, 6]
    assert found.sentence is not None
    assert len(found.sentence.words) == 11


@pytest.mark.slow
def test_fusions_on_a_target() -> None:
    pytest.importorskip("openvino")
    found = explain(zoo.tiny("bert", dtype=torch.float32), PLAN, example(), target="openvino")
    assert found.fusions is not None
    assert found.fusions.target == "openvino"
    kinds = {row.kind: (row.dense, row.pruned) for row in found.fusions.rows}
    assert kinds["attention"] == (zoo.LAYERS, zoo.LAYERS)


# -- what a notebook shows -------------------------------------------------------------------------------------------


def test_a_notebook_shows_the_page_in_a_frame() -> None:
    from html import unescape

    from prunepass.report.html import render_html

    page = with_text()._repr_html_()
    (inner,) = re.findall(r'<iframe srcdoc="([^"]*)"', page)
    assert unescape(inner) == render_html(with_text())


def test_reprs_are_one_short_line() -> None:
    from prunepass.dynamo.backend import Compilation
    from prunepass.pipeline import prune

    pruned = prune(model(), PLAN, example())
    result: Any = pruned.result
    compilation = Compilation("inductor", PLAN, result)
    assert repr(report()) == f"Report(BertModel: 2 stages in {zoo.LAYERS} blocks)"
    assert repr(report(PLAN, "convbert")).startswith("Report(ConvBertModel: refused, '")
    assert repr(pruned) == f"PrunedModule(BertModel, {PLAN!r})"
    assert re.fullmatch(rf"PruneResult\(2 stages in {zoo.LAYERS} blocks, mode='gather', \d+ nodes\)", repr(result))
    assert repr(compilation) == "Compilation(pruned in 2 stages on inductor)"
    assert all("\n" not in repr(x) for x in (report(PLAN, "convbert"), pruned, result, compilation))
