"""What the style of a report adds to the one of all pages: the four answers as cards, and completions side by side."""

CSS = """
.status { color: var(--faint); margin: 0 0 1rem; max-width: none; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 500px), 1fr)); gap: 1rem; }
.answer { border: 1px solid var(--line); border-left: 5px solid var(--line); border-radius: 6px; padding: .7rem 1rem;
  min-width: 0; break-inside: avoid; }
.answer.good { border-left-color: var(--good); color: inherit; }
.answer.warn { border-left-color: var(--warn); color: inherit; white-space: normal; }
.answer h3 { margin: 0 0 .3rem; color: var(--faint); font-size: .95rem; }
.answer .short { font-weight: 600; margin: 0 0 .4rem; }
.answer p { margin: .25rem 0; } .answer pre { margin: .5rem 0 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.panel .note { margin: .3rem 0 0; font-size: .9rem; }
.panel .what { color: var(--faint); font-size: .85rem; margin: .1rem 0 0; }
.sample { border: 1px solid var(--line); border-radius: 6px; margin: .8rem 0; padding: .6rem .9rem; }
.sides { display: grid; grid-template-columns: 1fr 1fr; gap: .8rem; }
.sides > div { min-width: 0; }
@media (max-width: 760px) { .sides { grid-template-columns: 1fr; } }
.part { color: var(--faint); font-size: .85rem; margin: .4rem 0 .15rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--panel); padding: .5rem .7rem;
  border-radius: 4px; font-size: .92rem; }
.policy { border-left: 3px solid var(--series-0); } .reference { border-left: 3px solid var(--series-1); }
"""
