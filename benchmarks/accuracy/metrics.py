"""Running a model over features, and the tasks' official figures from its outputs.

All figures are shares between 0 and 1 (correlations up to 1).

Every metric takes one array for each row of the features: class logits [C], a value [1], logits of each token
[tokens, C], (start, end) logits of each token [tokens, 2], or a unit vector [width].
"""

from __future__ import annotations

import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from benchmarks.accuracy.data import Example
from benchmarks.accuracy.features import Features, Kind
from prunepass.training.data.metrics import entity_spans

Array = np.ndarray[Any, np.dtype[np.float32]]
Outputs = Mapping[str, Any]
Metric = Callable[[Sequence[Array], Features], dict[str, float]]

#: longest answer of a question, in tokens (the value of BERT's SQuAD script)
LONGEST_ANSWER = 30


def accuracy(outputs: Sequence[Array], features: Features) -> dict[str, float]:
    """Share of the examples whose class is the one with the highest logit."""
    return {"accuracy": float(np.mean(_classes(outputs) == _labels(features)))}


def accuracy_and_f1(outputs: Sequence[Array], features: Features) -> dict[str, float]:
    """Accuracy, and the F1 of class 1 (0 where no example has, or gets, that class)."""
    found, wanted = _classes(outputs) == 1, _labels(features) == 1
    both = int(np.sum(found & wanted))
    return {**accuracy(outputs, features), "f1": _f1(both, int(found.sum()), int(wanted.sum()))}


def spearman(outputs: Sequence[Array], features: Features) -> dict[str, float]:
    """Spearman's rank correlation of the values with the labels; 0 where all values are the same."""
    return {"spearman": _rank_correlation([float(np.ravel(value)[0]) for value in outputs], _labels(features))}


def cosine_spearman(outputs: Sequence[Array], features: Features) -> dict[str, float]:
    """Spearman's rank correlation of the cosine of each pair of unit vectors with the pair's ``score``.

    The two texts of a pair are neighbouring examples; the first carries the ``score``.
    """
    scores = [example["score"] for example in features.examples[::2]]
    cosines = [float(a @ b) for a, b in zip(outputs[::2], outputs[1::2], strict=True)]
    return {"spearman": _rank_correlation(cosines, scores)}


def ndcg_at_10(outputs: Sequence[Array], features: Features) -> dict[str, float]:
    """Mean over the queries of the normalised discounted cumulative gain of the ten best documents.

    Gains are binary, the discount is ``1 / log2(1 + rank)`` (Jarvelin and Kekalainen 2002), ties go to the earlier
    document. Documents are the examples with a ``document`` number, queries those with a list ``relevant``.
    """
    at = {kind: [i for i, e in enumerate(features.examples) if kind in e] for kind in ("document", "relevant")}
    numbers = np.array([features.examples[i]["document"] for i in at["document"]])
    documents = np.stack([outputs[i] for i in at["document"]])
    gains = []
    for i in at["relevant"]:
        best = np.argsort(-(documents @ outputs[i]), kind="stable")[:10]
        relevant = features.examples[i]["relevant"]
        gains.append(_gain(np.isin(numbers[best], relevant)) / _gain(np.ones(min(10, len(relevant)))))
    return {"ndcg@10": float(np.mean(gains))}


def rank_at_10(outputs: Sequence[Array], features: Features) -> dict[str, float]:
    """Means over the queries, each of whose candidates have one value: MRR@10 (1 over the rank of the first right one,
    0 beyond the tenth) and nDCG@10 (see `ndcg_at_10`). Right candidates rank behind wrong ones of the same value."""
    candidates: dict[Any, list[tuple[float, bool]]] = defaultdict(list)
    for value, example in zip(outputs, features.examples, strict=True):
        candidates[example["query"]].append((-float(np.ravel(value)[0]), example["label"] > 0))
    reciprocal, gains = [], []
    for found in candidates.values():
        right = np.array([is_right for _, is_right in sorted(found)])
        first = np.flatnonzero(right[:10])
        reciprocal.append(1 / (1 + int(first[0])) if len(first) else 0.0)
        gains.append(_gain(right[:10]) / _gain(np.ones(min(10, int(right.sum())))))
    return {"mrr@10": float(np.mean(reciprocal)), "ndcg@10": float(np.mean(gains))}


# -- entities --------------------------------------------------------------------------------------------------------


def entity_f1(outputs: Sequence[Array], features: Features, tags: Sequence[str]) -> dict[str, float]:
    """Micro-averaged F1, precision and recall of whole entities: right only with the exact words and the exact type.

    A word takes the tag of its first piece, and O where the model doesn't see it. As in the CoNLL script, an ``I-X``
    that continues no ``X`` begins one.
    """
    found = [["O"] * sum(map(len, example["sentences"])) for example in features.examples]
    for output, owner, spans in zip(outputs, features.owners, features.spans, strict=True):
        for token, word in enumerate(spans):
            if word is not None:
                found[owner][word] = tags[int(output[token].argmax())]
    wanted = {(i, *e) for i, example in enumerate(features.examples) for e in _document_entities(example)}
    got = {(i, *e) for i, example in enumerate(features.examples) for e in _document_entities(example, found[i])}
    both = len(wanted & got)
    return {
        "f1": _f1(both, len(got), len(wanted)),
        "precision": both / len(got) if got else 0.0,
        "recall": both / len(wanted) if wanted else 0.0,
    }


