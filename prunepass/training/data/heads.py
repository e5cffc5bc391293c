"""What a model's head predicts, and the losses and metrics that go with it. `head_of` finds it from the model.

All losses take what a model returns (``outputs["logits"]`` and so on), are computed in at least float32 whatever the
autocast type, and let no gradient into the teacher. Distances to the teacher count each row alike, however long it is.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from prunepass.errors import DataError, OptionError
from prunepass.training.data import metrics
from prunepass.training.data.distances import kl, live, mean_by_row, mean_pooled, wide, without, yes_or_no
from prunepass.training.data.metrics import IGNORED

__all__ = ["SAMPLE_MASK", "Batch", "Head", "Kind", "head_of"]

Batch = Mapping[str, Tensor]

_TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
_IMAGES = "pixel_values"
_SOUNDS = ("input_values", "input_features")

#: in batches, the mask over samples of sound, which a model is given as its ``attention_mask``
SAMPLE_MASK = "sample_mask"


class Kind(StrEnum):
    """What a head predicts."""

    CLASSIFICATION = "classification"
    MULTI_LABEL = "multi-label"
    REGRESSION = "regression"
    TOKEN_CLASSIFICATION = "token-classification"
    QUESTION_ANSWERING = "question-answering"
    MASKED_LM = "masked-lm"
    CAUSAL_LM = "causal-lm"
    EMBEDDING = "embedding"


@dataclass(frozen=True)
class Head(ABC):
    """A head's losses and metrics.

    Args:
        inputs: the keys of a batch that the model's ``forward`` takes.
        labels: names of the classes, by id; empty where there are none.
    """

    kind: ClassVar[Kind]
    label_keys: ClassVar[tuple[str, ...]] = ("labels",)
    _headline: ClassVar[str | None] = None

    inputs: tuple[str, ...]
    labels: tuple[str, ...] = ()

    @property
    def headline(self) -> str | None:
        """The metric that says most, the larger the better; None where there are no labels."""
        return self._headline

    @property
    def makes_tokens(self) -> bool:
        """Whether the model makes its tokens itself, of images or sound. Batches then say by ``attention_mask``
        [B, tokens] which are live, and by ``sample_mask`` which samples of a sound, where the model is to know."""
        return not {_IMAGES, *_SOUNDS}.isdisjoint(self.inputs)

    @property
    def reads_sound(self) -> bool:
        """Whether the model makes its tokens of sound."""
        return not set(_SOUNDS).isdisjoint(self.inputs)

    @property
    def answers_once(self) -> bool:
        """Whether it gives one answer for all of a text, which it may read at a single token."""
        return not self.makes_tokens and self.kind in (Kind.CLASSIFICATION, Kind.MULTI_LABEL, Kind.REGRESSION)

    @property
    def finds_spans(self) -> bool:
        """Whether it marks the answer among a row's tokens, any of which may be it. To keep those longer costs tokens
        later on: SQuAD at 2/5 of the FLOPs has 43.1 F1 with a stage before block 0, and 38.7 without."""
        return self.kind == Kind.QUESTION_ANSWERING

    def model_inputs(self, batch: Batch) -> dict[str, Tensor]:
        """The part of ``batch`` that the model is called with: no labels, nothing it does not know."""
        found = {name: batch[name] for name in self.inputs if name in batch}
        return found | {"attention_mask": batch[SAMPLE_MASK]} if SAMPLE_MASK in batch else found

    def has_labels(self, batch: Batch) -> bool:
        """Whether `task_loss` can be computed."""
        return bool(self.label_keys) and all(key in batch for key in self.label_keys)

    def distillation(self, student: Any, teacher: Any, batch: Batch, temperature: float = 2.0) -> Tensor:
        """``T^2 KL(teacher || student)`` of predictions softened by T, or the distance that fits the head: a scalar.

        The factor keeps gradients of one size whatever T is (Hinton et al. 2015, arXiv 1503.02531); ToP takes T = 2.
        """
        return temperature**2 * self._distances(student, teacher, batch, temperature).mean()

    def divergence(self, student: Any, teacher: Any, batch: Batch) -> Tensor:
        """How far each row's predictions are from the teacher's, at temperature 1: float [B], 0 where they agree."""
        return self._distances(student, teacher, batch, 1.0)

    def task_loss(self, outputs: Any, batch: Batch) -> Tensor:
        """The loss against the labels in ``batch``, as transformers' own models have it: a scalar.

        Raises:
            DataError: the batch has no labels.
        """
        if not self.has_labels(batch):
            wanted = " and ".join(self.label_keys) or "labels, of which this head knows none"
            raise DataError(f"The batch has no {wanted}; it has {', '.join(batch)}.")
        return self._task_loss(outputs, batch)

    def salient(self, batch: Batch) -> Tensor:
        """Bool [B, S]: the positions whose predictions decide how much a token matters (`training.saliency`)."""
        return live(batch)

    @abstractmethod
    def _distances(self, student: Any, teacher: Any, batch: Batch, temperature: float) -> Tensor: ...

    @abstractmethod
    def _task_loss(self, outputs: Any, batch: Batch) -> Tensor: ...

    def compress(self, logits: Any, labels: Any) -> Any:
        """What `metrics` needs of one batch's outputs: the Trainer's ``preprocess_logits_for_metrics``."""
        return logits

    @abstractmethod
    def metrics(self, prediction: Any) -> dict[str, float]:
        """The Trainer's ``compute_metrics``: figures from a ``transformers.EvalPrediction`` of compressed outputs."""


