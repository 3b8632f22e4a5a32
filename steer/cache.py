"""A cache on disk: what was computed once, by a hash of all that it depends on. One SQLite file, bytes by key.

Values are safetensors or text. What `put` has returned from outlives the process, however it ends.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from steer.embedded import cache_dir
from steer.errors import SteerError
from steer.fingerprint import running_samples

if TYPE_CHECKING:
    from steer.model import FrozenLM

# Tells a cache from other SQLite files, a bank's index for one: "stcc".
_APPLICATION_ID = 0x73746363
_CREATE = f"""
BEGIN IMMEDIATE;
PRAGMA application_id = {_APPLICATION_ID};
CREATE TABLE IF NOT EXISTS entries (key TEXT PRIMARY KEY, value BLOB NOT NULL);
COMMIT;
"""
_BUSY_SECONDS = 30.0
# SQLite's own limit was 999 for a long time.
_AT_ONCE = 500


class Cache:
    """Bytes by key in one file, which is made when first needed; several processes may use it.

    Raises:
        SteerError: the file is something else, or cannot be read or written; by any method.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()

    def get(self, keys: Sequence[str]) -> dict[str, bytes]:
        """The values of those keys that are there."""
        found: dict[str, bytes] = {}
        with self._open() as db:
            for start in range(0, len(keys), _AT_ONCE):
                some = keys[start : start + _AT_ONCE]
                marks = ", ".join("?" * len(some))
                found |= dict(db.execute(f"SELECT key, value FROM entries WHERE key IN ({marks})", some))
        return found

    def put(self, values: Mapping[str, bytes]) -> None:
        """Adds all of the values or, if something happens meanwhile, none."""
        with self._open() as db, db:
            db.executemany("INSERT OR REPLACE INTO entries VALUES (?, ?)", values.items())

    # A connection each time: it costs less than a millisecond, and none is ever inherited through a fork.
    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self.path, timeout=_BUSY_SECONDS)) as db:
                # In this order, as another process may be creating the file, in one transaction.
                (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
                (kind,) = db.execute("PRAGMA application_id").fetchone()
                if kind != _APPLICATION_ID:
                    if tables:
                        raise SteerError(f"{self.path}: a database of another kind, no cache; it was not touched")
                    db.executescript(_CREATE)
                yield db
        except (sqlite3.Error, OSError) as error:
            raise SteerError(f"{self.path}: cannot be used as a cache ({error})") from error


def answers_cache() -> Cache:
    """Where the frozen model's own answers are kept, beside the embedded models: `answers.sqlite`."""
    return Cache(cache_dir() / "answers.sqlite")


def embeddings_cache() -> Cache:
    """Where embeddings of texts are kept, beside the embedded models: `embeddings.sqlite`."""
    return Cache(cache_dir() / "embeddings.sqlite")


@contextmanager
def if_possible(what: str) -> Iterator[None]:
    """Where a cache cannot be used, warns that `what` is not kept, instead of raising."""
    try:
        yield
    except SteerError as error:
        warnings.warn(f"{what} are not kept: {error}", stacklevel=4)


def key_of(*parts: Any) -> str:
    """SHA-256 of what a value depends on, which must be JSON, as 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def model_key(lm: FrozenLM) -> list[str]:
    """What tells a model from others, and from itself in another precision; the head plays no part."""
    precision = torch.get_float32_matmul_precision()
    return [key_of(lm.fingerprint.to_json()), str(lm.dtype), *([precision] if precision != "highest" else [])]


def head_key(lm: FrozenLM) -> list[int]:
    """What tells a model's head from others, beside `model_key`, for what depends on logits."""
    head = lm.model.get_output_embeddings()
    return [] if head is None else running_samples(head)
