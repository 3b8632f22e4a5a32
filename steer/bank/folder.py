"""The folder of a bank: how it is created, recognised, and written to without ever being seen half written.

people.bank/
    manifest.json                            format, version, what created it
    index.sqlite                             (user, name) -> provenance, data, and where the tensors lie
    segments/00000001-5f0c2a9e.safetensors   tensors of all states of one commit
    artifacts/<hash>.safetensors             what a method shares between users
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from steer.bank.index import Index
from steer.errors import SteerError

FORMAT = "steer-bank"
VERSION = 1

MANIFEST = "manifest.json"
INDEX = "index.sqlite"
SEGMENTS = "segments"
ARTIFACTS = "artifacts"


def open_or_create(path: Path, *, create: bool) -> None:
    """Makes sure that there is a bank of this version at `path`.

    Raises:
        SteerError: there is none and none may be created, something else is there, or a version that is not known.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        if not create:
            raise SteerError(f"{path}: there is no bank here")
        _create(path)
    _check(path)


def save_tensors(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file that is either absent or whole, even after a power cut.

    Raises:
        SteerError: the file could not be written; nothing of it is left.
    """
    draft = file.with_name(_draft_name(file))
    try:
        draft.touch()
        usual = draft.stat().st_mode
        save_file(tensors, draft, metadata)
        # Newer safetensors leave a file that only its owner may read, which would lock others out of a shared bank.
        draft.chmod(usual)
        _sync(draft)
        os.rename(draft, file)
        # The name lives in the folder: without this a power cut may lose the file after the rename.
        _sync(file.parent)
    except (OSError, SafetensorError) as error:
        raise SteerError(f"{file}: could not be written ({error})") from error
    finally:
        draft.unlink(missing_ok=True)


def new_token() -> str:
    """Eight random hexadecimal digits, so that writers who cannot see each other choose different names."""
    return secrets.token_hex(4)


def _create(path: Path) -> None:
    # Built beside its place and renamed into it: nobody, and no crash, meets half a bank.
    draft = path.with_name(_draft_name(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for folder in (draft, draft / SEGMENTS, draft / ARTIFACTS):
            folder.mkdir()
        (draft / MANIFEST).write_text(json.dumps(_manifest(), indent=2) + "\n", encoding="utf-8")
        Index.create(draft / INDEX)
        for written in (draft / MANIFEST, draft / INDEX, draft):
            _sync(written)
        os.rename(draft, path)
        _sync(path.parent)
    except OSError as error:
        # Another process may have created the same bank in the meantime; that one is as good.
        if not (path / MANIFEST).is_file():
            raise SteerError(f"{path}: cannot create a bank here ({error.strerror})") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _check(path: Path) -> None:
    if not path.is_dir():
        raise SteerError(f"{path}: not a bank but a file; a bank is a folder")
    if not (path / MANIFEST).is_file():
        raise SteerError(f"{path}: not a bank, the folder has files but no {MANIFEST}; nothing in it was touched")
    manifest = _read_manifest(path / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise SteerError(f"{path}: not a bank, its {MANIFEST} does not say {FORMAT!r}; nothing in it was touched")
    if manifest.get("version") != VERSION:
        found = manifest.get("version")
        raise SteerError(
            f"{path}: the bank has version {found} of the format, this steer-toolkit reads version {VERSION}; update it"
        )
    if not (path / INDEX).is_file():
        raise SteerError(f"{path}: the bank has lost its {INDEX}; restore it from a copy")


def _read_manifest(file: Path) -> Mapping[str, object]:
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _manifest() -> dict[str, object]:
    try:
        creator = f"steer-toolkit {version('steer-toolkit')}"
    except PackageNotFoundError:
        creator = "steer-toolkit"
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"format": FORMAT, "version": VERSION, "created_by": creator, "created": now}


def _draft_name(path: Path) -> str:
    return f".{path.name}.{new_token()}.tmp"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