def _document_entities(example: Example, flat: Sequence[str] | None = None) -> Iterator[tuple[int, str, int, int]]:
    """(sentence, type, first word, word after the last); no entity crosses the end of a sentence."""
    before = 0
    for number, given in enumerate(example["tags"]):
        sentence = given if flat is None else flat[before : before + len(given)]
        before += len(given)
        for entity in entity_spans(sentence):
            yield (number, *entity)


# -- questions -------------------------------------------------------------------------------------------------------


def answer_f1(outputs: Sequence[Array], features: Features) -> dict[str, float]:
    """SQuAD v1.1's exact match and word F1, each against the best of the given answers (Rajpurkar et al. 2016)."""
    texts = _answers(outputs, features)
    pairs = [(texts[i], example["answers"]) for i, example in enumerate(features.examples)]
    exact = [max(normalise_answer(text) == normalise_answer(answer) for answer in answers) for text, answers in pairs]
    f1 = [max(_word_f1(text, answer) for answer in answers) for text, answers in pairs]
    return {"f1": float(np.mean(f1)), "exact_match": float(np.mean(exact))}


def normalise_answer(text: str) -> str:
    """Lower case, without punctuation, articles and double spaces: what SQuAD compares."""
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def _word_f1(text: str, answer: str) -> float:
    found, wanted = normalise_answer(text).split(), normalise_answer(answer).split()
    return _f1((Counter(found) & Counter(wanted)).total(), len(found), len(wanted))


def _answers(outputs: Sequence[Array], features: Features) -> dict[int, str]:
    """The best span of each example over all windows of its context."""
    best: dict[int, tuple[float, str]] = defaultdict(lambda: (-np.inf, ""))
    for output, owner, spans in zip(outputs, features.owners, features.spans, strict=True):
        score, first, last = _best_span(output[: len(spans)], spans)
        if score > best[owner][0]:
            best[owner] = score, features.examples[owner]["context"][spans[first][0] : spans[last][1]]
    return {owner: best[owner][1] for owner in range(len(features.examples))}


def _best_span(logits: Array, spans: Sequence[Any]) -> tuple[float, int, int]:
    """Highest start + end logit of a span inside the context; minus infinity where the row holds no context."""
    inside = np.array([span is not None for span in spans])
    starts, ends = (np.where(inside, logits[:, side], -np.inf) for side in (0, 1))
    scores = starts[:, None] + ends[None, :]
    allowed = np.triu(np.tri(len(spans), k=LONGEST_ANSWER - 1, dtype=bool))  # first <= last < first + longest
    scores = np.where(allowed, scores, -np.inf)
    first, last = np.unravel_index(int(scores.argmax()), scores.shape)
    return float(scores[first, last]), int(first), int(last)


# -- helpers ---------------------------------------------------------------------------------------------------------


def _classes(outputs: Sequence[Array]) -> Any:
    return np.stack(list(outputs)).argmax(axis=-1)


def _labels(features: Features) -> Any:
    return np.array([example["label"] for example in features.examples])


def _f1(both: int, found: int, wanted: int) -> float:
    return 2 * both / (found + wanted) if found + wanted else 0.0


def _gain(hits: Any) -> float:
    return float(np.sum(hits / np.log2(2 + np.arange(len(hits)))))


def _rank_correlation(values: Sequence[float], wanted: Any) -> float:
    if len(set(values)) < 2:
        return 0.0
    return float(spearmanr(values, wanted).statistic)


# -- outputs ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def predict(
    model: Callable[..., Outputs], features: Features, kind: Kind, tokenizer: Any, *, batch_size: int = 32
) -> list[Array]:
    """One output a row, in the order of the rows.

    Rows run in batches of about the same length, padded to the longest.

    Args:
        model: takes the tokenizer's inputs (int64 [batch, length]) by name and gives a mapping of named outputs.
    """
    order = sorted(range(len(features)), key=features.lengths.__getitem__)
    outputs: list[Any] = [None] * len(order)
    for start in range(0, len(order), batch_size):
        at = order[start : start + batch_size]
        rows = [{name: features.rows[i][name] for name in tokenizer.model_input_names} for i in at]
        inputs = dict(tokenizer.pad(rows, return_tensors="pt"))
        for i, output in zip(at, read_outputs(kind, model(**inputs), inputs["attention_mask"]), strict=True):
            outputs[i] = output
    return outputs


def read_outputs(kind: Kind, outputs: Outputs, attention_mask: Any) -> list[Array]:
    """A model's named outputs as one array for each row; see `metrics` for the shapes.

    Outputs of tokens come back without their padding (which is taken to be on the right). Embeddings are the mean of
    the last hidden state over the live tokens, brought to unit length, as all-MiniLM-L6-v2 was trained.

    Args:
        outputs: tensors or arrays, [batch, ...].
        attention_mask: [batch, length], 1 at live tokens.
    """
    mask = _array(attention_mask)
    if kind in ("classification", "regression", "reranking"):
        return list(_array(outputs["logits"]))
    if kind == "embedding":
        pooled = (_array(outputs["last_hidden_state"]) * mask[:, :, None]).sum(axis=1)
        return list(pooled / np.linalg.norm(pooled, axis=1, keepdims=True))
    if kind == "question-answering":
        values = np.stack([_array(outputs["start_logits"]), _array(outputs["end_logits"])], axis=-1)
    else:
        values = _array(outputs["logits"])
    return [row[: int(live)] for row, live in zip(values, mask.sum(axis=1), strict=True)]


def _array(value: Any) -> Array:
    return np.asarray(value.float() if isinstance(value, Tensor) else value, dtype=np.float32)
