"""Scores against formulas worked out by hand, and what all scorers owe: no dependence on dead slots."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import oracle
from prunepass import scorers
from prunepass.errors import PlanError, WeightsError
from prunepass.scorers import Attention, ScoreInputs, Scorer, scorer_class
from prunepass.scorers.attention import AttentionScorer
from prunepass.scorers.likeness import LikenessScorer
from prunepass.scorers.mlp import MlpScorer, predictor_shapes
from prunepass.scorers.norm import NormScorer
from prunepass.scorers.random import RandomScorer

B, H, T, D = 2, 4, 9, 6
ALIVE = torch.tensor([[True] * 9, [True] * 5 + [False] * 4])


def given(**fields: Any) -> ScoreInputs:
    hidden = torch.randn(B, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ids = torch.randint(0, 50, (B, T), generator=torch.Generator().manual_seed(2))
    rank = torch.arange(T).expand(B, T)
    return ScoreInputs(**({"hidden": hidden, "alive": ALIVE, "rank": rank, "token_ids": ids} | fields))


def heads(n: int, seed: int) -> Tensor:
    return torch.randn(B, n, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def key_mask() -> Tensor:
    return ALIVE[:, None, None, :]


def probabilities(attention: Attention) -> Tensor:
    """Attention in the plainest writing."""
    query, key = attention.query, attention.key
    assert query is not None
    assert key is not None
    key = torch.stack([key[:, h * key.shape[1] // query.shape[1]] for h in range(query.shape[1])], 1)
    logits = torch.einsum("bhqd,bhkd->bhqk", query, key) * (attention.scale or D**-0.5)
    if attention.is_causal:
        logits = logits.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
    if attention.mask is not None and attention.mask.dtype == torch.bool:
        logits = logits.masked_fill(~attention.mask, -torch.inf)
    elif attention.mask is not None:
        logits = logits + attention.mask
    return logits.softmax(-1)


def additive() -> Tensor:
    return torch.where(key_mask(), 0.0, -torch.inf).double() + torch.randn(1, H, T, T, dtype=torch.float64)


ATTENTIONS = {
    "plain": lambda: Attention(heads(H, 3), heads(H, 4), key_mask()),
    "grouped queries": lambda: Attention(heads(H, 3), heads(2, 4), key_mask()),
    "one key head": lambda: Attention(heads(H, 3), heads(1, 4), key_mask()),
    "scaled": lambda: Attention(heads(H, 3), heads(H, 4), key_mask(), scale=0.3),
    "causal": lambda: Attention(heads(H, 3), heads(H, 4), is_causal=True),
    "added mask": lambda: Attention(heads(H, 3), heads(H, 4), additive()),
}


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_attention_received(kind: str) -> None:
    attention = ATTENTIONS[kind]()
    expected = oracle.attention_received(probabilities(attention), ALIVE)
    found = AttentionScorer()(given(attention=attention))
    assert torch.allclose(found[ALIVE], expected[ALIVE], atol=1e-12)


@pytest.mark.parametrize("rows", [2, 3, 4, 9, 64])
@pytest.mark.parametrize("kind", ATTENTIONS)
def test_attention_of_some_rows(kind: str, rows: int) -> None:
    attention = ATTENTIONS[kind]()
    found = AttentionScorer(rows)(given(attention=attention))
    exact = probabilities(attention).mean(1)
    for b in range(B):
        live = [t for t in range(T) if ALIVE[b, t]]
        places = range(len(live)) if len(live) <= rows else [i * (len(live) - 1) // (rows - 1) for i in range(rows)]
        expected = exact[b, [live[p] for p in places]].mean(0)
        assert torch.allclose(found[b, ALIVE[b]], expected[ALIVE[b]], atol=1e-12)
    if rows >= T:
        assert torch.allclose(found[ALIVE], AttentionScorer()(given(attention=attention))[ALIVE], atol=1e-12)


def test_rows_of_attention_are_a_number() -> None:
    for wrong in (1, True, 2.5):
        with pytest.raises(PlanError, match="at least 2"):
            AttentionScorer(wrong)  # type: ignore[arg-type]  # that it is refused is the test


def test_attention_of_models_that_write_out_their_probabilities() -> None:
    attention = ATTENTIONS["plain"]()
    found = AttentionScorer()(given(attention=Attention(probabilities=probabilities(attention))))
    assert torch.allclose(found, AttentionScorer()(given(attention=attention)), atol=1e-12)


def test_attention_without_padding_averages_every_row() -> None:
    attention = Attention(heads(H, 3), heads(H, 4))
    found = AttentionScorer()(given(attention=attention, alive=None))
    assert torch.allclose(found, probabilities(attention).mean((1, 2)), atol=1e-12)
    assert torch.allclose(found.sum(-1), torch.ones(B, dtype=torch.float64))


def test_attention_of_fully_masked_dead_rows_is_no_nan() -> None:
    mask = (ALIVE[:, None, :, None] & ALIVE[:, None, None, :]).double().log()
    attention = Attention(heads(H, 3), heads(H, 4), mask)
    assert AttentionScorer()(given(attention=attention))[ALIVE].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scores_have_at_least_single_precision(dtype: torch.dtype) -> None:
    attention = Attention(heads(H, 3).to(dtype), heads(H, 4).to(dtype), key_mask())
    inputs = given(hidden=given().hidden.to(dtype), attention=attention)
    for scorer in (AttentionScorer(), NormScorer(), RandomScorer(3), LikenessScorer()):
        assert scorer(inputs).dtype == torch.float32


def test_norm_is_the_euclidean_length() -> None:
    inputs = given()
    assert torch.allclose(NormScorer()(inputs), inputs.hidden.norm(dim=-1))


def test_likeness_compares_with_coarser_grids_only() -> None:
    inputs = given()
    found = LikenessScorer()(inputs)
    grid = [next(g for g in range(9) if (t + 1) % 2 ** (g + 1)) for t in range(T)]
    assert grid == [0, 1, 0, 2, 0, 1, 0, 3, 0]
    for b in range(B):
        for t in range(T):
            others = [u for u in range(T) if grid[u] > grid[t] and ALIVE[b, u]]
            alike = [float(torch.cosine_similarity(inputs.hidden[b, t], inputs.hidden[b, u], 0)) for u in others]
            expected = -max(alike) if alike else 2.0
            assert not ALIVE[b, t] or abs(float(found[b, t]) - expected) < 2**-14


@pytest.mark.parametrize("tokens", [1, 2, 8, 9])
def test_two_sets_are_told_by_slices_where_the_number_of_tokens_is_known(tokens: int) -> None:
    hidden = torch.randn(2, tokens, D, generator=torch.Generator().manual_seed(tokens), dtype=torch.float64)
    rank = torch.arange(tokens).expand(2, tokens)
    scorer = LikenessScorer(sets="two")
    by_levels, by_slices = (scorer(ScoreInputs(hidden, None, rank, tokens=n)) for n in (None, tokens))
    assert torch.equal(by_levels, by_slices)
    assert bool((by_slices[:, 1::2] == 2).all())


def test_of_equal_tokens_one_stays() -> None:
    hidden = torch.randn(1, 5, D).repeat_interleave(4, dim=1)  # five kinds of token, four of each
    scores = LikenessScorer()(ScoreInputs(hidden, None, torch.arange(20)[None]))
    kept = scores[0].topk(5).indices // 4
    assert sorted(kept.tolist()) == [0, 1, 2, 3, 4]


def test_random_scores_depend_on_seed_place_and_token_only() -> None:
    one = given()
    other = given(hidden=one.hidden + 1, alive=None)
    assert torch.equal(RandomScorer(7)(one), RandomScorer(7)(other))
    assert not torch.equal(RandomScorer(7)(one), RandomScorer(8)(one))
    assert (RandomScorer(7)(one) != RandomScorer(7)(given(rank=one.rank + 1))).any()
    assert one.token_ids is not None
    assert (RandomScorer(7)(one) != RandomScorer(7)(given(token_ids=one.token_ids + 1))).any()


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**40, -3])
def test_random_scores_favour_no_place(seed: int) -> None:
    """Over many rows every place should win about equally often: 64 places, 4000 rows, 5 standard deviations."""
    rows, places = 4000, 64
    ids = torch.randint(1000, 30000, (rows, places), generator=torch.Generator().manual_seed(4))
    rank = torch.arange(places).expand(rows, places)
    scores = RandomScorer(seed)(ScoreInputs(torch.zeros(rows, places, 1), None, rank, ids))
    half = torch.zeros_like(scores).scatter(1, scores.topk(places // 2, dim=1).indices, 1.0).mean(0)
    assert float((half - 0.5).abs().max()) < 5 * 0.5 / rows**0.5


def test_random_scores_seldom_tie() -> None:
    ids = torch.randint(0, 30000, (1, 512), generator=torch.Generator().manual_seed(4))
    scores = RandomScorer(1)(ScoreInputs(torch.zeros(1, 512, 1), None, torch.arange(512)[None], ids))
    assert len(scores.unique()) > 480


def mlp(outputs: int = 1, width: int = D) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "fc1.weight": draw(8, width),
        "fc1.bias": draw(8),
        "fc2.weight": draw(outputs, 8),
        "fc2.bias": draw(outputs),
    }


@pytest.mark.parametrize("outputs", [1, 2])
def test_mlp_is_linear_gelu_linear(outputs: int) -> None:
    weights = mlp(outputs)
    inputs = given()
    w = {k: v.double() for k, v in weights.items()}
    inner = inputs.hidden @ w["fc1.weight"].mT + w["fc1.bias"]
    inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
    logits = inner @ w["fc2.weight"].mT + w["fc2.bias"]
    expected = logits[..., 0] if outputs == 1 else logits[..., 0] - logits[..., 1]
    found = MlpScorer.load({}, weights, D, "before block 1").double()(inputs)
    assert torch.allclose(found, expected, atol=1e-12)


def test_mlp_that_looks_at_places() -> None:
    """Two rows of nine tokens, the second of five; one token is protected at the end of each."""
    weights = mlp() | {"position.weight": torch.randn(8, 2, generator=torch.Generator().manual_seed(6))}
    inputs = given(end=torch.tensor([[8], [4]]))
    places = [[[r, max(0, end - 1 - r)] for r in range(T)] for end in (8, 4)]
    w = {k: v.double() for k, v in weights.items()}
    inner = inputs.hidden @ w["fc1.weight"].mT + w["fc1.bias"]
    inner = inner + (torch.tensor(places).double() + 1).log() / 8 @ w["position.weight"].mT
    expected = (torch.nn.functional.gelu(inner) @ w["fc2.weight"].mT + w["fc2.bias"])[..., 0]
    scorer = MlpScorer.load({}, weights, D, "before block 1").double()
    assert torch.allclose(scorer(inputs), expected, atol=1e-6)  # places are float32
    assert {name: tuple(w.shape) for name, w in weights.items()} == predictor_shapes(D, 8, positions=True)
    with pytest.raises(WeightsError, match="damaged"):
        MlpScorer.load({}, weights | {"position.weight": torch.zeros(8, 3)}, D, "before block 1")


WRONG: dict[str, tuple[dict[str, Tensor], str]] = {
    "none": ({}, "before block 1 needs trained weights"),
    "another width": (mlp(width=48), "width 48.* 6 wide"),
    "too many outputs": (mlp(3), "damaged"),
    "left over": (mlp() | {"fc3.weight": torch.zeros(1)}, "fc3"),
    "a bias of another size": (mlp() | {"fc1.bias": torch.zeros(3)}, "damaged"),
    "layers that do not fit": (mlp() | {"fc2.weight": torch.zeros(1, 5)}, "damaged"),
}


@pytest.mark.parametrize("case", WRONG)
def test_mlp_refuses_weights_that_do_not_fit(case: str) -> None:
    weights, words = WRONG[case]
    with pytest.raises(WeightsError, match=words):
        MlpScorer.load({}, weights, D, "before block 1")


def test_options_of_another_scorer_are_refused() -> None:
    with pytest.raises(PlanError, match=r"'mlp' before block 1.*hidden"):
        MlpScorer.load({"hidden": 3}, mlp(), D, "before block 1")
    with pytest.raises(PlanError, match=r"'norm' before block 1.*seed"):
        NormScorer.load({"seed": 3}, {}, D, "before block 1")
    with pytest.raises(PlanError, match="seed"):
        RandomScorer.load({"seed": "x"}, {}, D, "before block 1")


def test_weights_for_a_scorer_without_weights_are_refused() -> None:
    with pytest.raises(WeightsError, match=r"'norm' takes none"):
        NormScorer.load({}, mlp(), D, "before block 1")


def test_scorers_are_found_by_name() -> None:
    assert {"attention", "likeness", "mlp", "norm", "position", "random"} <= set(scorers.names())
    for name in ("attention", "likeness", "mlp", "norm", "position", "random"):
        assert scorer_class(name).name == name
    with pytest.raises(PlanError, match=r"'atention'.*Did you mean 'attention'.*Known: .*norm"):
        scorer_class("atention")


def test_one_end_of_each_row_stays() -> None:
    inputs = given()
    for keep, sign in (("first", -1), ("last", 1)):
        scorer = scorer_class("position").load({"keep": keep}, {}, D, "")
        assert torch.equal(scorer(inputs), sign * inputs.rank.float())
    with pytest.raises(PlanError, match="must be 'first' or 'last', not 'middle'"):
        scorer_class("position")(keep="middle")  # type: ignore[call-arg]  # options are each scorer's own


NEAREST = """
from prunepass.scorers.base import Scorer


