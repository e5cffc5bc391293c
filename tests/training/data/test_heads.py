"""Heads: found from the model; losses against transformers' own and against plain formulas; what must not matter."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from prunepass.errors import DataError, OptionError
from prunepass.training.data import metrics
from prunepass.training.data.heads import Head, Kind, head_of
from zoo import batch, tiny

LENGTHS = [7, 3, 5]


def model_of(kind: Kind) -> Any:
    if kind == Kind.MULTI_LABEL:
        return tiny("bert", "sequence", num_labels=4, problem_type="multi_label_classification")
    if kind == Kind.REGRESSION:
        return tiny("bert", "sequence", num_labels=1)
    heads = {
        Kind.CLASSIFICATION: ("bert", "sequence"),
        Kind.TOKEN_CLASSIFICATION: ("bert", "token"),
        Kind.QUESTION_ANSWERING: ("bert", "question"),
        Kind.MASKED_LM: ("bert", "masked"),
        Kind.CAUSAL_LM: ("gpt2", "causal"),
        Kind.EMBEDDING: ("bert", "base"),
    }
    options = {"num_labels": 5} if kind in (Kind.CLASSIFICATION, Kind.TOKEN_CLASSIFICATION) else {}
    return tiny(*heads[kind], **options)


def labels_of(kind: Kind, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    live = inputs["attention_mask"].bool()
    if kind == Kind.CLASSIFICATION:
        return {"labels": torch.tensor([4, 0, 2])}
    if kind == Kind.MULTI_LABEL:
        return {"labels": torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]])}
    if kind == Kind.REGRESSION:
        return {"labels": torch.tensor([0.5, -1.0, 3.0], dtype=torch.float64)}
    if kind == Kind.TOKEN_CLASSIFICATION:
        labels = torch.arange(live.numel()).reshape(live.shape) % 5
        return {"labels": labels.masked_fill(~live, -100).index_fill(1, torch.tensor([0, 2]), -100)}
    if kind == Kind.QUESTION_ANSWERING:
        return {"start_positions": torch.tensor([1, 0, 2]), "end_positions": torch.tensor([3, 2, 2])}
    return {"labels": inputs["input_ids"].masked_fill(~live, -100)}


@pytest.fixture(name="case", params=list(Kind), ids=str)
def _case(request: pytest.FixtureRequest) -> tuple[Head, Any, dict[str, Tensor]]:
    model = model_of(request.param)
    return head_of(model), model, batch(LENGTHS)


def outputs_of(head: Head, model: Any, inputs: dict[str, Tensor], *, seed: int = 0) -> dict[str, Tensor]:
    """The model's outputs with noise added, as a plain mapping of leaves that take gradients."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        outputs = model(**head.model_inputs(inputs))
    noise = {k: torch.randn(v.shape, generator=generator, dtype=v.dtype) for k, v in outputs.items()}
    return {k: (v + seed * noise[k]).requires_grad_() for k, v in outputs.items()}


def main_output(outputs: dict[str, Tensor]) -> Tensor:
    return next(outputs[k] for k in ("logits", "start_logits", "last_hidden_state") if k in outputs)


# -- finding the head ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(Kind), ids=str)
def test_the_head_is_found_from_the_model(kind: Kind) -> None:
    assert head_of(model_of(kind)).kind == kind


def test_classes_are_named_as_the_config_names_them() -> None:
    model = tiny("bert", "sequence", id2label={0: "no", 1: "yes", 2: "maybe"}, label2id={"no": 0, "yes": 1, "maybe": 2})
    assert head_of(model).labels == ("no", "yes", "maybe")


def test_the_problem_type_of_the_config_decides() -> None:
    assert head_of(tiny("bert", "sequence", num_labels=3, problem_type="regression")).kind == Kind.REGRESSION


def test_a_head_that_cannot_be_trained_is_refused() -> None:
    import transformers

    model = transformers.BertForMultipleChoice(tiny("bert").config)
    with pytest.raises(OptionError, match="BertForMultipleChoice has a head"):
        head_of(model)


def test_the_model_gets_its_own_inputs_only() -> None:
    inputs = {**batch(LENGTHS), "labels": torch.zeros(3), "length": torch.zeros(3)}
    assert set(head_of(tiny("distilbert", "sequence")).model_inputs(inputs)) == {"input_ids", "attention_mask"}


# -- losses ----------------------------------------------------------------------------------------------------------


def test_the_task_loss_is_the_model_s_own(case: tuple[Head, Any, dict[str, Tensor]]) -> None:
    head, model, inputs = case
    if head.kind == Kind.EMBEDDING:
        with pytest.raises(DataError, match="of which this head knows none"):
            head.task_loss(model(**inputs), inputs)
        return
    labels = labels_of(head.kind, inputs)
    own = model(**inputs, **labels)
    ours = head.task_loss({k: v for k, v in own.items() if k != "loss"}, {**inputs, **labels})
    if head.kind == Kind.QUESTION_ANSWERING:  # transformers lets padding take part in the softmax; compare without it
        start, end = (own[k].masked_fill(inputs["attention_mask"] == 0, -1e30) for k in ("start_logits", "end_logits"))
        first = torch.nn.functional.cross_entropy(start, labels["start_positions"])
        expected = (first + torch.nn.functional.cross_entropy(end, labels["end_positions"])) / 2
    else:
        expected = own["loss"]
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6, check_dtype=False)  # causal: theirs is float32


