"""From files to batches, one step a module: `load` -> `formats` -> `tokenize` -> `prepare` -> a layout of `layouts`.

`files` reads the rows of files for `load`, with the file and line of each fault. `usability` decides which rows are
left out. `columns` names the columns of a dataset, `dates` fixes the date that chat templates print, `inputs` completes
the batches of a user's own collator, and `completions` lists what a reference scores ahead.
"""
