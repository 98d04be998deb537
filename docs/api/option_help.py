"""The help text of a config field is its description on the API page. mkdocs.yml names this as an extension of Griffe.

Read from the source, so that building the documentation imports neither torch nor transformers.
"""

import ast
from typing import Any

from griffe import Attribute, Docstring, Extension


class OptionHelp(Extension):
    """Gives every field that is written `name: type = _option("help", ...)` its help as a docstring."""

    def on_attribute_instance(self, *, node: Any, attr: Attribute, **kwargs: Any) -> None:
        """Called for each attribute that Griffe has read."""
        match node:
            case ast.AnnAssign(value=ast.Call(func=ast.Name(id="_option"), args=[help, *_])):
                attr.docstring = Docstring(_text(help), parent=attr)
                attr.value = None


def _text(help: ast.expr) -> str:
    """The text itself; of what is computed in an f-string, the expression."""
    if isinstance(help, ast.JoinedStr):
        return "".join(_text(part) for part in help.values)
    if isinstance(help, ast.FormattedValue):
        return f"`{ast.unparse(help.value)}`"
    assert isinstance(help, ast.Constant), ast.dump(help)
    return str(help.value)
