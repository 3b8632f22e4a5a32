"""The index of a bank: an SQLite file with everything about the states but their tensors.

It keeps SQLite's rollback journal rather than a write-ahead log. Then the index at rest is one file, which can be
copied, and read from a folder one may not write to; a log brings two more files, and a shared memory that network file
systems lack. What a log would give, commits three times as fast, matters little here: a commit may hold any number of
states, and writing a segment costs more than either.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steer.bank.segment import Key, Stored
from steer.errors import SteerError
from steer.state import Fingerprint, Provenance

# `kinds` repeats the name, and leaves settings out, so that it stays small: whoever asks what may occur in the bank
# need not scan millions of entries.
_SCHEMA = """
BEGIN;
CREATE TABLE models (id INTEGER PRIMARY KEY, fingerprint TEXT NOT NULL);
CREATE TABLE segments (id INTEGER PRIMARY KEY, file TEXT NOT NULL UNIQUE);
CREATE TABLE kinds (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL, method TEXT NOT NULL, version INTEGER NOT NULL,
    model INTEGER REFERENCES models, sites TEXT NOT NULL, artifact TEXT
);
CREATE TABLE entries (
    id INTEGER PRIMARY KEY, user TEXT NOT NULL, name TEXT NOT NULL,
    kind INTEGER NOT NULL REFERENCES kinds, segment INTEGER REFERENCES segments,
    records TEXT NOT NULL, settings TEXT NOT NULL, calibration TEXT NOT NULL, data TEXT NOT NULL, tensors TEXT NOT NULL,
    UNIQUE (user, name)
);
CREATE INDEX entries_by_kind ON entries (kind);
COMMIT;
"""

_ENTRIES = """
SELECT entries.id, user, entries.name, method, version, model, fingerprint, sites, artifact,
       records, settings, calibration, data, tensors, file
FROM entries
JOIN kinds ON kinds.id = entries.kind
LEFT JOIN models ON models.id = kinds.model
LEFT JOIN segments ON segments.id = entries.segment
"""

# An update rather than a replacement, which would move the entry to the end of the order.
_PUT = """
INSERT INTO entries (user, name, kind, segment, records, settings, calibration, data, tensors)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (user, name) DO UPDATE SET
    kind = excluded.kind, segment = excluded.segment, records = excluded.records, settings = excluded.settings,
    calibration = excluded.calibration, data = excluded.data, tensors = excluded.tensors
