"""Which part of a pair `prunepass search` and `prunepass train` protect where nothing is said."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("accelerate")

from cases import trainer

from prunepass import Protect, PrunePlan
from prunepass.errors import OptionError
from prunepass.training.data.options import Goal, SearchOptions, Source, TrainOptions
from prunepass.training.data.rows import Example, Examples
from prunepass.training.loop import conduct, recipe
from prunepass.training.loop.prepare import prepare_search, prepare_training
from vocabulary import WORDS, save_model, tiny_tokenizer
from zoo import tiny


def pairs(folder: Path, first: int, second: int) -> str:
    draw = random.Random(0)
    rows = (f"{' '.join(draw.choices(WORDS[:8], k=n))}" for _ in range(40) for n in (first, second))
    lines = [f"{one},{next(rows)}" for one in rows]
    path = folder / "pairs.csv"
    path.write_text("\n".join(["query,passage", *lines]) + "\n", encoding="utf-8")
    return str(path)


def texts(folder: Path) -> str:
    path = folder / "texts.csv"
    lines = (" ".join(WORDS[i % 8 :][:9]) for i in range(40))
    path.write_text("\n".join(["text", *lines]) + "\n", encoding="utf-8")
    return str(path)


class EnoughError(Exception):
    """Ends a search where it would begin to try plans."""


def asked(model: Path, data: str, out: Path, **options: Any) -> SearchOptions:
    given = {"scorer": "norm", "rows": 16, "max_evaluations": 14} | options
    return SearchOptions(str(model), Source(data), out, Goal(0.6), **given)


def searched_with(options: SearchOptions) -> dict[str, Any]:
    """The keyword arguments that the search gets."""
    with mock.patch.object(recipe, "search_stages", side_effect=EnoughError) as begun, pytest.raises(EnoughError):
        recipe.search(options, prepare_search(options))
    return dict(begun.call_args.kwargs)


def protected(*given: Any, **options: Any) -> Protect:
    """What all plans that are tried protect."""
    template: PrunePlan = searched_with(asked(*given, **options))["template"]
    return template.protect


@pytest.mark.parametrize(
    ("lengths", "part"),
    [([(3, 30), (5, 20)], "first"), ([(30, 3), (9, 9)], "second"), ([(10, 12), (12, 10)], None), ([(9, 26)], None)],
)
def test_the_short_part_of_a_pair(lengths: list[tuple[int, int]], part: str | None) -> None:
    rows = tuple(Example("x" * a, "y" * b) for a, b in lengths)
    assert Examples("some", rows, labelled=False).short_part() == part
    assert Examples("some", (Example("text"),), labelled=False).short_part() is None


def test_a_query_is_protected_unless_something_else_is_said(tmp_path: Path) -> None:
    model, data = save_model(tmp_path / "model", num_hidden_layers=3), pairs(tmp_path, 3, 16)
    options = asked(model, data, tmp_path / "a")
    assert recipe.search(options, prepare_search(options)).plan.protect == Protect(segment="first")
    assert protected(model, data, tmp_path / "b", protect_segment="second") == Protect(segment="second")
    assert protected(model, data, tmp_path / "c", protect_segment="none").segment is None
    with pytest.raises(OptionError, match="first, second, none"):
        protected(model, data, tmp_path / "d", protect_segment="third")


def test_parts_of_one_length_are_not(tmp_path: Path) -> None:
    assert protected(save_model(tmp_path / "model"), pairs(tmp_path, 9, 10), tmp_path / "out").segment is None


def test_a_separator_tells_the_parts_apart_where_the_model_is_not_told(tmp_path: Path) -> None:
    model: Any = tiny("distilbert", "sequence")
    model.float().save_pretrained(tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    found = protected(tmp_path / "model", pairs(tmp_path, 3, 16), tmp_path / "out", protect_token_ids=(7,))
    assert found == Protect(segment="first", token_ids=(7, tokenizer.sep_token_id))


@pytest.mark.parametrize("head", ["question", "sequence"])
def test_stages_stand_before_block_0_where_answers_are_extracted(head: str, tmp_path: Path) -> None:
    tiny("bert", head).float().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    found = searched_with(asked(tmp_path / "model", pairs(tmp_path, 3, 16), tmp_path / "out"))
    assert found["template"].protect == Protect(segment="first")
    assert found["from_embeddings"] == (head == "question")


@pytest.mark.parametrize("name", ["bert", "distilbert", "roberta", "llama"])
def test_no_stage_stands_before_block_0_where_two_texts_have_not_met(name: str, tmp_path: Path) -> None:
    """Also where none of them is kept whole, and in models without token types. A single text has none to meet."""
    model = tmp_path / "model"
    tiny(name, "sequence").float().save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    found = searched_with(asked(model, pairs(tmp_path, 9, 10), tmp_path / "out"))
    assert found["template"].protect.segment is None
    assert found["from_embeddings"] is False
    assert searched_with(asked(model, texts(tmp_path), tmp_path / "other"))["from_embeddings"] is None


@pytest.mark.parametrize(("second", "told"), [(10, False), (0, None)])
def test_training_is_told_of_pairs(second: int, told: bool | None, tmp_path: Path) -> None:
    """DistilBERT has no token types to tell them by."""
    tiny("distilbert", "sequence").float().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    data = pairs(tmp_path, 9, second) if second else texts(tmp_path)
    options = TrainOptions(
        str(tmp_path / "model"), Source(data), tmp_path / "out", Goal(0.6), eval_data=Source(data), epochs=0.5
    )
    with mock.patch.object(conduct, "search", side_effect=EnoughError) as begun, pytest.raises(EnoughError):
        recipe.train(options, prepare_training(options))
    assert begun.call_args.kwargs["from_embeddings"] is told


@pytest.mark.parametrize(
    ("name", "head", "last"),
    [("llama", "sequence", 1), ("gpt2", "sequence", 1), ("bert", "sequence", 0), ("bert", "token", 0)],
)
def test_the_token_that_a_causal_head_reads_is_kept(name: str, head: str, last: int, tmp_path: Path) -> None:
    """Causal classifiers read the last token; pruned, it would have the state that it left with."""
    trained = trainer(tmp_path / "out", name=name, head=head, steps=1)
    assert trained.student.settings.protect == Protect(last=last)
    trained.train()
    assert trained.plan is not None
    assert trained.plan.protect == Protect(last=last)


def test_a_plan_that_is_given_protects_what_it_says(tmp_path: Path) -> None:
    plan = PrunePlan.short(0.5, [1], scorer="mlp")
    assert trainer(tmp_path / "out", name="llama", plan=plan).student.settings.protect == Protect()


def test_a_search_keeps_what_a_causal_head_reads(tmp_path: Path) -> None:
    tiny("llama", "sequence").float().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    data = pairs(tmp_path, 9, 10)
    assert protected(tmp_path / "model", data, tmp_path / "out") == Protect(last=1)
