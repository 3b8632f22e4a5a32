"""The index of a bank: an SQLite file that knows where every state lies.

It holds nobody's texts, ids or numbers: users appear as salted hashes, and all that describes a state lies in segments.
For SQLite cannot be trusted to forget. Even with `secure_delete`, pages that were once split keep copies of rows that
are later deleted from the other half.

It keeps SQLite's rollback journal rather than a write-ahead log. Then the index at rest is one file, which can be
copied, and read from a folder one may not write to; a log brings two more files, and a shared memory that network file
systems lack.
"""

from __future__ import annotations

import json
import sqlite3
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from steer.bank.connection import OPENING, Connection
from steer.bank.layout import DTYPES, Layout
from steer.bank.segment import FILE, Segment
from steer.errors import Damage, SteerError
from steer.state import Fingerprint

# Rows of models, kinds and layouts stay for good, and the number of a segment is never given to another, so that what
# a reader has seen of them stays true. `kinds` repeats the name and leaves settings out, so that it is small: whoever
# asks what may occur in the bank need not look at millions of entries. Entries lie in the order of their keys, so that
# one is found in one tree and not in two; `number` is their order of arrival. That places are unique makes sure that no
# two people share one.
_SCHEMA = """
CREATE TABLE bank (salt_check BLOB NOT NULL, generation INTEGER NOT NULL, commits INTEGER NOT NULL);
CREATE TABLE models (id INTEGER PRIMARY KEY, fingerprint TEXT NOT NULL);
CREATE TABLE kinds (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL, method TEXT NOT NULL, version INTEGER NOT NULL,
    model INTEGER REFERENCES models, sites TEXT NOT NULL, artifact TEXT
);
CREATE TABLE layouts (id INTEGER PRIMARY KEY, tensors TEXT NOT NULL UNIQUE);
CREATE TABLE segments (
    id INTEGER PRIMARY KEY AUTOINCREMENT, file TEXT NOT NULL UNIQUE, dtype TEXT NOT NULL, capacity INTEGER NOT NULL,
    used INTEGER NOT NULL, dead INTEGER NOT NULL
);
CREATE TABLE entries (
    number INTEGER NOT NULL UNIQUE, user BLOB NOT NULL, name TEXT NOT NULL,
    kind INTEGER NOT NULL REFERENCES kinds, layout INTEGER NOT NULL REFERENCES layouts,
    segment INTEGER REFERENCES segments, at INTEGER, checksum INTEGER NOT NULL,
    facts_segment INTEGER NOT NULL REFERENCES segments, facts_at INTEGER NOT NULL, facts_length INTEGER NOT NULL,
    facts_checksum INTEGER NOT NULL,
    PRIMARY KEY (user, name), UNIQUE (segment, at), UNIQUE (facts_segment, facts_at)
) WITHOUT ROWID;
CREATE INDEX entries_by_kind ON entries (kind, number);
CREATE TABLE erasures (segment INTEGER NOT NULL, at INTEGER NOT NULL, length INTEGER NOT NULL);
"""

_COLUMNS = (
    "number, user, name, kind, layout, segment, at, checksum, facts_segment, facts_at, facts_length, facts_checksum"
)
_SEGMENT = "id, file, dtype, capacity, used, dead"
# Of kinds: those that still occur.
_ALIVE = "EXISTS (SELECT 1 FROM entries WHERE kind = kinds.id)"

# An update rather than a replacement, which would move the entry to the end of the order.
_PUT = """
INSERT INTO entries (number, user, name, kind, layout, segment, at, checksum,
                     facts_segment, facts_at, facts_length, facts_checksum)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (user, name) DO UPDATE SET
    kind = excluded.kind, layout = excluded.layout, segment = excluded.segment, at = excluded.at,
    checksum = excluded.checksum, facts_segment = excluded.facts_segment, facts_at = excluded.facts_at,
    facts_length = excluded.facts_length, facts_checksum = excluded.facts_checksum
"""

_PAGE = 1000
# Users that one query asks for; older SQLite takes no more than 999 values.
_ASKED = 512
# Entries of a kind that are tried as its example.
_EXAMPLES = 16

Address = tuple[bytes, str]
"""What a state is found by: the hash of the user, and the name."""


