"""The graphs of training against the models they come from: values, gradients, shared weights."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn

import zoo
from prunepass import Protect, PrunePlan, Stage
from prunepass.errors import OptionError, PlanError
from prunepass.passes import hide
from prunepass.pipeline import prune_graph
from prunepass.scorers.mlp import MlpScorer
from prunepass.training.methods.gates import Sample
from prunepass.training.methods.gating import RankGate, TopGate
from prunepass.training.methods.graphs import TrainingGraphs

NAMES = ["bert", "distilbert", "modernbert", "deberta-v2", "llama", "gpt_neox"]
STAGES = (Stage(1, 0.6), Stage(3, 0.3))


def batch() -> dict[str, Tensor]:
    known = zoo.batch([13, 7])
    return {name: known[name] for name in ("input_ids", "attention_mask")}


def predictors(count: int = 2) -> dict[int, MlpScorer]:
    return {i: MlpScorer(zoo.HIDDEN, 6).double() for i in range(count)}


def plan(restore: str = "last") -> PrunePlan:
    return PrunePlan(STAGES, scorer="mlp", restore=restore)


def hidden_of(module: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    state: Tensor = module(**inputs).last_hidden_state
    return state


@cache
def traced(name: str = "bert") -> TrainingGraphs:
    """The graphs of a tiny model under `batch`, traced once. For tests that leave the model's weights as they are."""
    return TrainingGraphs(zoo.tiny(name), batch())


