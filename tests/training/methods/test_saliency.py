"""SDTP's labels: gradients against finite differences, and the scalar they are gradients of."""

from __future__ import annotations

import pytest
import torch

from prunepass.errors import OptionError
from prunepass.training.data.heads import CausalLM
from prunepass.training.data.metrics import IGNORED
from prunepass.training.methods.saliency import SALIENCIES, confidence, saliency


def test_saliency_is_the_gradient_times_the_state() -> None:
    first = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    second = torch.tanh(first) * 2
    weight = torch.randn(2, 5, 3, dtype=torch.float64)
    found = saliency((second**2 * weight).sum(), [first, second], "signed")
    at_second = (2 * second * weight * second).sum(-1)
    at_first = (2 * second * weight * 2 / torch.cosh(first) ** 2 * first).sum(-1)
    torch.testing.assert_close(found[1], at_second.detach())
    torch.testing.assert_close(found[0], at_first.detach())
    assert not any(f.requires_grad for f in found)


@pytest.mark.parametrize("kind", sorted(SALIENCIES))
def test_labels_are_one_number_a_token(kind: str) -> None:
    hidden = torch.randn(2, 4, 3, requires_grad=True)
    (found,) = saliency(hidden.square().sum(), [hidden], kind)
    assert found.shape == (2, 4)
    assert found.dtype == torch.float32
    if kind != "signed":
        assert bool((found >= 0).all())


def test_signed_labels_tell_raising_from_lowering() -> None:
    hidden = torch.tensor([[[1.0], [-1.0]]], requires_grad=True)
    (found,) = saliency(hidden.sum(), [hidden], "signed")
    assert found.tolist() == [[1.0, -1.0]]
    (found,) = saliency(hidden.sum(), [hidden], "absolute")
    assert found.tolist() == [[1.0, 1.0]]


def test_an_unknown_kind_is_named() -> None:
    hidden = torch.ones(1, 1, 1, requires_grad=True)
    with pytest.raises(OptionError, match=r"no saliency 'squared'.*signed"):
        saliency(hidden.sum(), [hidden], "squared")


def batch() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.ones(2, 4).long(), "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])}


def test_confidence_of_each_head() -> None:
    logits = torch.tensor([[1.0, 3.0], [2.0, -1.0]])
    assert confidence({"logits": logits}, batch()) == 5
    ends = {"start_logits": torch.tensor([[0.0, 4, 1, 1], [1, 0, 9, 9]]), "end_logits": torch.zeros(2, 4)}
    assert confidence(ends, batch()) == 5, "padding is no answer"
    tokens = torch.zeros(2, 4, 3)
    tokens[0, :, 1], tokens[1, :2, 2], tokens[1, 2:] = 2.0, 1.0, 7.0
    assert confidence({"logits": tokens}, batch()) == 3, "a mean over live tokens"
    states = torch.zeros(2, 4, 2)
    states[0, :, 0], states[1, 0, 1], states[1, 3, 1] = 3.0, 4.0, 100.0
    assert confidence({"last_hidden_state": states}, batch()) == pytest.approx(5.0), "|mean| of each row's live states"


def test_confidence_of_embeddings_has_a_gradient() -> None:
    states = torch.randn(2, 4, 3, requires_grad=True)
    confidence({"last_hidden_state": states}, batch()).backward()
    assert states.grad is not None
    assert states.grad[0].abs().min() > 0
    assert not states.grad[1, 2:].any()


def test_a_causal_models_labels_say_whose_logits_count() -> None:
    """A prompt's tokens are told apart by what comes after them, not by their own predictions."""
    head = CausalLM(("input_ids",))
    labels = torch.tensor([[IGNORED, IGNORED, 3, 4], [IGNORED, 2, IGNORED, 1]])
    labelled = {"input_ids": labels.clamp(min=0), "labels": labels}
    assert head.salient(labelled).tolist() == [[False, True, True, False], [True, False, True, False]]
    assert head.salient({"input_ids": labels}).all()
    logits = torch.tensor([[[9.0], [1.0], [3.0], [9.0]], [[5.0], [9.0], [1.0], [9.0]]])
    assert confidence({"logits": logits}, labelled, head.salient(labelled)) == 2 + 3
    teacher = torch.randn(2, 4, 5)
    unread = teacher + ~head.salient(labelled)[..., None] * torch.randn(2, 4, 5)
    assert head.divergence({"logits": unread}, {"logits": teacher}, labelled).abs().max() < 1e-6
    assert head.divergence({"logits": unread}, {"logits": teacher}, {"input_ids": labels}).min() > 1e-3
