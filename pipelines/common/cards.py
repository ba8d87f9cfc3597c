"""The docstrings that users are shown, also where Python was told to leave docstrings out."""

import ast
import inspect
import sys
import textwrap
from typing import Any


def text(thing: Any) -> str:
    """The docstring of a function or class, without its indentation.

    `python -OO` has none, so there it is read from the source file; an empty string if that is not there either.
    """
    if sys.flags.optimize < 2:
        return inspect.getdoc(thing) or ""
    try:
        parsed = ast.parse(textwrap.dedent(inspect.getsource(thing))).body[0]
    except (OSError, TypeError, SyntaxError):
        return ""
    return (ast.get_docstring(parsed) or "") if isinstance(parsed, ast.FunctionDef | ast.ClassDef) else ""