def test_without_labels_there_is_no_task_loss(case: tuple[Head, Any, dict[str, Tensor]]) -> None:
    head, model, inputs = case
    assert not head.has_labels(inputs)
    with pytest.raises(DataError, match=r"no labels|knows none|no start_positions"):
        head.task_loss(outputs_of(head, model, inputs), inputs)


def test_agreement_costs_nothing_and_disagreement_does(case: tuple[Head, Any, dict[str, Tensor]]) -> None:
    head, model, inputs = case
    teacher, other = outputs_of(head, model, inputs), outputs_of(head, model, inputs, seed=1)
    for loss in (head.divergence(teacher, teacher, inputs), head.distillation(teacher, teacher, inputs)):
        torch.testing.assert_close(loss, torch.zeros_like(loss), atol=1e-12, rtol=0)
    divergence = head.divergence(other, teacher, inputs)
    assert divergence.shape == (len(LENGTHS),)
    assert (divergence > 1e-4).all()
    assert head.distillation(other, teacher, inputs).shape == ()


def test_no_gradient_reaches_the_teacher(case: tuple[Head, Any, dict[str, Tensor]]) -> None:
    head, model, inputs = case
    student, teacher = outputs_of(head, model, inputs, seed=1), outputs_of(head, model, inputs)
    head.distillation(student, teacher, inputs).backward()
    assert all(t.grad is None for t in teacher.values())
    gradient = main_output(student).grad
    assert gradient is not None
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0


def test_padding_does_not_matter(case: tuple[Head, Any, dict[str, Tensor]]) -> None:
    head, model, inputs = case
    student, teacher = outputs_of(head, model, inputs, seed=1), outputs_of(head, model, inputs)
    dead = inputs["attention_mask"] == 0
    before = head.divergence(student, teacher, inputs)
    per_token = [v for v in student.values() if v.shape[:2] == dead.shape]
    with torch.no_grad():
        for value in per_token:
            value[dead] = 50.0
    torch.testing.assert_close(head.divergence(student, teacher, inputs), before)
    if per_token:
        with torch.no_grad():
            per_token[0][0, 1] += torch.linspace(0, 9, per_token[0][0, 1].numel(), dtype=torch.float64).view_as(
                per_token[0][0, 1]
            )
        changed = head.divergence(student, teacher, inputs)
        if head.kind != Kind.QUESTION_ANSWERING:  # there one token has one logit, to which linspace adds 0
            assert changed[0] != before[0]


def test_half_precision_is_computed_in_single(case: tuple[Head, Any, dict[str, Tensor]]) -> None:
    head, model, inputs = case
    student = {k: v.detach().bfloat16() for k, v in outputs_of(head, model, inputs, seed=1).items()}
    teacher = {k: v.detach().bfloat16() for k, v in outputs_of(head, model, inputs).items()}
    loss = head.divergence(student, teacher, inputs)
    assert loss.dtype == torch.float32
    widened = ({k: v.float() for k, v in x.items()} for x in (student, teacher))
    torch.testing.assert_close(loss, head.divergence(*widened, inputs))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_distillation_is_the_softened_divergence(temperature: float) -> None:
    head = head_of(model_of(Kind.CLASSIFICATION))
    student, teacher = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    soft = [Categorical(logits=x / temperature) for x in (teacher, student)]
    expected = temperature**2 * kl_divergence(*soft).mean()
    torch.testing.assert_close(
        head.distillation({"logits": student}, {"logits": teacher}, batch(LENGTHS), temperature), expected
    )


def test_only_labelled_tokens_are_compared_where_there_are_labels() -> None:
    head = head_of(model_of(Kind.TOKEN_CLASSIFICATION))
    inputs = batch(LENGTHS)
    labels = labels_of(Kind.TOKEN_CLASSIFICATION, inputs)["labels"]
    student, teacher = (torch.randn(3, 7, 5, dtype=torch.float64) for _ in range(2))
    found = head.divergence({"logits": student}, {"logits": teacher}, {**inputs, "labels": labels})
    for row in range(3):
        places = [i for i in range(7) if labels[row, i] != -100]
        each = [kl_divergence(Categorical(logits=teacher[row, i]), Categorical(logits=student[row, i])) for i in places]
        torch.testing.assert_close(found[row], sum(each) / len(each))


def test_a_batch_without_any_masked_token_costs_nothing() -> None:
    head = head_of(model_of(Kind.MASKED_LM))
    inputs = batch(LENGTHS)
    logits = torch.randn(3, 7, 97, requires_grad=True)
    loss = head.task_loss({"logits": logits}, {**inputs, "labels": torch.full((3, 7), -100)})
    loss.backward()
    assert loss == 0