class Stretch(NamedTuple):
    """Elements of a segment: the segment's number, the first element, and how many."""

    segment: int
    at: int
    length: int


def joined(stretches: Iterable[Stretch]) -> list[Stretch]:
    """The same elements in as few stretches as possible, in order. Raises Damage if two of them overlap."""
    runs: list[Stretch] = []
    for number, at, length in sorted(stretches):
        if not runs or runs[-1].segment != number or (end := runs[-1].at + runs[-1].length) < at:
            runs.append(Stretch(number, at, length))
        elif end == at:
            runs[-1] = Stretch(number, runs[-1].at, runs[-1].length + length)
        else:
            raise Damage(f"damaged: by the bank's index, two states share element {at} of segment {number}")
    return runs


class Entry(NamedTuple):
    """A row of `entries`: of what kind a state is, where its tensors and its facts lie, and their CRC-32."""

    number: int
    user: bytes
    name: str
    kind: int
    layout: int
    segment: int | None
    at: int | None
    checksum: int
    facts_segment: int
    facts_at: int
    facts_length: int
    facts_checksum: int

    @property
    def address(self) -> Address:
        return self.user, self.name

    @property
    def facts(self) -> Stretch:
        return Stretch(self.facts_segment, self.facts_at, self.facts_length)


_TYPES = {
    (int, bytes, str, int, int, *place, int, int, int, int, int) for place in ((int, int), (type(None), type(None)))
}


@dataclass(frozen=True)
class Kind:
    """What states have in common: name, method and its version, model, sites and artifact."""

    name: str
    method: str
    version: int
    model: Fingerprint | None
    sites: tuple[str, ...]
    artifact: str | None

    @cached_property
    def checksum(self) -> int:
        """CRC-32 of all of it."""
        model = None if self.model is None else self.model.to_json()
        return zlib.crc32(json.dumps([self.name, self.method, self.version, model, self.sites, self.artifact]).encode())


# Where the two parts of a state lie: the columns of the segment, of the first element, and of how many there are.
_PARTS = (("segment", "at", "layouts.tensors"), ("facts_segment", "facts_at", "facts_length"))


@dataclass(frozen=True)
class Usage:
    """How much of a segment is taken, and how much of that by states that are gone; in elements."""

    segment: Segment
    used: int
    dead: int


