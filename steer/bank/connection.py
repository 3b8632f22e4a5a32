"""A connection to SQLite that survives threads, forks and the replacement of its file."""

from __future__ import annotations

import os
import sqlite3
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from steer.errors import SteerError

_BUSY_SECONDS = 30.0

# One thread at a time is in a connection, and none in any while the process forks: a child that is born in the middle
# of another thread's transaction would believe that it holds the locks of its parent.
_CONNECTIONS: weakref.WeakSet[Connection] = weakref.WeakSet()
_REGISTER = threading.Lock()
_HELD: list[threading.Lock] = []

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
        with _REGISTER:
            _CONNECTIONS.add(self)

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
        with _sqlite_errors(self.file):
            self._inode = self._found()
            self._db = _open(self.file)
            self._wait = _BUSY_SECONDS
            self._closer = weakref.finalize(self, _close, self._db, os.getpid())
            self._on_open(self._db)
            self._pid = os.getpid()

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
    _REGISTER.acquire()
    # In the order in which a thread that has one of them may wait for another.
    _HELD[:] = [connection._lock for connection in sorted(_CONNECTIONS, key=lambda connection: connection.rank)]
    for lock in _HELD:
        lock.acquire()


def _after_fork() -> None:
    for lock in _HELD:
        lock.release()
    _HELD.clear()
    _REGISTER.release()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)
