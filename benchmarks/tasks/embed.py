"""Documents a second: ``prunepass embed`` against a plain loop and against sentence-transformers' OpenVINO backend."""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import prunepass
from benchmarks.accuracy.features import Features
from benchmarks.accuracy.metrics import Array
from benchmarks.accuracy.tasks import Task as Dataset
from benchmarks.accuracy.tasks import find_task
from benchmarks.accuracy.teachers import base_model
from benchmarks.markdown import setting, table
from benchmarks.rivals import RIVAL, beside, in_brackets, versions, why_not
from benchmarks.store import Group, conditions, stages_text
from benchmarks.task import Cell, Rows, Task, chosen, option
from benchmarks.timing import quartiles, times_as_fast
from prunepass import PrunePlan
from prunepass.errors import OptionError, PruneError

CORPORA = ("20newsgroups", "cranfield")
DENSE, PRUNED = "dense", "pruned"
LOOP, EMBED = "loop", "embed"
#: what runs, and which folder
WAYS = ((RIVAL, DENSE), (LOOP, DENSE), (LOOP, PRUNED), (EMBED, DENSE), (EMBED, PRUNED))
Way = tuple[str, str]
_SCRIPTS = Path(__file__).parents[1] / "embedding"
SCRIPTS = {LOOP: _SCRIPTS / "plain_loop.py", RIVAL: _SCRIPTS / "sentence_transformers_openvino.py"}
#: of a script, the best of which is taken
SETTINGS = [{"batch": batch, "hint": hint} for hint in ("LATENCY", "THROUGHPUT") for batch in (1, 8, 16, 32, 64)]
SEED = 0
#: weight of the squared coefficients, of a regression on vectors of length 1
RIDGE = 1.0
#: of a command that failed, the last characters of what it said
_LAST_WORDS = 600


@dataclass(frozen=True)
class Benchmark(Task):
    title = "Documents a second"
    introduction = (
        "all-MiniLM-L6-v2, int8 by nncf, OpenVINO; real texts. Documents a second are those of a whole command, from a "
        "file of texts to a file of vectors, less the time of the same command for a few texts (its start). All ways "
        "run in turns; brackets hold quartiles over the repeats. sentence-transformers and the loop sort texts by "
        "length, too, and have the best of ten settings, tried on a sample. All read folders of "
        "`prunepass.export(..., pooled=True)`; *dense* is the model without a plan. Quality is nDCG@10 on Cranfield, "
        "and on 20 Newsgroups the accuracy of a ridge regression on the vectors, in two folds; both in %. "
        "*Queries unpruned*: the same on Cranfield with queries at level 0 of a folder of plans."
    )
    corpora: tuple[str, ...] = option(CORPORA, "whose texts (from the folder that PRUNEPASS_DATA names)")
    plans: tuple[str, ...] = option(("all-MiniLM-L6-v2/budgets/0.4",), "names or folders of plans")
    runners: tuple[str, ...] = option((RIVAL, LOOP, EMBED), "which")
    python: str = option("", f"of an environment with {RIVAL} and optimum-intel, for that runner")
    precision: str = option("", "of what is not int8: f32 or bf16; OpenVINO's own choice by default")
    texts: int = option(0, "take only so many, at random; 0 for all")
    few: int = option(64, "texts of all lengths whose time is that of the start")
    sample: int = option(256, "texts of all lengths on which settings are tried")
    calibration: int = option(128, "texts for int8, of those that are not measured")
    repeats: int = option(5, "how often each way runs")
    threads: int = option(2, "of each way, all together")
    workers: int = option(1, "processes of prunepass embed, which share the threads")

    def cells(self) -> Iterator[Cell]:
        for name in self.runners:
            chosen(name, (RIVAL, LOOP, EMBED), "runner")
        for name in ("few", "sample", "calibration", "repeats", "threads", "workers"):
            if getattr(self, name) < 1:
                raise OptionError(f"--{name} must be at least 1, not {getattr(self, name)}.")
        if self.threads % self.workers:
            raise OptionError(f"{self.threads} --threads cannot be shared out evenly to {self.workers} --workers.")
        missing = why_not(self.python, self.runners, (LOOP, EMBED))
        for corpus in self.corpora:
            chosen(corpus, CORPORA, "corpus")
            for plan in self.plans:
                key = {"corpus": corpus, "plan": plan, "precision": self.precision or "own"}
                key |= {"asked": self.texts or "all", "threads": self.threads, "workers": self.workers}
                yield Cell(key, lambda _, c=corpus, p=plan: measure(self, find_task(c), p), why_not=missing)

    @property
    def ways(self) -> list[Way]:
        """Those asked for, in the order of `WAYS`."""
        return [way for way in WAYS if way[0] in self.runners]

    @classmethod
    def page(cls, groups: Sequence[Group]) -> Iterator[str]:
        """Rates, ratios and quality of every way, group by group."""
        columns = ["", "model", "documents a second", f"over {RIVAL}", "over loop, same model", "start", "quality"]
        for group in groups:
            shared, lines = group.shared, []
            has_queries = any("quality_dense_queries" in row for row in group.rows)
            for row in group.rows:
                rate, low, high = row["rate"]
                over = [in_brackets(row["over"]), in_brackets(row["over_loop"])]
                line = [row["way"], row["model"], f"{rate:.4g} ({low:.4g} to {high:.4g})", *over]
                how = [f"{row['start']:.1f} s", f"{100 * row['quality']:.1f}"]
                if has_queries:
                    asked = row.get("quality_dense_queries")
                    how.append("" if asked is None else f"{100 * asked:.1f}")
                lines.append([*line, *how, _settings_text(row["settings"])])
            yield (
                f"## {shared['corpus']}, {shared['plan']}\n\n{shared['texts']} texts, mean {shared['mean_tokens']} "
                f"tokens, cut at {shared['max_length']}. Stages `{shared['stages']}`. What is not int8 is computed in "
                f"{shared['arithmetic']}. {shared['repeats']} repeats, {shared['workers']} workers; {setting(shared)}"
                f"{beside(shared)}.\n\n{table([*columns, *['queries unpruned'] * has_queries, 'settings'], lines)}"
            )


