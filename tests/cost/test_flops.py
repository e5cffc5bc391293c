"""FLOPs against hand formulas, against torch's own counter on a real run, and over corpora."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

import zoo
from prunepass import PrunePlan, ScorerSpec, Stage
from prunepass.cost import CorpusFlops, FlopCounter, corpus_flops
from prunepass.cost.flops import _run_at
from prunepass.cost.formulas import formula_of
from prunepass.errors import CaptureError, OptionError
from prunepass.graph.capture import capture_module
from prunepass.pipeline import prune_graph

aten = torch.ops.aten
LAYERS, WIDTH, INNER, MAX = 2, 24, 56, 64


def bert(attention: str = "sdpa") -> BertModel:
    config = BertConfig(
        hidden_size=WIDTH,
        num_attention_heads=3,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        vocab_size=50,
        max_position_embeddings=MAX,
        attn_implementation=attention,
    )
    return BertModel(config, add_pooling_layer=False).eval()


def inputs(batch: int, length: int) -> dict[str, Tensor]:
    ids = torch.arange(batch * length).reshape(batch, length) % 50
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def encoder_flops(batch: int, length: int, layers: int, width: int, inner: int) -> int:
    """Four projections and two feed-forward matrices for each token; scores and weighted sum for each pair."""
    per_token = 2 * (4 * width * width + 2 * width * inner)
    per_pair = 2 * 2 * width
    return layers * batch * (length * per_token + length * length * per_pair)


@pytest.fixture(scope="module")
def counter() -> FlopCounter:
    return FlopCounter(capture_module(bert(), inputs(2, 16)).graph_module, batch=2, length=16)


def test_inputs_that_are_no_tensors_are_left_as_they_are() -> None:
    model = zoo.tiny("llama", "causal", use_cache=True)
    plain = FlopCounter(capture_module(zoo.tiny("llama", "causal", use_cache=False), inputs(2, 16)).graph_module)
    flagged = FlopCounter(capture_module(model, {**inputs(2, 16), "use_cache": False}).graph_module)
    assert flagged.total(3, 20) == plain.total(3, 20) > 0


@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize("length", [1, 2, 3, 16, 17, MAX])
def test_encoder_matches_the_hand_formula(counter: FlopCounter, batch: int, length: int) -> None:
    assert counter.total(batch, length) == encoder_flops(batch, length, LAYERS, WIDTH, INNER)


def test_eager_attention_matches_torchs_counter_on_a_real_run() -> None:
    model = bert("eager")
    ours = FlopCounter(capture_module(model, inputs(2, 8)).graph_module, batch=2, length=8)
    for sizes in [(1, 1), (1, 9), (3, 12)]:
        with torch.no_grad(), FlopCounterMode(display=False) as theirs:
            model(**inputs(*sizes))
        assert ours.total(*sizes) == theirs.get_total_flops()


def test_grouped_queries_count_the_query_heads() -> None:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        use_cache=False,
    )
    model = LlamaModel(config).eval()
    counter = FlopCounter(capture_module(model, inputs(2, 8)).graph_module, batch=2, length=8)
    length = 11
    projections = 2 * length * 32 * (32 + 16 + 16 + 32)  # query, key, value, output
    feed_forward = 2 * length * 3 * 32 * 40
    attention = 2 * 2 * length * length * 32
    # Some versions of transformers form the rotary angles by a product too; that one is not under test.
    counted = (aten.linear.default, aten.scaled_dot_product_attention.default)
    by_node = counter.per_node(1, length)
    ours = sum(by_node.get(n.name, 0) for n in counter.graph_module.graph.nodes if n.target in counted)
    assert ours == projections + feed_forward + attention


def test_bert_base_at_128_tokens() -> None:
    # 22.35 GFLOPs: 12 layers of 7,077,888 weights, two FLOPs each for 128 tokens, and 4 * 128^2 * 768 of attention.
    with torch.device("meta"):
        model = BertModel(BertConfig(num_hidden_layers=1), add_pooling_layer=False).eval()
        example = inputs(2, 16)
    counter = FlopCounter(capture_module(model, example).graph_module)
    assert 12 * counter.total(1, 128) == 22_347_251_712
    assert counter.max_length == 512


def test_per_node_sums_to_the_total_and_names_only_contractions(counter: FlopCounter) -> None:
    by_node = counter.per_node(3, 10)
    targets = {n.name: n.target for n in counter.graph_module.graph.nodes}
    assert sum(by_node.values()) == counter.total(3, 10)
    assert {targets[name] for name in by_node} == {aten.linear.default, aten.scaled_dot_product_attention.default}
    assert len(by_node) == LAYERS * 7


def test_nothing_is_counted_as_inserted_in_a_dense_graph(counter: FlopCounter) -> None:
    assert counter.moved(2, 16) == 0


def test_elements_of_inserted_nodes_are_counted_apart() -> None:
    graph_module = capture_module(bert(), inputs(2, 16)).graph_module
    dense = FlopCounter(graph_module).total(2, 10)
    last = list(graph_module.graph.nodes)[-2]
    with graph_module.graph.inserting_after(last):
        inserted = graph_module.graph.call_function(aten.clone.default, (last,))
    inserted.meta.update(val=last.meta["val"], prunepass="gather")
    last.replace_all_uses_with(inserted, delete_user_cb=lambda user: user is not inserted)
    counter = FlopCounter(graph_module)
    assert counter.moved(2, 10) == 2 * 10 * WIDTH
    assert counter.total(2, 10) == dense


# -- where the formulas do not reach --------------------------------------------------------------------------------


class HeadTokens(nn.Module):
    """A projection of the first 8 tokens only: its cost stops growing at length 8."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 4)
        self.projection = nn.Linear(4, 6)

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.projection(self.embedding(input_ids)[:, :8])
        return logits