def test_embeddings_are_compared_by_the_angle_of_their_means() -> None:
    head = head_of(model_of(Kind.EMBEDDING))
    student, teacher = (torch.randn(3, 7, 4, dtype=torch.float64) for _ in range(2))
    found = head.divergence({"last_hidden_state": student}, {"last_hidden_state": teacher}, batch(LENGTHS))
    for row, n in enumerate(LENGTHS):
        one, other = student[row, :n].mean(0), teacher[row, :n].mean(0)
        torch.testing.assert_close(found[row], 1 - one @ other / (one.norm() * other.norm()))


# -- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_see_compressed_outputs(case: tuple[Head, Any, dict[str, Tensor]]) -> None:
    head, model, inputs = case
    labels = tuple(labels_of(head.kind, inputs).values())
    with torch.no_grad():
        outputs = tuple(model(**inputs).values())
    outputs = outputs if len(outputs) > 1 else outputs[0]
    compressed = head.compress(outputs, labels)
    arrays = tuple(t.numpy() for t in compressed) if isinstance(compressed, tuple) else compressed.numpy()
    label_ids = tuple(t.numpy() for t in labels) if len(labels) > 1 else labels[0].numpy()
    figures = head.metrics(SimpleNamespace(predictions=arrays, label_ids=label_ids))
    assert all(isinstance(value, float) for value in figures.values())
    if head.kind == Kind.EMBEDDING:
        assert figures == {}
    else:
        assert head.headline in figures


def test_f1_of_two_classes_is_that_of_the_second() -> None:
    logits = np.array([[0, 1], [0, 1], [1, 0], [1, 0]])
    assert metrics.classification(logits, np.array([1, 0, 1, 0])) == {"accuracy": 0.5, "f1": 0.5}
    assert metrics.classification(logits, np.array([1, 1, 1, 1])) == {"accuracy": 0.5, "f1": pytest.approx(2 / 3)}


def test_f1_of_several_classes_is_their_mean() -> None:
    found = metrics.classification(np.eye(3)[[0, 1, 1, 2]], np.array([0, 1, 2, 2]))
    assert found == {"accuracy": 0.75, "f1": pytest.approx((1 + 2 / 3 + 2 / 3) / 3)}


def test_correlations_of_a_constant_are_not_made_up() -> None:
    found = metrics.regression(np.array([1.0, 1.0, 1.0]), np.array([1.0, 2.0, 3.0]))
    assert np.isnan(found["spearman"])
    assert found["mse"] == pytest.approx(5 / 3)


def test_correlations() -> None:
    found = metrics.regression(np.array([[1.0], [2.0], [30.0]]), np.array([1.0, 2.0, 3.0]))
    assert found["spearman"] == pytest.approx(1)
    assert 0.8 < found["pearson"] < 0.95


def test_entities_count_whole() -> None:
    names = ("O", "B-PER", "I-PER", "B-LOC")
    labels = np.array([[-100, 1, 2, 0, 3]])
    predicted = np.array([[3, 1, 0, 0, 3]])  # PER cut short: wrong as a whole; LOC right
    found = metrics.entities(predicted, labels, names)
    assert found == {"f1": 0.5, "precision": 0.5, "recall": 0.5, "accuracy": 0.75}


def test_classes_that_are_no_entities_have_token_accuracy_only() -> None:
    assert metrics.entities(np.array([[0, 1]]), np.array([[0, 0]]), ("NOUN", "VERB")) == {"accuracy": 0.5}


@given(st.lists(st.tuples(st.sampled_from(["PER", "LOC"]), st.integers(1, 3), st.integers(0, 2)), max_size=6))
def test_entity_spans_are_read_back(entities: list[tuple[str, int, int]]) -> None:
    tags: list[str] = []
    written = []
    for kind, length, gap in entities:
        written.append((kind, len(tags), len(tags) + length))
        tags += [f"B-{kind}", *[f"I-{kind}"] * (length - 1), *["O"] * gap]
    assert list(metrics.entity_spans(tags)) == written


def test_an_inside_tag_without_a_beginning_begins_one() -> None:
    assert list(metrics.entity_spans(["I-PER", "I-LOC", "O", "I-LOC"])) == [("PER", 0, 1), ("LOC", 1, 2), ("LOC", 3, 4)]


def test_spans_must_be_right_at_both_ends() -> None:
    predicted, wanted = (np.array([1, 2, 3]), np.array([4, 5, 6])), (np.array([1, 2, 0]), np.array([4, 0, 6]))
    assert metrics.spans(predicted, wanted) == pytest.approx({"exact": 1 / 3, "start": 2 / 3, "end": 2 / 3})


def test_tags_that_mark_no_entities_are_scored_by_accuracy() -> None:
    model = tiny("bert", "token")
    model.config.id2label = {0: "NOUN", 1: "VERB"}
    assert head_of(model).headline == "accuracy"
    model.config.id2label = {0: "O", 1: "B-PER"}
    assert head_of(model).headline == "f1"
