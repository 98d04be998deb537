"""The command `holdfast`: `app` (train, precompute, demo) and `store` (list, verify, gc, export, import).

`yaml_text` reads YAML, `yaml_document` checks its values, `runfile` makes arguments of them, `sources` loads what they
name, and `assembly` makes the trainer. `paths` expands paths, `adapter_ranges` and `agreement` find what cannot be
before anything is loaded. `text_file` and `text` are about files that are read and text that is shown, and `errors`
decides which errors end in a message.
"""
