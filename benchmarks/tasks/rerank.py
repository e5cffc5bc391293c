"""Seconds to rerank a query's passages: pruned and dense by prunepass, and dense by sentence-transformers."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

import prunepass
from benchmarks.accuracy.candidates import Likeness
from benchmarks.accuracy.data import Example, read_squad
from benchmarks.accuracy.features import Features
from benchmarks.accuracy.metrics import rank_at_10
from benchmarks.accuracy.tasks import find_task
from benchmarks.accuracy.teachers import load_tokenizer, model_folder
from benchmarks.accuracy.truncation import MAIN_BUDGET
from benchmarks.markdown import setting, table
from benchmarks.places import data_folder, pruned_folder
from benchmarks.rivals import RIVAL, beside, in_brackets, versions, why_not
from benchmarks.store import Group, conditions, stages_text
from benchmarks.task import Cell, Rows, Task, chosen, option
from benchmarks.timing import quartiles, times_as_fast
from prunepass import PrunePlan
from prunepass.errors import OptionError, PruneError

DENSE, PRUNED = "dense", "pruned"
EMBEDDER = "prunepass"
#: what runs, and which folder
WAYS = ((RIVAL, DENSE), (EMBEDDER, DENSE), (EMBEDDER, PRUNED))
Way = tuple[str, str]
_PROGRAMS = Path(__file__).parents[1] / "reranking"
PROGRAMS = {EMBEDDER: _PROGRAMS / "embedder.py", RIVAL: _PROGRAMS / "sentence_transformers_openvino.py"}
#: pairs a call of sentence-transformers, the fastest of which is taken
BATCHES = (4, 8, 16, 32)
#: tokens of a passage
SHORTEST, LONGEST = 200, 500
#: tokens that longer pairs are cut to
MAX_LENGTH = 512
SEED = 0
TASK = "reranking"


@dataclass(frozen=True)
class Benchmark(Task):
    title = "Seconds to rerank"
    introduction = (
        "A cross-encoder of six layers (all-MiniLM-L6-v2, trained on SQuAD's questions and paragraphs) scores the "
        "passages of a query: that with the answer, and those that share most words with the question, of other "
        f"articles, too. Passages are paragraphs of SQuAD's development set, joined up to {SHORTEST} tokens and more. "
        "All ways run in turns, each in a process of its own with its model loaded; tokenising counts. "
        "sentence-transformers sorts pairs by length, too, and has the fastest of several batches. Times are of a "
        "query; brackets hold quartiles over queries and repeats. MRR@10 is that of the scores that were timed, in %."
    )
    budgets: tuple[str, ...] = option(("1/2", "2/5"), "shares of the FLOPs that the accuracy benchmark trained for")
    precisions: tuple[str, ...] = option(("f32",), "of OpenVINO's arithmetic: f32, bf16")
    python: str = option("", f"of an environment with {RIVAL}[openvino], for that way")
    runners: tuple[str, ...] = option((RIVAL, EMBEDDER), "which")
    queries: int = option(40, "how many")
    passages: int = option(100, "of each query")
    repeats: int = option(3, "how often each query is ranked by each way")
    threads: int = option(2, "of each way")
    seed: int = option(0, "of the trained model")

    def cells(self) -> Iterator[Cell]:
        for name in self.runners:
            chosen(name, (RIVAL, EMBEDDER), "runner")
        for name in ("queries", "passages", "repeats", "threads"):
            if getattr(self, name) < 1:
                raise OptionError(f"--{name} must be at least 1, not {getattr(self, name)}.")
        for budget in self.budgets:
            for precision in self.precisions:
                key = {"budget": budget, "precision": chosen(precision, ("f32", "bf16"), "precision")}
                key |= {"threads": self.threads, "passages": self.passages, "queries": self.queries, "seed": self.seed}
                yield Cell(key, lambda _, b=budget, p=precision: measure(self, b, p), why_not=self._why_not())

    def _why_not(self) -> str | None:
        if not (pruned_folder(TASK, self.seed) / "prunepass.json").is_file():
            return f"its model is missing; run the benchmark accuracy with --tasks {TASK} --rows both first"
        return why_not(self.python, self.runners, (EMBEDDER,))

    @property
    def ways(self) -> list[Way]:
        """Those asked for, in the order of `WAYS`."""
        return [way for way in WAYS if way[0] in self.runners]

    @classmethod
    def page(cls, groups: Sequence[Group]) -> Iterator[str]:
        """A table a group: seconds, ratios and MRR of every way."""
        columns = ["", "model", "seconds a query", f"over {RIVAL}", "over prunepass, dense", "MRR@10"]
        for group in groups:
            shared, lines = group.shared, []
            for row in group.rows:
                seconds = "{:.3f} ({:.3f} to {:.3f})".format(*row["seconds"])
                over = [in_brackets(row["over"]), in_brackets(row["over_own"])]
                lines.append([row["way"], row["model"], seconds, *over, f"{100 * row['mrr@10']:.1f}"])
            yield (
                f"## {shared['budget']} of the FLOPs, {shared['precision']}\n\n{shared['queries']} queries of "
                f"{shared['passages']} passages, mean {shared['mean_tokens']} tokens a pair. Stages "
                f"`{shared['stages']}`, query kept. {shared['repeats']} repeats; {RIVAL}: batches of "
                f"{shared['batch']}; {setting(shared)}{beside(shared)}.\n\n{table(columns, lines)}"
            )


def measure(options: Benchmark, budget: str, precision: str) -> tuple[dict[str, Any], Rows]:
    """A row for each way: ``seconds`` a query and how many times as fast as others, medians with quartiles.

    Raises:
        OptionError: there is no trained plan of that budget, or there are fewer queries.
        PruneError: a program fails; the message has its last words.
    """
    queries = draw(options.queries, options.passages)
    with tempfile.TemporaryDirectory(prefix="prunepass-rerank-") as work, ExitStack() as open_:
        folder = Path(work)
        lines = (json.dumps({"query": q["query"], "passages": q["passages"]}) + "\n" for q in queries)
        (folder / "queries.jsonl").write_text("".join(lines), encoding="utf-8")
        plan = export(folder, budget, options.seed)
        batch = _best_batch(options, folder, precision) if RIVAL in options.runners else 0
        programs = {way: open_.enter_context(Program(options, folder, way, precision, batch)) for way in options.ways}
        seconds, scores = _turns(programs, len(queries), options.repeats)
        other = versions(options.python) if RIVAL in options.runners else {}
    shared = conditions("openvino", "tokenizers", threads=options.threads) | {
        "other_versions": other,
        "repeats": options.repeats,
        "mean_tokens": _mean_tokens(queries),
        "stages": stages_text(plan.stages),
        "batch": batch,
    }
    rows = []
    for way in options.ways:
        examples = [
            {"query": number, "label": float(at == query["right"])}
            for number, query in enumerate(queries)
            for at in range(len(query["passages"]))
        ]
        found = [np.float32(score) for one in scores[way] for score in one]
        rows.append(
            {
                "way": way[0],
                "model": way[1],
                "seconds": [round(value, 4) for value in (median(seconds[way]), *quartiles(seconds[way]))],
                "over": times_as_fast(seconds, (RIVAL, DENSE), way),
                "over_own": times_as_fast(seconds, (EMBEDDER, DENSE), way),
                **{k: round(v, 5) for k, v in rank_at_10(found, Features(examples, [], [], [])).items()},
            }
        )
    return shared, rows


def draw(count: int, passages: int) -> list[dict[str, Any]]:
    """Queries of SQuAD's development set, at random with a fixed seed: ``query``, ``passages`` and which is ``right``.

    Raises:
        OptionError: there are fewer.
    """
    folder = data_folder() / "squad_v1.1"
    questions = read_squad([folder / "dev-part1-v1.1.json", folder / "dev-part2-v1.1.json"])
    texts, home = _passages(questions)
    answered = [question for question in questions if question["context"] in home]
    if count > len(answered) or passages > len(texts):
        raise OptionError(f"There are {len(answered)} queries and {len(texts)} passages; ask for fewer.")
    rng, likeness, queries = random.Random(SEED), Likeness(texts), []
    for question in rng.sample(answered, count):
        own = home[question["context"]]
        near = [text for text in likeness.nearest(question["question"]) if text != own][: passages - 1]
        near.insert(right := rng.randrange(passages), own)
        queries.append({"query": question["question"], "passages": near, "right": right})
    return queries


def _passages(questions: Sequence[Example]) -> tuple[list[str], dict[str, str]]:
    """Paragraphs of an article joined until they have `SHORTEST` tokens, but for those longer than `LONGEST`; and the
    passage that each paragraph is in."""
    tokenizer = load_tokenizer()
    paragraphs = list(dict.fromkeys((question["article"], question["context"]) for question in questions))
    encoded = tokenizer([text for _, text in paragraphs], add_special_tokens=False)["input_ids"]
    passages: list[str] = []
    home: dict[str, str] = {}
    gathered: list[str] = []
    tokens, last = 0, None
    for (article, text), ids in zip(paragraphs, encoded, strict=True):
        if article != last:
            gathered, tokens, last = [], 0, article
        gathered.append(text)
        tokens += len(ids)
        if tokens >= SHORTEST:
            if tokens <= LONGEST:
                passages.append(" ".join(gathered))
                home |= dict.fromkeys(gathered, passages[-1])
            gathered, tokens = [], 0
    return passages, home


def _mean_tokens(queries: Sequence[Mapping[str, Any]]) -> float:
    tokenizer = load_tokenizer()
    lengths = [
        len(ids)
        for q in queries
        for ids in tokenizer([q["query"]] * len(q["passages"]), q["passages"], truncation=True)["input_ids"]
    ]
    return round(fmean(lengths), 1)


def export(work: Path, budget: str, seed: int) -> PrunePlan:
    """Both folders: the task's dense model, and the one trained to be pruned, with its plan of that budget.

    Raises:
        OptionError: there is no plan of that budget.
    """
    from prunepass.export.hub import load

    home = pruned_folder(TASK, seed)
    plans = {f"{float(MAIN_BUDGET):g}": home} | {path.name: path for path in home.glob("budgets/*")}
    share = f"{float(Fraction(budget)):g}"
    if share not in plans:
        raise OptionError(f"No plan was trained for {budget} of the FLOPs; there are those for {', '.join(plans)}.")
    plan = PrunePlan.from_pretrained(plans[share])
    tokenizer = load_tokenizer()
    for name, source, one in ((DENSE, model_folder(find_task(TASK)), PrunePlan(())), (PRUNED, home, plan)):
        prunepass.export(load(str(source)).model, one, work / name, to="openvino", tokenizer=tokenizer)
    return plan


class Program:
    """One way in a process of its own; called with the number of a query, gives seconds and scores."""

    def __init__(
        self, options: Benchmark, work: Path, way: Way, precision: str, batch: int, max_length: int = MAX_LENGTH
    ) -> None:
        config = {"INFERENCE_NUM_THREADS": str(options.threads), "INFERENCE_PRECISION_HINT": precision}
        python = options.python if way[0] == RIVAL else sys.executable
        self._command = [python, str(PROGRAMS[way[0]]), str(work / way[1]), str(work / "queries.jsonl")]
        self._command += ["--max-length", str(max_length), "--batch", str(batch or 1), "--config", json.dumps(config)]
        threads = dict.fromkeys(("OMP_NUM_THREADS", "RAYON_NUM_THREADS"), str(options.threads))
        self._environment = {**os.environ, **threads, "TOKENIZERS_PARALLELISM": "true", "HF_HUB_OFFLINE": "1"}

    def __enter__(self) -> Program:
        self._words = tempfile.TemporaryFile("w+")  # closed with the process
        try:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._words,
                text=True,
                env=self._environment,
            )
        except OSError as e:
            raise PruneError(f"{self._command[0]} cannot be run: {e.strerror}. It is to be a Python.") from None
        try:
            while self._line() != "ready":  # what libraries print comes before
                pass
        except PruneError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._words.close()

    def __call__(self, number: int) -> tuple[float, list[float]]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{number}\n")
        self._process.stdin.flush()
        found = json.loads(self._line())
        return found["seconds"], found["scores"]

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._words.seek(0)
            words = " ".join(self._words.read().split())[-600:]
            raise PruneError(f"{' '.join(self._command[:3])} ended early: {words}")
        return line.strip()


def _best_batch(options: Benchmark, work: Path, precision: str) -> int:
    """Of `BATCHES`, the one that ranks the first queries fastest."""
    taken = {}
    for batch in BATCHES:
        with Program(options, work, (RIVAL, DENSE), precision, batch) as program:
            program(0)
            taken[batch] = min(program(number % options.queries)[0] for number in (0, 0, 0))
    return min(taken, key=taken.__getitem__)


def _turns(
    programs: Mapping[Way, Program], queries: int, repeats: int
) -> tuple[dict[Way, list[float]], dict[Way, list[list[float]]]]:
    """Seconds of each way, of every repeat and query, and the scores of the last repeat."""
    seconds: dict[Way, list[float]] = {way: [] for way in programs}
    scores: dict[Way, list[list[float]]] = {way: [] for way in programs}
    for program in programs.values():
        program(0)
    for repeat in range(repeats):
        for number in range(queries):
            order = list(programs) if (repeat + number) % 2 else list(programs)[::-1]
            for way in order:
                taken, found = programs[way](number)
                seconds[way].append(taken)
                if repeat == repeats - 1:
                    scores[way].append(found)
    return seconds, scores
