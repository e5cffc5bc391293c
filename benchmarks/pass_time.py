"""How long the passes take, by depth: `python benchmarks/pass_time.py`.

A BERT of each depth is captured once; its graph is pruned several times and the median of each pass is kept. Two
plans, spread over the depth: the default one (2 stages) and one of 10 stages, as SDTP has. Weights lie on the meta
device: no pass reads them, and 96 layers of real width need no memory.

Prints a table and writes a JSON file with the versions it was measured with. CPU seconds are this process's own, which
a busy machine does not change; the columns of the single passes are wall time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from transformers import BertConfig, BertModel

from prunepass.graph.capture import Captured, capture_module
from prunepass.pipeline import PruneResult, prune_graph
from prunepass.plan import PrunePlan, Stage

STAGES = 10
RESULTS = Path(__file__).parent / "results" / "pass_time.json"


def main() -> None:
    options = _parser().parse_args()
    torch.set_num_threads(1)
    _measure(12, options.width, options.length, 1)  # the first run pays for imports and caches
    rows = []
    for layers in options.layers:
        rows += _measure(layers, options.width, options.length, options.repeats)
        done = rows[-1]
        print(f"{layers} layers: {done['seconds']:.2f} s, captured in {done['capture_seconds']:.0f} s", flush=True)
    print(_table(rows))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    report = {"benchmark": "pass_time", "width": options.width, "length": options.length, "repeats": options.repeats}
    options.out.write_text(json.dumps({**report, "versions": _versions(), "rows": rows}, indent=2) + "\n")
    print(f"\nwritten to {options.out}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--layers", type=int, nargs="+", default=[12, 24, 48, 96], metavar="N", help="depths to measure"
    )
    parser.add_argument("--width", type=int, default=768, help="hidden width; the feed-forward part is four times that")
    parser.add_argument("--length", type=int, default=128, help="length of the example")
    parser.add_argument("--repeats", type=int, default=5, help="runs of which the median is taken")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file to write")
    return parser


def _measure(layers: int, width: int, length: int, repeats: int) -> list[dict[str, Any]]:
    start = time.perf_counter()
    captured = _capture(layers, width, length)
    capture_seconds = time.perf_counter() - start
    rows = []
    for name, plan in _plans(layers).items():
        runs = [_timed(captured, plan) for _ in range(repeats)]
        result = runs[-1][2]
        row = {
            "layers": layers,
            "plan": name,
            "stages": len(plan.stages),
            "nodes": len(captured.graph_module.graph.nodes),
            "nodes_after": len(result.graph_module.graph.nodes),
            "capture_seconds": round(capture_seconds, 4),
            "seconds": round(median(run[0] for run in runs), 4),
            "cpu_seconds": round(median(run[1] for run in runs), 4),
            "passes": {p: round(median(run[2].seconds[p] for run in runs), 4) for p in result.seconds},
        }
        rows.append(row)
    return rows


def _capture(layers: int, width: int, length: int) -> Captured:
    config = BertConfig(
        hidden_size=width, num_attention_heads=width // 64, intermediate_size=4 * width, num_hidden_layers=layers
    )
    with torch.device("meta"):
        model = BertModel(config).eval()
        ids = torch.ones(2, length, dtype=torch.int64)
        return capture_module(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def _plans(layers: int) -> dict[str, PrunePlan]:
    stages = [Stage(i * layers // 12 + 1, f"{11 - i}/12") for i in range(STAGES)]
    return {"default": PrunePlan.default(layers), f"{STAGES} stages": PrunePlan(stages)}


def _timed(captured: Captured, plan: PrunePlan) -> tuple[float, float, PruneResult]:
    start, start_cpu = time.perf_counter(), time.process_time()
    # As prune() does on a module: new nodes get their metadata when the graph is exported or compiled.
    result = prune_graph(captured.graph_module, plan, metadata=False)
    return time.perf_counter() - start, time.process_time() - start_cpu, result


def _table(rows: Sequence[dict[str, Any]]) -> str:
    passes = list(dict.fromkeys(name for row in rows for name in row["passes"]))
    lines = [["layers", "plan", "stages", "nodes", "after", "capture s", "passes s", "CPU s", "CPU ms/layer", *passes]]
    for row in rows:
        each = [f"{row['passes'].get(name, 0.0):.3f}" for name in passes]
        per_layer = f"{1e3 * row['cpu_seconds'] / row['layers']:.1f}"
        figures = [row["layers"], row["plan"], row["stages"], row["nodes"], row["nodes_after"]]
        times = [f"{row['capture_seconds']:.2f}", f"{row['seconds']:.3f}", f"{row['cpu_seconds']:.3f}", per_layer]
        lines.append([*map(str, figures), *times, *each])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in lines)


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }


if __name__ == "__main__":
    main()
