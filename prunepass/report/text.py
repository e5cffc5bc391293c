"""The report as plain, aligned text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict

from prunepass.plan import Protect, PrunePlan
from prunepass.report.data import BlockRow, Exact, Flops, Fusions, Refusal, ReportData, WholeFlops

__all__ = [
    "DENOMINATORS",
    "RESTORES",
    "exact_text",
    "flops_rows",
    "flops_text",
    "plan_text",
    "protect_text",
    "ratio_text",
    "render_text",
    "whole_rows",
]

WIDTH = 110

#: the field names of CorpusFlops, in words
DENOMINATORS = {
    "padded_to_max": "padded to the maximum ({max_length})",
    "padded_to_batch": "padded to the batch",
    "real_tokens": "real tokens only",
}

#: the column, and the beginning of the sentence, of what `Exact` holds
EXACT = "exact, no token pruned"

#: `PrunePlan.restore`, in words
RESTORES = {
    "last": "the state that the token left with",
    "lens": "a trained estimate of the token's last state",
    "mean": "the mean of the tokens kept",
    "zeros": "zeros",
    "none": "nothing: outputs are as short as the last stage leaves them",
}


def render_text(report: ReportData) -> str:
    """The whole report, section by section; those without content are left out."""
    title = f"{report.model}, pruned by prunepass"
    if not report.parts:
        return _joined([[title, "=" * len(title), *_example(report)], *_tables(report)])
    rows = "row" if report.batch == 1 else "rows"
    head = [title, "=" * len(title), f"example: {report.batch} {rows}"]
    refusals = [] if any(part.refusals for part in report.parts) else _refusals(report.refusals)
    sections = [head, refusals, _whole(report.whole), _fusions(report.fusions)]
    for part in report.parts:
        name = f"{part.part} ({part.model})"
        sections += [[name, "-" * len(name), *_example(part)], *_tables(part)]
    return _joined(sections)


def _joined(sections: Iterable[list[str]]) -> str:
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def _example(report: ReportData) -> list[str]:
    rows = "row" if report.batch == 1 else "rows"
    return [f"example: {report.batch} {rows} of {report.length} tokens (S = {report.length})", *_plan(report)]


def _tables(report: ReportData) -> list[list[str]]:
    return [
        _refusals(report.refusals),
        _stages(report),
        _blocks(report.blocks, pruned=not report.refusals),
        _flops(report),
        _passes(report),
        _fusions(report.fusions),
        _warnings(report.warnings),
    ]


def _whole(whole: WholeFlops | None) -> list[str]:
    if whole is None:
        return []
    rows = whole_rows(whole)
    return [
        "FLOPs of the whole model on the example, counted on what runs",
        *_table(("part", "dense", "pruned", "dense / pruned"), rows, right={1, 2, 3}),
    ]


def whole_rows(whole: WholeFlops) -> list[tuple[str, str, str, str]]:
    """The cells of the table of a model's parts, with their sum as the last row."""
    figures = [(p.part, p.dense, p.pruned) for p in whole.parts] + [("the whole model", whole.dense, whole.pruned)]
    return [(part, flops_text(d), flops_text(p), ratio_text(d, p)) for part, d, p in figures]


def _plan(report: ReportData) -> list[str]:
    source = [f"plan: {report.plan_source}"] if report.plan_source else []
    protected = f"protected: {protect_text(report.plan.protect)}"
    streams = [f"stream: {line}" for line in report.streams]
    return [*source, *streams, protected, f"pruned positions carry: {RESTORES[report.plan.restore]}"]


def _refusals(refusals: Sequence[Refusal]) -> list[str]:
    lines = []
    for refusal in refusals:
        place = f"{refusal.where}: " if refusal.where else ""
        lines += _wrapped(f"Refused: {place}{refusal.reason}")
        if refusal.hint:
            lines += _wrapped(f"  {refusal.hint}")
    return lines


def _stages(report: ReportData) -> list[str]:
    if not report.stages:
        return []
    rows = [(str(s.index), s.place, s.path or "-", s.scorer, s.keep, s.kept, str(s.count)) for s in report.stages]
    header = ("stage", "place", "module", "scorer", "keep", "tokens kept", f"at S={report.length}")
    return ["Stages", *_table(header, rows, right={0, 6})]