class Classification(Head):
    """One of several classes a text."""

    kind = Kind.CLASSIFICATION
    _headline = "accuracy"

    def _distances(self, student: Any, teacher: Any, batch: Batch, temperature: float) -> Tensor:
        return kl(student["logits"], teacher["logits"], temperature)

    def _task_loss(self, outputs: Any, batch: Batch) -> Tensor:
        return F.cross_entropy(wide(outputs["logits"]), batch["labels"])

    def compress(self, logits: Any, labels: Any) -> Any:
        return _first(logits)

    def metrics(self, prediction: Any) -> dict[str, float]:
        return metrics.classification(prediction.predictions, prediction.label_ids)


class MultiLabel(Head):
    """Any number of the classes a text; each is a yes or no of its own."""

    kind = Kind.MULTI_LABEL
    _headline = "f1"

    def _distances(self, student: Any, teacher: Any, batch: Batch, temperature: float) -> Tensor:
        return kl(yes_or_no(student["logits"]), yes_or_no(teacher["logits"]), temperature).mean(-1)

    def _task_loss(self, outputs: Any, batch: Batch) -> Tensor:
        logits = wide(outputs["logits"])
        return F.binary_cross_entropy_with_logits(logits, batch["labels"].to(logits.dtype))

    def compress(self, logits: Any, labels: Any) -> Any:
        return _first(logits)

    def metrics(self, prediction: Any) -> dict[str, float]:
        return metrics.multi_label(prediction.predictions, prediction.label_ids)


class Regression(Head):
    """A number, or several, a text. Temperature means nothing here, and changes nothing."""

    kind = Kind.REGRESSION
    _headline = "spearman"

    def distillation(self, student: Any, teacher: Any, batch: Batch, temperature: float = 2.0) -> Tensor:
        return self.divergence(student, teacher, batch).mean()

    def _distances(self, student: Any, teacher: Any, batch: Batch, temperature: float) -> Tensor:
        difference = wide(student["logits"]) - wide(teacher["logits"]).detach()
        return difference.square().flatten(1).mean(1)

    def _task_loss(self, outputs: Any, batch: Batch) -> Tensor:
        logits = wide(outputs["logits"])
        return F.mse_loss(logits, batch["labels"].to(logits.dtype).reshape(logits.shape))

    def compress(self, logits: Any, labels: Any) -> Any:
        return _first(logits)

    def metrics(self, prediction: Any) -> dict[str, float]:
        return metrics.regression(prediction.predictions, prediction.label_ids)


