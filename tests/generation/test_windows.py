"""`generate()` with models whose layers attend in a window, and with attention "eager": the prompt is pruned, and each
later token sees what is kept of it and in the window, by position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from sweep.models import build
from test_generation import DECODERS, PLAN, compiled, decoder, generated, left_padded, prompt_graph, prompts
from torch import Tensor, nn
from torch.fx import Graph

import hooks
import oracle
import prunepass
from decoding import Greedy
from prunepass import Protect, PrunePlan, ScorerSpec, Stage
from prunepass.dynamo.backend import compilations
from prunepass.errors import RefusalError
from prunepass.generation import attention
from prunepass.generation.attention import filled_slots
from prunepass.passes.windows import cut_to_window, spread
from windowed import WINDOW, WINDOWED, windowed

aten = torch.ops.aten
#: so many that the window has moved on from the prompt
STEPS = WINDOW + 3

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def some(daily: Sequence[str], names: Sequence[str] = tuple(WINDOWED)) -> list[Any]:
    return [pytest.param(n, marks=() if n in daily else pytest.mark.slow) for n in names]


def model_of(name: str, **options: Any) -> Any:
    return windowed(name, **options) if name in WINDOWED else decoder(name, **options)


def exact_logits(model: nn.Module, plan: PrunePlan, ids: Tensor, mask: Tensor, prompt: int) -> Tensor:
    """[B, S, V] of the whole unpruned model without a cache, which hides what the plan has pruned of the prompt."""
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    layers = hooks.layers_of(model, model.config.num_hidden_layers)  # type: ignore[union-attr, arg-type]  # a configuration
    logits: Tensor = hooks.run_hooked(model, layers, plan, given, prompt).output.logits
    return logits


class Followed(Greedy):
    """A pruned model called step by step, and after each call the whole unpruned one.

    Args:
        later: "graph" runs later calls as torch.compile does, "module" the model's own code.
    """

    def __init__(
        self, name: str, plan: PrunePlan = PLAN, later: str = "module", dynamic: bool | None = None, **options: Any
    ) -> None:
        self.fast = model_of(name, **options)
        self.fast.compile(backend="tokprune", dynamic=dynamic, options={"plan": plan, "target": "eager"})
        self.exact = model_of(name, **{**options, "use_cache": False})
        self.plan, self.later = plan, later
        self.cache: Any = None
        self.prompt, self.worst = 0, 0.0

    def call(self, ids: Tensor, mask: Tensor, new: int) -> Tensor:
        """[B, 1] greedy choices after rows whose last ``new`` tokens come now."""
        first = self.cache is None
        self.prompt = self.prompt or new
        call = self.fast if first or self.later == "graph" else self.fast.forward
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -new:]
        with oracle.float64_softmax(), torch.no_grad():
            found = call(
                input_ids=ids[:, -new:], attention_mask=mask, position_ids=positions, past_key_values=self.cache
            )
            exact = exact_logits(self.exact, self.plan, ids, mask, self.prompt)
        self.cache = found.past_key_values
        seen = 1 if first else new  # other logits of the prompt are those of tokens that left
        self.worst = max(self.worst, float((found.logits[:, -seen:] - exact[:, -seen:]).abs().max()))
        return exact[:, -1:].argmax(-1)


def pruned_stages() -> int:
    """Of the last prompt."""
    found = [c.result for c in compilations() if c.result is not None and c.result.sites]
    return len(found[-1].sites)


@pytest.mark.parametrize("name", WINDOWED)
def test_each_step_sees_what_is_kept_and_in_the_window(name: str) -> None:
    """Of a batch of prompts: longer than the window, and shorter ones padded beside it."""
    run = Followed(name)
    run.run(*left_padded([23, 16, 4]), STEPS)
    assert run.worst < 1e-10
    assert pruned_stages() == 2


@pytest.mark.parametrize("name", some(daily=["gemma3"]))
@pytest.mark.parametrize(
    "length", [pytest.param(n, marks=pytest.mark.slow) for n in (2, WINDOW - 1, WINDOW, WINDOW + 1, 12, 30)] + [5]
)
def test_prompts_of_any_length_beside_the_window(name: str, length: int) -> None:
    run = Followed(name)
    run.run(*left_padded([length]), STEPS)
    assert run.worst < 1e-10


@pytest.mark.parametrize("name", some(daily=["mistral"]))
def test_graphs_of_any_length(name: str) -> None:
    run = Followed(name, dynamic=True)
    run.run(*left_padded([23, 16, 4]), 3)
    assert run.worst < 1e-10


@pytest.mark.parametrize("name", some(["llama", "mistral", "gemma3"], (*WINDOWED, *sorted(DECODERS.keys() - WINDOWED))))
def test_attention_that_is_spelled_out(name: str) -> None:
    run = Followed(name, attention="eager")
    run.run(*left_padded([23, 16, 4]), STEPS)
    assert run.worst < 1e-10
    assert pruned_stages() == 2


@pytest.mark.parametrize("name", some(daily=["mistral"], names=(*WINDOWED, "llama")))
@pytest.mark.parametrize("implementation", ["eager", pytest.param(None, marks=pytest.mark.slow)])
def test_chats_go_on_from_their_cache(name: str, implementation: str | None) -> None:
    """A later turn of several tokens, compiled like the first."""
    run = Followed(name, later="graph", attention=implementation)
    ids, mask = run.run(*left_padded([19, 12]), 3)
    turn = prompts(2, 5, seed=5)
    run.run(torch.cat([ids, turn], 1), torch.cat([mask, torch.ones_like(turn)], 1), 3, new=6)
    assert run.worst < 1e-10


@pytest.mark.parametrize("name", some(daily=["gemma3"]))
@pytest.mark.parametrize("dynamic", [True, pytest.param(None, marks=pytest.mark.slow)])
def test_generate(name: str, dynamic: bool | None) -> None:
    """The cache is made before the model is traced: with ``dynamic=True`` the widths of its windows are open, too."""
    ids, mask = left_padded([21, 9, 14])
    fast = windowed(name)
    fast.compile(backend="tokprune", dynamic=dynamic, options={"plan": PLAN, "target": "eager"})
    with oracle.float64_softmax():  # Gemma 2 gives NaN in float64 where padded rows see no key in float32
        found = generated(fast, ids, attention_mask=mask, max_new_tokens=STEPS)
    exact, whole = windowed(name, use_cache=False), torch.ones(3, STEPS, dtype=torch.int64)
    for step, logits in enumerate(found.logits):
        seen = torch.cat([mask, whole[:, :step]], 1)
        with oracle.float64_softmax(), torch.no_grad():
            wanted = exact_logits(exact, PLAN, found.sequences[:, : 21 + step], seen, 21)[:, -1]
        assert (logits - wanted).abs().max() < 1e-6  # generate() rounds logits to float32
    assert pruned_stages() == 2


@pytest.mark.parametrize("stages", [(), PLAN.stages])
@pytest.mark.parametrize("heads", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_calls_of_as_many_tokens_as_heads(heads: int, stages: tuple[Stage, ...]) -> None:
    """A cache, [rows, heads, ...], is then as long as the tokens along its second axis."""
    run = Followed("gemma3", replace(PLAN, stages=stages), later="graph", dynamic=True, num_key_value_heads=heads)
    ids, mask = run.run(*left_padded([19, 12]), 2)
    turn = prompts(2, heads - 1, seed=5)  # and the last token before it
    run.run(torch.cat([ids, turn], 1), torch.cat([mask, torch.ones_like(turn)], 1), 2, new=heads)
    assert run.worst < 1e-10


@pytest.mark.slow
def test_beams_of_padded_prompts() -> None:
    lengths = [17, 11]
    ids, mask = left_padded(lengths)
    together = generated(compiled(windowed("mistral")), ids, attention_mask=mask, num_beams=3, max_new_tokens=STEPS)
    for row, length in enumerate(lengths):
        own = ids[row : row + 1, -length:]
        alone = generated(compiled(windowed("mistral")), own, num_beams=3, max_new_tokens=STEPS)
        assert torch.equal(together.sequences[row, -STEPS:], alone.sequences[0, -STEPS:])


@pytest.mark.slow
def test_of_a_prompt_in_chunks_the_first_is_pruned() -> None:
    ids = prompts(2, 23)
    found = generated(compiled(windowed("mistral")), ids, prefill_chunk_size=12)
    exact = windowed("mistral", use_cache=False)
    for step, logits in enumerate(found.logits):
        rows = found.sequences[:, : 23 + step]
        with torch.no_grad():
            wanted = exact_logits(exact, PLAN, rows, torch.ones_like(rows), 12)[:, -1]
        assert (logits - wanted).abs().max() < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("target", ["inductor", "openvino", "onnxruntime"])
def test_every_target_generates_alike(target: str) -> None:
    config = {"INFERENCE_PRECISION_HINT": "f32"} if target == "openvino" else {}
    ids, mask = left_padded([21, 9])
    runs = {"eager": {}, target: {"config": config}}
    exact, found = (
        generated(compiled(windowed("gemma3").float(), target=t, **o), ids, attention_mask=mask, max_new_tokens=3)
        for t, o in runs.items()
    )
    assert torch.equal(found.sequences, exact.sequences)
    assert (torch.stack(found.logits) - torch.stack(exact.logits)).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("name", "lengths"),
    [("mistral", [8, 8, 8]), ("gpt_oss", [23, 8, 7]), pytest.param("gemma3", [8, 8, 23], marks=pytest.mark.slow)],
)
def test_what_caches_hold(name: str, lengths: list[int]) -> None:
    """Windows hold their positions. Layers of the whole text hold what reached them, but for the first of a model, by
    which positions are counted."""
    run = Followed(name)
    run.run(*left_padded([23]), 1)
    assert run.lengths() == lengths
    if name != "mistral":
        return
    with torch.no_grad():  # what the unpruned model caches in the first of its pruned layers
        whole = windowed(name)(input_ids=left_padded([23])[0]).past_key_values.layers[1].keys
    found = run.cache.layers[1].keys
    kept = (found != 0).any(-1).any(1)[:, None, :, None]
    assert 0 < kept.sum() < 8
    assert torch.allclose(found, whole * kept)


def test_one_stage_that_keeps_more_than_the_window_holds() -> None:
    run = Followed("gemma3", PrunePlan([Stage(2, 0.5)], ScorerSpec("norm"), Protect(last=WINDOW + 1)))
    run.run(*left_padded([30, 3]), STEPS)
    assert run.worst < 1e-10


class TestRefusals:
    """By the true reason, before a token is produced."""

    def refused(self, model: Any, message: str, **options: Any) -> None:
        with pytest.raises(Exception, match=message) as caught:
            generated(compiled(model), prompts(2, 17), **options)
        assert isinstance(getattr(caught.value, "inner_exception", caught.value), RefusalError)

    def test_a_static_cache(self) -> None:
        model = decoder("llama", attention="eager")
        self.refused(model, "key-value cache of fixed size", cache_implementation="static")

    def test_attention_that_another_registered(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nothing would mend the masks that it gets."""
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        from transformers.masking_utils import sdpa_mask

        def attend(*args: Any, **kwargs: Any) -> Any:
            return sdpa_attention_forward(*args, **kwargs)

        monkeypatch.setitem(AttentionInterface._global_mapping, "mine", attend)
        monkeypatch.setitem(AttentionMaskInterface._global_mapping, "mine", sdpa_mask)
        self.refused(windowed("mistral", attention="mine"), "in code of its own")

    @pytest.mark.parametrize("implementation", [None, pytest.param("eager", marks=pytest.mark.slow)])
    def test_masks_made_of_hidden_states(self, implementation: str | None) -> None:
        model = build("doge", use_cache=True)
        model.set_attn_implementation(implementation or "sdpa")
        self.refused(model, "makes a mask of its own from hidden states")

    def test_a_graph_by_itself(self) -> None:
        """Nothing would hide the empty slots that its caches have; and no mode "mask" of a window."""
        graph = prompt_graph(windowed("mistral"))
        with pytest.raises(RefusalError, match="holds a window"):
            prunepass.prune(graph, PLAN)
        with pytest.raises(RefusalError, match="use_cache=False"):
            prunepass.prune(graph, PLAN, mode="mask")