class Index:
    """Reads and writes the index; safe to use from several threads and processes, and after a fork.

    Readers and writers have a connection each, so that a long commit in one thread leaves others free to read.

    Raises:
        SteerError: the file is no SQLite database, is damaged, or stays locked by another process; by any method.
    """

    def __init__(self, file: Path, salt_check: bytes, on_change: Callable[[], None]) -> None:
        """`on_change` is called when files of the bank may have gone since it was last read."""
        self._file = file
        self._salt_check = salt_check
        self._on_change = on_change
        self._generation = -1
        # By table and id; rows of these tables never change.
        self._known: dict[tuple[str, int], Any] = {}
        self._writer = Connection(file, self._check, rank=0)
        self._reader = Connection(file, self._check, rank=1)

    @staticmethod
    def create(file: Path, salt_check: bytes) -> None:
        """Makes an empty index in a new file."""
        with OPENING, closing(sqlite3.connect(file, isolation_level=None)) as db:
            # So that a compaction can give back pages without writing the whole file anew.
            db.execute("PRAGMA auto_vacuum = INCREMENTAL")
            db.executescript(f"BEGIN; {_SCHEMA} COMMIT;")
            db.execute("INSERT INTO bank VALUES (?, 0, 0)", (salt_check,))

    def close(self) -> None:
        self._reader.close()
        self._writer.close()

    # Reading.

    def find(self, addresses: Iterable[Address]) -> dict[Address, Entry]:
        """The entries of those addresses that there are, all from one moment."""
        users: dict[str, set[bytes]] = {}
        for user, name in addresses:
            users.setdefault(name, set()).add(user)
        with self._reading() as db:
            return {entry.address: entry for name, some in users.items() for entry in _find(db, name, list(some))}

    def pages(self, on_damage: Callable[[Damage], None] | None = None) -> Iterator[list[Entry]]:
        """All entries, in the order in which their keys came; what is written meanwhile may be among them or not.

        `on_damage` is told of rows that make no sense, or cannot be found by what refers to them; None to raise. Then
        everything is looked at that there is, whether something refers to it or not.
        """
        # Page by page, so that a reader who dawdles never holds a lock that a writer waits for.
        query, last, seen = "SELECT number FROM entries WHERE number > ? ORDER BY number LIMIT ?", -1, set[int]()
        count, moment = 0, None
        while True:
            with self._reading() as db:
                now = db.execute("SELECT commits FROM bank").fetchone()
                moment = moment or now
                # From the index of the numbers alone: where it leads nowhere, SQLite would leave a row out silently.
                numbers = [row[0] for row in db.execute(query, (last, _PAGE))]
                if not all(type(number) is int and number > last for number in numbers):
                    raise Damage("damaged: the numbers of the bank's index make no sense")
                page = _numbered(db, numbers, on_damage)
                if not numbers and now == moment and on_damage is None:
                    # Nobody has written meanwhile, so these must have been all.
                    (total,) = db.execute("SELECT COUNT(*) FROM entries NOT INDEXED").fetchone()
                    if total != count:
                        raise Damage(f"damaged: {total - count} entries of the bank's index have lost their numbers")
            if not numbers:
                break
            yield page
            last, count = numbers[-1], count + len(numbers)
            if on_damage is not None:
                seen.update(numbers)
        if on_damage is None:
            return
        rest = sorted(set(self._column("SELECT number FROM entries NOT INDEXED")) - seen, key=str)
        for start in range(0, len(rest), _ASKED):
            with self._reading() as db:
                yield _entries(_scanned(db, rest[start : start + _ASKED]), on_damage)

    def has_gone(self, entry: Entry) -> bool:
        """Whether an entry that was there, and is not found by its key, has been removed since; else it is damaged."""
        with self._reading() as db:
            # Who removes it removes its number, though that may be another's by now.
            if not db.execute("SELECT 1 FROM entries WHERE number = ?", (entry.number,)).fetchone():
                return True
            return entry.address not in [row[1:3] for row in _scanned(db, [entry.number])]

    def examples(self) -> list[list[Entry]]:
        """The oldest entries of each kind that occurs."""
        query = f"SELECT {_COLUMNS} FROM entries WHERE kind = ? ORDER BY number LIMIT {_EXAMPLES}"
        with self._reading() as db:
            kinds = db.execute("SELECT id FROM kinds").fetchall()
            found = [_entries(db.execute(query, kind)) for kind in kinds]
        return sorted((entries for entries in found if entries), key=lambda entries: entries[0].number)

    def count(self) -> int:
        return int(self._column("SELECT COUNT(*) FROM entries")[0])

    def names(self) -> list[str]:
        return self._column(f"SELECT DISTINCT name FROM kinds WHERE {_ALIVE} ORDER BY name")

    def names_of(self, user: bytes) -> list[str]:
        return self._column("SELECT name FROM entries WHERE user = ? ORDER BY name", user)

    def artifacts(self) -> list[str]:
        """Hashes of the artifacts that states need."""
        return self._column(f"SELECT DISTINCT artifact FROM kinds WHERE artifact IS NOT NULL AND {_ALIVE}")

    def kind(self, number: int) -> Kind:
        """Raises Damage where there is none of that number, as the next three do."""
        return self._row("kinds", "name, method, version, model, sites, artifact", number, self._to_kind)

    def layout(self, number: int) -> Layout:
        return self._row("layouts", "tensors", number, Layout.from_json)

    def segment(self, number: int) -> Segment:
        return self._row("segments", "id, file, dtype, capacity", number, _to_segment)

    def model(self, number: int) -> Fingerprint:
        return self._row("models", "fingerprint", number, _to_model)

    def segments(self) -> list[Usage]:
        """All segments, in the order of their numbers."""
        with self._reading() as db:
            return _usages(db)

    def erasures(self) -> list[Stretch]:
        """What has been deleted and may not have been erased yet."""
        with self._reading() as db:
            return _erasures(db)

    def commits(self) -> int:
        """How many commits there have been."""
        with self._reading() as db:
            return _commits(db)

    def placed(self, segment: Segment, part: str) -> Iterator[list[Entry]]:
        """The entries whose "tensors" or "facts" lie in a segment, in the order in which they lie, by pages."""
        column, at = ("segment", "at") if part == "tensors" else ("facts_segment", "facts_at")
        query = f"SELECT {_COLUMNS} FROM entries WHERE {column} = ? AND {at} > ? ORDER BY {at} LIMIT ?"
        last = -1
        while True:
            with self._reading() as db:
                page = _entries(db.execute(query, (segment.number, last, _PAGE)))
            if not page:
                return
            yield page
            last = getattr(page[-1], at)

    def unplaced(self) -> list[Entry]:
        """Entries that refer to segments which do not exist."""
        gone = "NOT IN (SELECT id FROM segments)"
        query = f"SELECT {_COLUMNS} FROM entries WHERE segment {gone} OR facts_segment {gone}"
        with self._reading() as db:
            return _entries(db.execute(query))

    def taken(self, segment: Segment) -> list[Stretch]:
        """Where in a segment states lie, in order, as few stretches. Raises Damage if two of them overlap."""
        with self._reading() as db:
            return _taken(db, segment)

    def faults(self) -> list[str]:
        """What SQLite finds wrong with the file."""
        try:
            with self._reading() as db:
                found = [str(row[0]) for row in db.execute("PRAGMA integrity_check")]
        except SteerError as error:
            return [str(error)]
        return [] if found == ["ok"] else found

    def shrink(self) -> None:
        """Gives back the pages that deleted entries have left."""
        with self._writer.transaction() as db:
            db.execute("PRAGMA incremental_vacuum").fetchall()

    @contextmanager
    def writing(self, busy_seconds: float | None = None) -> Iterator[Writer]:
        """A writer's turn. What it does is committed at the end, as a whole; an exception undoes it."""
        with self._writer.transaction("BEGIN IMMEDIATE", busy_seconds) as db:
            yield Writer(db)

    def _check(self, db: sqlite3.Connection) -> None:
        """Raises SteerError unless the file has the tables of a bank, nothing else, and belongs to the manifest."""
        self._forget()
        with closing(sqlite3.connect(":memory:")) as like:
            like.executescript(_SCHEMA)
            expected = _tables(like)
        if _tables(db) != expected:
            raise SteerError(f"{self._file}: not the index of a bank, it has other tables")
        if db.execute("SELECT salt_check FROM bank").fetchall() != [(self._salt_check,)]:
            raise SteerError(
                f"{self._file}: belongs to another bank than the manifest; if the bank was replaced, open it again"
            )

    def _forget(self) -> None:
        self._known.clear()
        self._on_change()

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._reader.transaction("BEGIN") as db:
            (generation,) = db.execute("SELECT generation FROM bank").fetchone() or (-1,)
            if generation != self._generation:
                self._forget()
                self._generation = generation
            yield db

    def _column(self, query: str, *values: Any) -> list[Any]:
        with self._reading() as db:
            return [row[0] for row in db.execute(query, values)]

    def _row(self, table: str, columns: str, number: int, convert: Callable[..., Any]) -> Any:
        found = self._known.get((table, number))
        if found is None:
            with self._reader.transaction() as db:
                row = db.execute(f"SELECT {columns} FROM {table} WHERE id = ?", (number,)).fetchone()
            if row is None:
                raise Damage(f"{self._file}: damaged, {table} has no row {number}")
            try:
                found = self._known[table, number] = convert(*row)
            except Damage:
                raise
            except (TypeError, ValueError, KeyError) as error:
                raise Damage(f"{self._file}: damaged, row {number} of {table} makes no sense") from error
        return found

    def _to_kind(
        self, name: str, method: str, version: int, model: int | None, sites: str, artifact: str | None
    ) -> Kind:
        fingerprint = None if model is None else self.model(model)
        return Kind(name, method, version, fingerprint, tuple(json.loads(sites)), artifact)


