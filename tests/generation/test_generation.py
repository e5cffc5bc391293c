"""`generate()` with a compiled model: the prompt is pruned, and later tokens see what its layers kept."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

import harness
import zoo
from prunepass import Protect, PrunePlan, ScorerSpec, Stage
from prunepass.dynamo.backend import compilations
from prunepass.errors import RefusalError
from prunepass.pipeline import kept_tokens, prune_graph

PLAN = PrunePlan([Stage(1, 0.6), Stage(2, 0.3)], ScorerSpec("norm"), Protect(first=1, last=1))
#: architecture, with what makes each of its layers see the whole row
DECODERS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {},
    "qwen3": {},
    "mistral": {"sliding_window": None},
    "gemma": {},
    "mixtral": {"sliding_window": None},
    "qwen3_moe": {"sliding_window": None},
}
DAILY = ("llama",)
NEW = 5


def some(names: Sequence[str] = tuple(DECODERS), daily: Sequence[str] = DAILY) -> list[Any]:
    return [pytest.param(n, marks=() if n in daily else pytest.mark.slow) for n in names]


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def decoder(name: str, **options: Any) -> Any:
    """A causal model with its cache, of three layers: as many as `PLAN` needs."""
    given = {"use_cache": True, "eos_token_id": None, "n_layer" if name == "gpt2" else "num_hidden_layers": 3}
    return zoo.tiny(name, "causal", **{**given, **DECODERS.get(name, {}), **options})


def compiled(model: Any, plan: PrunePlan = PLAN, target: str = "eager", **options: Any) -> Any:
    model.compile(backend="tokprune", options={"plan": plan, "target": target, **options})
    return model


def prompts(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(5, 60, (rows, length), generator=torch.Generator().manual_seed(seed))


def generated(model: Any, ids: Tensor, **options: Any) -> Any:
    options = {"max_new_tokens": NEW, "do_sample": False, "output_scores": True, **options}
    with torch.no_grad():
        return model.generate(ids, return_dict_in_generate=True, output_logits=True, **options)


def blocks_of(model: Any) -> nn.ModuleList:
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList))


def kept_of(model: Any, plan: PrunePlan, prompt: Tensor) -> list[Tensor]:
    """For each stage bool [B, S], the tokens of the prompt that it keeps; the model is traced for it."""
    return kept_tokens(model, plan, {"input_ids": prompt}) if plan.stages else []


def masked_logits(
    model: Any, plan: PrunePlan, ids: Tensor, prompt: int, kept: Sequence[Tensor] | None = None
) -> Tensor:
    """[B, V] logits of the next token, by the whole unpruned model without a cache: in each block, those keys of the
    prompt are hidden which the plan has pruned before it.

    Args:
        kept: what `kept_of` the prompt gave, where several steps follow it.
    """
    kept = kept_of(model, plan, ids[:, :prompt]) if kept is None else kept
    rows, length = ids.shape
    causal = torch.ones(length, length, dtype=torch.bool).tril()[None, None].expand(rows, 1, -1, -1)
    handles = []
    for i, block in enumerate(blocks_of(model)):
        mask = causal.clone()
        for stage, alive in zip(plan.stages, kept, strict=True):
            if stage.layer <= i:
                mask[..., :prompt] &= alive[:, None, None, :]
        mask |= torch.eye(length, dtype=torch.bool)  # so that no row of a softmax is empty; nothing reads such rows

        def give(module: nn.Module, args: Any, kwargs: dict[str, Any], mask: Tensor = mask) -> Any:
            given = inspect.signature(module.forward).bind(*args, **kwargs)
            extra = given.arguments.pop("kwargs", {})
            return (), {**given.arguments, **extra, "attention_mask": mask}

        handles.append(block.register_forward_pre_hook(give, with_kwargs=True))
    try:
        with torch.no_grad():
            logits: Tensor = model(input_ids=ids).logits[:, -1]
    finally:
        for handle in handles:
            handle.remove()
    return logits


@pytest.mark.parametrize("name", some())
def test_each_token_sees_what_the_layers_kept_of_the_prompt(name: str) -> None:
    fast = compiled(decoder(name))
    for rows, length in ((1, 17), (3, 31)):
        ids, model = prompts(rows, length), decoder(name, use_cache=False)
        found, kept = generated(fast, ids), kept_of(model, PLAN, ids)
        for step, logits in enumerate(found.logits):
            exact = masked_logits(model, PLAN, found.sequences[:, : length + step], length, kept)
            assert (logits - exact).abs().max() < 1e-6  # generate() rounds logits to float32
        cached = [layer.keys.shape[2] - (NEW - 1) for layer in found.past_key_values.layers]
        assert cached[0] == length
        assert cached[1:3] == [-(-length * 6 // 10), -(-length * 3 // 10)]
    dense = generated(decoder(name), ids)
    assert (found.logits[0] - dense.logits[0]).abs().max() > 1e-4


@pytest.mark.parametrize("name", some(daily=(*DAILY, "mixtral")))
@pytest.mark.parametrize(
    "plan",
    [pytest.param(PLAN, id="pruned"), pytest.param(PrunePlan([Stage(1, 1)]), id="all kept", marks=pytest.mark.slow)],
)
def test_in_float64_to_the_last_digit(name: str, plan: PrunePlan) -> None:
    fast, ids, cache = compiled(decoder(name), plan), prompts(2, 23), None
    pruned = PrunePlan([s for s in plan.stages if s.keep < 1], plan.scorer, plan.protect)
    model = decoder(name, use_cache=False)
    kept = kept_of(model, pruned, ids)
    with torch.no_grad():
        for _ in range(NEW):
            new = ids if cache is None else ids[:, -1:]
            found = fast(input_ids=new, past_key_values=cache)
            cache = found.past_key_values
            exact = masked_logits(model, pruned, ids, 23, kept)
            assert (found.logits[:, -1] - exact).abs().max() < 1e-10
            ids = torch.cat([ids, found.logits[:, -1:].argmax(-1)], 1)


@pytest.mark.parametrize("name", some())
def test_a_plan_that_keeps_all_changes_nothing(name: str) -> None:
    ids = prompts(2, 19)
    fast = compiled(decoder(name), PrunePlan([Stage(1, 1)], PLAN.scorer, PLAN.protect))
    found, dense = generated(fast, ids), generated(decoder(name), ids)
    assert torch.equal(found.sequences, dense.sequences)
    assert (torch.stack(found.logits) - torch.stack(dense.logits)).abs().max() < 1e-6


@pytest.mark.parametrize(
    "target", [*(pytest.param(t, marks=pytest.mark.slow) for t in ("inductor", "openvino")), "onnxruntime"]
)
def test_every_target_generates_alike(target: str) -> None:
    config = {"INFERENCE_PRECISION_HINT": "f32"} if target == "openvino" else {}
    ids = prompts(2, 21)
    exact = generated(compiled(decoder("llama").float()), ids)
    found = generated(compiled(decoder("llama").float(), target=target, config=config), ids)
    assert torch.equal(found.sequences, exact.sequences)
    assert (torch.stack(found.logits) - torch.stack(exact.logits)).abs().max() < 1e-4


@pytest.mark.slow
def test_beams_and_samples() -> None:
    ids = prompts(1, 18)
    beams = generated(compiled(decoder("llama")), ids, num_beams=3, num_return_sequences=3)
    assert len({tuple(row) for row in beams.sequences.tolist()}) == 3
    for row, score in zip(beams.sequences, beams.sequences_scores.tolist(), strict=True):
        total = 0.0
        for step in range(NEW):
            logits = masked_logits(decoder("llama", use_cache=False), PLAN, row[None, : 18 + step], 18)
            total += float(logits.log_softmax(-1)[0, row[18 + step]])
        assert abs(total / NEW - score) < 1e-6
    torch.manual_seed(0)
    drawn = generated(compiled(decoder("llama")), ids, do_sample=True, num_return_sequences=4)
    assert len({tuple(row) for row in drawn.sequences.tolist()}) > 1
    for step, logits in enumerate(drawn.logits):
        exact = masked_logits(decoder("llama", use_cache=False), PLAN, drawn.sequences[:, : 18 + step], 18)
        assert (logits - exact).abs().max() < 1e-6


def left_padded(lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Ids and mask, [B, the longest]."""
    ids = prompts(len(lengths), max(lengths), seed=3)
    mask = torch.stack([(torch.arange(max(lengths)) >= max(lengths) - n).long() for n in lengths])
    return torch.where(mask.bool(), ids, zoo.PAD), mask


