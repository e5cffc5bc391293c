"""Caches that are cut again while tokens are generated, against the unpruned model with the cut tokens hidden."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from test_generation import DECODERS, PLAN, blocks_of, compiled, decoder, generated, left_padded, prompts
from torch import Tensor

import oracle
import prunepass
from decoding import Greedy, Reference
from prunepass import Protect, PrunePlan, ScorerSpec, Stage
from prunepass.errors import OptionError, RefusalError
from prunepass.generation.decode import Decode, Scores, cut
from prunepass.scorers.mlp import predictor_shapes
from windowed import WINDOW, WINDOWED, windowed

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def some(daily: Sequence[str], names: Sequence[str]) -> list[Any]:
    return [pytest.param(n, marks=() if n in daily else pytest.mark.slow) for n in names]


class Followed(Greedy):
    """A model compiled with ``decode``, called step by step, and after each call the reference."""

    def __init__(
        self,
        name: str,
        every: int | None = None,
        keep: Any = None,
        plan: PrunePlan = PLAN,
        *,
        later_turns: bool = False,
        dynamic: bool | None = None,
        **options: Any,
    ) -> None:
        make = windowed if name in WINDOWED else decoder
        decode = {"every": every} if every is None else {"every": every, "keep": keep}
        settings: dict[str, Any] = {"later_turns": True} if later_turns else {}
        if not later_turns or every is not None:
            settings["decode"] = decode
        self.fast, self.prunes = make(name, **options), later_turns
        given = {"plan": plan, "target": "eager", **settings}
        self.fast.compile(backend="tokprune", dynamic=dynamic, options=given)
        exact = make(name, **{**options, "use_cache": False})
        kinds = getattr(exact.config, "layer_types", None) or []
        full = [i for i, kind in enumerate(kinds) if kind == "full_attention"]
        whole = tuple(i for i in range(len(kinds)) if i not in full[1:]) if name in WINDOWED else ()
        windows = {i: WINDOW for i, kind in enumerate(kinds) if kind == "sliding_attention"}
        layers = list(blocks_of(exact))
        self.exact = Reference(exact, layers, plan, every, keep, whole, windows.get)
        self.cache: Any = None
        self.worst = 0.0

    def call(self, ids: Tensor, mask: Tensor, new: int) -> Tensor:
        """[B, 1] greedy choices after rows whose last ``new`` tokens come now."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -new:]
        seen = 1 if self.cache is None or self.prunes else new  # others are those of tokens that left
        with oracle.float64_softmax(), torch.no_grad():
            found = self.fast(
                input_ids=ids[:, -new:], attention_mask=mask, position_ids=positions, past_key_values=self.cache
            )
        exact = self.exact.call(ids, mask, new, prune=self.prunes and new > 1)
        self.cache = found.past_key_values
        live = mask[:, -seen:].bool()
        self.worst = max(self.worst, float((found.logits[:, -seen:] - exact[:, -seen:])[live].abs().max()))
        return exact[:, -1:].argmax(-1)


#: in every layer of Mistral's there is a window, so nothing can be cut
CUT = tuple(name for name in DECODERS if name != "mistral")


@pytest.mark.parametrize("name", some(["llama"], CUT))
@pytest.mark.parametrize(("every", "keep"), [(3, 0.5), pytest.param(1, 9, marks=pytest.mark.slow)])
def test_each_token_sees_what_is_left(name: str, every: int, keep: Any) -> None:
    """Of rows padded on the left, whose caches are cut to different numbers of tokens."""
    run = Followed(name, every, keep)
    run.run(*left_padded([23, 16, 4]), 11)
    assert run.worst < 1e-10
    assert run.lengths()[1:] == run.exact.lengths()[1:]
    assert run.lengths()[0] == 33
    assert run.lengths()[1] < 33 * 0.6


@pytest.mark.parametrize("name", some(["gemma3"], ("gemma3", "olmo3", "qwen2", "cohere2")))
def test_beside_windows_only_full_attention_is_cut(name: str) -> None:
    kinds = {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}
    run = Followed(name, 4, 0.4, **kinds)
    run.run(*left_padded([23, 16, 4]), WINDOW + 3)
    assert run.worst < 1e-10
    assert run.lengths()[2] == run.exact.lengths()[2]


