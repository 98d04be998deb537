"""What the style of this page adds to the one of all pages: colours of tokens by use, and rows side by side.

Two boxes at the head of the page switch signs for white space and borders of tokens on and off, without a script.
"""

CSS = """
:root { --prompt: #555; --scored: #d8efdd; --scored-ink: #0b3d17; --unscored: #e9e9e9; --unscored-ink: #444;
  --cut-ink: #b3261e; --special: #6a3fb5; }
@media (prefers-color-scheme: dark) { :root { --prompt: #a9adb3; --scored: #17412a; --scored-ink: #d4f3de;
  --unscored: #34373c; --unscored-ink: #c9c9c9; --cut-ink: #ff8a80; --special: #c3a6ff; } .plot { background: #fff; } }
.found td:last-child, .found th:last-child { text-align: left; }
.found td:nth-child(3) { white-space: nowrap; }
.plot { max-width: 100%; }
.controls { position: sticky; top: 0; background: var(--back); padding: .5rem 0; border-bottom: 1px solid var(--line); }
.row { border: 1px solid var(--line); border-radius: 6px; margin: .8rem 0; padding: .6rem .9rem; }
.row > summary { font-weight: 600; }
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
