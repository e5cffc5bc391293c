"""How ``prunepass bench`` shows what it measured."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from prunepass.cli.common import out
from prunepass.report.bench import BenchResult

__all__ = ["print_bench"]


def print_bench(result: BenchResult) -> None:
    """Times, FLOPs and agreement as tables, and what to try where pruning does not pay or changes much."""
    table = Table(title=f"{result.target}, {result.texts} texts in {result.batches} batches")
    for name in ("", "p50 ms", "p95 ms", "texts/s"):
        table.add_column(name, justify="left" if not name else "right")
    for name, timing in (("dense", result.dense), ("pruned", result.pruned)):
        table.add_row(name, f"{timing.p50:.2f}", f"{timing.p95:.2f}", f"{timing.texts_per_second:.1f}")
    out.print(table)
    out.print(f"plan: {result.plan_source}", highlight=False, markup=False, soft_wrap=True)
    out.print(f"computed in {result.precision}", highlight=False, markup=False, soft_wrap=True)
    ratios = "  ".join(f"{kind.replace('_', ' ')} {ratio:.2f}" for kind, ratio in result.flops_ratio.items())
    out.print(f"speedup (p50) {result.speedup:.2f}", highlight=False)
    if ratios:
        out.print(f"fewer FLOPs, by denominator: {ratios}", highlight=False)
    if result.slower_up_to is not None:
        short = [timing for timing in result.by_batch if timing.length <= result.slower_up_to]
        more = sum(timing.pruned for timing in short) / sum(timing.dense for timing in short)
        batches = "1 batch takes" if len(short) == 1 else f"{len(short)} batches take"
        out.print(
            f"[yellow]Pruning does not pay here for texts of up to {result.slower_up_to} tokens:[/yellow] their "
            f"{batches} {more:.2f} times as long as unpruned. Leave such texts to the unpruned model, "
            "put more of them into one call, or give the plan fewer stages.",
            highlight=False,
        )
    agreement = Table(title="pruned against dense")
    for name in ("output", "cosine", "cosine, mean of tokens", "largest difference"):
        agreement.add_column(name, justify="left" if name == "output" else "right")
    for row in result.agreement:
        pooled = "" if row.pooled_cosine is None else f"{row.pooled_cosine:.4f}"
        agreement.add_row(row.output, f"{row.cosine:.4f}", pooled, f"{row.max_difference:.3g}")
    out.print(agreement)
    if result.advice is not None:
        out.print(f"[yellow]Note:[/yellow] {escape(result.advice)}", highlight=False, soft_wrap=True)