class _TokenHead(Head):
    """A class a token. ``_scored`` says which positions count."""

    def _distances(self, student: Any, teacher: Any, batch: Batch, temperature: float) -> Tensor:
        scored = self._scored(batch)
        # select before anything is computed: a vocabulary of logits at every position is what fills the memory
        distances = kl(student["logits"][scored], teacher["logits"][scored], temperature)
        return mean_by_row(distances, scored)

    def _task_loss(self, outputs: Any, batch: Batch) -> Tensor:
        labels = batch["labels"]
        counts = labels != IGNORED
        losses = F.cross_entropy(wide(outputs["logits"][counts]), labels[counts], reduction="none")
        return losses.sum() / max(1, losses.numel())  # a batch without a label is 0, not nan

    def _scored(self, batch: Batch) -> Tensor:
        return batch["labels"] != IGNORED if "labels" in batch else live(batch)

    def compress(self, logits: Any, labels: Any) -> Any:
        return _first(logits).argmax(-1)

    def metrics(self, prediction: Any) -> dict[str, float]:
        return metrics.tokens(prediction.predictions, prediction.label_ids)


class TokenClassification(_TokenHead):
    """A class a token; where labels are given, at the first piece of each word."""

    kind = Kind.TOKEN_CLASSIFICATION

    @property
    def headline(self) -> str:
        """Of whole entities, where the classes mark any."""
        return "f1" if metrics.marks_entities(self.labels) else "accuracy"

    def metrics(self, prediction: Any) -> dict[str, float]:
        return metrics.entities(prediction.predictions, prediction.label_ids, self.labels)


class MaskedLM(_TokenHead):
    """The tokens behind the mask; in a batch without labels, those at every live position."""

    kind = Kind.MASKED_LM
    _headline = "accuracy"


class CausalLM(_TokenHead):
    """The next token: where labels are given, at the positions that predict one (a prompt's own predictions are never
    read while generating); else at every live position."""

    kind = Kind.CAUSAL_LM
    _headline = "accuracy"

    def salient(self, batch: Batch) -> Tensor:
        return self._scored(batch)

    def _scored(self, batch: Batch) -> Tensor:
        if "labels" not in batch:
            return live(batch)
        return F.pad(batch["labels"][:, 1:] != IGNORED, (0, 1))

    def _task_loss(self, outputs: Any, batch: Batch) -> Tensor:
        return super()._task_loss({"logits": outputs["logits"][:, :-1]}, {"labels": batch["labels"][:, 1:]})

    def metrics(self, prediction: Any) -> dict[str, float]:
        return metrics.tokens(prediction.predictions[:, :-1], prediction.label_ids[:, 1:])


class QuestionAnswering(Head):
    """Where an answer starts and ends: two distributions over the live positions, each weighing one half."""

    kind = Kind.QUESTION_ANSWERING
    label_keys = ("start_positions", "end_positions")
    _headline = "exact"

    def _distances(self, student: Any, teacher: Any, batch: Batch, temperature: float) -> Tensor:
        dead = ~live(batch)
        ends = ("start_logits", "end_logits")
        start, end = (kl(student[name], teacher[name], temperature, dead=dead) for name in ends)
        return (start + end) / 2

    def _task_loss(self, outputs: Any, batch: Batch) -> Tensor:
        dead = ~live(batch)
        start = F.cross_entropy(without(wide(outputs["start_logits"]), dead), batch["start_positions"])
        end = F.cross_entropy(without(wide(outputs["end_logits"]), dead), batch["end_positions"])
        return (start + end) / 2

    def compress(self, logits: Any, labels: Any) -> Any:
        return logits[0].argmax(-1), logits[1].argmax(-1)

    def metrics(self, prediction: Any) -> dict[str, float]:
        return metrics.spans(prediction.predictions, prediction.label_ids)


class Embedding(Head):
    """A vector a text: the mean over live tokens, normalised (sentence-transformers' usual pooling).

    There are no labels; the teacher's vectors are what is learnt. Temperature means nothing here, and changes nothing.
    """

    kind = Kind.EMBEDDING
    label_keys = ()

    def distillation(self, student: Any, teacher: Any, batch: Batch, temperature: float = 2.0) -> Tensor:
        return self.divergence(student, teacher, batch).mean()

    def _distances(self, student: Any, teacher: Any, batch: Batch, temperature: float) -> Tensor:
        one = mean_pooled(student["last_hidden_state"], live(batch))
        other = mean_pooled(teacher["last_hidden_state"], live(batch)).detach()
        return 1 - (one * other).sum(-1)

    def _task_loss(self, outputs: Any, batch: Batch) -> Tensor:
        raise DataError("An embedding model has no labels to learn from.")

    def metrics(self, prediction: Any) -> dict[str, float]:
        return {}


