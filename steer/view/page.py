"""What views share: a page of HTML that stands alone, and plain text."""

from __future__ import annotations

from html import escape
from io import StringIO
from typing import Any

from rich.console import Console

_PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>{title}</title></head>
<body style="font-family:sans-serif;color:#000;background:#fff;max-width:60em;margin:2em auto;padding:0 1em">
<h1 style="font-size:1.3em">{title}</h1>
{body}
</body>
</html>
"""


def page(title: str, body: str) -> str:
    """A page that needs nothing but itself. The body is HTML, the title is text."""
    return _PAGE.format(title=escape(title), body=body)


def text_of(view: Any, width: int = 120) -> str:
    """What rich prints of a view, without colours."""
    console = Console(file=StringIO(), width=width, markup=False, emoji=False, highlight=False, color_system=None)
    console.print(view)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue().rstrip("\n")
