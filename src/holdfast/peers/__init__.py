"""The processes of a run watch each other, so that one that is lost ends the run on all of them, by name.

`phase` says what this process is doing, `beat` is what it tells the others every second, `links` carries it, `signs`
are its signs of life, `verdict` is the rule by which a process counts as lost, `watch` is the thread that applies it,
and `guard` is how the rest of the package uses all this.
"""