class MediaEmbedding(Embedding):
    """A vector an image or a sound: the mean over all live tokens and, where the model has one, ``pooler_output``,
    which is the class token's in most; each counts alike. Both are normalised."""

    def _distances(self, student: Any, teacher: Any, batch: Batch, temperature: float) -> Tensor:
        distances = super()._distances(student, teacher, batch, temperature)
        one, other = (x.get("pooler_output") for x in (student, teacher))
        if one is None or other is None:
            return distances
        return (distances + 1 - F.cosine_similarity(wide(one), wide(other).detach(), dim=-1)) / 2


_BY_SUFFIX: dict[str, type[Head]] = {
    "ForTokenClassification": TokenClassification,
    "ForQuestionAnswering": QuestionAnswering,
    "ForQuestionAnsweringSimple": QuestionAnswering,
    "ForMaskedLM": MaskedLM,
    "WithLMHeadModel": MaskedLM,
    "ForCausalLM": CausalLM,
    "LMHeadModel": CausalLM,
    "Model": Embedding,
}
#: of classes whose head answers once for all of an input
_WHOLE = ("ForSequenceClassification", "ForImageClassification", "ForAudioClassification")
_BY_PROBLEM: dict[str | None, type[Head]] = {
    "regression": Regression,
    "single_label_classification": Classification,
    "multi_label_classification": MultiLabel,
}


def head_of(model: nn.Module) -> Head:
    """The head of a transformers model, by its class and ``config.problem_type``; one logit a text, an image or a sound
    is a regression.

    Raises:
        OptionError: the class has none of the heads that can be trained.
    """
    name = type(model).__name__
    whole = name.endswith(_WHOLE)
    head_class = _sequence_head(model) if whole else _by_suffix(name)
    reads = getattr(model, "main_input_name", None)
    media = reads in (_IMAGES, *_SOUNDS)
    if media:
        head_class = head_class if whole else MediaEmbedding if _gives_states(model, name) else None
    if head_class is None:
        raise OptionError(
            f"{name} has a head that prunepass cannot train. It knows sequence, image, audio and token classification, "
            "regression, question answering, masked and causal language models, and base models, taken for embeddings; "
            "of an encoder and decoder that reads sound the encoder alone (model.get_encoder())."
        )
    if media:
        return head_class((str(reads),), _label_names(model, head_class))
    known = inspect.signature(model.forward).parameters
    return head_class(tuple(n for n in _TEXT_INPUTS if n in known), _label_names(model, head_class))


def _gives_states(model: nn.Module, name: str) -> bool:
    """Whether a model of images or sound is a base model, or the encoder out of a larger one."""
    if name.endswith("Encoder"):
        return True
    return name.endswith("Model") and not getattr(getattr(model, "config", None), "is_encoder_decoder", False)


def _by_suffix(name: str) -> type[Head] | None:
    return next((head for suffix, head in _BY_SUFFIX.items() if name.endswith(suffix)), None)


def _sequence_head(model: Any) -> type[Head] | None:
    problem = getattr(model.config, "problem_type", None)
    if problem is None:
        return Regression if model.config.num_labels == 1 else Classification
    return _BY_PROBLEM.get(problem)


def _label_names(model: Any, head_class: type[Head]) -> tuple[str, ...]:
    if head_class in (QuestionAnswering, MaskedLM, CausalLM, Embedding, MediaEmbedding):
        return ()
    return tuple(str(model.config.id2label[i]) for i in range(model.config.num_labels))


def _first(logits: Any) -> Any:
    """The logits alone, where a model returns more beside them (hidden states)."""
    return logits[0] if isinstance(logits, tuple) else logits
