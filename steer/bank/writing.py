"""How states come into a bank and leave it, and what happens to the remains of writers that were killed.

Writers take turns: each holds the lock of the index from before its first byte until its commit. A state is written
into places that nobody refers to, and synced; then one transaction refers to it. Killed before that, a writer leaves
files and bytes that no entry refers to. Whoever writes next, or opens the bank, erases them.

A state goes in two steps. One transaction removes the entry and notes where it lay; then its bytes are overwritten
with zeros, synced, and the note is removed. Killed in between, the note tells the next one to finish. This is so when
a state is deleted and when it is replaced, and no place is used twice.

What no entry refers to is taken for a killed writer's, so an index that is older than the segments must be noticed:
to it, whatever came later looks just like that. The file `commits` has the number of the next commit. It is written
after each commit, and before anything is cleared away it is made to agree with the index: an index whose next commit
would be an earlier one is an old one.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Literal, NamedTuple

from steer.bank import folder
from steer.bank.index import Address, Entry, Kind, Stretch, Usage, Writer
from steer.bank.layout import BYTES, DTYPES, Layout
from steer.bank.segment import FILE, LARGEST, SMALLEST, Segment
from steer.bank.store import Store, facts_checksum, kind_checksum, tensors_checksum
from steer.errors import Damage, SteerError
from steer.files import DRAFT

Conflict = Literal["error", "keep", "replace"]


class Packed(NamedTuple):
    """A state as it will be stored: the bytes of its tensors, and the line of its facts."""

    address: Address
    kind: Kind
    layout: Layout
    tensors: bytes
    facts: bytes


def put(store: Store, states: Sequence[Packed], conflict: Conflict = "replace") -> int:
    """Stores states in one commit, and erases those that they replace; returns how many it stored.

    Args:
        store: the bank.
        states: no two of one address.
        conflict: what to do where there is a state: "replace" it, "keep" it, or raise an "error".

    Raises:
        SteerError: they cannot be written, or may not; then the bank is as it was. Or what they replaced could not be
            erased yet, and the message says so.
    """
    with writing(store) as writer:
        replaced = writer.find(state.address for state in states)
        if replaced and conflict == "error":
            raise SteerError(f"{store.path}: there is a state {replaced[0].name!r} of one of these users already")
        if conflict == "keep":
            there = {entry.address for entry in replaced}
            states, replaced = [state for state in states if state.address not in there], []
        room = _Room(store, writer, states)
        rows = []
        for state in states:
            number, kind = writer.kind(state.kind)
            segment, at = room.place(state.layout.dtype, state.tensors) if state.tensors else (None, None)
            facts_segment, facts_at = room.place(BYTES, state.facts)
            own = kind_checksum(kind, state.layout)
            checksum = tensors_checksum(state.address, own, zlib.crc32(state.tensors))
            facts = (facts_segment, facts_at, len(state.facts), facts_checksum(state.address, zlib.crc32(state.facts)))
            rows.append((*state.address, number, writer.layout(state.layout), segment, at, checksum, *facts))
        room.write()
        writer.put(rows)
        writer.discard(store.stretches(replaced))
    if replaced:
        settle(store)
    return len(states)


def delete(store: Store, choose: Callable[[Writer], Sequence[Entry]]) -> int:
    """Deletes the entries that are chosen, and erases their bytes; returns how many there were.

    Raises:
        SteerError: nothing could be deleted; or the bytes could not be erased yet, and the message says so.
    """
    with writing(store) as writer:
        entries = choose(writer)
        writer.remove(entries)
        writer.discard(store.stretches(entries))
    if entries:
        settle(store)
    return len(entries)


def settle(store: Store) -> None:
    """Erases what was deleted or replaced.

    Raises:
        SteerError: that failed; it is tried again by whoever writes next or opens the bank.
    """
    try:
        with store.index.writing() as writer:
            recover(store, writer)
    except (OSError, SteerError) as error:
        raise SteerError(
            f"{store.path}: what was deleted or replaced is no longer in the index, but its bytes could not be erased "
            f"yet ({error}). The next one to write to the bank or to open it will try again"
        ) from error


def recover_if_needed(store: Store) -> None:
    """Clears away what killed writers left, unless somebody is writing now, who has done so, or one may not write."""
    with suppress(SteerError, OSError):
        if _is_settled(store):
            return
        with store.index.writing(busy_seconds=0) as writer:
            recover(store, writer)


@contextmanager
def writing(store: Store) -> Iterator[Writer]:
    """A writer's turn, which begins by clearing away what killed ones left. Raises SteerError if writing fails."""
    try:
        with store.index.writing() as writer:
            recover(store, writer)
            number = writer.commits() + 1
            writer.count_commit(number)
            yield writer
        _note_commit(store, number)
    except BaseException as error:
        # Files that were made for it are not kept open, as they would keep their space.
        store.segments.forget()
        recover_if_needed(store)
        if isinstance(error, OSError):
            raise SteerError(f"{store.path}: could not be written to ({error.strerror or error})") from error
        raise


