"""The type checker that `conftest.py` puts behind every annotated function and record of the tensor modules."""

from typing import Any, Self

from beartype import BeartypeConf, FrozenDict, beartype

# `Self` means nothing to beartype in a method that is decorated by itself, as the import hook does.
checked = beartype(conf=BeartypeConf(hint_overrides=FrozenDict({Self: Any})))