"""

_BUSY_SECONDS = 30.0
_PAGE = 1000

# One thread at a time is in SQLite, and none while the process forks: a child that is born in the middle of
# another thread's transaction would believe that it holds the locks of its parent.
_LOCK = threading.Lock()
os.register_at_fork(before=_LOCK.acquire, after_in_parent=_LOCK.release, after_in_child=_LOCK.release)

# Connections that came through a fork. SQLite forbids to use them in the child, even to close them, so they are kept.
_INHERITED: list[sqlite3.Connection] = []


@dataclass(frozen=True)
class Entry:
    """A state without its tensors; `segment` is the name of the file they are in, None for a state that has none."""

    user: str
    name: str
    provenance: Provenance
    data: Mapping[str, Any]
    stored: Stored
    segment: str | None

    def to_row(self) -> tuple[str, ...]:
        """The JSON columns of `entries`, in order.

        Raises:
            SteerError: something in the entry is not JSON.
        """
        source, owner = self.provenance, f"state {self.name!r} of user {self.user!r}"
        parts = {
            "records": source.records,
            "settings": dict(source.settings),
            "calibration": dict(source.calibration),
            "data": dict(self.data),
            "tensors": self.stored.to_json(),
        }
        return tuple(to_json(part, f"{name} of {owner}") for name, part in parts.items())


class Index:
    """Reads and writes the index; safe to use from several threads and processes, and after a fork.

    Raises:
        SteerError: the file is no SQLite database, is damaged, or stays locked by another process; by any method.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._models: dict[int, Fingerprint] = {}
        self._connect()

    @staticmethod
    def create(file: Path) -> None:
        """Makes an empty index in a new file."""
        with closing(sqlite3.connect(file)) as db:
            db.executescript(_SCHEMA)

    def put(self, entries: Iterable[tuple[Entry, tuple[str, ...]]]) -> None:
        """Adds or replaces entries, each with its `to_row()`, in one transaction."""
        with self._transaction("BEGIN IMMEDIATE") as db:
            kinds = _Interned(lambda kind: _kind_id(db, *kind))
            segments = _Interned(lambda file: _segment_id(db, file))
            stored = db.execute("SELECT id, fingerprint FROM models").fetchall()
            # Fingerprints that are equal but for rounding share an id: equality of the keys is theirs.
            models = _Interned(lambda model: _model_id(db, model), {self._model(*row): row[0] for row in stored})
            rows = []
            for entry, columns in entries:
                source = entry.provenance
                model = None if source.model is None else models[source.model]
                sites = json.dumps(source.sites)
                kind = kinds[entry.name, source.method, source.version, model, sites, source.artifact]
                segment = None if entry.segment is None else segments[entry.segment]
                rows.append((entry.user, entry.name, kind, segment, *columns))
            db.executemany(_PUT, rows)

    def find(self, keys: Iterable[Key]) -> dict[Key, Entry]:
        """The entries of those keys that there are, all from one moment."""
        with self._transaction() as db:
            found = {key: db.execute(f"{_ENTRIES} WHERE user = ? AND entries.name = ?", key).fetchone() for key in keys}
            return {key: self._entry(row) for key, row in found.items() if row is not None}

    def templates(self) -> list[Entry]:
        """One entry for each kind that occurs."""
        first = "SELECT (SELECT MIN(id) FROM entries WHERE kind = kinds.id) FROM kinds"
        with self._transaction() as db:
            rows = db.execute(f"{_ENTRIES} WHERE entries.id IN ({first}) ORDER BY entries.id").fetchall()
            return [self._entry(row) for row in rows]

    def entries(self) -> Iterator[Entry]:
        """All entries, in the order in which their keys came; what is written meanwhile may be among them or not."""
        for row in self._pages(f"{_ENTRIES} WHERE entries.id > ? ORDER BY entries.id LIMIT ?"):
            yield self._entry(row)

    def keys(self) -> Iterator[Key]:
        """All keys, like `entries`."""
        for _, user, name in self._pages("SELECT id, user, name FROM entries WHERE id > ? ORDER BY id LIMIT ?"):
            yield user, name

    def contains(self, key: Key) -> bool:
        return bool(self._column("SELECT 1 FROM entries WHERE user = ? AND name = ?", *key))

    def count(self) -> int:
        return int(self._column("SELECT COUNT(*) FROM entries")[0])

    def users(self) -> list[str]:
        return self._column("SELECT DISTINCT user FROM entries ORDER BY user")

    def names(self) -> list[str]:
        alive = "EXISTS (SELECT 1 FROM entries WHERE kind = kinds.id)"
        return self._column(f"SELECT DISTINCT name FROM kinds WHERE {alive} ORDER BY name")

    def names_of(self, user: str) -> list[str]:
        return self._column("SELECT name FROM entries WHERE user = ? ORDER BY name", user)

    def last_segment(self) -> int:
        """Number of the newest segment, 0 where there is none."""
        return int(self._column("SELECT COALESCE(MAX(id), 0) FROM segments")[0])

    def _connect(self) -> None:
        with _sqlite_errors(self._file):
            self._db = _open(self._file)
        self._pid = os.getpid()
        self._closer = weakref.finalize(self, self._db.close)

    @contextmanager
    def _transaction(self, begin: str = "BEGIN") -> Iterator[sqlite3.Connection]:
        with _LOCK, _sqlite_errors(self._file):
            if self._pid != os.getpid():
                self._closer.detach()
                _INHERITED.append(self._db)
                self._connect()
            # Leaving the connection's context commits, or rolls back after an exception.
            with self._db as db:
                db.execute(begin)
                yield db

    def _column(self, query: str, *values: str) -> list[Any]:
        with self._transaction() as db:
            return [row[0] for row in db.execute(query, values)]

    def _pages(self, query: str) -> Iterator[tuple[Any, ...]]:
        # Page by page, so that a reader who dawdles never holds a lock that a writer waits for.
        last = 0
        while True:
            with self._transaction() as db:
                rows = db.execute(query, (last, _PAGE)).fetchall()
            if not rows:
                return
            yield from rows
            last = rows[-1][0]

    def _entry(self, row: Sequence[Any]) -> Entry:
        _, user, name, method, version, model, fingerprint, sites, artifact, *columns, segment = row
        records, settings, calibration, data, tensors = (json.loads(column) for column in columns)
        provenance = Provenance(
            method=method,
            version=version,
            model=None if model is None else self._model(model, fingerprint),
            sites=tuple(json.loads(sites)),
            artifact=artifact,
            records=tuple(records),
            settings=settings,
            calibration=calibration,
        )
        return Entry(user, name, provenance, data, Stored.from_json(tensors), segment)

    def _model(self, number: int, fingerprint: str) -> Fingerprint:
        # Rows of `models` never change, and states of one model then share one object.
        if number not in self._models:
            self._models[number] = Fingerprint.from_json(json.loads(fingerprint))
        return self._models[number]


