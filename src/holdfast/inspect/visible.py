"""Text of a dataset, made visible: see `holdfast.visible`."""

from holdfast.visible import SPACES, visible

__all__ = ["SPACES", "visible"]
