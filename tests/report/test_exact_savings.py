"""What `explain` counts as saved with no token pruned, against hand counts and against what `torch.compile` runs."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from sweep.models import build
from torch import Tensor, nn

import oracle
import zoo
from prunepass.backends import FusionCounts, fusion_counts
from prunepass.cost import CorpusFlops, FlopCounter
from prunepass.dynamo.backend import compilations
from prunepass.graph.capture import capture_module, ensure_aten
from prunepass.graph.ops import SDPA
from prunepass.passes.unread import without_unread
from prunepass.pipeline import prune
from prunepass.plan import Protect, PrunePlan, Stage
from prunepass.report.build import Report, explain

NOTHING = PrunePlan(())
STAGES = (Stage(1, 0.5),)
LAST = PrunePlan(STAGES, "norm", Protect(first=1, last=1))
ROWS, LENGTH, LENGTHS, LONGEST = 2, 11, (4, 9), 16
LAYERS = 2
H, FEED, KEYS = zoo.HIDDEN, zoo.INTERMEDIATE, 2 * zoo.HEAD_SIZE


class Layer(nn.Module):
    """Attention over keys and values given, or over its own, and a feed-forward part."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.query, self.out = nn.Linear(H, H), nn.Linear(H, H)
        self.key, self.value = (nn.Linear(H, H), nn.Linear(H, H)) if own else (None, None)
        self.up, self.down = nn.Linear(H, FEED), nn.Linear(FEED, H)

    def forward(self, x: Tensor, given: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        def split(y: Tensor) -> Tensor:
            return y.view(*y.shape[:2], zoo.HEADS, zoo.HEAD_SIZE).transpose(1, 2)

        if self.key is not None and self.value is not None:
            given = split(self.key(x)), split(self.value(x))
        assert given is not None
        attended = nn.functional.scaled_dot_product_attention(split(self.query(x)), *given)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(self.up(x).relu()), given


class Reader(nn.Module):
    """Two layers with keys of their own, others that attend to those of the second, and a head that reads one token."""

    def __init__(self, read: int = -1, sharing: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head, self.read = nn.Embedding(zoo.VOCABULARY, H), nn.Linear(H, 3), read
        self.layers = nn.ModuleList([Layer(own) for own in [True] * LAYERS + [False] * sharing])

    def forward(self, input_ids: Tensor) -> Tensor:
        x, given = self.embed(input_ids), None
        for layer in self.layers:
            x, given = layer(x, given)
        read: Tensor = self.head(x[:, self.read])
        return read


def layer_flops(queries: int, tokens: int, *, keys: int = H, feed: int = 2 * FEED, own: bool = True) -> int:
    """Of a row: keys and values of ``tokens``, and all else of ``queries``.

    Args:
        keys: width of keys and values.
        feed: width of all products of the feed-forward part, together.
        own: whether the layer makes keys and values.
    """
    alone = 2 * (2 * H * H + H * feed) * queries
    return alone + (2 * tokens * 2 * H * keys if own else 0) + 4 * queries * tokens * H


def llama_layer(queries: int, tokens: int) -> int:
    return layer_flops(queries, tokens, keys=KEYS, feed=3 * FEED)


def ids() -> dict[str, Any]:
    return zoo.batch([LENGTH] * ROWS, seed=3)


def explained(model: nn.Module, plan: PrunePlan, inputs: dict[str, Any], target: str | None = None) -> Report:
    with oracle.float64_softmax():
        return explain(model, plan, inputs, lengths=LENGTHS, batch_size=ROWS, max_length=LONGEST, target=target)


@cache
def sharing(target: str | None = None) -> Report:
    return explained(Reader(sharing=2).eval(), NOTHING, {"input_ids": ids()["input_ids"]}, target)


@cache
def llama(plan: PrunePlan) -> Report:
    model = zoo.tiny("llama", "causal", num_hidden_layers=LAYERS)
    return explained(model, plan, {**ids(), "use_cache": False, "logits_to_keep": 1})


def said(report: Report) -> str:
    return " ".join(str(report).split())


# -- plans with stages ----------------------------------------------------------------------------------------------


def test_the_last_block_of_a_decoder_has_one_query() -> None:
    report = llama(LAST)
    assert report.flops is not None
    assert report.exact is not None
    whole, one = ROWS * llama_layer(LENGTH, LENGTH), ROWS * llama_layer(1, LENGTH)
    assert [b.dense_flops for b in report.blocks] == [whole] * LAYERS
    assert report.exact.block_flops == (whole, one)
    assert (report.exact.blocks, report.exact.layers) == ((1,), ())
    assert report.exact.example == report.flops.example_dense - (whole - one)

    def less(n: int) -> int:
        return llama_layer(n, n) - llama_layer(1, n)

    dense = report.flops.dense
    assert report.exact.flops == CorpusFlops(
        dense.padded_to_max - 2 * less(LONGEST),
        dense.padded_to_batch - 2 * less(9),
        dense.real_tokens - less(4) - less(9),
    )
    assert report.exact.in_pruned
    assert report.flops.example_pruned < report.exact.example
    assert "The pruned model leaves them out, too." in said(report)


def test_a_class_token_needs_one_query_of_the_last_block() -> None:
    report = explained(Reader(read=0).eval(), PrunePlan(STAGES, "norm"), {"input_ids": ids()["input_ids"]})
    assert report.exact is not None
    assert report.exact.blocks == (1,)
    assert report.exact.block_flops == (ROWS * layer_flops(LENGTH, LENGTH), ROWS * layer_flops(1, LENGTH))
    assert report.exact.in_pruned


def test_a_plan_that_drops_what_the_head_reads_computes_it_all() -> None:
    plan = PrunePlan(STAGES, "norm", Protect(first=0, last=1))
    report = explained(Reader(read=0).eval(), plan, {"input_ids": ids()["input_ids"]})
    assert report.exact is not None
    assert not report.exact.in_pruned
    assert "it leaves them out where the plan protects the tokens that results read" in said(report)


@pytest.mark.parametrize("plan", [NOTHING, PrunePlan(STAGES, "norm")], ids=["nothing", "stages"])
def test_where_each_token_is_read_the_report_is_what_it_was(plan: PrunePlan, tmp_path: Path) -> None:
    report = explained(zoo.tiny("bert", "token", num_hidden_layers=LAYERS), plan, ids())
    assert report.exact is None
    assert "exact" not in str(report).casefold()
    assert "exact" not in report.to_html(tmp_path / "report.html").read_text(encoding="utf-8").casefold()
    assert ["denominator", "dense", "pruned", "dense", "/", "pruned"] in [x.split() for x in str(report).splitlines()]


# -- plans that prune nothing ---------------------------------------------------------------------------------------


def test_layers_that_share_keys_compute_the_last_token_alone() -> None:
    report = sharing()
    assert report.flops is not None
    assert report.exact is not None
    last, shared = (layer_flops(1, LENGTH, own=own) for own in (True, False))
    whole = layer_flops(LENGTH, LENGTH), layer_flops(LENGTH, LENGTH, own=False)
    assert report.flops.example_dense == ROWS * (2 * whole[0] + 2 * whole[1] + 2 * H * 3)
    assert report.exact.example == ROWS * (whole[0] + last + 2 * shared + 2 * H * 3)
    assert report.exact.block_flops == (ROWS * whole[0], ROWS * (last + 2 * shared))
    assert report.exact.blocks == (1,)
    assert report.exact.layers == ("layers.1", "layers.2", "layers.3")
    assert "do not need all tokens in block 1 (layers.1, layers.2, layers.3)." in said(report)
    assert 'torch.compile(backend="tokprune") leaves the others out' in said(report)


def test_prune_leaves_the_model_as_it_is_and_a_target_does_not() -> None:
    model = Reader(sharing=2).eval()
    assert prune(model, NOTHING, {"input_ids": ids()["input_ids"]}) is model
    report, on_target = sharing(), sharing("eager")
    assert report.flops is not None
    assert report.flops.pruned == report.flops.dense
    assert report.exact is not None
    assert not report.exact.in_pruned
    assert not report.passes

    assert on_target.flops is not None
    assert on_target.exact is not None
    assert on_target.exact.in_pruned
    assert on_target.flops.pruned == on_target.exact.flops == report.exact.flops
    assert tuple(b.pruned_flops for b in on_target.blocks) == on_target.exact.block_flops
    assert [p.name for p in on_target.passes] == ["hoist", "cleanup"]


def test_fusions_on_a_target_are_those_of_what_runs_there(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[Any] = []

    def counts(target: str, program: Any) -> FusionCounts:
        counted.append(program)
        return fusion_counts(target, program)

    monkeypatch.setattr("prunepass.backends.fusion_counts", counts)
    report = explained(Reader(sharing=2).eval(), NOTHING, {"input_ids": ids()["input_ids"]}, "eager")
    assert report.fusions is not None
    assert ("attention", 4, 4) in [(row.kind, row.dense, row.pruned) for row in report.fusions.rows]
    queries = [[n.args[0].meta["val"].shape[2] for n in program.graph.nodes if n.target is SDPA] for program in counted]
    # by their expressions: comparing open sizes would fix them
    assert [[str(q) == "1" for q in of] for of in queries] == [[False] * 4, [False, True, True, True]]


@pytest.mark.parametrize("attentions", [0, 2])
def test_values_are_those_of_the_dense_model(attentions: int) -> None:
    model, x = Reader(sharing=2).double().eval(), ids()["input_ids"]
    found = without_unread(capture_module(model, (x,)).graph_module, NOTHING, attentions=attentions, metadata=False)
    assert found is not None
    with torch.no_grad():
        for length in (1, 2, LENGTH):
            wanted = model(x[:, :length])
            torch.testing.assert_close(found.graph_module(x[:, :length]), wanted, rtol=0, atol=1e-12)


def test_torch_compile_leaves_a_single_query_alone_where_nothing_is_pruned() -> None:
    report = llama(NOTHING)
    assert report.flops is not None
    assert report.exact is None
    assert "exact" not in str(report)
    assert report.flops.pruned == report.flops.dense


GEMMA: dict[str, Any] = {
    "num_hidden_layers": 6,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "use_cache": True,
}
GEMMAS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3n": ("gemma3n_text", {**GEMMA, "intermediate_size": [40] * 6, "activation_sparsity_pattern": [0.0] * 6}),
    "gemma4": ("gemma4_text", GEMMA),
}


class Prompt(nn.Module):
    """The first call of ``generate()``: logits of the last token, keys and values."""

    def __init__(self, name: str) -> None:
        super().__init__()
        kind, options = GEMMAS[name]
        self.inner = build(kind, **options)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, list[Tensor]]:
        out = self.inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=True, logits_to_keep=1)
        layers = [layer for layer in out.past_key_values.layers if layer.keys is not None]
        return out.logits, [x for layer in layers for x in (layer.keys, layer.values)]