def at_live(value: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    return value[inputs["attention_mask"].bool()]


@pytest.mark.parametrize("name", NAMES)
def test_hidden_states_seen_by_taps_are_the_models_own(name: str) -> None:
    model, inputs = zoo.tiny(name), batch()
    watched = traced(name).watched(hidden=[1, 2, 3])
    with torch.no_grad():
        outputs = watched.module(**inputs)
        wanted = model(**inputs, output_hidden_states=True)
    torch.testing.assert_close(outputs.last_hidden_state, wanted.last_hidden_state, rtol=0, atol=1e-12)
    for cut, tap in watched.hidden.items():
        seen, own = (at_live(v, inputs) for v in (tap.take(), wanted.hidden_states[cut]))
        torch.testing.assert_close(seen, own, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["bert", "llama", "distilbert"])
def test_attention_seen_by_taps_is_that_received_from_live_rows(name: str) -> None:
    model, inputs = zoo.tiny(name), batch()
    watched = traced(name).watched(attention=[0, 3])
    model.set_attn_implementation("eager")
    with torch.no_grad():
        watched.module(**inputs)
        attentions = model(**inputs, output_attentions=True).attentions
    live = inputs["attention_mask"].double()
    for block, tap in watched.attention.items():
        rows = attentions[block] * live[:, None, :, None]
        wanted = rows.sum(2).mean(1) / live.sum(1, keepdim=True)
        seen = at_live(tap.take(), inputs)
        torch.testing.assert_close(seen.double(), at_live(wanted, inputs), rtol=0, atol=1e-6)


def test_a_leaf_tap_gives_gradients_at_the_cuts_of_a_frozen_model() -> None:
    model, inputs = zoo.tiny("bert").requires_grad_(False), batch()
    watched = TrainingGraphs(model, inputs).watched(hidden=[1, 2])
    watched.hidden[1].leaf = True
    target = watched.module(**inputs).last_hidden_state[:, 0].sum()
    first, second = (watched.hidden[c].take() for c in (1, 2))
    found = torch.autograd.grad(target, [first, second])
    # the same by running the model's own last blocks by hand
    start = second.detach().requires_grad_()
    mask = inputs["attention_mask"][:, None, None, :].bool().expand(-1, 1, 13, 13)
    state = start
    for layer in model.encoder.layer[2:]:
        state = layer(state, attention_mask=mask)
        state = state if isinstance(state, Tensor) else state[0]
    (wanted,) = torch.autograd.grad(state[:, 0].sum(), start)
    torch.testing.assert_close(found[1], wanted, rtol=0, atol=1e-12)
    assert found[0].abs().max() > 0


@pytest.mark.parametrize("restore", ["last", "zeros"])
@pytest.mark.parametrize("name", NAMES)
def test_a_gate_of_the_top_scores_chooses_as_deployed(name: str, restore: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hide, "LEAK", 1e-30)  # what training adds for its gradient's sake
    inputs, scorers = batch(), predictors()
    graphs = traced(name)
    gates = [TopGate(s, Protect()) for s in STAGES]
    gated = graphs.gated(plan(restore), gates, scorers).module
    with torch.no_grad():
        soft, masked, gathered = (
            at_live(hidden_of(m, inputs), inputs)
            for m in (gated, graphs.masked(plan(restore), scorers), graphs.pruned(plan(restore), scorers))
        )
    torch.testing.assert_close(gathered, masked, rtol=0, atol=1e-10)
    torch.testing.assert_close(soft, masked, rtol=0, atol=1e-6)  # the degrees are float32
    assert gates[0].degree.sum(1).tolist() == [8, 5]  # ceil(0.6 * 13), ceil(0.6 * 7)


def test_predictors_are_shared_by_all_graphs_and_not_copied() -> None:
    inputs, scorers = batch(), predictors()
    graphs = traced()
    pruned = graphs.pruned(plan(), scorers)
    before = hidden_of(pruned, inputs)
    with torch.no_grad():
        for scorer in scorers.values():
            scorer.fc2.weight.neg_()
    assert (hidden_of(pruned, inputs) - before).abs().max() > 1e-6
    again = hidden_of(graphs.pruned(plan(), scorers), inputs)
    torch.testing.assert_close(hidden_of(pruned, inputs), again, rtol=0, atol=0)


def test_a_choice_has_a_gradient_even_for_tokens_that_are_out() -> None:
    """Finite differences of the degree itself: mask mode is differentiated through, not around."""
    inputs = {k: v[:1] for k, v in batch().items()}
    graphs = traced()

    class Fixed(TopGate):
        degrees: Tensor

        def choose(self, scores: Tensor, ranked: Tensor, *_: object) -> Tensor:
            return self.degrees

    gate = Fixed(STAGES[0], Protect())
    module = graphs.gated(PrunePlan(STAGES[:1], scorer="norm"), [gate]).module

    def value(degrees: Tensor) -> Tensor:
        gate.degrees = degrees
        return hidden_of(module, inputs)[0, 0].square().sum()

    degrees = torch.tensor([[1.0] + [0.0, 1.0, 0.5] * 4], requires_grad=True)
    (gradient,) = torch.autograd.grad(value(degrees), degrees)
    step = 1e-3
    for place in (1, 2, 3):
        moved = degrees.detach().clone()
        moved[0, place] += step
        high = value(moved)
        moved[0, place] = (degrees[0, place] - step).clamp(min=0)
        low = value(moved)
        slope = (high - low) / (degrees[0, place] + step - moved[0, place])
        assert torch.isclose(gradient[0, place].double(), slope.detach(), rtol=2e-2, atol=1e-6), place


def test_straight_through_gradients_reach_the_predictors_of_all_stages() -> None:
    inputs, scorers = batch(), predictors()
    graphs = TrainingGraphs(zoo.tiny("bert").requires_grad_(False), inputs)
    gates = [TopGate(s, Protect()) for s in STAGES]
    hidden_of(graphs.gated(plan(), gates, scorers).module, inputs)[:, 0].sum().backward()
    for scorer in scorers.values():
        assert scorer.fc1.weight.grad is not None
        assert scorer.fc1.weight.grad.abs().max() > 0


def test_a_rank_gate_drops_by_percentile_and_never_revives() -> None:
    inputs = batch()
    graphs = traced()
    gates = [RankGate(0), RankGate(1)]
    gated = graphs.gated(PrunePlan(STAGES, scorer="random"), gates)
    half = torch.tensor([1.0] * 5 + [0.0] * 5)
    for gate in gates:
        gate.sample = Sample(torch.ones(2), torch.stack([half, half]))
    gated.module(**inputs)
    first, second = gates[0].degree, gates[1].degree
    assert torch.allclose(first.sum(1), torch.tensor([7.0, 4.0]))  # [CLS], and half of 12 and of 6
    assert bool((second <= first).all())
    assert bool((first[:, 0] == 1).all())
    assert not first[1, 7:].any(), "padding is not there"
    for gate in gates:
        gate.sample = Sample(torch.zeros(2), torch.stack([half, half]))  # a stage that is switched off
    gated.module(**inputs)
    assert torch.equal(gates[1].degree, inputs["attention_mask"].float())


def test_noise_only_while_training() -> None:
    inputs, scorers = batch(), predictors()
    graphs = traced()
    gate = TopGate(STAGES[0], Protect(), noise=5.0)
    module = graphs.gated(PrunePlan(STAGES[:1], scorer="mlp"), [gate], {0: scorers[0]}).module
    gate.eval()
    hidden_of(module, inputs)
    calm = gate.degree.detach().round()
    hidden_of(module, inputs)
    assert torch.equal(calm, gate.degree.detach().round())
    gate.train()
    draws = []
    for _ in range(8):
        hidden_of(module, inputs)
        draws.append(gate.degree.detach().round())
    assert any(not torch.equal(calm, d) for d in draws)
    assert all(torch.equal(d.sum(1), calm.sum(1)) for d in draws)


def test_scores_of_the_deployed_graph_can_be_watched() -> None:
    inputs, scorers = batch(), predictors()
    pruned = traced().pruned_and_watched(plan(), scorers)
    pruned.module(**inputs)
    assert pruned.positions[0] is None
    first, second = (tap.take() for tap in pruned.scores)
    at, alive = pruned.positions[1], pruned.alive[1]
    assert at is not None
    assert alive is not None
    assert first.shape == (2, 13)
    assert second.shape == (2, 8)
    positions, live = at.take(), alive.take()
    assert live.sum(1).tolist() == [8, 5]
    assert bool((positions[0].diff() > 0).all())


def test_gates_must_fit_the_plan() -> None:
    graphs = traced()
    with pytest.raises(PlanError, match="1 gates for a plan of 2 stages"):
        graphs.gated(plan(), [TopGate(STAGES[0], Protect())], predictors())
    with pytest.raises(OptionError, match="mode='mask'"):
        prune_graph(graphs.captured.graph_module, plan(), gates={0: TopGate(STAGES[0], Protect())})


@pytest.mark.parametrize("name", ["bert", "llama", "deberta-v2"])
def test_streams_are_the_pruned_models_states_and_say_where_they_stand(name: str) -> None:
    model, inputs, scorers = zoo.tiny(name), batch(), predictors()
    with torch.no_grad():
        pruned = traced(name).pruned_and_watched(plan(), scorers)
        pruned.module(**inputs)
        dense = model(**inputs, output_hidden_states=True).hidden_states
        masked = TrainingGraphs(model, {**inputs, "output_hidden_states": True}).masked(plan(), scorers)
        wanted = masked(**inputs, output_hidden_states=True).hidden_states
    assert [s.block for s in pruned.hidden] == [2, 3, 4]
    for stream, width in zip(pruned.hidden, (8, 8, 4), strict=True):
        state, at = stream.state.take(), stream.positions.value
        assert at is not None
        assert stream.alive is not None
        assert stream.alive.value is not None
        assert state.shape[1] == width
        if name == "llama" and stream.block == 4:
            continue  # its last state is told after the final norm
        states = wanted[stream.block], dense[stream.block]
        like, other = (v.gather(1, at.unsqueeze(-1).expand_as(state))[stream.alive.value] for v in states)
        torch.testing.assert_close(state[stream.alive.value], like, rtol=0, atol=1e-10)
        assert (like - other).abs().max() > 1e-6
