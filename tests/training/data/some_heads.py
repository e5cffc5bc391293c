"""One head of each kind, for tests of data."""

from __future__ import annotations

from prunepass.training.data.heads import (
    Classification,
    MultiLabel,
    QuestionAnswering,
    Regression,
    TokenClassification,
)

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
TWO = Classification(INPUTS, ("bad", "good"))
NUMBER = Regression(INPUTS, ("LABEL_0",))
TAGS = TokenClassification(INPUTS, ("O", "B-CAT", "I-CAT"))
TOPICS = MultiLabel(INPUTS, ("a", "b", "c"))
QA = QuestionAnswering(INPUTS)