def _blocks(blocks: Sequence[BlockRow], *, pruned: bool) -> list[str]:
    if not blocks:
        return []
    if not pruned:
        plain = [(str(b.index), b.path or "-", b.attention, flops_text(b.dense_flops)) for b in blocks]
        return ["Blocks", *_table(("block", "module", "attention", "FLOPs"), plain, right={0, 3})]
    rows = [
        (
            str(b.index),
            b.path or "-",
            b.attention,
            b.tokens_in if b.tokens_in == b.tokens_out else f"{b.tokens_in}, then {b.tokens_out}",
            str(b.count_in) if b.count_in == b.count_out else f"{b.count_in}, {b.count_out}",
            flops_text(b.dense_flops),
            flops_text(b.pruned_flops),
        )
        for b in blocks
    ]
    header = ("block", "module", "attention", "tokens", "count", "dense FLOPs", "pruned FLOPs")
    return ["Blocks", *_table(header, rows, right={0, 4, 5, 6})]


def _flops(report: ReportData) -> list[str]:
    flops, exact = report.flops, report.exact
    if flops is None:
        return []
    share = flops.scoring / flops.example_pruned if flops.example_pruned else 0.0
    header, *rows = flops_rows(flops, exact, "the example")
    return [
        f"FLOPs over {flops.rows} rows with {flops.tokens} tokens, {flops.batch_size} rows a batch",
        *_table(header, rows, right=set(range(1, len(header)))),
        f"  of which scoring on the example: {flops_text(flops.scoring)} ({share:.1%});"
        f" elements sorted, gathered and masked: {flops_text(flops.moved)}",
        *(_wrapped(f"  {exact_text(report, exact)}") if exact is not None else ()),
    ]


def _passes(report: ReportData) -> list[str]:
    if not report.passes:
        return []
    rows = [(p.name, str(p.changes), str(p.nodes_added), f"{p.seconds * 1e3:.1f}") for p in report.passes]
    return ["Passes", *_table(("pass", "sites changed", "nodes added", "ms"), rows, right={1, 2, 3})]


def _fusions(fusions: Fusions | None) -> list[str]:
    if fusions is None:
        return []
    rows = [(row.kind, str(row.dense), str(row.pruned)) for row in fusions.rows]
    table = _table(("kind", "dense", "pruned"), rows, right={1, 2})
    precision = _wrapped(f"  computed in {fusions.precision}") if fusions.precision else []
    return [f"Fusions kept on {fusions.target}", *table, *_wrapped(f"  counted: {fusions.counts}"), *precision]


def _warnings(warnings: Sequence[str]) -> list[str]:
    return [line for warning in warnings for line in _wrapped(f"Warning: {warning}")]


def plan_text(plan: PrunePlan) -> str:
    """A plan in a few words: ``50 % of the tokens from block 1 on, by norm scores``."""
    if not plan.stages:
        return "nothing pruned"
    names = list(dict.fromkeys(plan.scorer_of(i).name for i in range(len(plan.stages))))
    shown = plan.stages if len(plan.stages) <= _STAGES_SHOWN else (plan.stages[0], plan.stages[-1])
    first, *others = (
        f"{'after the attention of' if s.after_attention else 'from'} block {s.layer}"
        f"{'' if s.after_attention else ' on'}"
        for s in shown
    )
    keeps = [f"{100 * float(s.keep):.0f} %" for s in shown]
    parts = [f"{keeps[0]} of the tokens {first}", *(f"{k} {place}" for k, place in zip(keeps[1:], others, strict=True))]
    between = ", " if shown is plan.stages else f", in {len(plan.stages)} stages down to "
    return f"{between.join(parts)}, by {' and '.join(names)} scores"


#: a plan of more is told by its first and last one
_STAGES_SHOWN = 3