class Nearest(Scorer):
    name = "{name}"

    def score(self, inputs):
        return -inputs.hidden.norm(dim=-1)
"""


def test_a_new_scorer_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorers, "__path__", [*scorers.__path__, str(tmp_path)])
    (tmp_path / "nearest.py").write_text(NEAREST.format(name="nearest"), encoding="utf-8")
    (tmp_path / "misnamed.py").write_text(NEAREST.format(name="named"), encoding="utf-8")
    try:
        assert {"nearest", "norm"} <= set(scorers.names())
        assert not {"base", "lens"} & set(scorers.names())
        scorer = scorer_class("nearest")
        assert torch.allclose(scorer()(given()), -NormScorer()(given()))
        with pytest.raises(WeightsError, match=r"'nearest' takes none"):
            scorers.check_weights("nearest", mlp(), "before block 1")
        with pytest.raises(PlanError, match="exists already"):
            scorers.register(scorer)
        with pytest.raises(PlanError, match=r"misnamed\.py holds no scorer whose name is 'misnamed'"):
            scorer_class("misnamed")
    finally:
        for name in ("nearest", "misnamed"):
            sys.modules.pop(f"prunepass.scorers.{name}", None)


class FirstWord(Scorer):
    name = "first word"

    def score(self, inputs: ScoreInputs) -> Tensor:
        return -inputs.rank.double()


def test_ones_own_scorer_is_registered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorers, "_REGISTERED", {})
    scorers.register(FirstWord)
    assert scorer_class("first word") is FirstWord
    scorers.register(FirstWord)  # a module run again registers its scorer again

    class Other(Scorer):
        name = "first word"

    class Nameless(Scorer):
        pass

    class Builtin(Scorer):
        name = "norm"

    for cls, words in ((Other, "exists already"), (Nameless, "no name"), (Builtin, "exists already")):
        with pytest.raises(PlanError, match=words):
            scorers.register(cls)


DEAD_CHANGES = {
    "hidden": lambda x: x.masked_fill(~ALIVE[..., None], 1e6),
    "token_ids": lambda x: x.masked_fill(~ALIVE, 3),
    "rank": lambda x: x.masked_fill(~ALIVE, 77),
}


@pytest.mark.parametrize("field", DEAD_CHANGES)
@pytest.mark.parametrize("name", ["norm", "random", "mlp", "likeness", "position"])
def test_dead_slots_do_not_matter(name: str, field: str) -> None:
    scorer = scorer_class(name).load({}, mlp() if name == "mlp" else {}, D, "").double()
    inputs = given()
    changed = given(**{field: DEAD_CHANGES[field](getattr(inputs, field))})
    assert torch.equal(scorer(inputs)[ALIVE], scorer(changed)[ALIVE])


def test_dead_queries_and_keys_do_not_matter_to_attention() -> None:
    attention = ATTENTIONS["plain"]()
    assert attention.query is not None
    assert attention.key is not None
    noise = torch.where(ALIVE[:, None, :, None], 0.0, 5.0)
    other = Attention(attention.query + noise, attention.key + noise, attention.mask)
    scorer = AttentionScorer()
    one, two = (scorer(given(attention=a)) for a in (attention, other))
    assert torch.allclose(one[ALIVE], two[ALIVE], atol=1e-12)
