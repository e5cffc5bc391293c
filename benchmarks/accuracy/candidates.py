"""Passages to rank for each query: the right ones, and the wrong ones that share most words with the query."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["Likeness", "cranfield_pairs", "squad_pairs"]

Example = Mapping[str, Any]
Pair = dict[str, Any]
#: of the order of candidates, and of those that are drawn
SEED = 0


def squad_pairs(
    questions: Sequence[Example], *, every: int, alike: int, others: int, among: int | None = None
) -> list[Pair]:
    """Question and paragraph: for each question its own paragraph and so many wrong ones, in random order.

    Args:
        questions: of SQuAD, with ``article``.
        every: only each so many-th question.
        alike: wrong paragraphs of the same article.
        others: wrong paragraphs of other articles.
        among: the first are drawn from so many paragraphs that share most words with the question; None takes the
            ``alike`` nearest themselves.

    Returns:
        ``text`` (the question), ``second`` (the paragraph), ``label`` (1.0 or 0.0) and ``query`` (the question's id).
        The pairs of a question follow each other.
    """
    paragraphs: dict[str, list[str]] = defaultdict(list)
    for question in questions:
        if question["context"] not in paragraphs[question["article"]]:
            paragraphs[question["article"]].append(question["context"])
    every_paragraph = [text for texts in paragraphs.values() for text in texts]
    rng, pairs = random.Random(SEED), list[Pair]()
    likeness = {article: Likeness(texts) for article, texts in paragraphs.items()}
    for question in questions[::every]:
        own = question["context"]
        near = [text for text in likeness[question["article"]].nearest(question["question"]) if text != own]
        wrong = near[:alike] if among is None else rng.sample(near[:among], min(alike, len(near[:among])))
        far = [text for text in rng.sample(every_paragraph, others + 1) if text != own][:others]
        candidates = [(own, 1.0), *((text, 0.0) for text in [*wrong, *far])]
        rng.shuffle(candidates)
        pairs += [
            {"text": question["question"], "second": text, "label": label, "query": question["id"]}
            for text, label in candidates
        ]
    return pairs


def cranfield_pairs(collection: Sequence[Example], *, candidates: int) -> list[Pair]:
    """Query and document of Cranfield: the documents judged relevant, and the others that share most words with the
    query, ``candidates`` in all, in random order. Keys as those of `squad_pairs`."""
    documents = [example for example in collection if "document" in example and example["text"]]
    numbers = {example["document"]: example["text"] for example in documents}
    likeness, rng, pairs = Likeness(list(numbers.values())), random.Random(SEED), list[Pair]()
    for number, query in enumerate(example for example in collection if "relevant" in example):
        right = [numbers[n] for n in query["relevant"] if n in numbers][:candidates]
        wrong = [text for text in likeness.nearest(query["text"]) if text not in right]
        chosen = [(text, 1.0) for text in right] + [(text, 0.0) for text in wrong[: candidates - len(right)]]
        rng.shuffle(chosen)
        pairs += [{"text": query["text"], "second": text, "label": label, "query": number} for text, label in chosen]
    return pairs


class Likeness:
    """Texts by how much their words' weights (TF-IDF) have in common with a query's."""

    def __init__(self, texts: Sequence[str]) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer

        self._texts = texts
        self._weigh = TfidfVectorizer(stop_words="english", sublinear_tf=True)
        self._weights = self._weigh.fit_transform(texts)

    def nearest(self, query: str) -> list[str]:
        """All texts, the nearest first; ties in their order."""
        likeness = (self._weights @ self._weigh.transform([query]).T).toarray()[:, 0]
        return [self._texts[i] for i in np.argsort(-likeness, kind="stable")]