def protect_text(protect: Protect) -> str:
    """Which tokens are kept before any other, in words."""
    parts = []
    if protect.first:
        parts.append("the first token" if protect.first == 1 else f"the first {protect.first} tokens")
    if protect.last:
        parts.append("the last token" if protect.last == 1 else f"the last {protect.last} tokens")
    if protect.last_share:
        parts.append(f"the last {protect.last_share} of each row")
    if protect.token_ids:
        parts.append(f"ids {', '.join(map(str, protect.token_ids))}")
    if protect.segment:
        parts.append(f"the {protect.segment} part of a pair")
    if protect.restricts:
        parts.append(f"all but ids {', '.join(map(str, protect.only_ids))}")
    return "; ".join(parts) or "nothing"


def flops_text(count: int) -> str:
    """A count in four digits with its SI prefix: 22.35 G."""
    if count < 1000:
        return str(count)
    value = float(count)
    for prefix in "kMGT":
        value /= 1000
        if value < 999.95:
            return f"{value:.4g} {prefix}"
    return f"{value / 1000:.4g} P"


def flops_rows(flops: Flops, exact: Exact | None, example: str) -> list[tuple[str, ...]]:
    """The header, then FLOPs and their ratio by denominator; a column for what is exact only where there is some.

    Args:
        example: what the example's row is called.
    """
    dense, pruned = asdict(flops.dense), asdict(flops.pruned)
    needed = {} if exact is None else {**asdict(exact.flops), "example": exact.example}
    dense["example"], pruned["example"] = flops.example_dense, flops.example_pruned
    rows = [("denominator", "dense", *([EXACT] if needed else []), "pruned", "dense / pruned")]
    for kind, label in {**DENOMINATORS, "example": example}.items():
        counts = [flops_text(of[kind]) for of in (dense, needed, pruned) if of]
        rows.append((label.format(max_length=flops.max_length), *counts, ratio_text(dense[kind], pruned[kind])))
    return rows


def exact_text(report: ReportData, exact: Exact) -> str:
    """What is saved with no token pruned, in which blocks, and who leaves it out, in sentences."""
    assert report.flops is not None
    dense = report.flops.example_dense
    layers = f" ({', '.join(exact.layers)})" if exact.layers else ""
    where = f" in {_blocks_text(exact.blocks)}{layers}" if exact.blocks else ""
    if not report.stages:
        door = (
            'torch.compile(backend="tokprune") leaves the others out by a plan that prunes nothing; prune() and '
            "export() give the model back as it is."
        )
    elif exact.in_pruned:
        door = "The pruned model leaves them out, too."
    else:
        door = (
            "The pruned model computes them all the same: it leaves them out where the plan protects the tokens that "
            "results read, as Protect(first=1) does for a class token and Protect(last=1) for the next token."
        )
    return (
        f"{EXACT}: results do not need all tokens{where}. Without the others the dense model gives the same values "
        f"with {flops_text(exact.example)} FLOPs on the example in place of {flops_text(dense)} "
        f"({1 - exact.example / dense:.1%} less). {door}"
    )


def _blocks_text(numbers: Sequence[int]) -> str:
    """``block 3``, ``blocks 3 to 5``, ``blocks 1, 3 and 5``."""
    if len(numbers) == 1:
        return f"block {numbers[0]}"
    first, *between, last = numbers
    if last - first == len(between) + 1:
        return f"blocks {first} to {last}" if between else f"blocks {first} and {last}"
    return f"blocks {', '.join(map(str, (first, *between)))} and {last}"


def ratio_text(dense: int, pruned: int) -> str:
    """How many times less the pruned model has: ``1.83x``."""
    return f"{dense / pruned:.2f}x" if pruned else "-"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: set[int]) -> Iterator[str]:
    """Lines of an aligned table, indented by two; ``right`` holds the columns of numbers."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, ["-" * w for w in widths], *rows):
        cells = (
            cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        yield ("  " + "  ".join(cells)).rstrip()


def _wrapped(text: str) -> list[str]:
    """Lines of at most `WIDTH`; the indent of the first is kept, the others are set in."""
    bare = text.lstrip()
    return textwrap.wrap(bare, WIDTH, initial_indent=" " * (len(text) - len(bare)), subsequent_indent="    ")
