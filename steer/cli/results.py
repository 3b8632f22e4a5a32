"""Files that commands write results to: numbers, pages and pictures."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steer.cli import options
from steer.errors import SteerError
from steer.files import draft


def require_writable(*files: Path | None, html: Path | None = None, png: Path | None = None) -> None:
    """Raises SteerError where a result, a page or a picture could not be written, before a long run and not after it.

    A picture needs matplotlib, and an ending that it knows.
    """
    for file in (*files, html, png):
        if file is not None and (not os.access(file.parent, os.W_OK) or (file.exists() and not file.is_file())):
            raise SteerError(f"{file} cannot be written: give a file, in a folder that exists and may be written to")

    if html is not None and html.suffix.lower() not in ("", ".html", ".htm"):
        raise SteerError(f"{html} has not the ending of a page, .html")
    if png is not None and png.suffix[1:].lower() not in (known := _formats()):
        raise SteerError(f"{png} has the ending of no picture; there are .{', .'.join(known)}")


def _formats() -> list[str]:
    from steer.view.figures import new_figure

    return sorted(new_figure(1, 1).canvas.get_supported_filetypes())


def write(file: Path | None, content: str | Mapping[str, Any] | Any) -> None:
    """Writes a page, numbers as JSON, or a figure, if it is wanted, and says where: all of it, or nothing.

    Raises:
        SteerError: the file cannot be written, or its ending is that of no picture.
    """
    from steer.view.figures import DPI

    if file is None:
        return
    if isinstance(content, Mapping):
        content = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    with draft(file.resolve()) as unfinished:
        if isinstance(content, str):
            unfinished.write_text(content, encoding="utf-8")
        else:
            try:
                content.savefig(unfinished, dpi=DPI)
            except ValueError as error:
                raise SteerError(f"{file} cannot be written: {error}") from None
    options.err.print(f"wrote {file}", soft_wrap=True)