def measure(options: Benchmark, task: Dataset, plan: str) -> tuple[dict[str, Any], Rows]:
    """A row for each way.

    ``rate`` is in documents a second: median and quartiles. ``over`` and ``over_loop`` are how many times as fast it is
    as sentence-transformers, and as the loop on the same folder: likewise, of turns that belong together. ``start`` and
    ``whole`` are medians in seconds, of a few texts and of all. ``difference`` is the largest one between a number of
    a vector and the loop's.

    Raises:
        OptionError: a plan that is not there, or fewer texts than asked for.
        PruneError: a command fails; the message has its last words.
    """
    examples = draw(task, options.texts)
    with tempfile.TemporaryDirectory(prefix="prunepass-embed-") as work:
        bench = _Bench(options, task, [example["text"] for example in examples], Path(work))
        stages = bench.export(plan)
        settings = {way: bench.best_settings(way) for way in options.ways if way[0] in SCRIPTS}
        times, vectors = bench.turns(settings)
        shared = conditions("openvino", "nncf", "tokenizers", threads=options.threads) | {
            "other_versions": versions(options.python) if RIVAL in options.runners else {},
            "repeats": options.repeats,
            "texts": len(examples),
            "mean_tokens": round(statistics.mean(bench.lengths), 1),
            "max_length": task.max_length,
            "stages": stages,
            "arithmetic": bench.arithmetic(),
        }
    net = {way: [all_ - few for all_, few in zip(*times[way], strict=True)] for way in times}
    rows = []
    for way in options.ways:
        rates = [(len(examples) - options.few) / seconds for seconds in net[way]]
        row = {
            "way": way[0],
            "model": way[1],
            "rate": _three(rates),
            "over": times_as_fast(net, (RIVAL, DENSE), way),
            "over_loop": times_as_fast(net, (LOOP, way[1]), way),
            "start": round(statistics.median(times[way][1]), 3),
            "whole": round(statistics.median(times[way][0]), 3),
            "quality": round(quality(task, vectors[way], examples), 5),
            "settings": settings.get(way, {}),
        }
        if way[1] == PRUNED and task.kind == "embedding" and (whole := vectors.get((way[0], DENSE))) is not None:
            row["quality_dense_queries"] = round(
                quality(task, with_queries_of(whole, vectors[way], examples), examples), 5
            )
        if (loop := vectors.get((LOOP, way[1]))) is not None:
            row["difference"] = round(float(np.abs(vectors[way] - loop).max()), 6)
        rows.append(row)
    return shared, rows


