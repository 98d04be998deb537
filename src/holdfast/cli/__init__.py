"""The command `holdfast`: `app` (train, precompute, demo) and `store` (list, verify, gc, export, import).

`yaml_document` reads a YAML file, `runfile` makes checked arguments of it, `sources` loads what it names, `assembly`
makes the trainer, and `errors` decides which errors end in a message.
"""