class Writer:
    """What may be done to the index in one transaction."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self._kinds: dict[Kind, tuple[int, Kind]] = {}
        self._layouts: dict[Layout, int] = {}
        rows = db.execute("SELECT id, fingerprint FROM models").fetchall()
        models = [(number, _to_model(text)) for number, text in rows]
        self._models = {model: (number, model) for number, model in models}

    def find(self, addresses: Iterable[Address]) -> list[Entry]:
        """Like `Index.find`."""
        users: dict[str, list[bytes]] = {}
        for user, name in addresses:
            users.setdefault(name, []).append(user)
        return [entry for name, some in users.items() for entry in _find(self._db, name, some)]

    def find_users(self, users: Sequence[bytes]) -> list[Entry]:
        """All entries of some users.

        Raises:
            Damage: there are others of theirs that cannot be found by the user.
        """
        query = f"SELECT {_COLUMNS} FROM entries WHERE user = ?"
        found = [entry for user in users for entry in _entries(self._db.execute(query, (user,)))]
        # Another copy of the users' hashes, read from end to end: nobody's states are to stay behind unnoticed.
        count = 0
        for start in range(0, len(users), _ASKED):
            some = users[start : start + _ASKED]
            # With a + SQLite does not look them up in the tree that was asked already.
            others = f"entries INDEXED BY entries_by_kind WHERE +user IN ({','.join('?' * len(some))})"
            count += self._db.execute(f"SELECT COUNT(*) FROM {others}", some).fetchone()[0]
        if count != len(found):
            raise Damage(
                "damaged: the bank's index does not agree with itself on how many states these users have. `steer bank "
                "verify` tells more; merge what can be read into a new bank, and delete there"
            )
        return found

    def put(self, rows: Iterable[tuple[Any, ...]]) -> None:
        """Adds or replaces entries: the columns of `entries` but the number. New ones are the last."""
        (last,) = self._db.execute("SELECT COALESCE(MAX(number), -1) FROM entries").fetchone()
        if type(last) is not int:
            raise Damage(f"damaged: the bank's index gives an entry the number {last!r}")
        self._db.executemany(_PUT, ((number, *row) for number, row in enumerate(rows, start=last + 1)))

    def remove(self, entries: Sequence[Entry]) -> None:
        """Removes entries."""
        self._db.executemany("DELETE FROM entries WHERE user = ? AND name = ?", [entry.address for entry in entries])

    def require_free(self, stretch: Stretch) -> None:
        """Raises Damage if a state lies in a stretch, or half in it: it must not be overwritten."""
        number, at, length = stretch
        for column, place, size in _PARTS:
            query = (
                f"SELECT {place}, {size} FROM entries JOIN layouts ON layouts.id = layout "
                f"WHERE {column} = ? AND {place} < ? ORDER BY {place} DESC LIMIT 1"
            )
            for begin, taken in self._db.execute(query, (number, at + length)):
                if begin + _length(taken) > at:
                    raise Damage(
                        f"damaged: the bank's index says that a state begins at element {begin} of segment {number}, "
                        f"where there should be none. `steer bank verify` tells more; merge what can be read into a "
                        "new bank"
                    )

    def discard(self, stretches: Iterable[Stretch]) -> None:
        """Notes that stretches are to be erased. Raises Damage if an entry refers to one."""
        stretches = joined(stretches)
        for stretch in stretches:
            self.require_free(stretch)
        self._db.executemany("INSERT INTO erasures VALUES (?, ?, ?)", stretches)
        dead = [(stretch.length, stretch.segment) for stretch in stretches]
        self._db.executemany("UPDATE segments SET dead = dead + ? WHERE id = ?", dead)

    def erasures(self) -> list[Stretch]:
        return _erasures(self._db)

    def erased(self) -> None:
        """Notes that all erasures are done."""
        self._db.execute("DELETE FROM erasures")

    def segments(self) -> list[Usage]:
        """Like `Index.segments`."""
        return _usages(self._db)

    def add_segment(self, token: str, dtype: str, capacity: int) -> Segment:
        """A new segment, whose file is named by its number and the token."""
        insert = "INSERT INTO segments (file, dtype, capacity, used, dead) VALUES (?, ?, ?, 0, 0)"
        number = _insert(self._db, insert, token, dtype, capacity)
        file = f"{number:08d}-{token}.safetensors"
        self._db.execute("UPDATE segments SET file = ? WHERE id = ?", (file, number))
        return Segment(number, file, dtype, capacity)

    def use(self, segment: Segment, used: int) -> None:
        """Notes how much of a segment is taken."""
        self._db.execute("UPDATE segments SET used = ? WHERE id = ?", (used, segment.number))

    def fill_up(self, segment: Segment) -> None:
        """Notes that there is no more room in a segment."""
        self._db.execute(
            "UPDATE segments SET dead = dead + capacity - used, used = capacity WHERE id = ?", (segment.number,)
        )

    def taken(self, segment: Segment) -> list[Stretch]:
        """Like `Index.taken`."""
        return _taken(self._db, segment)

    def move(self, stretch: Stretch, target: Segment, to: int) -> None:
        """Lets entries that lie in a stretch refer to another segment, from element `to` on."""
        source, at, length = stretch
        values = (target.number, to - at, source, at, at + length)
        for column, place, _ in _PARTS:
            self._db.execute(
                f"UPDATE entries SET {column} = ?, {place} = {place} + ? "
                f"WHERE {column} = ? AND {place} >= ? AND {place} < ?",
                values,
            )

    def retire(self, segments: Iterable[Segment]) -> None:
        """Removes segments that no entry refers to any more; readers are told to let go of their files."""
        self._db.executemany("DELETE FROM segments WHERE id = ?", [(segment.number,) for segment in segments])
        self._db.execute("UPDATE bank SET generation = generation + 1")

    def commits(self) -> int:
        """Like `Index.commits`."""
        return _commits(self._db)

    def count_commit(self, count: int) -> None:
        """Notes that this is the commit of that number."""
        self._db.execute("UPDATE bank SET commits = ?", (count,))

    def kind(self, kind: Kind) -> tuple[int, Kind]:
        """A kind's id, and the kind as the bank has it; it is added if it is new."""
        if kind not in self._kinds:
            number, model = (None, None) if kind.model is None else self._model(kind.model)
            row = (kind.name, kind.method, kind.version, number, json.dumps(kind.sites), kind.artifact)
            columns = "(name, method, version, model, sites, artifact)"
            # IS rather than =, which finds no NULL.
            found = self._db.execute(f"SELECT id FROM kinds WHERE {columns} IS (?, ?, ?, ?, ?, ?)", row).fetchone()
            insert = f"INSERT INTO kinds {columns} VALUES (?, ?, ?, ?, ?, ?)"
            self._kinds[kind] = found[0] if found else _insert(self._db, insert, *row), replace(kind, model=model)
        return self._kinds[kind]

    def layout(self, layout: Layout) -> int:
        """Id of a layout, which is added if it is new."""
        if layout not in self._layouts:
            text = (layout.to_json(),)
            found = self._db.execute("SELECT id FROM layouts WHERE tensors = ?", text).fetchone()
            insert = "INSERT INTO layouts (tensors) VALUES (?)"
            self._layouts[layout] = found[0] if found else _insert(self._db, insert, *text)
        return self._layouts[layout]

    def _model(self, model: Fingerprint) -> tuple[int, Fingerprint]:
        # Fingerprints that are equal but for rounding share a row: equality of the keys is theirs.
        if model not in self._models:
            insert = "INSERT INTO models (fingerprint) VALUES (?)"
            self._models[model] = _insert(self._db, insert, json.dumps(model.to_json())), model
        return self._models[model]


