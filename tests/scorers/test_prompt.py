"""The scorer `prompt`: attention received from the last tokens of the text, against the plainest writing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import harness
import zoo
from prunepass import Protect, PrunePlan, Stage
from prunepass.errors import PlanError
from prunepass.scorers import Attention, ScoreInputs
from prunepass.scorers.prompt import PromptScorer

B, H, T, D = 2, 4, 9, 6
#: the second row is padded on the left
ALIVE = torch.tensor([[True] * 9, [False] * 4 + [True] * 5])
#: image tokens may leave
PROTECTED = torch.tensor([[2, 0, 0, 2, 2, 0, 0, 2, 2], [0, 0, 0, 0, 2, 0, 0, 0, 2]])


def heads(n: int, seed: int) -> Tensor:
    return torch.randn(B, n, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def given(attention: Attention, **fields: Any) -> ScoreInputs:
    rank = torch.cumsum(ALIVE, 1) - 1
    return ScoreInputs(heads(1, 1)[:, 0], ALIVE, rank, attention=attention, **fields)


def expected(probabilities: Tensor, rows: int, protected: Tensor | None) -> Tensor:
    out = torch.zeros(B, T, dtype=torch.float64)
    for b in range(B):
        asks = [t for t in range(T) if ALIVE[b, t] and (protected is None or protected[b, t] > 0)]
        out[b] = probabilities[b][:, asks[-rows:]].mean(dim=(0, 1))
    return out


SEEN = ALIVE[:, None, None, :] & torch.ones(T, T).tril().bool()
ATTENTIONS = {
    "bool mask": Attention(heads(H, 3), heads(H, 4), SEEN | torch.eye(T).bool()),
    "mask of keys": Attention(heads(H, 3), heads(H, 4), ALIVE[:, None, None, :]),
    "grouped queries": Attention(heads(H, 3), heads(2, 4), ALIVE[:, None, None, :]),
    "added mask of all heads": Attention(
        heads(H, 3),
        heads(H, 4),
        torch.randn(1, H, T, T, dtype=torch.float64, generator=torch.Generator().manual_seed(6)),
    ),
    "causal": Attention(heads(H, 3), heads(H, 4), is_causal=True),
    "scaled": Attention(heads(H, 3), heads(H, 4), ALIVE[:, None, None, :], scale=0.3),
}


def softmax(attention: Attention) -> Tensor:
    assert attention.query is not None
    assert attention.key is not None
    key = attention.key.repeat_interleave(H // attention.key.shape[1], 1)
    logits = torch.einsum("bhqd,bhkd->bhqk", attention.query, key) * (attention.scale or D**-0.5)
    if attention.is_causal:
        logits = logits.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
    if attention.mask is None:
        return logits.softmax(-1)
    added = attention.mask.dtype != torch.bool
    return (logits + attention.mask if added else logits.masked_fill(~attention.mask, -torch.inf)).softmax(-1)


@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("protected", [None, PROTECTED], ids=["any token", "text"])
@pytest.mark.parametrize("kind", ATTENTIONS)
def test_attention_from_the_end_of_the_text(kind: str, protected: Tensor | None, rows: int) -> None:
    attention = ATTENTIONS[kind]
    wanted = expected(softmax(attention), rows, protected)
    inputs = given(attention, protected=protected)
    written_out = replace(inputs, attention=Attention(probabilities=softmax(attention)))
    for found in (PromptScorer(rows)(inputs), PromptScorer(rows)(written_out)):
        assert (found - wanted)[ALIVE].abs().max() < 1e-12


def test_rows_without_text_score_nothing() -> None:
    found = PromptScorer()(given(ATTENTIONS["bool mask"], protected=torch.zeros_like(PROTECTED)))
    assert torch.equal(found, torch.zeros_like(found))


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_gathering_equals_hiding(name: str) -> None:
    """In a model of text every live token asks; the row alone gives what it gives in its batch."""
    plan = PrunePlan([Stage(1, 0.6), Stage(2, 0.3)], {"name": "prompt", "rows": 3}, Protect(first=1, last=1))
    inputs, source = zoo.batch([14, 9]), harness.captured(name)
    pruned, masked = (harness.pruned(source, plan, mode).graph_module for mode in ("gather", "mask"))
    with torch.no_grad():
        hidden = masked(**inputs).last_hidden_state
        found = pruned(**inputs).last_hidden_state
        alone = pruned(**{k: v[1:, :9] for k, v in inputs.items()}).last_hidden_state
    live = inputs["attention_mask"].bool()
    assert (found - hidden)[live].abs().max() < 1e-10
    assert (found[1:, :9] - alone).abs().max() < 1e-10


@pytest.mark.parametrize("rows", [0, -1, 1.5, True, "all"])
def test_rows_that_are_no_number(rows: Any) -> None:
    with pytest.raises(PlanError, match="takes rows, a whole number of at least 1"):
        PromptScorer(rows)