def test_spread_puts_tokens_where_they_stood() -> None:
    x = torch.arange(1.0, 13).reshape(2, 1, 3, 2)
    positions, like = torch.tensor([[0, 2, 3], [1, 3, 0]]), torch.zeros(2, 4)
    alive = torch.tensor([[True, True, True], [True, True, False]])
    found = spread(x, positions, alive, like)[:, 0, :, 0]
    assert found.tolist() == [[1, 0, 3, 5], [0, 7, 0, 9]]


@pytest.mark.parametrize("dtype", [torch.bool, torch.float64], ids=str)
def test_empty_slots_are_hidden(dtype: torch.dtype) -> None:
    keys = torch.ones(2, 1, 4, 3, dtype=torch.float64)
    keys[0, :, 1], keys[1, :, 2] = 0, 0
    seen = torch.tensor([[True, True, True, False], [True, True, True, True]])[None, None]
    mask = seen if dtype == torch.bool else torch.zeros(1, 1, 2, 4, dtype=dtype).masked_fill(~seen, -1e300)
    wanted = seen & torch.tensor([[1, 0, 1, 1], [1, 1, 0, 1]], dtype=torch.bool)[:, None, None]
    found = filled_slots(keys, mask)
    assert found.dtype == dtype
    assert torch.equal(found if dtype == torch.bool else found == 0, wanted)
    assert torch.equal(filled_slots(keys, None), (keys[:, :1, :, 0] != 0)[:, :, None])


