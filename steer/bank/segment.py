"""Segments: safetensors files of a fixed size, which fill up from the front.

A segment holds one flat tensor, `values`, of one dtype. States take stretches of it, one after another; what is not
taken is zero, and takes no place on disks that know sparse files. Nothing moves within a segment and no two states that
were stored ever had one place, so that whoever has looked a place up reads that state there or finds that it is gone.

The header always takes the first 4,096 bytes. The place of an element follows from its number, then, and a header is
checked by comparing it with the one that has to be there; nobody else's is ever parsed.
"""

from __future__ import annotations

import errno
import json
import os
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from steer.bank.layout import DTYPES
from steer.errors import Damage, SteerError

HEADER_BYTES = 4096
SMALLEST, LARGEST = 64 << 10, 128 << 20
"""Bytes of the values of new segments. They grow with what there is, so that small banks are small and large ones have
few files."""

FILE = re.compile(r"[0-9]{8,}-[0-9a-f]{8}\.safetensors")
"""Names of segments."""

_KEPT_OPEN = 256
_CHUNK = 4 << 20
# Reads only what is in memory, where the operating system can be asked for that.
_NOW: int | None = getattr(os, "RWF_NOWAIT", None)
# Of one system call.
_BUFFERS = 1024
_CODES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


@dataclass(frozen=True)
class Segment:
    """A segment as the index knows it: `capacity` elements of a dtype in a file."""

    number: int
    file: str
    dtype: str
    capacity: int

    @cached_property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def header(self) -> bytes:
        nbytes = self.capacity * self.itemsize
        values = {"dtype": _CODES[self.dtype], "shape": [self.capacity], "data_offsets": [0, nbytes]}
        text = json.dumps({"__metadata__": {"format": "steer-bank"}, "values": values}).encode()
        size = HEADER_BYTES - 8
        return struct.pack("<Q", size) + text.ljust(size)

    def offset(self, at: int) -> int:
        """Place of an element in the file, in bytes."""
        return HEADER_BYTES + at * self.itemsize

    @cached_property
    def end(self) -> int:
        """Size of the file, in bytes."""
        return self.offset(self.capacity)