@pytest.mark.parametrize("name", some())
def test_a_prompt_goes_on_the_same_alone_and_padded(name: str) -> None:
    lengths = [21, 9, 14, 2]
    ids, mask = left_padded(lengths)
    together = generated(compiled(decoder(name)), ids, attention_mask=mask)
    assert [layer.keys.shape[2] - (NEW - 1) for layer in together.past_key_values.layers] == [21, 13, 7]
    for row, length in enumerate(lengths):
        alone = generated(compiled(decoder(name)), ids[row : row + 1, -length:])
        assert torch.equal(together.sequences[row, -NEW:], alone.sequences[0, -NEW:])
        for one, two in zip(together.logits, alone.logits, strict=True):
            assert (one[row] - two[0]).abs().max() < 1e-6


def test_beams_of_padded_prompts() -> None:
    lengths = [17, 11]
    ids, mask = left_padded(lengths)
    together = generated(compiled(decoder("llama")), ids, attention_mask=mask, num_beams=3)
    for row, length in enumerate(lengths):
        alone = generated(compiled(decoder("llama")), ids[row : row + 1, -length:], num_beams=3)
        assert torch.equal(together.sequences[row, -NEW:], alone.sequences[0, -NEW:])


@pytest.mark.parametrize("padded", [pytest.param(False, marks=pytest.mark.slow), True], ids=["even", "padded"])
def test_chats_go_on_from_their_cache(padded: bool) -> None:
    """A later turn attends to what the first prompt left, and keeps its own tokens."""
    lengths = [19, 12 if padded else 19]
    ids, mask = left_padded(lengths)
    fast = compiled(decoder("llama"))
    first = generated(fast, ids, attention_mask=mask)
    turn = torch.cat([first.sequences, prompts(2, 6, seed=5)], 1)
    mask = torch.cat([mask, torch.ones(2, turn.shape[1] - 19, dtype=torch.int64)], 1)
    second = generated(fast, turn, attention_mask=mask, past_key_values=first.past_key_values)
    for step, logits in enumerate(second.logits):
        for row, length in enumerate(lengths):
            alone = second.sequences[row : row + 1, 19 - length : turn.shape[1] + step]
            exact = masked_logits(decoder("llama", use_cache=False), PLAN, alone, length)
            assert (logits[row] - exact[0]).abs().max() < 1e-6


