"""From files to batches, one step a module: `load` -> `formats` -> `tokenize` -> `prepare` -> a layout of `layouts`.

`usability` decides which rows are left out. `columns` names the columns of a dataset, `dates` fixes the date that chat
templates print, `inputs` completes the batches of a user's own collator, and `completions` lists what a reference
scores ahead.
"""
