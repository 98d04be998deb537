"""Pictures of numbers as SVG within a page: one kind a file, on the same frame (`frame`) and axes (`axis`).

Each is a pure function of numbers. Text is 12 units of a frame 420 units wide, so it is read on a telephone too. What a
pointer shows is the `title` of a shape. Given up: zooming; a table of the numbers stands beside what is looked at
closely.
"""