def recover(store: Store, writer: Writer) -> None:
    """Removes files and erases bytes that no entry refers to: what killed writers left, and what was deleted.

    Raises:
        Damage: there have been commits that the index does not know, so what it does not refer to may be somebody's.
    """
    following = writer.commits() + 1
    if folder.read_next_commit(store.path) > following:
        raise Damage(
            f"{store.path}: {folder.INDEX} is older than the other files, so they do not belong together. Restore the "
            "whole folder from one copy; nothing was changed"
        )
    # Before any commit that an older index does not know has consequences.
    folder.write_next_commit(store.path, following)
    usages = writer.segments()
    for path in list(_remains(store, usages)):
        path.unlink(missing_ok=True)
    for usage in latest(usages).values():
        writer.require_free(Stretch(usage.segment.number, usage.used, usage.segment.capacity - usage.used))
        try:
            store.segments.erase_rest(usage.segment, usage.used)
        except Damage:
            # Nobody is to append to a damaged file.
            writer.fill_up(usage.segment)
    segments = {usage.segment.number: usage.segment for usage in usages}
    pending = writer.erasures()
    for stretch in pending:
        writer.require_free(stretch)
    for number, stretches in groupby(pending, key=lambda stretch: stretch.segment):
        if number in segments:
            store.segments.erase(segments[number], [(at, length) for _, at, length in stretches])
    if pending:
        writer.erased()


def _note_commit(store: Store, number: int) -> None:
    """Notes that a commit is done, unless others have noted later ones since."""
    # Whoever comes next notes it as well: the commit is not undone if that fails here.
    with suppress(OSError):
        if folder.read_next_commit(store.path) <= number:
            folder.write_next_commit(store.path, number + 1)


def latest(usages: Sequence[Usage]) -> dict[str, Usage]:
    """For each dtype the segment that was made last: the only one that may still be filling up."""
    return {usage.segment.dtype: usage for usage in usages}


def _is_settled(store: Store) -> bool:
    usages = store.index.segments()
    return not (
        folder.read_next_commit(store.path) != store.index.commits() + 1
        or store.index.erasures()
        or any(True for _ in _remains(store, usages))
        or any(store.segments.has_rest(usage.segment, usage.used) for usage in latest(usages).values())
    )


def _remains(store: Store, usages: Sequence[Usage]) -> Iterator[Path]:
    """Files that writers made and did not live to refer to."""
    known = {usage.segment.file for usage in usages}
    for path in store.segments.folder.iterdir():
        if FILE.fullmatch(path.name) and path.name not in known:
            yield path
    for path in (store.path / folder.ARTIFACTS).iterdir():
        if DRAFT.fullmatch(path.name):
            yield path


@dataclass
class _Filling:
    """A segment that takes further states."""

    segment: Segment
    start: int
    used: int
    parts: list[bytes] = field(default_factory=list)


class _Room:
    """Finds places for what one commit stores: behind what is in the latest segments, and then in new ones."""

    def __init__(self, store: Store, writer: Writer, states: Sequence[Packed]) -> None:
        self._store = store
        self._writer = writer
        self._filling: dict[str, _Filling] = {}
        # Bytes by dtype: what the bank has, and what is still to come.
        self._stored: Counter[str] = Counter()
        self._ahead: Counter[str] = Counter()
        usages = writer.segments()
        for usage in usages:
            self._stored[usage.segment.dtype] += usage.used * usage.segment.itemsize
        for dtype, usage in latest(usages).items():
            self._filling[dtype] = _Filling(usage.segment, usage.used, usage.used)
        for state in states:
            self._ahead[state.layout.dtype] += len(state.tensors)
            self._ahead[BYTES] += len(state.facts)

    def place(self, dtype: str, data: bytes) -> tuple[int, int]:
        """The number of a segment and the first element in it, where `write` will put these bytes."""
        length = len(data) // DTYPES[dtype].itemsize
        filling = self._filling.get(dtype)
        if filling is None or filling.used + length > filling.segment.capacity:
            if filling is not None:
                self._flush(filling)
            filling = self._filling[dtype] = self._new(dtype, len(data))
        at = filling.used
        filling.parts.append(data)
        filling.used += length
        self._ahead[dtype] -= len(data)
        return filling.segment.number, at

    def write(self) -> None:
        """Writes everything, and waits until it is on the disk."""
        for filling in self._filling.values():
            self._flush(filling)
        self._store.segments.sync_folder()

    def _new(self, dtype: str, needed: int) -> _Filling:
        # As large as all that the bank has of this dtype, so that there are few segments at every size.
        usual = min(max(SMALLEST, self._stored[dtype], self._ahead[dtype]), LARGEST)
        capacity = max(usual, needed) // DTYPES[dtype].itemsize
        segment = self._writer.add_segment(folder.new_token(), dtype, capacity)
        self._store.segments.create(segment)
        return _Filling(segment, 0, 0)

    def _flush(self, filling: _Filling) -> None:
        if filling.parts:
            self._store.segments.write(filling.segment, filling.start, filling.parts)
            self._writer.use(filling.segment, filling.used)
            self._stored[filling.segment.dtype] += sum(map(len, filling.parts))