class Segments:
    """The files of a bank's segments; safe to use from several threads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # By name, as a number is given again when the writer who had it first came to nothing.
        # Used without a lock, which a fork could leave held. Of a file that two threads open at once, one is kept.
        self._open: dict[str, _File] = {}

    def read(self, segment: Segment, at: int, into: memoryview) -> None:
        """Fills a buffer of bytes from element `at` on.

        Read by `pread` rather than through a mapping: one copy either way, but a file that somebody truncates is an
        error then and not the end of the process (SIGBUS).

        Raises:
            Damage: the file is missing, is not the segment, or ends too early.
        """
        file, offset, nbytes = self._file(segment), segment.offset(at), into.nbytes
        if not HEADER_BYTES <= offset <= segment.end - nbytes:
            raise Damage(f"{self.folder / segment.file}: damaged, the index refers to a place behind its end")
        try:
            got = os.preadv(file.descriptor, [into], offset)
            while 0 < got < nbytes and (more := os.preadv(file.descriptor, [into[got:]], offset + got)):
                got += more
        except OSError as error:
            raise Damage(f"{self.folder / segment.file}: damaged, it cannot be read ({error})") from error
        if got < nbytes:
            raise Damage(f"{self.folder / segment.file}: damaged, it ends too early")

    def read_many(self, wanted: Sequence[tuple[Segment, int, memoryview]]) -> None:
        """Fills many buffers, each as `read` does.

        What the operating system has in memory comes first. It is asked to fetch all the rest before any of it is
        waited for, so that the disk can work on many at once. Raises Damage.
        """
        late = []
        for segment, at, into in wanted:
            file, offset, nbytes = self._file(segment), segment.offset(at), into.nbytes
            if _NOW is not None and HEADER_BYTES <= offset <= segment.end - nbytes:
                try:
                    if os.preadv(file.descriptor, (into,), offset, _NOW) == nbytes:
                        continue
                except OSError:
                    # Not in memory, or a file system that does not tell.
                    pass
                os.posix_fadvise(file.descriptor, offset, nbytes, os.POSIX_FADV_WILLNEED)
            late.append((segment, at, into))
        for segment, at, into in late:
            self.read(segment, at, into)

    def room(self, segment: Segment) -> int:
        """How many elements the file holds, whatever the index says. Raises Damage if it cannot be read."""
        return max(self._file(segment).size - HEADER_BYTES, 0) // segment.itemsize

    def create(self, segment: Segment) -> None:
        """Makes the file; nobody reads it before the index refers to it."""
        descriptor = os.open(self.folder / segment.file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            os.pwrite(descriptor, segment.header, 0)
            os.ftruncate(descriptor, segment.end)
        finally:
            os.close(descriptor)

    def write(self, segment: Segment, at: int, parts: Sequence[bytes]) -> None:
        """Writes bytes from element `at` on, and waits until they are on the disk."""
        with _File.writable(self._checked(segment)) as file:
            offset = segment.offset(at)
            for start in range(0, len(parts), _BUFFERS):
                offset = _write(file.descriptor, b"".join(parts[start : start + _BUFFERS]), offset)
            os.fsync(file.descriptor)

    def copy(self, stretches: Iterable[tuple[Segment, int, int]], target: Segment) -> None:
        """Fills a segment with stretches of others, each its segment, first element and length; waits for the disk."""
        with _File.writable(self._checked(target)) as file:
            offset = target.offset(0)
            for source, at, length in stretches:
                for chunk in self.chunks(source, at, at + length):
                    offset = _write(file.descriptor, chunk, offset)
            os.fsync(file.descriptor)

    def erase(self, segment: Segment, stretches: Sequence[tuple[int, int]]) -> None:
        """Overwrites stretches, given as first element and number of elements, with zeros, and waits for the disk.

        A damaged file is erased as well, as far as it goes, and one that is gone needs no erasing.
        """
        try:
            file = _File.writable(self.folder / segment.file)
        except FileNotFoundError:
            return
        with file:
            size = os.fstat(file.descriptor).st_size
            for at, length in stretches:
                start, end = segment.offset(at), min(segment.offset(at + length), size)
                for offset in range(start, end, _CHUNK):
                    _write(file.descriptor, bytes(min(_CHUNK, end - offset)), offset)
            os.fsync(file.descriptor)

    def is_intact(self, segment: Segment) -> bool:
        """Whether the file is there, with the header and the size that it should have."""
        try:
            file = self._opened(segment)
        except Damage:
            return False
        return os.fstat(file.descriptor).st_size == segment.end

    def has_rest(self, segment: Segment, used: int) -> bool:
        """Whether a killed writer left something behind the elements in use. Raises Damage."""
        return any(self._written(segment, used))

    def erase_rest(self, segment: Segment, used: int) -> None:
        """Erases that. Raises Damage, also if the file was damaged since it was opened."""
        file = self._open[segment.file] = self._opened(segment)
        if os.fstat(file.descriptor).st_size < segment.offset(used):
            raise Damage(f"{self.folder / segment.file}: damaged, it ends too early")
        if stretches := list(self._written(segment, used)):
            self.erase(segment, stretches)
        if stretches or os.fstat(file.descriptor).st_size < segment.end:
            with _File.writable(self.folder / segment.file) as own:
                # Gives back what the zeros take, so that the next writer need not look at them.
                os.ftruncate(own.descriptor, segment.offset(used))
                os.ftruncate(own.descriptor, segment.end)
                os.fsync(own.descriptor)

    def sync_folder(self) -> None:
        """Waits until the names of the files are on the disk."""
        with _File(self.folder) as folder:
            os.fsync(folder.descriptor)

    def chunks(self, segment: Segment, start: int, end: int) -> Iterator[bytes]:
        """The bytes of some elements, a few megabytes at a time. Raises Damage."""
        step = _CHUNK // segment.itemsize
        for at in range(start, end, step):
            buffer = bytearray(min(step, end - at) * segment.itemsize)
            self.read(segment, at, memoryview(buffer))
            yield bytes(buffer)

    def forget(self) -> None:
        """Closes all files, so that the disk gets back the place of those that are no longer there."""
        self._open.clear()

    def _written(self, segment: Segment, used: int) -> Iterator[tuple[int, int]]:
        """Stretches from element `used` on in which something is not zero, rounded to the chunks that were read."""
        file = self._file(segment)
        end, offset = segment.end, segment.offset(used)
        while offset < end:
            try:
                # Skips what was never written.
                offset = max(os.lseek(file.descriptor, offset, os.SEEK_DATA), offset)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return
                raise Damage(f"{self.folder / segment.file}: damaged, it cannot be read ({error})") from error
            hole = os.lseek(file.descriptor, offset, os.SEEK_HOLE)
            at = (offset - HEADER_BYTES) // segment.itemsize
            until = -(-(min(hole, end) - HEADER_BYTES) // segment.itemsize)
            length = min(_CHUNK // segment.itemsize, until - at)
            chunk = next(self.chunks(segment, at, at + length))
            if chunk.count(0) < len(chunk):
                yield at, length
            offset = segment.offset(at + length)

    def _checked(self, segment: Segment) -> Path:
        self._file(segment)
        return self.folder / segment.file

    def _file(self, segment: Segment) -> _File:
        file = self._open.get(segment.file)
        if file is None:
            file = self._opened(segment)
            while len(self._open) >= _KEPT_OPEN:
                # Whoever reads from one that is dropped here holds on to it. Another thread may drop it first.
                with suppress(StopIteration, KeyError, RuntimeError):
                    del self._open[next(iter(self._open))]
            self._open[segment.file] = file
        return file

    def _opened(self, segment: Segment) -> _File:
        path = self.folder / segment.file
        try:
            file = _File(path)
            size = file.size = os.fstat(file.descriptor).st_size
            found = os.pread(file.descriptor, HEADER_BYTES, 0)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                raise SteerError(f"{path}: cannot be opened now ({error.strerror})") from error
            raise Damage(f"{path}: damaged or missing, it cannot be read ({error.strerror})") from error
        if found != segment.header:
            raise Damage(f"{path}: damaged, its header is not that of a segment of {segment.capacity} {segment.dtype}")
        # A shorter one costs only what lay behind its end.
        if size > segment.end:
            raise Damage(f"{path}: damaged, it has {size} bytes and should have {segment.end}")
        return file


class _File:
    """A descriptor that is closed when nobody holds it any more, so never under the hands of another thread."""

    def __init__(self, path: Path, flags: int = os.O_RDONLY) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, flags)
        # In bytes, when it was opened; segments do not grow.
        self.size = 0

    @classmethod
    def writable(cls, path: Path) -> _File:
        return cls(path, os.O_RDWR)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def _write(descriptor: int, data: bytes, offset: int) -> int:
    """Writes all of the data; returns where they end."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
    return offset
