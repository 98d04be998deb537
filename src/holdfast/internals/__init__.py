"""Every private name of torch, transformers and peft that the package leans on, one module per library.

A private name may move with any release. Here each one stands behind a small public function that looks it up first and
raises `MovedError` where it is gone, so that a release that renames it is an error and never another number. Of
accelerate the package uses no private name. `tests/test_architecture.py` finds private names everywhere else.
"""
