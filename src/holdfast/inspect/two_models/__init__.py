"""Two models beside each other: is the reference the one that it is taken for?

`compare` loads both and asks each module here its question: `gaps` how their log-probs differ, `parting` where their
hidden states part, `weights` which tensors differ, `settings` which settings, `tokenizers` what becomes of a text.
`verdict` says it all in a sentence, and `lines`, `page` and `numbers_file` show it. Given up: models that do not fit
into the memory of one process together.
"""