class _Bench:
    """Files of one cell, in a work folder, and the commands that run on them."""

    def __init__(self, options: Benchmark, task: Dataset, texts: Sequence[str], work: Path) -> None:
        from prunepass.export.hub import load

        self._options, self._task, self._work = options, task, work
        self._loaded = load(str(base_model()))
        self.lengths = [min(n, task.max_length) for n in self._loaded.lengths(texts, max_length=task.max_length)]
        if len(texts) < 2 * options.few:
            raise OptionError(f"There are {len(texts)} texts, and --few {options.few} needs at least twice as many.")
        self._write("all", texts, range(len(texts)))
        self._write("few", texts, self._of_all_lengths(options.few))
        self._write("sample", texts, self._of_all_lengths(options.sample))

    def _write(self, name: str, texts: Sequence[str], numbers: Sequence[int]) -> None:
        lines = (json.dumps({"id": i, "text": texts[i]}) + "\n" for i in numbers)
        (self._work / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")

    def _of_all_lengths(self, count: int) -> list[int]:
        """So many numbers of texts, evenly spaced in the order of length."""
        order = sorted(range(len(self.lengths)), key=self.lengths.__getitem__)
        count = min(count, len(order))
        return [order[(2 * i + 1) * len(order) // (2 * count)] for i in range(count)]

    def export(self, plan: str) -> str:
        """Write both folders; gives the stages of the pruned one."""
        from prunepass.plan.choice import choose

        texts = [example["text"] for example in self._task.train()[: self._options.calibration]]
        batches = self._loaded.batches(texts, length=None)
        how: dict[str, Any] = {"to": "openvino", "tokenizer": self._loaded.tokenizer, "pooled": True, "pooling": "mean"}
        choice = choose(plan)
        for name, one in ((DENSE, PrunePlan(())), (PRUNED, choice)):
            prunepass.export(self._loaded.model, one, self._work / name, int8=batches, **how)
        return stages_text(PrunePlan.from_pretrained(self._work / PRUNED).stages)

    def best_settings(self, way: Way) -> dict[str, Any]:
        """Of `SETTINGS`, what runs the sample fastest."""
        words = _said(self._script(way, "sample", "--try", json.dumps(SETTINGS)), self._environment())
        return dict(json.loads(words.splitlines()[-1])["best"])

    def turns(self, settings: Mapping[Way, Mapping[str, Any]]) -> tuple[dict[Way, list[list[float]]], dict[Way, Array]]:
        """Of each way the seconds for all texts and for a few, one figure a repeat, and the vectors of all."""
        ways = self._options.ways
        times: dict[Way, list[list[float]]] = {way: [[], []] for way in ways}
        vectors: dict[Way, Array] = {}
        for way in ways:
            self._run(way, "few", settings, "warm-up")  # files are in the cache of the disk from here on
        for repeat in range(self._options.repeats):
            at = repeat % len(ways)
            order = [*ways[at:], *ways[:at]]
            for way in order[::-1] if repeat % 2 else order:
                for texts, taken in zip(("all", "few"), times[way], strict=True):
                    began = time.perf_counter()
                    out = self._run(way, texts, settings, str(repeat))
                    taken.append(time.perf_counter() - began)
                    if texts == "all":
                        vectors[way] = read_vectors(out)
        return times, vectors

    def _run(self, way: Way, texts: str, settings: Mapping[Way, Mapping[str, Any]], name: str) -> Path:
        """Where the vectors are that a command has written."""
        out = self._work / "-".join((*way, texts, name))
        if way[0] == EMBED:
            command = self._embed(way, texts, out)
        else:
            out = out.with_suffix(".npy")
            command = self._script(way, texts, str(out), "--settings", json.dumps(settings[way]))
        _said(command, self._environment())
        return out

    def _embed(self, way: Way, texts: str, out: Path) -> list[str]:
        options = self._options
        command = [sys.executable, "-m", "prunepass", "embed", str(self._work / way[1])]
        command += [
            str(self._work / f"{texts}.jsonl"),
            str(out),
            "--truncate",
            "--max-length",
            str(self._task.max_length),
        ]
        command += ["--workers", str(options.workers), "--cpus", str(options.threads // options.workers)]
        return command + (["--precision", options.precision] if options.precision else [])

    def _script(self, way: Way, texts: str, *more: str) -> list[str]:
        options = self._options
        config = {"INFERENCE_NUM_THREADS": str(options.threads)}
        if options.precision:
            config["INFERENCE_PRECISION_HINT"] = options.precision
        python = options.python if way[0] == RIVAL else sys.executable
        given = [str(self._work / way[1]), str(self._work / f"{texts}.jsonl")]
        length = ["--max-length", str(self._task.max_length)]
        return [python, str(SCRIPTS[way[0]]), *given, *more, *length, "--config", json.dumps(config)]

    def _environment(self) -> dict[str, str]:
        threads = dict.fromkeys(("OMP_NUM_THREADS", "RAYON_NUM_THREADS"), str(self._options.threads))
        return {**os.environ, **threads, "TOKENIZERS_PARALLELISM": "true", "HF_HUB_OFFLINE": "1"}

    def arithmetic(self) -> str:
        """In which precision OpenVINO computes what is not int8."""
        import openvino

        config = {"INFERENCE_PRECISION_HINT": self._options.precision} if self._options.precision else {}
        compiled = openvino.Core().compile_model(self._work / PRUNED / "openvino_model.xml", "CPU", config)
        return str(compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name())


def draw(task: Dataset, count: int) -> list[dict[str, Any]]:
    """Test examples of a task, all or ``count`` at random with a fixed seed.

    Of a collection with queries so many documents, and the queries that have one of them to find.

    Raises:
        OptionError: there are fewer.
    """
    examples = task.test(every=1)
    texts = [example for example in examples if "relevant" not in example]
    if count > len(texts):
        raise OptionError(f"{task.name} has {len(texts)} texts, not {count}; ask for fewer.")
    drawn = random.Random(SEED).sample(texts, count) if count else texts
    there = {example.get("document") for example in drawn}
    queries = []
    for example in (one for one in examples if "relevant" in one):
        relevant = [number for number in example["relevant"] if number in there]
        if relevant:
            queries.append({**example, "relevant": relevant})
    return [*drawn, *queries]


def quality(task: Dataset, vectors: Array, examples: Sequence[Mapping[str, Any]]) -> float:
    """nDCG@10 of a retrieval task, else `ridge_accuracy` with the examples' labels."""
    if task.kind == "embedding":
        return task.metric(list(vectors), Features(list(map(dict, examples)), [], [], []))[task.headline]
    return ridge_accuracy(vectors, [example["label"] for example in examples])


def with_queries_of(whole: Array, pruned: Array, examples: Sequence[Mapping[str, Any]]) -> Array:
    """Vectors [n, d] of queries from ``whole``, those of documents from ``pruned``: as where a folder of several plans
    embeds queries at level 0."""
    asks = np.array(["relevant" in example for example in examples])
    return np.where(asks[:, None], whole, pruned)


def ridge_accuracy(vectors: Array, labels: Sequence[int]) -> float:
    """Accuracy of a ridge regression from vectors [n, d] to one-hot labels, each half of them judged by the other.

    Halves are drawn at random with a fixed seed. The regression has a constant, which is not penalised.
    """
    classes = np.eye(max(labels) + 1)[np.asarray(labels)]
    order = np.random.default_rng(SEED).permutation(len(labels))
    halves = (order[::2], order[1::2])
    right = 0
    for fitted, judged in (halves, halves[::-1]):
        inputs, mean = vectors[fitted].astype(np.float64), vectors[fitted].mean(axis=0, dtype=np.float64)
        target_mean = classes[fitted].mean(axis=0)
        centred = inputs - mean
        weights = np.linalg.solve(
            centred.T @ centred + RIDGE * np.eye(centred.shape[1]), centred.T @ (classes[fitted] - target_mean)
        )
        found = ((vectors[judged] - mean) @ weights + target_mean).argmax(axis=1)
        right += int((found == np.asarray(labels)[judged]).sum())
    return right / len(labels)


def read_vectors(out: Path) -> Array:
    """Vectors [n, d] in the order of the texts: of a script's file, or of the folder that ``prunepass embed`` wrote.

    Raises:
        PruneError: an id is missing or there twice.
    """
    if out.is_file():
        return np.asarray(np.load(out), np.float32)
    import pyarrow.parquet

    parts = [pyarrow.parquet.read_table(part) for part in sorted(out.glob("part-*.parquet"))]
    ids = np.concatenate([part["id"].to_numpy() for part in parts])
    if sorted(ids.tolist()) != list(range(len(ids))):
        raise PruneError(f"{out} does not hold each of the {len(ids)} ids once.")
    rows = np.concatenate([np.stack(part["vector"].to_numpy(zero_copy_only=False)) for part in parts])
    return np.asarray(rows[np.argsort(ids)], np.float32)


def _three(values: Sequence[float]) -> list[float]:
    return [round(value, 3) for value in (statistics.median(values), *quartiles(values))]


def _said(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """What a command prints to standard output. Raises `PruneError` where it fails or is not there."""
    try:
        done = subprocess.run(command, env=dict(environment), capture_output=True, text=True, check=False)
    except OSError as e:
        raise PruneError(f"{command[0]} cannot be run: {e.strerror}. It is to be a Python.") from None
    if done.returncode:
        words = " ".join(done.stderr.split())[-_LAST_WORDS:]
        raise PruneError(f"{' '.join(command[:4])} ... ended with code {done.returncode}: {words}")
    return done.stdout


def _settings_text(settings: Mapping[str, Any]) -> str:
    return f"batches of {settings['batch']}, {settings['hint'].lower()}" if settings else ""