def _tables(db: sqlite3.Connection) -> list[tuple[str, ...]]:
    # All of them, as in a file from elsewhere what is named like SQLite's own may be a trigger. Without white space.
    rows = db.execute("SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY name")
    return [(*names, "".join(str(sql).split())) for *names, sql in rows]


def _find(db: sqlite3.Connection, name: str, users: Sequence[bytes]) -> list[Entry]:
    found = []
    for start in range(0, len(users), _ASKED):
        some = users[start : start + _ASKED]
        # As many question marks as a power of two, so that SQLite has few statements to compile.
        marks = 1 << (len(some) - 1).bit_length()
        query = f"SELECT {_COLUMNS} FROM entries WHERE name = ? AND user IN ({','.join('?' * marks)})"
        entries = _entries(db.execute(query, (name, *some, *[None] * (marks - len(some)))))
        # In a damaged tree SQLite may take the entry that it arrives at for the one that it was sent to.
        if not all(entry.name == name for entry in entries) or not {entry.user for entry in entries} <= set(some):
            raise Damage("damaged: the bank's index leads to somebody else's entry")
        found += entries
    return found


def _numbered(
    db: sqlite3.Connection, numbers: Sequence[int], on_damage: Callable[[Damage], None] | None
) -> list[Entry]:
    """The entries of consecutive numbers; what refers to them is not trusted to lead there."""
    if not numbers:
        return []
    query = f"SELECT {_COLUMNS} FROM entries WHERE number BETWEEN ? AND ? ORDER BY number"
    rows = db.execute(query, (numbers[0], numbers[-1])).fetchall()
    if len(rows) < len(numbers):
        rows += _scanned(db, sorted(set(numbers) - {row[0] for row in rows}))
        if lost := len(numbers) - len(rows):
            damage = Damage(f"damaged: {lost} entries of the bank's index cannot be found")
            if on_damage is None:
                raise damage
            on_damage(damage)
    return _entries(rows, on_damage)


