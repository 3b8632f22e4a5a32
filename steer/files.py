"""Files and folders that are there as a whole or not at all."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from steer.errors import SteerError

DRAFT = re.compile(r"\.[0-9a-f]{8}\.tmp\..*")
"""Names of what a killed process may have left unfinished."""


@contextmanager
def draft(path: Path) -> Iterator[Path]:
    """A file to write to beside a place, which takes that place when it is whole and on the disk.

    Raises:
        SteerError: it cannot be written; nothing of it is left, and what was at the place is there still.
    """
    unfinished = _beside(path)
    try:
        unfinished.touch()
        yield unfinished
        sync(unfinished)
        os.replace(unfinished, path)
        # The name lives in the folder: without this a power cut may lose the file after the renaming.
        sync(path.parent)
    except OSError as error:
        raise SteerError(f"{path}: could not be written ({error.strerror or error})") from error
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def draft_folder(path: Path) -> Iterator[Path]:
    """A folder to make and to fill beside a place, which takes that place when all has gone well.

    Raises:
        SteerError: there is something at the place, or it cannot be written to; nothing of the folder is left.
    """
    if not is_free(path):
        raise SteerError(f"{path}: exists already; give a place where nothing is")
    if os.path.ismount(path):
        raise SteerError(f"{path}: a file system is mounted here, and no folder can take its place; give one inside it")
    unfinished = _beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        for written in (*unfinished.rglob("*"), unfinished):
            sync(written)
        os.rename(unfinished, path)
        sync(path.parent)
    except OSError as error:
        raise SteerError(f"{path}: could not be written ({error.strerror or error})") from error
    except SteerError as error:
        # The draft is gone when this is read.
        raise type(error)(str(error).replace(str(unfinished), str(path))) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def is_free(path: Path) -> bool:
    """Whether there is nothing at a place, or a folder with nothing in it."""
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _beside(path: Path) -> Path:
    # With the name at the end, as some writers go by its ending.
    return path.with_name(f".{secrets.token_hex(4)}.tmp.{path.name}")