PLANS = {
    "a share of the end": PrunePlan(PLAN.stages, PLAN.scorer, Protect(first=2, last=1, last_share=0.1)),
    "after an attention": PrunePlan([Stage(1, 0.6, after_attention=True)], PLAN.scorer, PLAN.protect),
    "a stage that keeps all": PrunePlan([Stage(1, 1), Stage(2, 0.5)], PLAN.scorer, PLAN.protect),
}


@pytest.mark.slow
@pytest.mark.parametrize("plan", [PLANS["a share of the end"]])
def test_protected_tokens_stay(plan: PrunePlan) -> None:
    run = Followed("llama", 2, 4, plan)
    run.run(*left_padded([23, 9]), 9)
    assert run.worst < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("plan", [PLANS["after an attention"], PLANS["a stage that keeps all"]])
def test_other_places(plan: PrunePlan) -> None:
    fast = compiled(decoder("llama"), plan, decode={"every": 2, "keep": 6})
    found = generated(fast, prompts(2, 20), max_new_tokens=6)
    lengths = [layer.keys.shape[2] for layer in found.past_key_values.layers]
    assert lengths[:2] == [25, 25]
    assert lengths[2:] == [7]  # one came after the last cut


@pytest.mark.slow
def test_a_chat_goes_on_with_its_scores() -> None:
    """A later turn of several tokens counts as so many new ones."""
    run = Followed("llama", 5, 0.5)
    ids, mask = run.run(*left_padded([19, 12]), 3)
    turn = prompts(2, 6, seed=5)
    run.run(torch.cat([ids, turn], 1), torch.cat([mask, torch.ones_like(turn)], 1), 6, new=7)
    assert run.worst < 1e-10


@pytest.mark.slow
def test_a_prompt_of_one_token() -> None:
    run = Followed("llama", 4, 4)
    ids = prompts(2, 1)
    run.run(ids, torch.ones_like(ids), 10)
    assert run.worst < 1e-10
    assert run.lengths() == run.exact.lengths() == [10, 5, 5]


@pytest.mark.slow
def test_generate_with_padded_rows() -> None:
    ids, mask = left_padded([21, 9, 14])
    found = generated(compiled(decoder("llama"), decode={"every": 3, "keep": 0.5}), ids, attention_mask=mask)
    exact = Reference(model := decoder("llama", use_cache=False), list(blocks_of(model)), PLAN, 3, 0.5)
    for step, logits in enumerate(found.logits):
        rows = found.sequences[:, : 21 + step]
        seen = torch.cat([mask, torch.ones(3, step, dtype=torch.int64)], 1)
        wanted = exact.call(rows, seen, 1 if step else 21)[:, -1]
        assert (logits - wanted).abs().max() < 1e-6  # generate() rounds logits to float32