def _scanned(db: sqlite3.Connection, numbers: Sequence[object]) -> list[tuple[Any, ...]]:
    """Rows of some numbers, found by reading all there are."""
    wanted = set(numbers)
    return [row for row in db.execute(f"SELECT {_COLUMNS} FROM entries NOT INDEXED") if row[0] in wanted]


def _entries(rows: Iterable[tuple[Any, ...]], on_damage: Callable[[Damage], None] | None = None) -> list[Entry]:
    entries = []
    for row in rows:
        # A damaged page may hold anything, and NULL where it is not allowed.
        if tuple(map(type, row)) in _TYPES:
            entries.append(Entry._make(row))
            continue
        damage = Damage("damaged: an entry of the bank's index makes no sense")
        if on_damage is None:
            raise damage
        on_damage(damage)
    return entries


def _usages(db: sqlite3.Connection) -> list[Usage]:
    usages = []
    for *row, used, dead in db.execute(f"SELECT {_SEGMENT} FROM segments ORDER BY id"):
        segment = _to_segment(*row)
        if not (type(used) is type(dead) is int and 0 <= dead <= used <= segment.capacity):
            raise Damage(f"damaged: the bank's index says that of {segment.file} {used!r} elements are taken")
        usages.append(Usage(segment, used, dead))
    return usages