def test_a_guard_that_fails_is_answered_by_a_run_at_that_point(counter: FlopCounter) -> None:
    graph = fx.Graph()
    model = HeadTokens()
    ids = graph.placeholder("input_ids")
    table, weight = graph.get_attr("embedding.weight"), graph.get_attr("projection.weight")
    embedded = graph.call_function(aten.embedding.default, (table, ids))
    head = graph.call_function(aten.slice.Tensor, (embedded, 1, 0, 8))
    graph.output((graph.call_function(aten.linear.default, (head, weight)),))
    ids.meta["val"] = counter.graph_module.graph.find_nodes(op="placeholder")[0].meta["val"]
    found = FlopCounter(fx.GraphModule(model, graph), length=16)
    assert [found.total(1, n) for n in (3, 7, 8, 9, 40)] == [2 * 4 * 6 * min(n, 8) for n in (3, 7, 8, 9, 40)]


def test_length_beyond_the_position_table_is_refused(counter: FlopCounter) -> None:
    assert counter.max_length == MAX
    with pytest.raises(OptionError, match=f"at most {MAX} tokens, not {MAX + 1}"):
        counter.total(1, MAX + 1)


@pytest.mark.parametrize("share", [30, 50, 200])
def test_a_stage_that_keeps_one_token_at_the_traced_length_bounds_nothing(counter: FlopCounter, share: int) -> None:
    plan = PrunePlan((Stage(1, Fraction(1, share)),), ScorerSpec("norm"))
    pruned = FlopCounter(prune_graph(counter.graph_module, plan).graph_module, batch=2, length=16)
    assert pruned.max_length == MAX
    for length in (7, 29, 31, 51, MAX):
        kept = -(-length // share)
        block = encoder_flops(3, length, 1, WIDTH, INNER)
        assert pruned.total(3, length) == block + encoder_flops(3, kept, 1, WIDTH, INNER)


@pytest.mark.parametrize("sizes", [(0, 4), (1, 0)])
def test_empty_sizes_are_refused(counter: FlopCounter, sizes: tuple[int, int]) -> None:
    with pytest.raises(OptionError, match="at least 1"):
        counter.total(*sizes)


def test_a_static_graph_has_a_cost_only_at_its_own_length() -> None:
    model = bert()
    with torch.no_grad():
        program = torch.export.export(model, (), inputs(2, 16), strict=False)
    counter = FlopCounter(program.module(check_guards=False))
    assert counter.total(2, 16) == encoder_flops(2, 16, LAYERS, WIDTH, INNER)
    with pytest.raises(OptionError, match="fixed length of 16"):
        counter.total(2, 17)
    with pytest.raises(OptionError, match="fixed batch of 2"):
        counter.total(1, 16)


def test_a_graph_without_tokens_is_refused() -> None:
    with pytest.raises(CaptureError, match="looks like tokens"):
        FlopCounter(fx.symbolic_trace(nn.Linear(3, 3)))


# -- formulas -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "args"),
    [
        (aten.linear.default, (torch.ones(5, 7, 3), torch.ones(4, 3))),
        (aten.matmul.default, (torch.ones(2, 5, 3), torch.ones(3, 6))),
        (aten.matmul.default, (torch.ones(2, 1, 5, 3), torch.ones(1, 4, 3, 6))),
        (aten.bmm.default, (torch.ones(2, 5, 3), torch.ones(2, 3, 6))),
        (aten.addmm.default, (torch.ones(6), torch.ones(5, 3), torch.ones(3, 6))),
        (aten.baddbmm.default, (torch.ones(2, 5, 6), torch.ones(2, 5, 3), torch.ones(2, 3, 6))),
        (aten.einsum.default, ("bld,bmd->blm", [torch.ones(2, 5, 3), torch.ones(2, 6, 3)])),
        (aten.einsum.default, ("...ld,...md->...lm", [torch.ones(2, 4, 5, 3), torch.ones(2, 4, 6, 3)])),
        (aten.conv1d.default, (torch.ones(2, 6, 9), torch.ones(4, 3, 3), None, [1], [1], [1], 2)),
        (aten.conv2d.default, (torch.ones(2, 3, 9, 9), torch.ones(4, 3, 3, 3))),
        (
            aten.convolution.default,
            (torch.ones(2, 3, 9), torch.ones(3, 4, 3), None, [2], [0], [1], True, [0], 1),
        ),
    ],
)
def test_formula_matches_torchs_counter(op: torch._ops.OpOverload, args: tuple[object, ...]) -> None:
    with FlopCounterMode(display=False) as theirs:
        out = op(*args)
    formula = formula_of(op)
    assert formula is not None
    assert formula(out, *args) == theirs.get_total_flops()


