"""The report as one HTML file: no scripts, nothing fetched, readable in light and in dark."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import date
from html import escape

from prunepass.report.data import (
    AgreementRow,
    BlockRow,
    Fusions,
    PassRow,
    Picture,
    Refusal,
    ReportData,
    Sentence,
    StageRow,
    WholeFlops,
)
from prunepass.report.picture import picture_figures
from prunepass.report.style import STYLE
from prunepass.report.text import (
    RESTORES,
    exact_text,
    flops_rows,
    flops_text,
    plan_text,
    protect_text,
    ratio_text,
    whole_rows,
)

__all__ = ["render_html"]


def render_html(report: ReportData) -> str:
    """The whole page. Text from the model, the plan and the tokens is escaped."""
    today = date.today().isoformat()
    planned = _plans(report)
    title = f"{report.model}: {planned[:1].lower()}{planned[1:]}, {today}"
    made = f"Made by prunepass on {today}."
    parts = [f"<h1>{escape(report.model)}</h1>", f'<p class="lead">{escape(planned)}.</p>']
    if report.parts:
        rows = _plural(report.batch, "row")
        parts += [f'<p class="muted">{made} Example: {report.batch} {rows}.</p>']
        parts += [] if any(part.refusals for part in report.parts) else [_refusals(report.refusals)]
        parts += [_whole(report.whole), _fusions(report.fusions)]
        for number, part in enumerate(report.parts):
            parts += [f'<h2 class="part">{escape(part.part)} ({escape(part.model)})</h2>', _said(part)]
            parts += _tables(part, f"example-{number}")
    else:
        parts += [_said(report, made), *_tables(report)]
    body = "\n".join(part for part in parts if part)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _plans(report: ReportData) -> str:
    if not report.parts:
        return _sentence_case(plan_text(report.plan))
    return "; ".join(f"{part.part}: {plan_text(part.plan)}" for part in report.parts)


def _said(report: ReportData, before: str = "") -> str:
    """The example and the plan in words."""
    said = [
        before,
        f"Example: {report.batch} {_plural(report.batch, 'row')} of {report.length} tokens.",
        f"Kept before any other: {protect_text(report.plan.protect)}.",
        f"Pruned positions carry {RESTORES[report.plan.restore]}.",
        f"Plan: {report.plan_source}." if report.plan_source else "",
        *(f"{_sentence_case(line)}." for line in report.streams if report.part),
    ]
    return f'<p class="muted">{escape(" ".join(filter(None, said)))}</p>'


def _tables(report: ReportData, picture: str = "example") -> list[str]:
    return [
        _refusals(report.refusals),
        _warnings(report.warnings),
        "" if report.part else _measured(report),
        _tiles(report),
        _picture(report.picture, picture) or _sentence(report.sentence, len(report.blocks)),
        _depth(report),
        _stages(report.stages, report.length),
        _flops(report),
        _blocks(report.blocks, pruned=not report.refusals),
        _fusions(report.fusions),
        _passes(report.passes),
        _section("The plan", f"<pre>{escape(report.plan.to_json().rstrip())}</pre>"),
    ]


def _whole(whole: WholeFlops | None) -> str:
    if whole is None:
        return ""
    table = _table(("part", "dense", "pruned", "dense / pruned"), whole_rows(whole), right={1, 2, 3})
    tile = _tile_row([(ratio_text(whole.dense, whole.pruned), "fewer FLOPs on the example, of the whole model")])
    return f"{tile}\n{_section('FLOPs of the whole model', table, 'On the example, counted on what runs.')}"


def _section(heading: str, content: str, note: str = "", *, kind: str = "") -> str:
    lead = f'<p class="muted">{note}</p>' if note else ""
    style = f' class="{kind}"' if kind else ""
    return f"<section{style}>\n<h2>{escape(heading)}</h2>\n{lead}\n{content}\n</section>"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], *, right: set[int]) -> str:
    """A table of escaped cells; ``right`` holds the columns of numbers.

    Each cell carries the name of its column: on a narrow screen a row is a list of names and values.
    """

    def attributes(column: int, tag: str) -> str:
        name = f' data-column="{escape(header[column])}"' if tag == "td" else ""
        return (' class="number"' if column in right else "") + name

    def row(cells: Sequence[str], tag: str) -> str:
        parts = (f"<{tag}{attributes(i, tag)}>{escape(cell)}</{tag}>" for i, cell in enumerate(cells))
        return f"<tr>{''.join(parts)}</tr>"

    body = "\n".join(row(cells, "td") for cells in rows)
    return f"<table>\n<thead>{row(header, 'th')}</thead>\n<tbody>\n{body}\n</tbody></table>"


def _sentence_case(text: str) -> str:
    return text[:1].upper() + text[1:]


def _plural(count: int, noun: str) -> str:
    return noun if count == 1 else f"{noun}s"


# -- messages -------------------------------------------------------------------------------------------------------


def _refusals(refusals: Sequence[Refusal]) -> str:
    return "\n".join(
        _section(
            "Refused",
            (f"<p><code>{escape(r.where)}</code></p>" if r.where else "")
            + f"<p>{escape(r.reason)}</p>"
            + (f"<p>{escape(r.hint)}</p>" if r.hint else ""),
            kind="callout refused",
        )
        for r in refusals
    )


def _warnings(warnings: Sequence[str]) -> str:
    return "\n".join(_section("Warning", f"<p>{escape(text)}</p>", kind="callout") for text in warnings)


# -- figures --------------------------------------------------------------------------------------------------------


def _measured(report: ReportData) -> str:
    """Time and agreement, which FLOPs do not tell; or how to get them."""
    if report.refusals:
        return ""
    if report.measured is None:
        return _section(
            "Time and agreement: not measured",
            "<p><code>prunepass bench MODEL --target openvino --file texts.txt</code> measures both on your texts; "
            "with <code>--html report.html</code> it writes this page with them.</p>",
        )
    taken = report.measured
    tiles = [
        (f"{taken.speedup:.2f}x", f"as fast: {taken.pruned_ms:.1f} ms a batch in place of {taken.dense_ms:.1f} ms"),
        *((f"{_closest(row):.3f}", f"cosine to the dense {row.output}{_of_what(row)}") for row in taken.agreement),
    ]
    said = (
        f"{taken.texts} {_plural(taken.texts, 'text')} on {escape(taken.target)}, computed in {escape(taken.precision)}"
    )
    return _section("Time and agreement", _tile_row(tiles), f"Measured over {said}. Dense and pruned ran in turns.")


def _closest(row: AgreementRow) -> float:
    return row.cosine if row.pooled_cosine is None else row.pooled_cosine


def _of_what(row: AgreementRow) -> str:
    return "" if row.pooled_cosine is None else ", averaged over tokens"


def _tile_row(tiles: Iterable[tuple[str, str]]) -> str:
    cells = "\n".join(f'<div class="tile"><b>{escape(b)}</b><span>{escape(t)}</span></div>' for b, t in tiles)
    return f'<div class="tiles">\n{cells}\n</div>'


def _tiles(report: ReportData) -> str:
    tiles = []
    if report.flops is not None:
        dense, pruned = report.flops.dense.real_tokens, report.flops.pruned.real_tokens
        tiles.append((ratio_text(dense, pruned), "fewer FLOPs, on real tokens"))
    if report.stages and report.blocks:
        last = report.blocks[-1]
        tiles.append((f"{last.count_out} of {report.length}", "tokens leave the last block"))
        tiles.append(
            (str(len(report.stages)), f"{_plural(len(report.stages), 'stage')} in {len(report.blocks)} blocks")
        )
    if report.passes:
        tiles.append((f"{sum(p.seconds for p in report.passes):.2f} s", "to rewrite the graph"))
    return _tile_row(tiles) if tiles else ""


_LIGHTER = " The lighter part leaves after the block's attention."


def _depth(report: ReportData) -> str:
    """One bar a block, as wide as the page: the tokens alive in it, of those that the unpruned model carries."""
    if not report.blocks or report.refusals:
        return ""
    bars = "\n".join(_bar(block, report.length) for block in report.blocks)
    leaves = any(block.count_in != block.count_out for block in report.blocks)
    note = f"Of the example's {report.length} tokens." + (_LIGHTER if leaves else "")
    return _section("Tokens alive in each block", f'<div class="bars">\n{bars}\n</div>', note)


def _bar(block: BlockRow, length: int) -> str:
    inside, after = (100 * count / length for count in (block.count_in, block.count_out))
    said = f"block {block.index}: {block.count_in} tokens in its attention, {block.count_out} after it"
    count = str(block.count_in) if block.count_in == block.count_out else f"{block.count_in}, {block.count_out}"
    return (
        f'<div class="bar" title="{escape(said)}"><span>{block.index}</span><span class="track">'
        f'<i class="in" style="width: {inside:.1f}%"></i><i class="out" style="width: {after:.1f}%"></i></span>'
        f"<span>{count}</span></div>"
    )


# -- the picture ----------------------------------------------------------------------------------------------------


def _picture(picture: Picture | None, name: str) -> str:
    if picture is None:
        return ""
    ways = {drawn.merges for drawn in picture.stages}
    left = ("Under a light shade are patches that were merged into others", "under a dark one those that were dropped")
    note = f"{left[0]}; {left[1]}" if len(ways) > 1 else left[0] if True in ways else left[1][:1].upper() + left[1][1:]
    return _section("Patches kept at each stage", picture_figures(picture, name), f"{note}. The example's first image.")


# -- the sentence ---------------------------------------------------------------------------------------------------


def _sentence(sentence: Sentence | None, num_blocks: int) -> str:
    if sentence is None:
        return ""
    tokens = "".join(
        _token(text, last, num_blocks, glued=glued)
        for (text, glued), last in zip(_pieces(sentence.words), sentence.last_block, strict=True)
    )
    note = "Plain tokens stay to the last block. Marked ones leave; the stronger the mark, the earlier."
    return _section(
        "Where each token leaves", f'<p class="sentence">{tokens}</p>\n{_legend(sentence, num_blocks)}', note
    )


def _token(text: str, last: int, num_blocks: int, *, glued: bool) -> str:
    # A zero-width space lets a long unbroken run wrap between tokens.
    before = "&#8203;" if glued else " "
    style = f"token{' glued' if glued else ''}"
    if last == num_blocks - 1:
        return f'{before}<span class="{style}">{escape(text)}</span>'
    left = "before the first block" if last < 0 else f"after block {last}"
    mark = f'style="--share: {_strength(last, num_blocks)}%" title="leaves {left}"'
    return f'{before}<span class="{style} left" {mark}>{escape(text)}</span>'


def _strength(last: int, num_blocks: int) -> int:
    """Of the mark of a token that leaves after block ``last``, in per cent."""
    return round(100 * (1 - (last + 1) / num_blocks))


def _legend(sentence: Sentence, num_blocks: int) -> str:
    counts = Counter(sentence.last_block)
    entries = []
    for last in sorted(counts):
        if last == num_blocks - 1:
            entries.append(f'<span class="token">stay</span><span>{counts[last]}</span>')
            continue
        name = "leave before the first block" if last < 0 else f"leave after block {last}"
        style = f'class="token left" style="--share: {_strength(last, num_blocks)}%"'
        entries.append(f"<span {style}>{name}</span><span>{counts[last]}</span>")
    return f'<div class="legend">{"".join(entries)}<span>of {len(sentence.words)} tokens</span></div>'


def _pieces(words: Sequence[str]) -> list[tuple[str, bool]]:
    """Tokens as readable text, and whether each continues the word before it.

    WordPiece marks continuations (##), byte-level BPE and SentencePiece mark starts; where no token carries a mark
    (plain ids), every token is its own word.
    """
    starts = ("\u0120", "\u2581")
    marks_starts = any(word.startswith(starts) for word in words)
    pieces = []
    for i, word in enumerate(words):
        if word.startswith("##"):
            pieces.append((word[2:], True))
        elif word.startswith(starts):
            pieces.append((word[1:] or "\u2423", False))
        else:
            special = word.startswith(("<", "[")) and len(word) > 2
            pieces.append((word, marks_starts and i > 0 and not special))
    return pieces


# -- tables ---------------------------------------------------------------------------------------------------------


def _stages(stages: Sequence[StageRow], length: int) -> str:
    if not stages:
        return ""
    header = ("stage", "place", "module", "scorer", "keep", "tokens kept of S", f"at S = {length}")
    rows = [(str(s.index), s.place, s.path or "-", s.scorer, s.keep, s.kept, str(s.count)) for s in stages]
    return _section("Stages", _table(header, rows, right={0, 6}))


def _flops(report: ReportData) -> str:
    flops, exact = report.flops, report.exact
    if flops is None:
        return ""
    header, *rows = flops_rows(flops, exact, "the example as it is")
    table = _table(header, rows, right=set(range(1, len(header))))
    scoring = flops.scoring / flops.example_pruned if flops.example_pruned else 0.0
    after = (
        f'<p class="muted">Scoring is {flops_text(flops.scoring)} ({scoring:.1%}) of the pruned example. The inserted '
        f"sorts, gathers and masks write {flops_text(flops.moved)} elements; those are no FLOPs.</p>"
    )
    if exact is not None:
        after = f"<p>{escape(_sentence_case(exact_text(report, exact)))}</p>{after}"
    note = (
        f"Over {flops.rows} {_plural(flops.rows, 'row')} with {flops.tokens} tokens, {flops.batch_size} rows a batch. "
        "A speed-up against padded text is partly the padding's; the last denominator leaves it out."
    )
    return _section("FLOPs", table + after, note)


def _blocks(blocks: Sequence[BlockRow], *, pruned: bool) -> str:
    if not blocks:
        return ""
    if not pruned:
        rows = [(str(b.index), b.path or "-", b.attention, flops_text(b.dense_flops)) for b in blocks]
        return _section("Blocks", _table(("block", "module", "attention", "FLOPs"), rows, right={0, 3}))
    header = ("block", "module", "attention", "tokens in", "tokens out", "dense FLOPs", "pruned FLOPs")
    full = [
        (
            str(b.index),
            b.path or "-",
            b.attention,
            b.tokens_in,
            b.tokens_out,
            flops_text(b.dense_flops),
            flops_text(b.pruned_flops),
        )
        for b in blocks
    ]
    return _section("Blocks", _table(header, full, right={0, 5, 6}))


def _fusions(fusions: Fusions | None) -> str:
    if fusions is None:
        return ""
    rows = [(row.kind, str(row.dense), str(row.pruned)) for row in fusions.rows]
    table = _table(("kind", "dense", "pruned"), rows, right={1, 2})
    return _section(f"Fusions kept on {fusions.target}", table, f"Counted: {escape(fusions.counts)}")


def _passes(passes: Sequence[PassRow]) -> str:
    if not passes:
        return ""
    rows = [(p.name, str(p.changes), str(p.nodes_added), f"{p.seconds * 1e3:.1f}") for p in passes]
    return _section("Passes", _table(("pass", "sites changed", "nodes added", "ms"), rows, right={1, 2, 3}))