def _to_model(text: str) -> Fingerprint:
    try:
        return Fingerprint.from_json(json.loads(text))
    except (TypeError, ValueError, KeyError) as error:
        raise Damage("damaged: the index of the bank holds what is no fingerprint of a model") from error


def _to_segment(number: int, file: str, dtype: str, capacity: int) -> Segment:
    # An index from elsewhere must not point out of the bank.
    if type(number) is not int or not isinstance(file, str) or not FILE.fullmatch(file):
        raise Damage(f"damaged: the index of the bank refers to {file!r}, which is not the name of a segment")
    if dtype not in DTYPES or not isinstance(capacity, int) or capacity < 0:
        raise Damage(f"damaged: the index of the bank says that {file} has {capacity!r} elements of {dtype!r}")
    return Segment(number, file, dtype, capacity)


def _taken(db: sqlite3.Connection, segment: Segment) -> list[Stretch]:
    lengths = {number: Layout.from_json(text).length for number, text in db.execute("SELECT id, tensors FROM layouts")}
    tensors = db.execute("SELECT at, layout FROM entries WHERE segment = ?", (segment.number,))
    facts = db.execute("SELECT facts_at, facts_length FROM entries WHERE facts_segment = ?", (segment.number,))
    try:
        stretches = [Stretch(segment.number, at, lengths[layout]) for at, layout in tensors]
        return joined(stretches + [Stretch(segment.number, at, length) for at, length in facts])
    except (KeyError, TypeError) as error:
        raise Damage(f"damaged: the bank's index does not say what lies in {segment.file}") from error


def _length(size: str | int) -> int:
    return size if isinstance(size, int) else Layout.from_json(size).length


def _erasures(db: sqlite3.Connection) -> list[Stretch]:
    found = [Stretch(*row) for row in db.execute("SELECT segment, at, length FROM erasures ORDER BY segment, at")]
    if not all(type(number) is int and number >= 0 for stretch in found for number in stretch):
        raise Damage("damaged: the bank's index does not say what is to be erased")
    return found


def _commits(db: sqlite3.Connection) -> int:
    (count,) = db.execute("SELECT commits FROM bank").fetchone() or (None,)
    if type(count) is not int:
        raise Damage("damaged: the bank's index does not say how many commits there were")
    return count


def _insert(db: sqlite3.Connection, statement: str, *values: str | int | None) -> int:
    number = db.execute(statement, values).lastrowid
    assert number is not None
    return number