def test_attention_formula_with_other_value_width_and_key_count() -> None:
    query, key, value = torch.ones(2, 4, 5, 8), torch.ones(2, 2, 7, 8), torch.ones(2, 2, 7, 6)
    formula = formula_of(aten.scaled_dot_product_attention.default)
    assert formula is not None
    assert formula(None, query, key, value, enable_gqa=True) == 2 * (2 * 4) * 5 * 7 * (8 + 6)


def test_element_wise_work_has_no_formula() -> None:
    assert formula_of(aten.softmax.int) is None
    assert formula_of(aten.gather.default) is None


# -- corpora --------------------------------------------------------------------------------------------------------


def test_three_denominators(counter: FlopCounter) -> None:
    def cost(batch: int, length: int) -> int:
        return encoder_flops(batch, length, LAYERS, WIDTH, INNER)

    counted = corpus_flops(counter, [3, 9, 5, 20, 1], batch_size=2, max_length=MAX)
    assert counted == CorpusFlops(
        padded_to_max=cost(2, MAX) + cost(2, MAX) + cost(1, MAX),
        padded_to_batch=cost(2, 9) + cost(2, 20) + cost(1, 1),
        real_tokens=cost(1, 3) + cost(1, 9) + cost(1, 5) + cost(1, 20) + cost(1, 1),
    )
    assert counted.padded_to_max > counted.padded_to_batch > counted.real_tokens


def test_the_longest_row_is_the_default_maximum(counter: FlopCounter) -> None:
    assert corpus_flops(counter, [3, 9]).padded_to_max == counter.total(2, 9)


def test_ratios_are_taken_against_the_same_padding() -> None:
    ratios = CorpusFlops(12, 8, 6).over(CorpusFlops(3, 4, 6))
    assert ratios == {"padded_to_max": 4.0, "padded_to_batch": 2.0, "real_tokens": 1.0}


@pytest.mark.parametrize(
    ("lengths", "options", "message"),
    [
        ([], {}, "empty"),
        ([4, 0], {}, "at least 1; found 0"),
        ([4, 9], {"max_length": 8}, "longest row has 9"),
        ([4], {"batch_size": 0}, "batch_size"),
    ],
)
def test_wrong_corpora_are_refused(
    counter: FlopCounter, lengths: list[int], options: dict[str, int], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        corpus_flops(counter, lengths, **options)


@pytest.mark.parametrize("name", ["deberta-v2", "bloom"])
def test_formulas_agree_with_runs_on_other_architectures(name: str) -> None:
    counter = FlopCounter(capture_module(zoo.tiny(name), inputs(2, 16)).graph_module, length=16)
    for sizes in [(1, 1), (1, 7), (3, 40)]:
        run = _run_at(counter.graph_module, counter._inputs, *sizes)
        assert counter.per_node(*sizes) == run.flops
        assert counter.total(*sizes) > 0
