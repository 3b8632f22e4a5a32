"""A bank's parts together, and how an entry of the index becomes a state."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from steer.bank import folder
from steer.bank.facts import Facts
from steer.bank.folder import Manifest
from steer.bank.index import Address, Entry, Index, Kind, Stretch
from steer.bank.layout import Layout
from steer.bank.segment import Segments
from steer.errors import Damage
from steer.state import UserState

Found = TypeVar("Found")
Read = TypeVar("Read")


@dataclass(frozen=True)
class Store:
    """A folder, its manifest, its index and its segments."""

    path: Path
    manifest: Manifest
    index: Index
    segments: Segments

    @classmethod
    def open(cls, path: Path, manifest: Manifest) -> Store:
        """Raises SteerError for an index that is damaged, or not that of this bank."""
        segments = Segments(path / folder.SEGMENTS)
        return cls(path, manifest, Index(path / folder.INDEX, manifest.salt_check, segments.forget), segments)

    def settled(self, find: Callable[[], Found], read: Callable[[Found], Read], found: Found | None = None) -> Read:
        """Reads what is found in the index, or has been found there before.

        A writer may move or erase it in between. Then the index says otherwise by now, and is asked again.

        Raises:
            Damage: it cannot be read, though the index still refers to it.
        """
        found = find() if found is None else found
        while True:
            try:
                return read(found)
            except Damage:
                again = find()
                if again == found:
                    raise
                found = again

    def settled_entry(self, entry: Entry, read: Callable[[Entry], Read]) -> Read | None:
        """The same for one entry; None if it is gone by now."""

        def find() -> list[Entry]:
            found = list(self.index.find([entry.address]).values())
            return found if found or self.index.has_gone(entry) else [entry]

        def read_all(found: list[Entry]) -> Read | None:
            return read(found[0]) if found else None

        return self.settled(find, read_all, [entry])

    def state(self, entry: Entry) -> UserState:
        """A state. Raises Damage if it cannot be read, as the methods below do."""
        return self.described(entry, self.facts(entry))

    def described(self, entry: Entry, facts: Facts) -> UserState:
        """A state whose facts have been read."""
        return UserState(facts.provenance(self.index.kind(entry.kind)), self.tensors(entry), facts.data)

    def tensors(self, entry: Entry) -> dict[str, Tensor]:
        """The tensors of a state."""
        layout = self.index.layout(entry.layout)
        self.require_room(entry.segment, layout.length)
        packed = torch.empty(layout.nbytes, dtype=torch.uint8)
        self.fill([entry], [packed.numpy().data])
        return layout.unpack(packed)

    def fill(self, entries: Sequence[Entry], into: Sequence[memoryview]) -> None:
        """Reads the bytes of states' tensors, as their layouts pack them, into a buffer for each."""
        index = self.index
        self.segments.read_many(
            [
                (index.segment(entry.segment), entry.at, buffer)
                for entry, buffer in zip(entries, into, strict=True)
                if entry.segment is not None and entry.at is not None
            ]
        )
        own = {
            of: kind_checksum(index.kind(of[0]), index.layout(of[1]))
            for of in {(entry.kind, entry.layout) for entry in entries}
        }
        for entry, buffer in zip(entries, into, strict=True):
            if tensors_checksum(entry.address, own[entry.kind, entry.layout], zlib.crc32(buffer)) != entry.checksum:
                raise Damage(f"{self._file(entry.segment)}: damaged, the bytes are not those that were saved")

    def facts(self, entry: Entry) -> Facts:
        """What describes a state."""
        number, at, length = entry.facts
        self.require_room(number, length)
        line = bytearray(length)
        self.segments.read(self.index.segment(number), at, memoryview(line))
        if facts_checksum(entry.address, zlib.crc32(line)) != entry.facts_checksum:
            raise Damage(f"{self._file(number)}: damaged, the bytes are not those that were saved")
        try:
            return Facts.from_bytes(bytes(line))
        except (ValueError, TypeError, KeyError) as error:
            raise Damage(f"{self._file(number)}: damaged, what it holds makes no sense") from error

    def stretches(self, entries: Iterable[Entry]) -> Iterator[Stretch]:
        """Where entries lie."""
        for entry in entries:
            yield entry.facts
            if entry.segment is not None and entry.at is not None:
                yield Stretch(entry.segment, entry.at, self.index.layout(entry.layout).length)

    def require_room(self, number: int | None, length: int) -> None:
        """Raises Damage if so many elements cannot lie in a segment; asked before memory is taken for them."""
        room = 0 if number is None else self.segments.room(self.index.segment(number))
        if not 0 <= length <= room:
            raise Damage(f"{self._file(number)}: damaged, the index looks for {length} elements there")

    def _file(self, number: int | None) -> Path:
        return self.path / folder.INDEX if number is None else self.segments.folder / self.index.segment(number).file


def kind_checksum(kind: Kind, layout: Layout) -> bytes:
    """CRC-32 of what a state is."""
    return struct.pack("<II", kind.checksum, layout.checksum)


def tensors_checksum(address: Address, kind: bytes, crc: int) -> int:
    """CRC-32 over whose and what a state is and, given theirs, over its tensors.

    So no damage to the index can pass one person's tensors for another's, or for those of another model or site.
    """
    user, name = address
    return zlib.crc32(crc.to_bytes(4, "little") + kind + user + name.encode())


def facts_checksum(address: Address, crc: int) -> int:
    """CRC-32 over whose state it is and, given theirs, over its facts."""
    return tensors_checksum(address, b"", crc)
