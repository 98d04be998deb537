"""Every private name of torch, transformers and peft that the package uses, one module per library.

A private name may move with any release. Here each one stands behind a small public function that looks it up first and
raises `MovedError` where it is gone. So a release that renames it gives an error, and never another number. The package
uses no private name of accelerate. `tests/test_architecture.py` finds private names that stand elsewhere. Given up:
running on a version that has moved a name, even where the name would not be needed.
"""
