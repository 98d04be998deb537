"""The style sheet of the page. Two boxes at its head switch signs for white space and borders of tokens on and off,
without a script."""

CSS = """
:root { color-scheme: light dark; --back: #fff; --ink: #1a1a1a; --faint: #6b6b6b; --line: #ddd; --panel: #f7f7f5;
  --prompt: #555; --scored: #d8efdd; --scored-ink: #0b3d17; --unscored: #e9e9e9; --unscored-ink: #444;
  --cut-ink: #b3261e; --special: #6a3fb5; --warn: #8a4b00; }
@media (prefers-color-scheme: dark) { :root { --back: #16181b; --ink: #e8e6e3; --faint: #9a9a9a; --line: #3a3d42;
  --panel: #1f2226; --prompt: #a9adb3; --scored: #17412a; --scored-ink: #d4f3de; --unscored: #34373c;
  --unscored-ink: #c9c9c9; --cut-ink: #ff8a80; --special: #c3a6ff; --warn: #ffb86b; } .plot { background: #fff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1100px; padding: 1.5rem; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.25rem; border-top: 2px solid var(--line); padding-top: 1rem; }
h3 { font-size: 1.05rem; margin-bottom: .3rem; }
table { border-collapse: collapse; margin: .5rem 0 1rem; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .7rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th:first-child, td:first-child, .found td:last-child, .found th:last-child { text-align: left; }
.found td:nth-child(3) { white-space: nowrap; }
.faint { color: var(--faint); } .warn { color: var(--warn); white-space: pre-wrap; overflow-wrap: anywhere; }
.plot { max-width: 100%; }
.controls { position: sticky; top: 0; background: var(--back); padding: .5rem 0; border-bottom: 1px solid var(--line); }
.row { border: 1px solid var(--line); border-radius: 6px; margin: .8rem 0; padding: .6rem .9rem; }
.row > summary { cursor: pointer; font-weight: 600; overflow-wrap: anywhere; }
.part { margin: .5rem 0 .2rem; color: var(--faint); font-size: .85rem; }
.tokens { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--panel); padding: .5rem .7rem;
  border-radius: 4px; font: 13px/1.6 ui-monospace, monospace; }
.sides { display: grid; grid-template-columns: 1fr 1fr; gap: .8rem; }
.sides > div { min-width: 0; }
@media (max-width: 760px) { .sides { grid-template-columns: 1fr; } }
.prompt { color: var(--prompt); }
.scored { background: var(--scored); color: var(--scored-ink); }
.unscored { background: var(--unscored); color: var(--unscored-ink); border-bottom: 1px dotted; }
.cut { color: var(--cut-ink); text-decoration: line-through; opacity: .75; }
.special { color: var(--special); font-weight: 700; }
.tokens span:hover { outline: 1px solid var(--ink); }
#boundaries:checked ~ main .tokens > span { box-shadow: inset -1px 0 0 var(--cut-ink); }
i { font-style: normal; }
#spaces:checked ~ main i { position: relative; }
#spaces:checked ~ main i::before { color: var(--faint); position: absolute; }
#spaces:checked ~ main i.s::before { content: "\\00b7"; }
#spaces:checked ~ main i.t::before { content: "\\2192"; }
#spaces:checked ~ main i.n::before { content: "\\21b5"; position: static; }
"""