class _Interned(dict[Any, int]):
    """Ids by value; one that is not known yet is looked up or inserted."""

    def __init__(self, find: Callable[[Any], int], known: Mapping[Any, int] | None = None) -> None:
        super().__init__(known or {})
        self._find = find

    def __missing__(self, value: Any) -> int:
        self[value] = self._find(value)
        return self[value]


def to_json(value: Any, what: str) -> str:
    """JSON text that reads back as `value`, but for tuples, which become lists.

    Raises:
        SteerError: there is no such text; `what` tells the user which part it is about.
    """
    try:
        _require_text_keys(value)
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise SteerError(f"{what}: cannot be stored as JSON ({error})") from error


def _require_text_keys(value: Any) -> None:
    # json.dumps turns the key 18 into "18" without a word, and whoever then looks for 18 finds nothing.
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise TypeError(f"the key {key!r} is not text")
            _require_text_keys(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            _require_text_keys(inner)


@contextmanager
def _sqlite_errors(file: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise SteerError(f"{file}: the index of the bank cannot be used ({error})") from error


def _open(file: Path) -> sqlite3.Connection:
    # `mode=rw` never creates a file, and falls back to reading where one may not write.
    db = sqlite3.connect(
        f"{file.as_uri()}?mode=rw", uri=True, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
    )
    # EXTRA is FULL and a sync of the folder once the journal is gone: a commit that returned survives a power cut.
    db.execute("PRAGMA synchronous = EXTRA")
    # Banks are handed around, and SQLite files can carry code of their own, in triggers and views.
    db.execute("PRAGMA trusted_schema = OFF")
    return db


def _model_id(db: sqlite3.Connection, model: Fingerprint) -> int:
    return _insert(db, "INSERT INTO models (fingerprint) VALUES (?)", json.dumps(model.to_json()))


def _segment_id(db: sqlite3.Connection, file: str) -> int:
    return _insert(db, "INSERT INTO segments (file) VALUES (?)", file)


def _kind_id(db: sqlite3.Connection, *kind: str | int | None) -> int:
    columns = "(name, method, version, model, sites, artifact)"
    # IS rather than =, which finds no NULL.
    row = db.execute(f"SELECT id FROM kinds WHERE {columns} IS (?, ?, ?, ?, ?, ?)", kind).fetchone()
    return int(row[0]) if row else _insert(db, f"INSERT INTO kinds {columns} VALUES (?, ?, ?, ?, ?, ?)", *kind)


def _insert(db: sqlite3.Connection, statement: str, *values: str | int | None) -> int:
    number = db.execute(statement, values).lastrowid
    assert number is not None
    return number
