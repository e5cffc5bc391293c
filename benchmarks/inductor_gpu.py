"""Dense and pruned through Inductor on a GPU, in turns: encoders in bf16, and the prefill of a decoder on long prompts.

    python benchmarks/inductor_gpu.py --out benchmarks/results/inductor_gpu.json

Random weights and random tokens do for time. One process compiles both models; each round times one call of each, and
the medians are over the rounds. "all_kept" is the same plan with a share that rounds to all: what scoring and selecting
cost at most, on every token. Without a GPU it says so and ends.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from prunepass import Protect, PrunePlan, Stage

#: of so few tokens, rounded up, it is all; a share of 1 would be no stage at all
NEARLY_ALL = "999999/1000000"
# 0.1 N + 0.9 N * 0.9^s before blocks 3, 6, ..., of which the last tenth is always kept (SDTP, section 4)
SDTP = {"protect": Protect(first=4, last=1, last_share="1/10"), "scorer": "norm"}


def bert() -> Any:
    return BertModel(BertConfig(), add_pooling_layer=False)


def llama_1b() -> Any:
    config = LlamaConfig(
        vocab_size=32_000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
        num_key_value_heads=4, max_position_embeddings=32_768, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def llama_7b() -> Any:
    config = LlamaConfig(max_position_embeddings=32_768, use_cache=False)  # 32 layers, 4096 wide: the default shape
    return LlamaForCausalLM(config)


def sdtp_plan(layers: int) -> PrunePlan:
    places = range(3, layers, 3)
    return PrunePlan([Stage(i, 0.1 + 0.9 * 0.9 ** (s + 1)) for s, i in enumerate(places)], **SDTP)


CASES: list[tuple[str, Callable[[], Any], PrunePlan, list[tuple[int, int]], dict[str, Any]]] = [
    ("BERT-base shape, keep 1/2 and 1/4", bert, PrunePlan([Stage(4, "1/2"), Stage(8, "1/4")]),
     [(1, 512), (8, 512), (32, 512)], {}),
    ("Llama-1B shape, SDTP schedule", llama_1b, sdtp_plan(22),
     [(1, 4096), (1, 8192), (1, 16_384)], {"use_cache": False, "logits_to_keep": 1}),
    ("Llama-7B shape, SDTP schedule", llama_7b, sdtp_plan(32),
     [(1, 4096), (1, 8192), (1, 16_384), (1, 32_768)], {"use_cache": False, "logits_to_keep": 1}),
]  # fmt: skip


def milliseconds(call: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)


def measure(model: Any, plan: PrunePlan, batch: int, length: int, extra: dict[str, Any], rounds: int) -> dict[str, Any]:
    torch._dynamo.reset()
    ids = torch.randint(10, model.config.vocab_size, (batch, length), device="cuda")
    dense = torch.compile(model, dynamic=False)
    plans = {
        "pruned": plan,
        "all_kept": PrunePlan([Stage(s.layer, NEARLY_ALL) for s in plan.stages], plan.scorer, plan.protect),
    }
    ways = {"dense": dense} | {
        name: torch.compile(model, backend="tokprune", options={"plan": p}, dynamic=False) for name, p in plans.items()
    }
    calls = {name: (lambda f=f: f(input_ids=ids, **extra)) for name, f in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        first = {name: milliseconds(call) for name, call in calls.items()}
        for call in calls.values():
            for _ in range(3):
                call()
        for _ in range(rounds):
            for name, call in calls.items():
                times[name].append(milliseconds(call))
    p50 = {name: statistics.median(t) for name, t in times.items()}
    return {
        "batch": batch,
        "length": length,
        "dense_ms": round(p50["dense"], 3),
        "pruned_ms": round(p50["pruned"], 3),
        "all_kept_ms": round(p50["all_kept"], 3),
        "ratio": round(p50["dense"] / p50["pruned"], 3),
        "first_call_ms": {k: round(v) for k, v in first.items()},
        "rounds": rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/inductor_gpu.json"))
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("This benchmark needs a CUDA device, and torch sees none.")
    torch.manual_seed(0)
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "dtype": "bfloat16",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "cases": {},
    }
    for name, make, plan, sizes, extra in CASES:
        with torch.device("cuda"):
            model = make().to(torch.bfloat16).eval()
        results["cases"][name] = [measure(model, plan, *size, extra, arguments.rounds) for size in sizes]
        for row in results["cases"][name]:
            sizes_read = f"{row['batch']:3d} x {row['length']:6d}"
            times_read = f"{row['dense_ms']:9.2f} -> {row['pruned_ms']:9.2f} ms  {row['ratio']:.2f}x"
            print(f"{name:40s} {sizes_read}  {times_read}")
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(results, indent=2) + "\n")
        del model
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
