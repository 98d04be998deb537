"""The style sheet of every page: colours as variables, for light and dark, and rules for narrow screens and paper.

The colours of series are those of Okabe and Ito, which people with any kind of colour blindness can tell apart, made
lighter in the dark; each series has a pattern of dashes too, for paper without colour.
"""

_LIGHT = """--back: #fff; --ink: #1a1a1a; --faint: #63676c; --line: #dcdfe3; --panel: #f6f7f8; --warn: #8a4b00;
  --warn-back: #fff4e0; --bad: #b3261e; --good: #1b6e3c; --good-back: #e6f4ea; --link: #0b57d0; --healthy: #2e9e5b;
  --series-0: #0072b2; --series-1: #d55e00; --series-2: #00835f; --series-3: #a8457f; --series-4: #8a6d00;
  --series-5: #2f8fc4; --series-6: #5b4fc0; --series-7: #555b61;"""
_DARK = """--back: #16181b; --ink: #e8e6e3; --faint: #a3a7ad; --line: #3a3d42; --panel: #1f2226; --warn: #ffb86b;
  --warn-back: #33260f; --bad: #ff8a80; --good: #7bd69a; --good-back: #14301f; --link: #8ab4f8; --healthy: #57c785;
  --series-0: #56b4e9; --series-1: #ff8f45; --series-2: #3ccf9f; --series-3: #e591c2; --series-4: #e6c229;
  --series-5: #9fd6f5; --series-6: #a9a0ff; --series-7: #b9bec4;"""

_PAGE = """
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1480px; padding: 1.5rem; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .6rem; }
h2 { font-size: 1.25rem; border-top: 2px solid var(--line); padding-top: 1rem; margin-top: 2rem; }
h3 { font-size: 1.05rem; margin-bottom: .3rem; }
h1, h2, h3, p, li, dd, summary, figcaption { overflow-wrap: anywhere; }
p, li, dd { max-width: 90ch; }
a { color: var(--link); }
code, pre { font: .9em/1.5 ui-monospace, monospace; background: var(--panel); border-radius: 4px; }
code { padding: .05em .3em; overflow-wrap: anywhere; } pre { padding: .6rem .8rem; overflow-x: auto; }
summary { cursor: pointer; }
.faint { color: var(--faint); } .warn { color: var(--warn); white-space: pre-wrap; overflow-wrap: anywhere; }
.bad { color: var(--bad); } .good { color: var(--good); }
.note { border-left: 4px solid var(--line); background: var(--panel); padding: .5rem .8rem; margin: .5rem 0; }
.note.warn { border-color: var(--warn); background: var(--warn-back); color: var(--ink); }
.note.good { border-color: var(--good); background: var(--good-back); color: var(--ink); }
"""
_TABLES = """
.scroll { overflow-x: auto; max-width: 100%; margin: .5rem 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--faint); padding-bottom: .2rem; }
th, td { padding: .2rem .7rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th { font-weight: 600; }
th:first-child, td:first-child { text-align: left; }
.words th, .words td { text-align: left; } .words td { overflow-wrap: anywhere; }
.words td:first-child { white-space: nowrap; }
.left th, .left td { text-align: left; min-width: 3.5rem; max-width: 30rem; overflow-wrap: break-word; }
@media (max-width: 600px) { body { padding: 1rem; } th, td { padding: .2rem .45rem; }
  .words td:first-child { white-space: normal; min-width: 7rem; } }
"""
_CHARTS = """
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 360px), 1fr)); gap: 1.2rem 1.4rem; }
.charts > * { min-width: 0; }
.chart { margin: 0; max-width: 600px; }
.chart figcaption { font-weight: 600; }
.chart svg { display: block; width: 100%; height: auto; }
.chart text { font: 12px system-ui, sans-serif; fill: var(--faint); }
.chart .frame { stroke: var(--faint); stroke-width: 1; fill: none; }
.chart .grid { stroke: var(--line); stroke-width: 1; }
.chart .series { fill: none; stroke: var(--color); stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
.chart .faint-series { opacity: .35; } .chart .faint-series .series { stroke-width: 1; }
.chart .spread { fill: var(--color); opacity: .16; stroke: none; }
.chart .dot { fill: var(--color); stroke: none; } .chart .target { fill: transparent; stroke: none; }
.chart .target:hover { fill: var(--color); fill-opacity: .55; }
.chart .fill { fill: var(--color); fill-opacity: .75; stroke: var(--back); stroke-width: .5; }
.chart .point { fill: var(--color); fill-opacity: .55; stroke: none; }
.chart .value { fill: var(--ink); } .chart .within { fill: var(--ink); font-weight: 600; }
.chart .range { fill: var(--healthy); opacity: .1; } .chart .edge { stroke: var(--healthy); stroke-dasharray: 2 3; }
.chart .level { stroke: var(--faint); stroke-dasharray: 5 4; }
.chart .mark { stroke: var(--ink); stroke-dasharray: 1 3; }
.chart .short { stroke: var(--ink); stroke-width: 1.5; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1rem; font-size: .85rem; color: var(--faint); margin: .2rem 0 0; }
.legend b { color: var(--ink); font-variant-numeric: tabular-nums; }
.legend span { overflow-wrap: anywhere; min-width: 0; }
.legend svg { display: inline-block; width: 26px; height: 10px; margin-right: .35rem; vertical-align: middle; }
""" + "".join(f".c{number} {{ --color: var(--series-{number}); }} " for number in range(8))
_PAPER = """
@media print { :root { LIGHT } body { max-width: none; padding: 0; font-size: 11pt; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  .charts { grid-template-columns: 1fr 1fr; } .chart, tr, .note { break-inside: avoid; } h2, h3 { break-after: avoid; }
  .scroll { overflow: visible; } .screen { display: none; } }
"""

CSS = (
    f":root {{ color-scheme: light dark; {_LIGHT} }}\n"
    f"@media (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}\n"
    f"{_PAGE}{_TABLES}{_CHARTS}{_PAPER.replace('LIGHT', _LIGHT)}"
)