def test_beams_take_their_scores_along() -> None:
    ids, mask = left_padded([17, 11])
    options = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 7}
    found = generated(compiled(decoder("llama"), decode={"every": 2, "keep": 0.5}), ids, attention_mask=mask, **options)
    assert len({tuple(row) for row in found.sequences.tolist()}) > 3
    for i, (row, score) in enumerate(zip(found.sequences, found.sequences_scores.tolist(), strict=True)):
        exact = Reference(model := decoder("llama", use_cache=False), list(blocks_of(model)), PLAN, 2, 0.5)
        total = 0.0
        for step in range(7):
            seen = torch.cat([mask[i // 3], torch.ones(step, dtype=torch.int64)])[None]
            logits = exact.call(row[None, : 17 + step], seen, 1 if step else 17)[:, -1]
            total += float(logits.log_softmax(-1)[0, row[17 + step]])
        assert abs(total / 7 - score) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("target", ["inductor", "openvino", "onnxruntime"])
def test_every_target_cuts_alike(target: str) -> None:
    config = {"INFERENCE_PRECISION_HINT": "f32"} if target == "openvino" else {}
    ids, mask = left_padded([21, 9])
    decode = {"every": 2, "keep": 0.4}
    runs = {"eager": {}, target: {"config": config}}
    exact, found = (
        generated(compiled(decoder("llama").float(), target=t, decode=decode, **o), ids, attention_mask=mask)
        for t, o in runs.items()
    )
    assert torch.equal(found.sequences, exact.sequences)
    assert (torch.stack(found.logits) - torch.stack(exact.logits)).abs().max() < 1e-4


@pytest.mark.slow
def test_trained_predictors_with_places_score_new_tokens() -> None:
    torch.manual_seed(0)
    shapes = predictor_shapes(32, 8, positions=True)
    weights = {f"stages.{i}.{name}": torch.randn(shape) for i in range(2) for name, shape in shapes.items()}
    plan = PrunePlan(PLAN.stages, ScorerSpec("mlp"), PLAN.protect, weights=weights)
    fast = compiled(decoder("llama"), plan, decode={"every": 3, "keep": 8})
    whole = generated(compiled(decoder("llama"), plan, decode={"every": None}), prompts(2, 20), max_new_tokens=8)
    found = generated(fast, prompts(2, 20), max_new_tokens=8)
    assert [layer.keys.shape[2] for layer in found.past_key_values.layers] == [27, 9, 9]
    assert torch.equal(found.logits[0], whole.logits[0])
    assert not torch.allclose(found.logits[-1], whole.logits[-1])


class TestOwnCaches:
    """`compress_cache(by="predictor")`: the user says when."""

    def left(self, lengths: Sequence[int] = (23, 16)) -> tuple[Followed, Tensor, Tensor]:
        run = Followed("llama", None, None)
        return run, *run.run(*left_padded(lengths), 4)

    @pytest.mark.parametrize("keep", [0.4, pytest.param(9, marks=pytest.mark.slow)])
    def test_a_cut_by_the_scores_that_are_kept(self, keep: Any) -> None:
        run, ids, mask = self.left()
        before = run.lengths()
        short = prunepass.compress_cache(run.fast, run.cache, None, keep, by="predictor")
        assert run.lengths() == before
        run.cache = short
        run.exact.cut(mask[:, :-1], keep)
        assert run.lengths()[1:] == run.exact.lengths()[1:]
        run.run(ids, mask, 4, new=1)
        assert run.worst < 1e-10

    @pytest.mark.slow
    def test_copies_go_on_alike(self) -> None:
        run, ids, mask = self.left()
        twin = copy.deepcopy(run.cache)
        options = {"input_ids": ids[:, -1:], "attention_mask": mask}
        with torch.no_grad():
            one = run.fast(past_key_values=run.cache, **options)
            two = run.fast(past_key_values=twin, **options)
        assert torch.equal(one.logits, two.logits)

    @pytest.mark.slow
    def test_rows_are_chosen_and_repeated_with_their_scores(self) -> None:
        run, *_ = self.left()
        exact = prunepass.compress_cache(run.fast, run.cache, None, 0.4, by="predictor")
        run.cache.batch_repeat_interleave(2)
        run.cache.batch_select_indices(torch.tensor([3]))
        short = prunepass.compress_cache(run.fast, run.cache, None, 0.4, by="predictor")
        for one, two in zip(short.layers, exact.layers, strict=True):
            assert torch.equal(one.keys, two.keys[1:, :, -one.keys.shape[2] :])
            assert torch.equal(one.values, two.values[1:, :, -one.values.shape[2] :])

    def test_what_cannot_be_cut(self) -> None:
        run, ids, _ = self.left()
        with pytest.raises(OptionError, match="'attention' or 'predictor'"):
            prunepass.compress_cache(run.fast, run.cache, ids, 0.5, by="norm")  # type: ignore[arg-type]  # the mistake itself
        with pytest.raises(OptionError, match="needs the prompt's input_ids"):
            prunepass.compress_cache(run.fast, run.cache, None, 0.5)
        with pytest.raises(OptionError, match="share in"):
            prunepass.compress_cache(run.fast, run.cache, None, 1.5, by="predictor")
        dense = decoder("llama")
        cache = dense(input_ids=ids).past_key_values
        with pytest.raises(RefusalError, match="no scores"):
            prunepass.compress_cache(dense, cache, None, 0.5, by="predictor")


class TestOptions:
    """What is wrong is said before a token is produced."""

    @pytest.mark.parametrize(
        ("decode", "says"),
        [
            ({"every": 0, "keep": 0.5}, "at least 1, not 0"),
            ({"every": 2.5, "keep": 0.5}, "whole number"),
            ({"every": True, "keep": 0.5}, "whole number"),
            ({"every": 4}, "needs 'keep'"),
            ({"keep": 0.5}, "needs 'every'"),
            ({"every": None, "keep": 0.5}, "no 'every'"),
            ({"every": 4, "keep": 1.5}, r"share in \(0, 1\]"),
            ({"every": 4, "keep": 0}, "at least 1, not 0"),
            ({"every": 4, "keep": 0.0}, r"share in \(0, 1\]"),
            ({"every": 4, "keep": "half"}, r"share in \(0, 1\]"),
            ({"every": 4, "keeps": 0.5}, "Did you mean 'keep'"),
            (64, "must be a mapping"),
        ],
    )
    def test_values(self, decode: Any, says: str) -> None:
        with pytest.raises(OptionError, match=says):
            Decode.parse(decode)

    def refused(self, kind: type[Exception], says: str, plan: PrunePlan = PLAN, model: Any = None, **call: Any) -> None:
        fast = compiled(model or decoder("llama"), plan, decode={"every": 2, "keep": 0.5})
        with pytest.raises(Exception, match=says) as caught:
            generated(fast, call.pop("ids", prompts(2, 17)), **call)
        assert isinstance(getattr(caught.value, "inner_exception", caught.value), kind)

    def test_through_torch_compile(self) -> None:
        with pytest.raises(Exception, match="at least 1, not 0") as caught:
            generated(compiled(decoder("llama"), decode={"every": 0, "keep": 0.5}), prompts(2, 17))
        assert isinstance(getattr(caught.value, "inner_exception", caught.value), OptionError)

    def test_scores_that_later_tokens_tell(self) -> None:
        plan = PrunePlan(PLAN.stages, ScorerSpec("attention"), PLAN.protect)
        self.refused(OptionError, "attention of tokens after it", plan)

    @pytest.mark.slow
    def test_a_plan_that_prunes_nothing(self) -> None:
        self.refused(OptionError, "no stage of the plan prunes", PrunePlan([Stage(1, 1)], PLAN.scorer, PLAN.protect))

    @pytest.mark.slow
    def test_windows_alone(self) -> None:
        self.refused(RefusalError, "attends in a window", model=windowed("mistral"))

    @pytest.mark.slow
    def test_attention_that_is_spelled_out(self) -> None:
        self.refused(RefusalError, "'decode' is for fused attention", model=decoder("llama", attention="eager"))

    @pytest.mark.slow
    def test_a_static_cache(self) -> None:
        self.refused(RefusalError, "key-value cache of fixed size", cache_implementation="static")

    def test_drafted_tokens(self) -> None:
        ids = prompts(1, 8, seed=2).repeat(1, 3)  # so that there is something to look up
        self.refused(RefusalError, "without an assistant", ids=ids, prompt_lookup_num_tokens=3)

    def test_a_cache_without_scores(self) -> None:
        ids = prompts(2, 12)
        with torch.no_grad():
            cache = decoder("llama")(input_ids=ids[:, :8]).past_key_values
            fast = compiled(decoder("llama"), decode={"every": 2, "keep": 0.5})
            with pytest.raises(RefusalError, match="no scores"):
                fast(input_ids=ids[:, 8:], past_key_values=cache)


def test_a_cut_takes_the_best_and_of_equal_ones_the_earlier() -> None:
    scores = torch.tensor([[1.0, 5, 5, float("nan"), 5, 0]]).repeat(2, 1)
    rank = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 2, 3]])
    filled = torch.tensor([[True] * 6, [False, False, True, True, True, True]])
    stays = rank == 0
    known = Scores(scores, rank, filled, stays & filled, torch.tensor([[6], [4]]), Protect(1, 1), 6)
    chosen = cut(known, 4)
    assert chosen is not None
    found, index = chosen
    assert index.tolist() == [[0, 1, 2, 5], [2, 3, 4, 5]]
    assert found.filled.all()
    chosen = cut(known, 3)
    assert chosen is not None
    assert chosen[1].tolist() == [[0, 1, 5], [2, 4, 5]]
    assert cut(known, 6) is None
