"""The folder of a bank: how it is created, recognised, and written to without ever being seen half written.

people.bank/
    manifest.json                            format, version, what created it, how user ids are kept
    index.sqlite                             (user, name) -> where the state lies
    segments/00000001-5f0c2a9e.safetensors   tensors of states, or what describes them
    artifacts/<hash>.safetensors             what a method shares between users
    commits                                  number of the next commit
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from steer.bank.index import Index
from steer.errors import SteerError
from steer.files import draft_folder, is_free

FORMAT = "steer-bank"
VERSION = 2

MANIFEST = "manifest.json"
INDEX = "index.sqlite"
SEGMENTS = "segments"
ARTIFACTS = "artifacts"
COMMITS = "commits"


@dataclass(frozen=True)
class Manifest:
    """How a bank keeps user ids.

    Attributes:
        hashed: whether it keeps only their hashes.
        salt: of the hashes, by which it finds states in either case.
    """

    hashed: bool
    salt: bytes

    def hash(self, user: bytes) -> bytes:
        """The hash of a user id, which is given in UTF-8: 16 bytes."""
        return blake2b(user, key=self.salt, digest_size=16).digest()

    @property
    def salt_check(self) -> bytes:
        """Tells whether an index belongs to the manifest: the hash of the empty text, which is nobody's id."""
        return self.hash(b"")


def open_or_create(path: Path, *, create: bool, hashed: bool | None = None, salt: bytes | None = None) -> Manifest:
    """Makes sure that there is a bank of this version at `path`, and returns its manifest.

    Args:
        path: the folder.
        create: make a bank where there is none.
        hashed: whether a new bank keeps only hashes of user ids; None for no, and for an old one as it is.
        salt: of a new bank's hashes; at random if None.

    Raises:
        SteerError: there is none and none may be created, something else is there, a version that is not known, or one
            that keeps user ids otherwise than asked for.
    """
    if is_free(path):
        if not create:
            raise SteerError(f"{path}: there is no bank here")
        _create(path, Manifest(bool(hashed), salt or secrets.token_bytes(16)))
    manifest = read_manifest(path)
    if hashed is not None and hashed != manifest.hashed:
        kept = "only hashes of user ids" if manifest.hashed else "user ids as they are"
        raise SteerError(f"{path}: the bank keeps {kept}; to change that, merge it into a new one")
    return manifest


def read_next_commit(path: Path) -> int:
    """Number of the commit that a bank expects next; 0 where that is not known."""
    try:
        return int((path / COMMITS).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0


def write_next_commit(path: Path, number: int) -> None:
    """Notes the number of the commit that is expected next, in one write of always the same length."""
    descriptor = os.open(path / COMMITS, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        os.pwrite(descriptor, f"{number:019d}\n".encode(), 0)
    finally:
        os.close(descriptor)


def new_token() -> str:
    """Eight random hexadecimal digits, so that writers who cannot see each other choose different names."""
    return secrets.token_hex(4)


def _create(path: Path, manifest: Manifest) -> None:
    # Built beside its place and renamed into it: nobody, and no crash, meets half a bank.
    try:
        with draft_folder(path) as draft:
            for folder in (draft, draft / SEGMENTS, draft / ARTIFACTS):
                folder.mkdir()
            (draft / MANIFEST).write_text(json.dumps(_described(manifest), indent=2) + "\n", encoding="utf-8")
            Index.create(draft / INDEX, manifest.salt_check)
            write_next_commit(draft, 1)
    except SteerError:
        # Another process may have created the same bank in the meantime; that one is as good.
        if not (path / MANIFEST).is_file():
            raise


def read_manifest(path: Path, version: int = VERSION) -> Manifest:
    """The manifest of a bank of that version of the format. Raises SteerError if there is none at `path`."""
    if not path.exists():
        raise SteerError(f"{path}: there is no bank here")
    if not path.is_dir():
        raise SteerError(f"{path}: not a bank but a file; a bank is a folder")
    if not (path / MANIFEST).is_file():
        raise SteerError(f"{path}: not a bank, the folder has files but no {MANIFEST}; nothing in it was touched")
    described = _read_json(path / MANIFEST)
    if described.get("format") != FORMAT:
        raise SteerError(f"{path}: not a bank, its {MANIFEST} does not say {FORMAT!r}; nothing in it was touched")
    if (found := described.get("version")) != version:
        if version < VERSION:
            raise SteerError(f"{path}: the bank has version {found} of the format, and not version {version}")
        todo = f"`steer bank migrate {path} NEW` makes a new one of it" if found == 1 else "update steer-toolkit"
        raise SteerError(
            f"{path}: the bank has version {found} of the format, this steer-toolkit reads version {version}; {todo}"
        )
    if not (path / INDEX).is_file():
        raise SteerError(f"{path}: the bank has lost its {INDEX}; restore the whole folder from a copy")
    if version == 1:
        return Manifest(hashed=False, salt=b"")
    try:
        hashed, salt = ("plain", "hashed").index(described["users"]) == 1, bytes.fromhex(described["salt"])
    except (KeyError, TypeError, ValueError) as error:
        raise SteerError(f"{path / MANIFEST}: damaged, `users` or `salt` is missing or wrong") from error
    return Manifest(hashed, salt)


def _read_json(file: Path) -> Mapping[str, Any]:
    try:
        described = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return described if isinstance(described, dict) else {}


def _described(manifest: Manifest) -> dict[str, object]:
    try:
        creator = f"steer-toolkit {version('steer-toolkit')}"
    except PackageNotFoundError:
        creator = "steer-toolkit"
    return {
        "format": FORMAT,
        "version": VERSION,
        "created_by": creator,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "users": "hashed" if manifest.hashed else "plain",
        "salt": manifest.salt.hex(),
    }