def test_only_prompts_are_pruned() -> None:
    generated(compiled(decoder("llama")), prompts(1, 17))
    first, *later = compilations()
    assert first.result is not None
    assert len(first.result.sites) == 2
    assert later
    assert not any(c.result.sites for c in later if c.result is not None)


class Splitting(DynamicCache):
    """Breaks Dynamo's graph, as caches do that quantise in operators of their own."""

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        torch._dynamo.graph_break()
        return super().get_seq_length(*args, **kwargs)


class TestRefusals:
    """Before any token is produced, with what to do."""

    def refused(self, message: str, plan: PrunePlan = PLAN) -> None:
        fast = compiled(decoder("llama"), plan)
        with pytest.raises(Exception, match=message) as caught:
            generated(fast, prompts(2, 17))
        assert isinstance(getattr(caught.value, "inner_exception", caught.value), RefusalError)

    def test_a_stage_before_the_first_block(self) -> None:
        self.refused("layer 1 or later", PrunePlan([Stage(0, 0.5)], PLAN.scorer, PLAN.protect))

    def test_a_last_token_that_may_leave(self) -> None:
        self.refused("Protect.last=1", PrunePlan(PLAN.stages, PLAN.scorer))

    @pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
    def test_drafted_tokens(self, attention: str) -> None:
        ids = prompts(1, 8, seed=2).repeat(1, 3)  # so that there is something to look up
        with pytest.raises(Exception, match="without an assistant"):
            generated(compiled(decoder("llama", attention=attention)), ids, prompt_lookup_num_tokens=3)

    def test_a_static_cache(self) -> None:
        with pytest.raises(Exception, match="dynamic cache"):
            generated(compiled(decoder("llama")), prompts(1, 17), cache_implementation="static")

    def test_a_cache_that_splits_the_graph(self) -> None:
        with pytest.raises(Exception, match="generate with the dynamic cache"):
            generated(compiled(decoder("llama")), prompts(1, 17), past_key_values=Splitting())

    def test_mask_mode(self) -> None:
        with pytest.raises(RefusalError, match="use_cache=False"):
            prune_graph(prompt_graph(), PLAN, mode="mask")


def prompt_graph(model: Any = None) -> Any:
    """Dynamo's graph of a call that fills a cache."""
    graphs: list[Any] = []
    model = model or decoder("llama")
    model.compile(backend=lambda gm, _: graphs.append(gm) or gm)
    harness.run(model, {"input_ids": prompts(2, 20)})
    return graphs[0]


def test_a_graph_returns_shortened_caches() -> None:
    result = prune_graph(prompt_graph(), PLAN)
    outputs = next(iter(result.graph_module.graph.find_nodes(op="output"))).all_input_nodes
    assert sorted({n.meta["val"].shape[2] for n in outputs if n.meta["val"].dim() == 4}) == [6, 12, 20]
