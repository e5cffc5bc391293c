"""What cannot be pruned soundly is refused: never a wrong answer, never a silently dense one. The message says where in
the model and what to do, and nothing is left on the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import harness
import prunepass
import toys
import zoo
from prunepass import Protect, PrunePlan, Stage
from prunepass.errors import CaptureError, PlanError, PruneError, RefusalError, WeightsError
from prunepass.graph.capture import capture_module

PLAN = PrunePlan((Stage(1, 0.5), Stage(3, 0.3)))
LATE = PrunePlan((Stage(3, 0.3),))


def gather_equals_mask(model: nn.Module, plan: PrunePlan, tolerance: float = 1e-10) -> None:
    source = capture_module(model, harness.example())  # traced once for both
    gathered, masked = (harness.pruned(source, plan, mode).graph_module for mode in ("gather", "mask"))
    for x in (zoo.batch([13, 9, 4], seed=1), zoo.batch([16], seed=4)):
        live = x["attention_mask"].bool()
        assert harness.difference(harness.run(gathered, x), harness.run(masked, x), live) < tolerance


# -- operations over the sequence --------------------------------------------------------------------------------------


def test_a_recurrence_below_the_cut_is_refused() -> None:
    """It was unrolled to one length when it was traced."""
    with pytest.raises(RefusalError, match=r"blocks\.2\.extra.*a recurrence over the sequence"):
        prunepass.prune(toys.encoder(toys.Recurrence), PLAN, harness.example())


#: what is said of some of `toys.MIXERS`
REASONS = {
    "convolution": r"aten\.conv1d\S* is a convolution over the sequence",
    "fourier": r"is a Fourier transform over the sequence",
    "average pooling": r"is a pooling over the sequence",
    "cumulative sum": r"is a running sum or product over the sequence",
    "flip": r"is a reversal of the sequence",
    "mean of the batch": r"pools over the batch, whose rows keep different tokens",
    "elements by their value": r"gives as many elements as its values say",
    "unknown operator": r"aten\.renorm\S* is not known to prunepass yet",
}


@pytest.mark.parametrize("mixer", toys.MIXERS)
def test_mixing_tokens_below_the_cut_is_refused_where_it_stands_and_for_its_true_reason(mixer: str) -> None:
    with pytest.raises(RefusalError, match=rf"blocks\.2\.extra.*{REASONS.get(mixer, '')}") as refusal:
        prunepass.prune(toys.encoder(toys.MIXERS[mixer]), PLAN, harness.example())
    assert refusal.value.where is not None
    assert "blocks.2.extra" in refusal.value.where
    assert refusal.value.where in str(refusal.value)
    assert len(refusal.value.reason.split()) > 4


def test_each_reason_is_looked_for() -> None:
    assert set(REASONS) <= set(toys.MIXERS)


class Window(nn.Module):
    """Attention of each token to itself and its neighbours, in pieces: [batch, tokens, heads, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(zoo.VOCABULARY, 24)
        self.attention = toys.Apply(self.attend)

    def attend(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        near = nn.functional.pad(x, (0, 0, 1, 1)).unfold(1, 3, 1).view(b, s, 3, 8, 3)
        probabilities = (x.view(b, s, 3, 1, 8) @ near).softmax(-1)
        return (probabilities @ near.mT).reshape(b, s, 24)

    def forward(self, input_ids: Tensor) -> Tensor:
        x: Tensor = self.words(input_ids)
        return x + self.attention(x)


def test_block_local_attention_is_refused_by_that_name() -> None:
    with pytest.raises(RefusalError, match=r"attention: the attention here is block-local.*softmax"):
        prunepass.prune(Window(), PLAN, harness.example(("input_ids",)))


class Dense(nn.Module):
    """Each layer reads what all before it gave, so that no value stands between them."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(zoo.VOCABULARY, toys.WIDTH)
        self.layers = nn.ModuleList(toys.Attention() for _ in range(3))

    def forward(self, input_ids: Tensor) -> Tensor:
        seen = [self.words(input_ids)]
        for layer in self.layers:
            seen.append(layer(sum(seen), None) * len(seen))
        return torch.cat(seen, -1)


def test_layers_without_a_cut_between_them_are_said_to_be() -> None:
    with pytest.raises(PlanError, match=r"1 blocks.*Block 0 holds 3 layers with attention \(layers\.0 to layers\.2\)"):
        prunepass.prune(Dense(), PLAN, harness.example(("input_ids",)))


def test_what_is_changed_where_copies_cannot_be_told_is_refused_with_what_works() -> None:
    def change(x: Tensor) -> Tensor:
        y = x * 2
        y.mT.reshape(x.shape[0], -1).add_(1)
        return y

    captured = capture_module(toys.encoder(lambda: toys.Apply(change)), harness.example())
    with pytest.raises(RefusalError, match=r"blocks\.2\.extra.*add_.*in place.*run_decompositions"):
        prunepass.prune(captured.exported, PLAN)
    prunepass.prune(captured.exported.run_decompositions({}), PLAN)


@pytest.mark.parametrize("mixer", ["convolution", "cumulative sum", "softmax over tokens"])
def test_mixing_tokens_above_the_cut_is_no_obstacle(mixer: str) -> None:
    gather_equals_mask(toys.encoder(toys.MIXERS[mixer]), LATE)


@pytest.mark.parametrize("names", [tuple(toys.TOKENWISE)[i::5] for i in range(5)], ids=", ".join)
def test_operations_on_each_token_alone_are_no_obstacle(names: tuple[str, ...]) -> None:
    """Three at a time, one after the other."""
    gather_equals_mask(toys.encoder(lambda: nn.Sequential(*(toys.TOKENWISE[name]() for name in names))), PLAN)


@pytest.mark.parametrize("kind", ["softmax", "einsum"])
def test_attention_written_out_by_hand(kind: str) -> None:
    gather_equals_mask(toys.encoder(kind=kind), PLAN)


def test_the_length_as_a_number_stays_the_original_one() -> None:
    """A scale by the length is part of the model's arithmetic, not a shape: hiding keys does not change it."""
    gather_equals_mask(toys.encoder(lambda: toys.Apply(lambda x: x / x.shape[1])), PLAN)


def test_linear_attention_has_no_probabilities_to_hide_keys_in() -> None:
    with pytest.raises(PruneError):
        prunepass.prune(toys.encoder(kind="linear"), PLAN, harness.example())


class MeanPool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def test_pooling_over_restored_tokens_is_refused_or_right() -> None:
    """A pool above the last block would see the kept tokens alone unless the others were put back."""
    try:
        gather_equals_mask(toys.encoder(top=MeanPool()), PLAN)
    except RefusalError as refusal:
        assert "top" in str(refusal)  # noqa: PT017 (either is sound)


@pytest.mark.parametrize("name", ["funnel", pytest.param("mamba", marks=pytest.mark.slow)])
def test_architectures_that_mix_tokens_otherwise_are_refused(name: str) -> None:
    example = harness.example()
    if not zoo.UNPRUNABLE[name].mask:
        del example["attention_mask"]
    with pytest.raises(PruneError) as refusal:
        prunepass.prune(zoo.tiny(name), PLAN, example)
    assert not isinstance(refusal.value, PlanError) or "block" in str(refusal.value)
    assert name != "funnel" or "is a pooling over the sequence" in str(refusal.value)


def test_convbert_names_its_convolution() -> None:
    with pytest.raises(RefusalError, match=r"encoder\.layer\.1\.attention"):
        prunepass.prune(zoo.tiny("convbert"), PLAN, harness.example())


def test_fnet_is_told_to_have_no_attention() -> None:
    with pytest.raises(RefusalError, match=r"fourier.*no attention was found.*is a Fourier transform"):
        prunepass.prune(zoo.tiny("fnet"), PLAN, {"input_ids": harness.example()["input_ids"]})


def test_a_convolution_beside_the_first_block_only_forbids_cuts_above_it() -> None:
    model = zoo.tiny("deberta-v2", conv_kernel_size=3, conv_act="gelu")
    gather_equals_mask(model, PLAN)
    with pytest.raises(RefusalError, match="conv"):
        prunepass.prune(model, PrunePlan((Stage(0, 0.5),), "norm"), harness.example())


class NoAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(zoo.VOCABULARY, 8)
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.layers(self.words(input_ids)) * attention_mask[..., None]


def test_attention_whose_kernel_is_not_loaded_is_told_by_its_zeros() -> None:
    """MRA has no other than for CUDA, and computes zeros without it."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
    config = transformers.MraConfig(vocab_size=60, max_position_embeddings=66, block_per_row=2, **sizes)
    ids = torch.arange(64).reshape(2, 32) % 50
    with pytest.raises(RefusalError, match=r"^encoder\.layer\.0\.attention.*computes zeros.*is not loaded"):
        prunepass.prune(transformers.MraModel(config).eval(), None, {"input_ids": ids})


def test_what_cannot_be_traced_is_refused_in_a_message_alone(capfd: pytest.CaptureFixture[str]) -> None:
    """torch prints the graph as far as it came."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 40}
    config = transformers.LongformerConfig(vocab_size=60, max_position_embeddings=66, attention_window=8, **sizes)
    ids = torch.arange(32).reshape(2, 16) % 50
    x = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with pytest.raises(CaptureError, match="branches on a value that is computed from the inputs"):
        prunepass.prune(transformers.LongformerModel(config).eval(), None, x)
    assert capfd.readouterr() == ("", "")
    assert "print" not in vars(torch.export._trace)  # what else is exported prints as ever


def test_a_model_without_attention_is_refused() -> None:
    with pytest.raises(RefusalError, match="attention"):
        prunepass.prune(NoAttention(), PLAN, harness.example())


# -- outputs and inputs that pruning cannot honour ---------------------------------------------------------------------


def test_a_cache_in_the_outputs_is_refused_with_the_way_out() -> None:
    with pytest.raises(PruneError, match="use_cache"):
        prunepass.prune(zoo.tiny("llama", use_cache=True), PLAN, harness.example())


def test_attention_maps_in_the_outputs_are_refused_with_the_way_out() -> None:
    with pytest.raises(RefusalError, match="attention"):
        prunepass.prune(zoo.tiny("bert", attention="eager", output_attentions=True), PLAN, harness.example())


def test_a_mask_of_four_axes_is_refused_with_the_way_out() -> None:
    """It does not say which tokens are live, and counts go by live tokens."""
    example = harness.example()
    square = example["attention_mask"][:, None, None, :].expand(-1, 1, 11, 11).bool().contiguous()
    with pytest.raises(PruneError, match="attention_mask"):
        prunepass.prune(zoo.tiny("bert"), PLAN, {**example, "attention_mask": square})


def test_ids_cannot_be_protected_where_there_are_none() -> None:
    example = harness.example()
    embedded = torch.randn(*example["input_ids"].shape, zoo.HIDDEN, dtype=torch.float64)
    inputs = {"inputs_embeds": embedded, "attention_mask": example["attention_mask"]}
    prunepass.prune(zoo.tiny("bert"), PLAN, inputs)
    with pytest.raises(PruneError, match="inputs_embeds"):
        prunepass.prune(zoo.tiny("bert"), PrunePlan(PLAN.stages, protect=Protect(token_ids=(7,))), inputs)


# -- plans that do not fit the model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_layer_out_of_range_is_refused_with_the_number_of_blocks(name: str) -> None:
    with pytest.raises(PlanError, match=rf"7.*\b{zoo.LAYERS}\b"):
        prunepass.prune(harness.captured(name).exported, PrunePlan((Stage(7, 0.5),)))


def test_after_the_attention_of_a_parallel_block_is_before_the_next() -> None:
    source, x = harness.captured("gpt_neox"), zoo.batch([13, 9, 4], seed=1)
    inside, between = (PrunePlan((Stage(1, 0.5, after_attention=True),)), PrunePlan((Stage(2, 0.5),)))
    one, two = (harness.run(harness.pruned(source, plan).graph_module, x) for plan in (inside, between))
    assert harness.difference(one, two, x["attention_mask"].bool()) == 0
    with pytest.raises(PlanError, match="parallel"):
        harness.pruned(source, PrunePlan((*inside.stages, *between.stages)))


def test_attention_scores_before_the_first_block_are_refused() -> None:
    with pytest.raises(PruneError, match=r"block 0.*"):
        prunepass.prune(harness.captured("bert").exported, PrunePlan((Stage(0, 0.5),)))


def test_an_unknown_scorer_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(PlanError, match=r"'atention'.*attention"):
        prunepass.prune(harness.captured("bert").exported, PrunePlan((Stage(1, 0.5),), "atention"))


def test_an_unknown_scorer_option_is_refused_by_name() -> None:
    with pytest.raises(PlanError, match="sed"):
        prunepass.prune(harness.captured("bert").exported, PrunePlan((Stage(1, 0.5),), {"name": "random", "sed": 1}))


def test_a_trained_scorer_without_weights_is_refused() -> None:
    with pytest.raises(PlanError, match="weights"):
        prunepass.prune(harness.captured("bert").exported, PrunePlan((Stage(1, 0.5),), "mlp"))


def test_a_plan_made_for_another_width_is_refused_with_both_widths() -> None:
    stages = (Stage(1, 0.5, "mlp"),)
    plan = PrunePlan(stages, weights=harness.mlp_weights(stages, width=48))
    with pytest.raises(WeightsError, match=r"48.*32|32.*48"):
        prunepass.prune(harness.captured("bert").exported, plan)


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="gather"):
        prunepass.prune(harness.captured("bert").exported, PLAN, mode="drop")


def test_a_module_without_example_inputs_is_refused() -> None:
    with pytest.raises(PruneError, match="example_inputs"):
        prunepass.prune(zoo.tiny("bert"), PLAN)


@pytest.mark.parametrize("model", [None, "bert", 3])
def test_other_things_than_models_are_refused(model: Any) -> None:
    with pytest.raises((PruneError, TypeError), match="Module"):
        prunepass.prune(model, PLAN, harness.example())


# -- nothing is left behind --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "plan"),
    [("convbert", PLAN), ("bert", PrunePlan((Stage(7, 0.5),))), ("bert", PrunePlan((Stage(1, 0.5),), "mlp"))],
)
def test_a_refused_export_writes_nothing(tmp_path: Path, name: str, plan: PrunePlan) -> None:
    with pytest.raises(PruneError):
        prunepass.export(zoo.tiny(name).float(), plan, tmp_path / "out", to="pt2", example_inputs=harness.example())
    assert list(tmp_path.iterdir()) == []


