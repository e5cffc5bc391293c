"""Rows that ask for what was said before: one pass key in running text, or one of many keys and their values.

Among many, a statement is " <key> <value>." with key and value one word and one token each; the pass key is stated as
" The pass key is <value>.". Rows are made of token ids: lengths and depths are exact, and an answer is one token.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prunepass.training.data.metrics import IGNORED

_SHORTEST_WORD = 3


def single_token_words(tokenizer: Any) -> list[int]:
    """Ids of the tokens that are a space and a word in lower case."""
    texts = {i: tokenizer.decode([i]) for i in sorted(tokenizer.get_vocab().values())}
    return [i for i, t in texts.items() if t[:1] == " " and t[1:].isalpha() and t.islower() and len(t) > _SHORTEST_WORD]


@dataclass(frozen=True)
class Question:
    """A row to be tested on.

    Attributes:
        context: ids of text with statements in it.
        question: ids that follow it, up to the answer.
        answer: the one id asked for.
    """

    context: list[int]
    question: list[int]
    answer: int


@dataclass(frozen=True)
class Recall:
    """Makes rows.

    Args:
        words: ids that serve as keys and values.
        passkey: ids of " The pass key is", the key of rows that hold one statement.
        stop: id of ".".
    """

    words: tuple[int, ...]
    passkey: tuple[int, ...]
    stop: int

    @classmethod
    def of(cls, tokenizer: Any) -> Recall:
        """For a tokenizer that has "." as a token."""
        passkey, (stop,) = (tokenizer(text, add_special_tokens=False).input_ids for text in (" The pass key is", "."))
        return cls(tuple(single_token_words(tokenizer)), tuple(passkey), stop)

    def statements(self, rng: random.Random, count: int, text: Sequence[int] = ()) -> list[tuple[list[int], int]]:
        """(key, value) of ``count`` statements with different keys, of which none is in ``text``, where another word
        would follow it; of a single one, the pass key."""
        values = rng.sample(self.words, count)
        if count == 1:
            return [(list(self.passkey), *values)]
        said = set(text)
        keys = rng.sample([word for word in self.words if word not in said], count)
        return [([key], value) for key, value in zip(keys, values, strict=True)]

    # -- to train on -------------------------------------------------------------------------------------------------

    def repeated_row(self, rng: random.Random, length: int) -> tuple[list[int], list[int]]:
        """(ids, labels), both ``length`` long: some words in any order, again and again; labels from the second time
        on. What follows a word is what followed it before, which is the better part of recalling a statement."""
        words = rng.choices(self.words, k=rng.randint(2, length // 2))
        ids = (words * (length // len(words) + 1))[:length]
        return ids, [IGNORED] * len(words) + ids[len(words) :]

    def dense_row(self, rng: random.Random, length: int) -> tuple[list[int], list[int]]:
        """(ids, labels), both ``length`` long: statements alone, again and again; labels where a key comes again."""
        known = self.statements(rng, rng.randint(2, max(2, length // 10)))
        said: set[int] = set()
        ids: list[int] = []
        labels: list[int] = []
        while len(ids) < length:
            i = rng.randrange(len(known))
            key, value = known[i]
            ids += [*key, value, self.stop]
            labels += [*[IGNORED] * len(key), value if i in said else IGNORED, IGNORED]
            said.add(i)
        return ids[:length], labels[:length]

    def needle_row(self, rng: random.Random, length: int, text: Sequence[int]) -> tuple[list[int], list[int]]:
        """(ids, labels), both ``length`` long: statements within ``text``, then questions about them with answers."""
        known = self.statements(rng, min(rng.choice((1, 2, 4, length // 16)), length // 8) or 1, text)
        asked = rng.sample(known, len(known))
        tail = [i for key, value in asked for i in (*key, value, self.stop)]
        labels = [i for key, value in asked for i in (*[IGNORED] * len(key), value, IGNORED)]
        room = length - len(tail)
        context = self.scattered(rng, known, text, room)
        return context + tail, [IGNORED] * room + labels

    # -- to test on --------------------------------------------------------------------------------------------------

    def question(self, rng: random.Random, length: int, depth: float, count: int, text: Sequence[int]) -> Question:
        """A context of ``length`` tokens with ``count`` statements in it, the one asked for at ``depth`` (0 the start,
        1 the end), the others anywhere."""
        known = self.statements(rng, count, text)
        context = self.scattered(rng, known, text, length, depth)
        key, value = known[0]
        return Question(context, key, value)

    def scattered(
        self,
        rng: random.Random,
        known: Sequence[tuple[list[int], int]],
        text: Sequence[int],
        length: int,
        depth: float | None = None,
    ) -> list[int]:
        """The beginning of ``text`` with statements put into it, ``length`` in all; the first one at ``depth``."""
        said = [[*key, value, self.stop] for key, value in known]
        room = length - sum(map(len, said))
        assert 0 <= room <= len(text)
        places = [rng.randint(0, room) for _ in said]
        if depth is not None:
            places[0] = round(depth * room)
        out = list(text[:room])
        for place, statement in sorted(zip(places, said, strict=True), reverse=True):
            out[place:place] = statement
        return out
