"""First token and decoding rate of Gemma 3 270M in openvino-genai: our pruned stateful folder and dense ones.

``--dense`` is a folder that ``optimum-cli export openvino`` wrote of the same model, in an environment of its own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

import prunepass
from benchmarks.decoder.gemma import Gemma
from benchmarks.decoder.texts import read_corpus
from benchmarks.markdown import setting, table
from benchmarks.store import Group, conditions, stages_text
from benchmarks.task import Cell, Rows, Task, option
from benchmarks.tasks.decoder_speed import with_predictors
from benchmarks.timing import quartiles
from prunepass import PrunePlan
from prunepass.errors import OptionError

OPTIMUM, PRUNED = "optimum-intel's export", "prunepass, pruned"
#: how openvino-genai runs attention; it runs our pruned folders by the second alone
BACKENDS = ("PA", "SDPA")
Way = tuple[str, str]
#: from token ids [1, N] to milliseconds to the first token, and for each one after it
_Call = Callable[[Any], tuple[float, float]]


@dataclass(frozen=True)
class Benchmark(Task):
    title = "Gemma 3 270M in openvino-genai"
    introduction = (
        "`LLMPipeline` generates greedily after a prompt of WikiText-2. Our folder has SDTP's schedule with random "
        "predictors as wide as the model, whose time is inside: speed does not depend on which tokens stay. The dense "
        "folders run by paged attention (PA) and by stateful attention (SDPA). Times to the first token are the "
        "pipeline's own, medians of calls of each way in turns."
    )
    dense: str = option("", "folder of optimum-intel's export of the same model")
    lengths: tuple[int, ...] = option((1024, 4096, 8192), "tokens of the prompts")
    new: int = option(17, "tokens that are generated; the first of them ends the prefill")
    repeats: int = option(3, "calls of each way that count")
    threads: int = option(2, "OpenVINO's")
    precision: str = option("f32", "of OpenVINO's arithmetic")

    def cells(self) -> Iterator[Cell]:
        if not Path(self.dense, "openvino_model.xml").is_file():
            raise OptionError(
                f"--dense={self.dense} holds no openvino_model.xml. Give a folder from optimum-cli export openvino."
            )
        missing = None if find_spec("openvino_genai") else "pip install openvino-genai"
        key = {"precision": self.precision, "new": self.new, "threads": self.threads}
        yield Cell(key, self._measure, why_not=missing)

    def _measure(self, _: Sequence[str]) -> tuple[Mapping[str, Any], Rows]:
        subject = Gemma()
        config = subject.model.config
        torch.manual_seed(0)
        plan = with_predictors(PrunePlan.sdtp(config.num_hidden_layers), config.hidden_size)
        shared = conditions("openvino", "openvino-genai", "transformers", threads=self.threads)
        return shared | {"repeats": self.repeats, "stages": stages_text(plan.stages)}, self._rows(subject, plan)

    def _rows(self, subject: Gemma, plan: PrunePlan) -> Rows:
        text = read_corpus("wikitext").test[0]
        words = subject.tokenizer(text[: 8 * max(self.lengths)], add_special_tokens=False)["input_ids"]
        with tempfile.TemporaryDirectory(prefix="prunepass-genai-") as work:
            calls = self._pipelines(subject, plan, Path(work))
            for length in self.lengths:
                prompt = np.array([[subject.begin, *words[: length - 1]]])
                if prompt.shape[1] < length:
                    raise OptionError(f"The text has {prompt.shape[1]} tokens, fewer than {length}.")
                yield from self._turns(calls, prompt)

    def _pipelines(self, subject: Gemma, plan: PrunePlan, work: Path) -> dict[Way, _Call]:
        import openvino
        import openvino_genai

        folder = prunepass.export(
            subject.model, plan, work / "pruned", to="openvino", stateful=True, tokenizer=subject.tokenizer
        )
        ways = [*((OPTIMUM, Path(self.dense), backend) for backend in BACKENDS), (PRUNED, folder, "SDPA")]
        settings = {"INFERENCE_PRECISION_HINT": self.precision, "INFERENCE_NUM_THREADS": self.threads}
        generation = openvino_genai.GenerationConfig(max_new_tokens=self.new, do_sample=False, ignore_eos=True)
        calls = {}
        for name, folder, backend in ways:
            more: dict[str, Any] = {"ATTENTION_BACKEND": backend}
            if backend == "PA":  # which else knows the prompt from the call before
                more["scheduler_config"] = openvino_genai.SchedulerConfig()
                more["scheduler_config"].enable_prefix_caching = False
            pipeline = openvino_genai.LLMPipeline(str(folder), "CPU", **more, **settings)

            def call(ids: Any, pipeline: Any = pipeline) -> tuple[float, float]:
                metrics = pipeline.generate(openvino.Tensor(ids), generation).perf_metrics
                return metrics.get_ttft().mean, metrics.get_tpot().mean

            calls[name, backend] = call
        return calls

    def _turns(self, calls: Mapping[Way, _Call], prompt: Any) -> Rows:
        for call in calls.values():
            call(prompt)
        first: dict[Way, list[float]] = {way: [] for way in calls}
        each: dict[Way, list[float]] = {way: [] for way in calls}
        for repeat in range(self.repeats):
            for way in list(calls)[:: -1 if repeat % 2 else 1]:
                ttft, tpot = calls[way](prompt)
                first[way].append(ttft)
                each[way].append(tpot)
        best = min((way for way in calls if way[0] != PRUNED), key=lambda way: median(first[way]))
        for way in calls:
            ratios = [dense / own for dense, own in zip(first[best], first[way], strict=True)]
            row = {"length": prompt.shape[1], "way": way[0], "backend": way[1]}
            row["first_token_ms"] = round(median(first[way]), 1)
            row["over_best_dense"] = [round(x, 3) for x in (median(ratios), *quartiles(ratios))]
            yield row | {"tokens_per_second": round(1000 / median(each[way]), 2)}

    @classmethod
    def page(cls, groups: Sequence[Group]) -> Iterator[str]:
        titles = ("prompt", "folder", "attention", "first token, ms", "over the best dense", "tokens a second")
        for group in groups:
            shared, lines = group.shared, []
            for row in group.rows:
                middle, low, high = row["over_best_dense"]
                ratio = "" if row["way"] != PRUNED else f"{middle:.2f}x ({low:.2f} to {high:.2f})"
                cells = [str(row["length"]), row["way"], row["backend"], f"{row['first_token_ms']:.0f}", ratio]
                lines.append([*cells, f"{row['tokens_per_second']:.1f}"])
            yield (
                f"## {shared['precision']}\n\nStages `{shared['stages']}`. {setting(shared)}; "
                f"{shared['repeats']} calls of each way; brackets hold quartiles.\n\n{table(titles, lines)}"
            )
