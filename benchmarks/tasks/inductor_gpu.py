"""Dense and pruned through Inductor on a GPU, in turns: encoders in bf16, and the prefill of a decoder on long prompts.

Random weights and random tokens do for time. "all kept" is the same plan with a share that rounds to all: what scoring
and selecting cost at most, on every token.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers

from benchmarks.latency.models import LLAMA_1B
from benchmarks.latency.targets import find_target
from benchmarks.markdown import setting, table
from benchmarks.store import Group, conditions
from benchmarks.task import Cell, Rows, Task, chosen, option
from benchmarks.timing import in_turns, p50
from prunepass import Protect, PrunePlan, Stage

TARGET = "inductor-cuda-bf16"
#: of so few tokens, rounded up, it is all; a share of 1 would be no stage at all
NEARLY_ALL = "999999/1000000"
COLUMNS = ("batch x tokens", "dense, ms", "pruned, ms", "speed-up", "all kept, ms")
_PROMPT = {"use_cache": False, "logits_to_keep": 1}


def sdtp_plan(layers: int) -> PrunePlan:
    """0.1 N + 0.9 N * 0.9^s before blocks 3, 6, ..., of which the last tenth is always kept (SDTP, section 4)."""
    stages = [Stage(i, 0.1 + 0.9 * 0.9 ** (s + 1)) for s, i in enumerate(range(3, layers, 3))]
    return PrunePlan(stages, "norm", Protect(first=4, last=1, last_share="1/10"))


@dataclass(frozen=True)
class Case:
    """A model's shape, its plan, the (batch, length) of its calls, and what else they are given."""

    make: Callable[[], Any]
    plan: PrunePlan
    sizes: Sequence[tuple[int, int]]
    extra: Mapping[str, Any]


def _llama(**sizes: Any) -> Any:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(max_position_embeddings=32_768, use_cache=False, **sizes)
    )


CASES = {
    "bert-base": Case(
        lambda: transformers.BertModel(transformers.BertConfig(), add_pooling_layer=False),
        PrunePlan([Stage(4, "1/2"), Stage(8, "1/4")]),
        [(1, 512), (8, 512), (32, 512)],
        {},
    ),
    "llama-1b": Case(
        partial(_llama, num_hidden_layers=22, **LLAMA_1B), sdtp_plan(22), [(1, 2**n) for n in (12, 13, 14)], _PROMPT
    ),
    "llama-7b": Case(_llama, sdtp_plan(32), [(1, 2**n) for n in (12, 13, 14, 15)], _PROMPT),
}


@dataclass(frozen=True)
class Benchmark(Task):
    title = "Dense and pruned through Inductor on a GPU"
    introduction = (
        "Random weights, bf16. BERT keeps 1/2 and 1/4 before blocks 4 and 8; Llamas run a prompt under SDTP's "
        "schedule. *All kept* is the same plan with shares that round to all: what scoring and selecting cost at "
        "most."
    )
    cases: tuple[str, ...] = option(tuple(CASES), "which")
    repeats: int = option(30, "calls of each way")

    def cells(self) -> Iterator[Cell]:
        for case in self.cases:
            for batch, length in CASES[chosen(case, CASES, "case")].sizes:
                key = {"case": case, "batch": batch, "length": length}
                yield Cell(key, partial(_measure, self.repeats, key), why_not=find_target(TARGET).why_not())

    @classmethod
    def page(cls, groups: Sequence[Group]) -> Iterator[str]:
        for case in dict.fromkeys(group.shared["case"] for group in groups):
            mine = [group for group in groups if group.shared["case"] == case]
            yield f"## {case}\n\n{setting(mine[0].shared)}.\n\n{table(COLUMNS, map(_line, mine))}"


def _measure(repeats: int, key: Mapping[str, Any], _: Sequence[str] = ()) -> tuple[dict[str, Any], Rows]:
    case = CASES[key["case"]]
    torch.manual_seed(0)
    torch._dynamo.reset()
    with torch.device("cuda"):
        model = case.make().to(torch.bfloat16).eval()
    ids = torch.randint(10, model.config.vocab_size, (key["batch"], key["length"]), device="cuda")
    all_kept = PrunePlan([Stage(s.layer, NEARLY_ALL) for s in case.plan.stages], case.plan.scorer, case.plan.protect)
    ways: dict[str, Any] = {"dense": torch.compile(model, dynamic=False)}
    for name, plan in {"pruned": case.plan, "all_kept": all_kept}.items():
        ways[name] = torch.compile(model, backend="tokprune", options={"plan": plan}, dynamic=False)

    def call(way: str) -> None:
        ways[way](input_ids=ids, **case.extra)
        torch.cuda.synchronize()

    first = {}
    with torch.no_grad():
        for way in ways:
            began = time.perf_counter()
            call(way)
            first[way] = round(1000 * (time.perf_counter() - began))
        times = in_turns({way: partial(call, way) for way in ways}, repeats, settle=0)
    row = {"ms": {way: round(p50(taken), 3) for way, taken in times.items()}, "first_call_ms": first}
    ways.clear()
    del model
    gc.collect()
    torch.cuda.empty_cache()
    return {"repeats": repeats, **conditions(threads=torch.get_num_threads(), device="cuda")}, [row]


def _line(group: Group) -> list[str]:
    dense, pruned, kept = (group.rows[0]["ms"][way] for way in ("dense", "pruned", "all_kept"))
    size = f"{group.shared['batch']} x {group.shared['length']}"
    return [size, f"{dense:.2f}", f"{pruned:.2f}", f"{dense / pruned:.2f}x", f"{kept:.2f}"]
