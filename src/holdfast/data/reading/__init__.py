"""Ways in which rows are written that are meant as something else: what `holdfast.data.formats` recognises in them.

`roles` are other names of roles, `written` messages that are written as text, `prompts` prompts that completions repeat
or that are of another kind than they, `empty` what is missing in a row that is used, `rules` what the first rows decide
for all, and `sentences` what is said of it. Only what cannot be misread is recognised, and it is said with the number
of rows. The rest is refused or, where the row can be used as it is, counted and said.
"""
