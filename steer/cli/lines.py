"""JSONL files that commands read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from steer.errors import SteerError


def read_lines(file: Path, has: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each line stands, as file:number, and its object. Blank lines are left out.

    Args:
        file: in UTF-8. Lines end as in ASCII: what else Unicode has for a line's end may stand in a text.
        has: what such an object has, for messages.

    Raises:
        SteerError: there is no such file, or a line is no object; the message says where.
    """
    if file.is_dir():
        raise SteerError(f"{file} is a folder; give a file")
    if not file.is_file():
        raise SteerError(f"{file}: there is no such file")
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        where = f"{file}:{number}"
        if not line.strip():
            continue
        try:
            entry = json.loads(line.decode("utf-8-sig"))
        except ValueError as error:
            raise SteerError(f"{where}: not JSON in UTF-8 ({error})") from None
        if not isinstance(entry, dict):
            raise SteerError(f"{where}: expected an object with {has}")
        yield where, entry


def meant(key: str, known: Iterable[str]) -> str:
    """For a message on a key that is not known, what it resembles."""
    alike = get_close_matches(key, list(known), n=1)
    return f", but {alike[0]!r} is" if alike else ""
