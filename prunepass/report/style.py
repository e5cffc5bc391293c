"""The style sheet of the HTML report; one string, so that the file it goes into needs nothing else."""

__all__ = ["STYLE"]

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fbfaf7; --card: #ffffff; --ink: #1d2126; --muted: #646b73; --line: #e3e0d9;
  --heat: #d9662b; --cool: #eef0f1; --pruned: #2f6f8f; --alert: #b3261e; --note: #946200;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171a; --card: #1c2024; --ink: #e8e6e1; --muted: #9aa2aa; --line: #2e3439;
    --heat: #a8481a; --cool: #262b30; --pruned: #5ba3c6; --alert: #ff8a80; --note: #f0b94d;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 66rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}
h1 { font-size: 1.7rem; margin: 0 0 .2rem; letter-spacing: -.01em; }
.lead { font-size: 1.1rem; }
h2 { font-size: 1.08rem; margin: 0 0 .2rem; }
h2.part { font-size: 1.35rem; margin-top: 2.4rem; }
p { margin: .25rem 0 .75rem; max-width: 46rem; }
.muted, caption, figcaption { color: var(--muted); font-size: .9rem; }
section { background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  padding: 1.1rem 1.25rem; margin-top: 1.1rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .8rem; margin-top: 1.1rem; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .8rem 1rem; }
.tile b { display: block; font-size: 1.55rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
.tile span { color: var(--muted); font-size: .88rem; }
.callout { border-left: .3rem solid var(--note); }
.callout.refused { border-left-color: var(--alert); }
table { border-collapse: collapse; width: 100%; font-size: .92rem; margin-top: .4rem; }
th { text-align: left; font-weight: 600; color: var(--muted); }
th, td { padding: .3rem 1.2rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: baseline;
  overflow-wrap: anywhere; }
th:last-child, td:last-child { padding-right: 0; }
tbody tr:last-child td { border-bottom: 0; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
code, pre { overflow-wrap: anywhere;
  font: .86rem/1.5 ui-monospace, "SFMono-Regular", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre { white-space: pre-wrap; margin: .6rem 0 0; }
.bars { margin-top: .5rem; }
.bar { display: grid; grid-template-columns: 2rem 1fr 5.5rem; gap: .6rem; align-items: center; margin: .18rem 0;
  font-size: .88rem; color: var(--muted); font-variant-numeric: tabular-nums; }
.track { position: relative; height: .95rem; border-radius: .2rem; background: var(--cool); overflow: hidden; }
.track i { position: absolute; inset: 0 auto 0 0; }
.track .in { background: color-mix(in oklab, var(--pruned) 45%, var(--cool)); }
.track .out { background: var(--pruned); }
.sentence { line-height: 1.9; max-width: none; margin: .6rem 0 .2rem; overflow-wrap: anywhere; }
.token { padding: .1em .1em; }
.token.left { border-radius: .2em; background: color-mix(in oklab, var(--heat) var(--share), var(--cool)); }
.legend { display: flex; flex-wrap: wrap; gap: .4rem .5rem; align-items: center;
  font-size: .88rem; color: var(--muted); }
.legend .token { color: var(--ink); }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: .9rem;
  margin-top: .6rem; }
.pictures figure { margin: 0; }
.pictures svg { display: block; width: 100%; border-radius: .2rem; }
.merged { fill: #101418; fill-opacity: .55; }
.dropped { fill: #101418; fill-opacity: .92; }
@media (max-width: 44rem) {
  body { padding: 1.2rem .75rem 3rem; }
  section { padding: .9rem .85rem; }
  table, tbody, tr, td { display: block; }
  thead { display: none; }
  tr { padding: .45rem 0; border-bottom: 1px solid var(--line); }
  tbody tr:last-child { border-bottom: 0; }
  td, td.number { display: flex; justify-content: space-between; gap: 1rem; padding: .08rem 0; border: 0;
    text-align: right; white-space: normal; }
  td::before { content: attr(data-column); color: var(--muted); text-align: left; flex: none; }
}
"""