@pytest.mark.slow
@pytest.mark.parametrize("name", GEMMAS)
def test_as_torch_compile_runs_gemma(name: str) -> None:
    """Of Gemma 4, transformers itself leaves the tokens out of the layers that share keys."""
    model = Prompt(name).eval()
    report = explained(model, NOTHING, ids())
    torch._dynamo.reset()
    with torch.no_grad(), oracle.float64_softmax():
        torch.compile(model, backend="tokprune", options={"plan": NOTHING, "target": "eager"})(**ids())
    result = compilations()[0].result
    assert result is not None
    assert report.flops is not None
    run = FlopCounter(ensure_aten(result.graph_module), batch=ROWS, length=LENGTH).total(ROWS, LENGTH)
    assert run == (report.flops.example_dense if report.exact is None else report.exact.example)
    if name == "gemma3n":
        assert report.exact is not None
        # keys and values of layer 3, and what foretells its four states, are those of all tokens
        layer, keys = report.blocks[1].dense_flops, ROWS * LENGTH * 2 * 2 * H * KEYS
        foretold, merged = (ROWS * LENGTH * 2 * n for n in (4 * H + 4 * 16 + 16 * H, 3 * H * H))
        some = layer - keys - foretold + 2 * (layer - keys) + merged
        assert (report.flops.example_dense - report.exact.example) * LENGTH == some * (LENGTH - 1)
        assert [path.rpartition(".")[2] for path in report.exact.layers] == ["3", "4", "5"]


# -- forms ----------------------------------------------------------------------------------------------------------


def test_every_form_holds_it(tmp_path: Path) -> None:
    report = llama(LAST)
    assert report.exact is not None
    data = json.loads(json.dumps(report.to_dict()))
    assert data["exact"]["example"] == report.exact.example
    assert data["exact"]["blocks"] == [1]
    assert data["exact"]["flops"]["real_tokens"] == report.exact.flops.real_tokens
    page = " ".join(report.to_html(tmp_path / "report.html").read_text(encoding="utf-8").split())
    for form in (said(report), page):
        assert "xact, no token pruned: results do not need all tokens in block 1." in form
    assert "denominator dense exact, no token pruned pruned dense / pruned" in said(report)
    assert ">exact, no token pruned</th>" in page


@pytest.mark.parametrize(
    ("numbers", "words"),
    [((3,), "block 3"), ((3, 4), "blocks 3 and 4"), ((3, 4, 5), "blocks 3 to 5"), ((1, 3, 5), "blocks 1, 3 and 5")],
)
def test_blocks_in_words(numbers: tuple[int, ...], words: str) -> None:
    from prunepass.report.text import _blocks_text

    assert _blocks_text(numbers) == words
