"""The style sheet of the HTML report; one string, so that the file it goes into needs nothing else."""

__all__ = ["STYLE"]

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fbfaf7; --card: #ffffff; --ink: #1d2126; --muted: #646b73; --line: #e3e0d9;
  --heat: #d9662b; --cool: #eef0f1; --dense: #b9bfc6; --pruned: #2f6f8f; --alert: #b3261e; --note: #946200;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171a; --card: #1c2024; --ink: #e8e6e1; --muted: #9aa2aa; --line: #2e3439;
    --heat: #a8481a; --cool: #262b30; --dense: #59626b; --pruned: #5ba3c6; --alert: #ff8a80; --note: #f0b94d;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 66rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}
h1 { font-size: 1.7rem; margin: 0 0 .2rem; letter-spacing: -.01em; }
h2 { font-size: 1.08rem; margin: 0 0 .2rem; }
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
.scroll { overflow-x: auto; }
table { border-collapse: collapse; min-width: 50%; font-size: .92rem; margin-top: .4rem; }
th { text-align: left; font-weight: 600; color: var(--muted); white-space: nowrap; }
th, td { padding: .3rem 1.6rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: baseline; }
tbody tr:last-child td { border-bottom: 0; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
code, pre { font: .86rem/1.5 ui-monospace, "SFMono-Regular", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre { overflow-x: auto; margin: .6rem 0 0; }
svg { display: block; width: 100%; height: auto; margin-top: .5rem; }
svg text { fill: var(--muted); font-size: 11px; font-family: inherit; }
svg .dense, .swatch.dense { fill: var(--dense); background: var(--dense); }
svg .pruned, .swatch.pruned { fill: var(--pruned); background: var(--pruned); }
svg .rule { stroke: var(--line); }
.swatch { display: inline-block; width: .8em; height: .8em; border-radius: .15em; }
.sentence { line-height: 2.1; max-width: none; margin: .6rem 0 .2rem; overflow-wrap: anywhere; }
.token {
  padding: .14em .26em; border-radius: .25em; margin-left: .22em;
  background: color-mix(in oklab, var(--heat) var(--share), var(--cool));
}
.token.glued { margin-left: 1px; }
.token sub { font-size: .62em; opacity: .72; margin-left: .15em; line-height: 0; }
.legend { display: flex; flex-wrap: wrap; gap: .4rem .5rem; align-items: center;
  font-size: .88rem; color: var(--muted); }
.legend .token { margin: 0; color: var(--ink); }
"""
