"""The kit of every page that holdfast writes: one HTML file that loads nothing, runs no script and escapes all text.

`page.page` is the skeleton, `markup` makes elements of text, `tables` are tables, and `charts` are pictures of numbers
as SVG, one kind a file. Pure functions of values: what a number means is known by the rooms that show it. A page reads
in light and dark, on paper, and from 400 to 1600 pixels. Given up: anything that moves; what a pointer shows is a
`title`.
"""