def test_a_refused_model_is_not_changed() -> None:
    model = toys.encoder(toys.MIXERS["convolution"])
    x = zoo.batch([9, 5])
    with torch.no_grad():
        before = model(**x)
        with pytest.raises(RefusalError):
            prunepass.prune(model, PLAN, harness.example())
        assert torch.equal(model(**x), before)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_with_heads_in_the_batch_is_scored_alike(causal: bool) -> None:
    ids = {"input_ids": zoo.batch([12, 12, 12], seed=3)["input_ids"]}
    example = harness.example(("input_ids",))
    found = []
    for kind in ("sdpa", "folded"):
        captured = capture_module(toys.encoder(kind=kind, causal=causal), example)
        found.append(harness.run(harness.pruned(captured, PrunePlan((Stage(2, 0.5),), "attention")).graph_module, ids))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "inputs"), [("folded", ("input_ids", "attention_mask")), ("heads first", ("input_ids",))]
)
def test_other_layouts_of_attention_are_not_scored(kind: str, inputs: tuple[str, ...]) -> None:
    captured = capture_module(toys.encoder(kind=kind), harness.example(inputs))
    with pytest.raises(RefusalError, match=r"\[batch, heads, tokens, width\].*norm"):
        harness.pruned(captured, PrunePlan((Stage(2, 0.5),), "attention"))
    assert harness.pruned(captured, PrunePlan((Stage(2, 0.5),), "norm")).sites


