"""A connection to SQLite that survives threads, forks and the replacement of its file."""

from __future__ import annotations

import os
import sqlite3
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from steer.errors import SteerError

_BUSY_SECONDS = 30.0

# One thread at a time is in a connection, and none is in SQLite while the process forks: a child that is born in the
# middle of another thread's transaction would believe that it holds the locks of its parent, and one that is born while
# another thread opens or closes a file would wait forever for what that thread holds within SQLite.
_CONNECTIONS: weakref.WeakSet[Connection] = weakref.WeakSet()
_HELD: list[Iterator[None]] = []

OPENING = threading.RLock()
"""Held by whoever opens or closes an SQLite file, or uses one other than by a `Connection`: no fork comes in between.
A thread that also takes a turn in a connection takes that first. It may come here twice, as Python clears connections
away at any time."""

# Connections that came through a fork. SQLite forbids to use them in the child, even to close them, so they are kept.
_INHERITED: list[sqlite3.Connection] = []


class Connection:
    """One SQLite file, opened for reading and, where that is allowed, for writing.

    Args:
        file: it must exist.
        on_open: looks at the file whenever it was opened, at first, after a fork, and when another file has taken its
            place; what was read of it before need not hold any more. An exception refuses the file.
        rank: of two connections that one thread uses at once, the one of lower rank has to be taken first.
    """

    def __init__(self, file: Path, on_open: Callable[[sqlite3.Connection], None], rank: int) -> None:
        self.file = file
        self.rank = rank
        self._on_open = on_open
        self._lock = threading.Lock()
        self._pid, self._wait = -1, _BUSY_SECONDS
        self._open()

    @contextmanager
    def transaction(self, begin: str = "", busy_seconds: float | None = None) -> Iterator[sqlite3.Connection]:
        """One thread's turn; with `begin`, what it does is done as a whole or not at all.

        Args:
            begin: the statement that begins a transaction; none for a single query.
            busy_seconds: how long to wait for other processes.

        Raises:
            SteerError: the file is no SQLite database, is damaged, locked by another process, or gone.
        """
        with self._lock, _sqlite_errors(self.file):
            if self._pid != os.getpid() or self._inode != self._found():
                self._reopen()
            db = self._db
            wait = _BUSY_SECONDS if busy_seconds is None else busy_seconds
            if wait != self._wait:
                db.execute(f"PRAGMA busy_timeout = {int(1000 * wait)}")
                self._wait = wait
            try:
                # Within the `try`, as Ctrl-C may come when it has just begun.
                if begin:
                    db.execute(begin)
                yield db
                if begin:
                    db.execute("COMMIT")
            finally:
                if db.in_transaction:
                    db.execute("ROLLBACK")

    def close(self) -> None:
        """Closes the file; the connection cannot be used any more."""
        with self._lock:
            self._closer()

    def _open(self) -> None:
        with OPENING, _sqlite_errors(self.file):
            self._inode = self._found()
            self._db = _open(self.file)
            self._wait = _BUSY_SECONDS
            self._closer = weakref.finalize(self, _close, self._db, os.getpid())
            self._on_open(self._db)
            self._pid = os.getpid()
            _CONNECTIONS.add(self)

    def _reopen(self) -> None:
        self._closer()
        # Until it has been looked at, whoever comes next looks again.
        self._pid = -1
        self._open()

    def _found(self) -> tuple[int, int]:
        try:
            found = os.stat(self.file)
        except OSError as error:
            raise SteerError(f"{self.file}: the index of the bank is gone ({error.strerror})") from error
        return found.st_dev, found.st_ino


def _open(file: Path) -> sqlite3.Connection:
    # `mode=rw` never creates a file, and falls back to reading where one may not write.
    db = sqlite3.connect(
        f"{file.as_uri()}?mode=rw", uri=True, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
    )
    # EXTRA is FULL and a sync of the folder once the journal is gone: a commit that returned survives a power cut.
    db.execute("PRAGMA synchronous = EXTRA")
    db.execute("PRAGMA secure_delete = ON")
    # Spilling would lock out readers for the rest of a long commit.
    db.execute("PRAGMA cache_spill = OFF")
    # Banks are handed around, and SQLite files can carry code of their own, in triggers and views.
    db.execute("PRAGMA trusted_schema = OFF")
    return db


def _close(db: sqlite3.Connection, pid: int) -> None:
    if pid == os.getpid():
        with OPENING:
            db.close()
    else:
        _INHERITED.append(db)


@contextmanager
def _sqlite_errors(file: Path) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, UnicodeDecodeError, OverflowError) as error:
        # The others come from bytes and numbers of a damaged file.
        raise SteerError(f"{file}: the index of the bank cannot be used ({error})") from error


def _before_fork() -> None:
    """Waits until no thread is in SQLite, and keeps it so; an interrupt does not end the wait."""
    interrupt = None
    while not _HELD:
        held: list[Iterator[None]] = []
        try:
            with OPENING:
                connections = sorted(_CONNECTIONS, key=lambda connection: connection.rank)
            # In the order in which a thread that has one of them may wait for another.
            locks: list[AbstractContextManager[Any]] = [connection._lock for connection in connections]
            for lock in [*locks, OPENING]:
                held.append(_holding(lock))
                next(held[-1])
            if set(_CONNECTIONS) == set(connections):
                _HELD.extend(held)
        except BaseException as error:
            interrupt = error
    if interrupt is not None:
        # Python can only print it, and forks all the same.
        held = []
        raise interrupt


def _holding(lock: AbstractContextManager[Any]) -> Iterator[None]:
    """Holds a lock from its first step until nobody refers to it any more."""
    # `with` alone takes a lock so that no interrupt comes between taking it and knowing that it is held.
    with lock:
        yield


# Not a function of ours, in which an interrupt could come before it lets go.
_after_fork = _HELD.clear

os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)
