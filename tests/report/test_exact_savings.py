"""What `explain` counts as saved with no token pruned, against hand counts and against what `torch.compile` runs."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from sweep.models import build
from torch import nn

import oracle
import zoo
from prunepass.cost import CorpusFlops, FlopCounter
from prunepass.dynamo.backend import compilations
from prunepass.pipeline import prune
from prunepass.plan import Protect, PrunePlan, Stage
from prunepass.report.build import Report, explain

NOTHING = PrunePlan(())
STAGE = Stage(2, 0.5)
LAST = PrunePlan([STAGE], "norm", Protect(first=1, last=1))
ROWS, LENGTH, LENGTHS = 2, 11, (4, 9)
H, KEYS = zoo.HIDDEN, 2 * zoo.HEAD_SIZE
#: six layers, of which the last two attend to the keys of layers 2 and 3
GEMMA4: dict[str, Any] = {
    "num_hidden_layers": 6,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "use_cache": True,
}
GEMMA3N = {**GEMMA4, "activation_sparsity_pattern": [0.0] * 6, "intermediate_size": [40] * 6}
GEMMAS = {"gemma3n": ("gemma3n_text", GEMMA3N), "gemma4": ("gemma4_text", GEMMA4)}


def llama_block(queries: int, tokens: int) -> int:
    """FLOPs of a layer of Llama for a row, with keys and values of all tokens and the rest of some."""
    alone = 2 * (2 * H * H + 3 * H * zoo.INTERMEDIATE)
    return alone * queries + 2 * tokens * 2 * H * KEYS + 4 * queries * tokens * H


def bert_block(queries: int, tokens: int) -> int:
    alone = 2 * (2 * H * H + 2 * H * zoo.INTERMEDIATE)
    return alone * queries + 2 * tokens * 2 * H * H + 4 * queries * tokens * H


def next_token(model: nn.Module, plan: PrunePlan, *, cache: bool = False, target: str | None = None) -> Report:
    with oracle.float64_softmax():
        return explain(model, plan, prompt(cache), lengths=LENGTHS, batch_size=ROWS, max_length=16, target=target)


def prompt(cache: bool) -> dict[str, Any]:
    return {**zoo.batch([LENGTH] * ROWS, seed=3), "use_cache": cache, "logits_to_keep": 1}


@cache
def llama(plan: PrunePlan) -> Report:
    return next_token(zoo.tiny("llama", "causal"), plan)


@cache
def gemma(name: str) -> Report:
    kind, options = GEMMAS[name]
    return next_token(build(kind, **options), NOTHING, cache=True)


@cache
def bert(head: str, plan: PrunePlan) -> Report:
    return explain(zoo.tiny("bert", head), plan, zoo.batch([LENGTH] * ROWS))


def said(report: Report) -> str:
    return " ".join(str(report).split())


def test_the_last_block_of_a_decoder_has_one_query() -> None:
    report = llama(LAST)
    assert report.flops is not None
    assert report.exact is not None
    whole, one = ROWS * llama_block(LENGTH, LENGTH), ROWS * llama_block(1, LENGTH)
    assert [b.dense_flops for b in report.blocks] == [whole] * zoo.LAYERS
    assert report.exact.blocks == (zoo.LAYERS - 1,)
    assert report.exact.block_flops == (*[whole] * (zoo.LAYERS - 1), one)
    assert report.exact.example == report.flops.example_dense - (whole - one)

    def less(n: int) -> int:
        return llama_block(n, n) - llama_block(1, n)

    dense = report.flops.dense
    assert report.exact.flops == CorpusFlops(
        dense.padded_to_max - 2 * less(16), dense.padded_to_batch - 2 * less(9), dense.real_tokens - less(4) - less(9)
    )
    assert report.exact.in_pruned
    assert report.flops.example_pruned < report.exact.example


def test_torch_compile_leaves_a_single_query_alone_where_nothing_is_pruned() -> None:
    report = llama(NOTHING)
    assert report.flops is not None
    assert report.exact is None
    assert "exact" not in str(report)
    assert report.flops.pruned == report.flops.dense


def test_a_class_token_needs_one_query_of_the_last_block() -> None:
    report = bert("sequence", PrunePlan([STAGE], "norm"))
    assert report.exact is not None
    assert report.exact.blocks == (zoo.LAYERS - 1,)
    assert report.exact.block_flops[-1] == ROWS * bert_block(1, LENGTH)
    assert report.exact.block_flops[0] == report.blocks[0].dense_flops == ROWS * bert_block(LENGTH, LENGTH)
    assert "The pruned model leaves them out, too." in said(report)


def test_a_plan_that_drops_what_the_head_reads_computes_it_all() -> None:
    report = bert("sequence", PrunePlan([STAGE], "norm", Protect(first=0, last=1)))
    assert report.exact is not None
    assert not report.exact.in_pruned
    assert "it leaves them out where the plan protects the tokens that results read" in said(report)


@pytest.mark.parametrize("plan", [NOTHING, PrunePlan([STAGE], "norm")], ids=["nothing", "stages"])
def test_where_each_token_is_read_the_report_is_what_it_was(plan: PrunePlan, tmp_path: Path) -> None:
    report = bert("token", plan)
    assert report.exact is None
    assert "exact" not in str(report).casefold()
    assert "exact" not in report.to_html(tmp_path / "report.html").read_text(encoding="utf-8").casefold()
    assert ["denominator", "dense", "pruned", "dense", "/", "pruned"] in [x.split() for x in str(report).splitlines()]


@pytest.mark.parametrize("name", GEMMAS)
def test_layers_that_share_keys_compute_the_last_token_alone(name: str) -> None:
    """Layer 3 is the last with keys of its own, which all tokens have; of the rest only the last token is needed."""
    report = gemma(name)
    assert report.flops is not None
    assert report.exact is not None
    dense = [b.dense_flops for b in report.blocks]
    keys = ROWS * LENGTH * 2 * 2 * H * KEYS
    *before, third, fourth, fifth = report.exact.block_flops
    assert report.exact.blocks == (3, 4, 5)
    assert before == dense[:3]
    assert (third - keys) * LENGTH == dense[3] - keys
    assert (fourth * LENGTH, fifth * LENGTH) == (dense[4], dense[5])
    assert report.exact.example < report.flops.example_dense
    assert "blocks 3 to 5" in said(report)
    assert 'torch.compile(backend="tokprune") leaves the others out' in said(report)


@pytest.mark.parametrize("name", GEMMAS)
def test_that_is_what_torch_compile_runs(name: str) -> None:
    kind, options = GEMMAS[name]
    model = build(kind, **options)
    torch._dynamo.reset()
    model.compile(backend="tokprune", options={"plan": NOTHING, "target": "eager"})
    with torch.no_grad(), oracle.float64_softmax():
        model(**prompt(cache=True))
    result = compilations()[0].result
    assert result is not None
    exact = gemma(name).exact
    assert exact is not None
    assert FlopCounter(result.graph_module, batch=ROWS, length=LENGTH).total(ROWS, LENGTH) == exact.example


def test_prune_leaves_the_model_as_it_is_and_a_target_does_not() -> None:
    kind, options = GEMMAS["gemma4"]
    model = build(kind, **options)
    assert prune(model, NOTHING, prompt(cache=True)) is model
    report = gemma("gemma4")
    assert report.flops is not None
    assert report.flops.pruned == report.flops.dense
    assert not report.passes

    on_target = next_token(model, NOTHING, cache=True, target="eager")
    assert on_target.flops is not None
    assert on_target.exact is not None
    assert on_target.exact.in_pruned
    assert on_target.flops.pruned == on_target.exact.flops == report.exact.flops  # type: ignore[union-attr]
    assert tuple(b.pruned_flops for b in on_target.blocks) == on_target.exact.block_flops
    assert [p.name for p in on_target.passes] == ["hoist", "cleanup"]
    assert on_target.fusions is not None


def test_every_form_holds_it(tmp_path: Path) -> None:
    report = llama(LAST)
    assert report.exact is not None
    data = json.loads(json.dumps(report.to_dict()))
    assert data["exact"]["example"] == report.exact.example
    assert data["exact"]["blocks"] == [zoo.LAYERS - 1]
    assert data["exact"]["flops"]["real_tokens"] == report.exact.flops.real_tokens
    page = " ".join(report.to_html(tmp_path / "report.html").read_text(encoding="utf-8").split())
    for form in (said(report), page):
        assert "xact, no token pruned: results do not need all tokens in block 3." in form
    header = "denominator dense exact, no token pruned pruned dense / pruned"
    assert header in said(report)
    assert ">exact, no token pruned</th>" in page
