"""Datasets of other shapes -> the columns that holdfast reads, as `columns` of a run says.

`mapping` is what can be asked for, `named` the public formats that have a name, `paths` how a column is named,
`answers` how a pair is chosen among scored answers, `dialogues` how a dialogue in one text is read, `row` what becomes
of a row, `convert` what becomes of a dataset, and `guess` which shape a dataset seems to have that was not asked for.
"""
