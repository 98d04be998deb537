"""The help text of a config field is its description on the API page. mkdocs.yml names this as an extension of Griffe.

The text is read from the source, so that building the documentation imports neither torch nor transformers. Given up:
what a help text computes, such as the list of all losses; an ellipsis stands for it.
"""

import ast
from typing import Any

from griffe import Attribute, Docstring, Extension


class OptionHelp(Extension):
    """Gives a field its help as a docstring: `name: type = _option("help", ...)`, and `= option(default, "help")`."""

    def on_attribute_instance(self, *, node: Any, attr: Attribute, **kwargs: Any) -> None:
        """Called for each attribute that Griffe has read."""
        match node:
            case ast.AnnAssign(value=ast.Call(func=ast.Name(id="_option"), args=[help, *_])):
                attr.docstring = Docstring(_text(help), parent=attr)
                attr.value = None
            case ast.AnnAssign(value=ast.Call(func=ast.Name(id="option"), args=[default, help, *_])):
                attr.docstring = Docstring(_text(help), parent=attr)
                attr.value = ast.unparse(default)
                if isinstance(node.annotation, ast.Subscript) and isinstance(node.annotation.slice, ast.Tuple):
                    attr.annotation = ast.unparse(node.annotation.slice.elts[0])  # without the rule


def _text(help: ast.expr) -> str:
    """The text as far as it is written out."""
    match help:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(map(_text, parts))
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _text(left) + _text(right)
        case ast.FormattedValue():
            return "..."
        case _:
            return "... "