def test_a_mask_of_other_tokens_is_refused() -> None:
    """A decoder that is given its encoder's mask: which of its own tokens are live is not said."""

    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = toys.encoder()

        def forward(self, decoder_input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.inner(decoder_input_ids, attention_mask[:, : decoder_input_ids.shape[1]])

    ids = torch.randint(0, 20, (2, 7))
    with pytest.raises(RefusalError, match=r"mask has the shape \[2, 9\] and decoder_input_ids \[2, 7\]"):
        prunepass.prune(
            Decoder(), PLAN, {"decoder_input_ids": ids, "attention_mask": torch.ones(2, 9, dtype=torch.int64)}
        )


def test_an_encoder_is_pruned_however_large_its_decoder_is() -> None:
    """ProphetNet's decoder reaches more of the graph than its encoder does."""
    config = transformers.ProphetNetConfig(
        hidden_size=32,
        num_encoder_layers=2,
        num_decoder_layers=2,
        num_encoder_attention_heads=4,
        num_decoder_attention_heads=4,
        encoder_ffn_dim=40,
        decoder_ffn_dim=40,
        vocab_size=97,
        max_position_embeddings=64,
        use_cache=False,
    )
    model = zoo.randomize(transformers.ProphetNetModel(config).eval())
    x = {**zoo.batch([12, 9]), "decoder_input_ids": torch.randint(5, 90, (2, 5))}
    plan = PrunePlan((Stage(1, 0.5, "norm"),))
    source = capture_module(model, x)
    one, two = (harness.pruned(source, plan, mode).graph_module for mode in ("gather", "mask"))
    gap = (harness.run(one, x).last_hidden_state - harness.run(two, x).last_hidden_state).abs().max()
    assert float(gap) < 1e-4