def test_others_are_left_alone_until_a_cache_has_empty_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_empty_slots", False)
    masks: list[Tensor | None] = []

    def note(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
        masks.append(mask)

    keys = torch.zeros(1, 1, 4, 2)
    attention.attend_over_caches(note, None, keys[:, :, :1], keys, keys, None)
    attention.expect_empty_slots()
    attention.attend_over_caches(note, None, keys, keys, keys, None)
    attention.attend_over_caches(note, None, keys[:, :, :1], keys, keys, None)
    assert masks[:2] == [None, None]
    assert masks[2] is not None


def test_cuts_to_a_window_are_told_from_others() -> None:
    graph = Graph()
    x = graph.placeholder("x")

    def cut(*args: Any) -> Any:
        return graph.call_function(aten.slice.Tensor, args)

    end = 2**63 - 1
    whole = cut(x, 0, 0, end)
    window = cut(whole, 2, -4, end)
    around = cut(window, 3, 0, end)
    assert cut_to_window(window) == [whole, window]
    assert cut_to_window(around) == [whole, window, around]
    assert cut_to_window(cut(x, -2, -4)) is not None
    for other in (x, whole, cut(x, 2, 4, end), cut(x, 2, -4, -1), cut(x, 1, -4, end), cut(x, 2, -4, end, 2)):
        assert cut_to_window(other) is None
