"""Looking after a bank: finding damage, and giving back space."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from steer.bank import artifacts, folder, writing
from steer.bank.index import Entry, Usage, Writer
from steer.bank.segment import LARGEST, Segment
from steer.bank.store import Store
from steer.errors import Damage, SteerError

Progress = Callable[[float], None]
"""Told from time to time what share of the work is done."""

# A segment is written anew when at least this share of it holds nothing that anybody needs.
_WASTE = 1 / 8


@dataclass(frozen=True)
class Fault:
    """Something that is wrong with a bank.

    Attributes:
        file: where.
        user, name: of the state that is lost by it; the user's id, or the hash of it where the id cannot be read.
        message: what is wrong.
    """

    file: Path
    message: str
    user: str | None = None
    name: str | None = None

    def __str__(self) -> str:
        whose = "" if self.user is None else f"state {self.name!r} of user {self.user!r}: "
        return f"{whose}{self.message}"


class NoArtifact(Fault):
    """An artifact that states need and that is not in the bank; perhaps it was never put there."""


@dataclass(frozen=True)
class Compaction:
    """What a compaction did.

    Attributes:
        segments_before, segments_after: how many files there were and are.
        nbytes_before, nbytes_after: their sizes, in bytes.
    """

    segments_before: int
    segments_after: int
    nbytes_before: int
    nbytes_after: int


def verify(store: Store, on_progress: Progress | None = None) -> list[Fault]:
    """See `Bank.verify`."""
    file = store.path / folder.INDEX
    faults = [Fault(file, f"{file}: {found}") for found in store.index.faults()]
    for check in (_index_faults, partial(_all_segment_faults, on_progress=on_progress), _artifact_faults):
        try:
            faults.extend(check(store))
        except SteerError as error:
            # An index too damaged to be asked.
            faults.append(Fault(file, str(error)))
    return faults


def _index_faults(store: Store) -> Iterator[Fault]:
    for entry in store.index.unplaced():
        yield _fault(store, entry, "its segment is not in the index")


def _all_segment_faults(store: Store, on_progress: Progress | None) -> Iterator[Fault]:
    seen: set[Segment] = set()
    done = 0
    # Until there is none that a writer has made meanwhile, perhaps to move there what lay elsewhere.
    while new := [usage for usage in store.index.segments() if usage.segment not in seen]:
        total = done + max(_nbytes(new), 1)
        for usage in new:
            seen.add(usage.segment)
            try:
                yield from _segment_faults(store, usage.segment)
            except SteerError as error:
                # An index that cannot be asked about this one may be asked about others.
                if _is_known(store, usage.segment):
                    yield Fault(store.segments.folder / usage.segment.file, str(error))
            done += usage.segment.end
            if on_progress is not None:
                on_progress(done / total)


def _artifact_faults(store: Store) -> Iterator[Fault]:
    inside = store.path / folder.ARTIFACTS
    stored = artifacts.stored(inside)
    for digest in store.index.artifacts():
        if digest not in stored:
            yield NoArtifact(
                inside, f"{store.path}: has no artifact {digest}, which states need; `put_artifact` stores it"
            )
    for digest in stored:
        file = inside / f"{digest}.safetensors"
        try:
            artifacts.load(file, digest)
        except SteerError as error:
            yield Fault(file, str(error))


def _segment_faults(store: Store, segment: Segment) -> Iterator[Fault]:
    def read_facts(entry: Entry) -> None:
        # Whole, if it has no tensors: no other pass comes to it.
        if entry.segment is None:
            store.state(entry)
        else:
            store.facts(entry)

    for part, read in (("tensors", store.tensors), ("facts", read_facts)):
        for page in store.index.placed(segment, part):
            for entry in page:
                try:
                    store.settled_entry(entry, read)
                except Damage as damage:
                    yield _fault(store, entry, str(damage))
    file = store.segments.folder / segment.file
    if not _is_clean(store, segment):
        # Perhaps it is what somebody writes at this moment; nobody does while one holds the lock.
        why = ""
        try:
            with writing.writing(store) as writer:
                still = any(usage.segment == segment for usage in writer.segments())
                clean = not still or _is_clean(store, segment)
        except SteerError as error:
            clean, why = False, f", and they cannot be erased ({error})"
        if not clean:
            yield Fault(file, f"{file}: holds bytes that belong to no state{why}")
    if not store.segments.is_intact(segment) and _is_known(store, segment):
        yield Fault(file, f"{file}: damaged, its end is missing")


def _is_known(store: Store, segment: Segment) -> bool:
    """Whether a segment is still in the index; False for one that somebody has retired."""
    try:
        return segment in [usage.segment for usage in store.index.segments()]
    except SteerError:
        return True


def _fault(store: Store, entry: Entry, message: str) -> Fault:
    try:
        user = store.facts(entry).user
    except Damage:
        user = None
    where = store.path / folder.INDEX
    with suppress(Damage):
        where = store.segments.folder / store.index.segment(entry.segment or entry.facts_segment).file
    return Fault(where, message, user or entry.user.hex(), entry.name)


def _is_clean(store: Store, segment: Segment) -> bool:
    """Whether everything is zero that is no state's. Raises Damage if that cannot be read."""
    end = 0
    for _, at, length in store.index.taken(segment):
        if any(chunk.count(0) < len(chunk) for chunk in store.segments.chunks(segment, end, at)):
            return False
        end = at + length
    return not store.segments.has_rest(segment, end)


def compact(store: Store, on_progress: Progress | None = None) -> Compaction:
    """See `Bank.compact`."""
    if faults := store.index.faults():
        raise SteerError(
            f"{store.path / folder.INDEX}: damaged ({faults[0]}), so that states could be lost. Merge what can be read "
            "into a new bank"
        )
    before = store.index.segments()
    # A damaged segment is left as it is as long as anybody's state lies in it.
    groups = list(_groups([usage for usage in before if not _live(usage) or store.segments.is_intact(usage.segment)]))
    for done, group in enumerate(groups, start=1):
        # A turn for each, so that others can write in between.
        with writing.writing(store) as writer:
            _pack(store, writer, group)
        writing.settle(store)
        if on_progress is not None:
            on_progress(done / len(groups))
    store.index.shrink()
    after = store.index.segments()
    return Compaction(len(before), len(after), _nbytes(before), _nbytes(after))


def _groups(usages: Sequence[Usage]) -> Iterator[set[int]]:
    """Numbers of segments that are to become one, or none; each group of one dtype."""
    for dtype in sorted({usage.segment.dtype for usage in usages}):
        group: list[Usage] = []
        for usage in usages:
            if usage.segment.dtype != dtype or (_waste(usage) < _WASTE and _nbytes([usage]) >= LARGEST // 2):
                continue
            if group and sum(map(_live, [*group, usage])) > LARGEST:
                yield {one.segment.number for one in group}
                group = []
            group.append(usage)
        if len(group) > 1 or any(_waste(usage) >= _WASTE for usage in group):
            yield {one.segment.number for one in group}


def _pack(store: Store, writer: Writer, numbers: set[int]) -> None:
    """Copies what lives in some segments into a new one, which has no room for more, and retires them."""
    sources = [usage.segment for usage in writer.segments() if usage.segment.number in numbers]
    if not sources:
        # Somebody else has done it.
        return
    taken = [(source, stretch) for source in sources for stretch in writer.taken(source)]
    if total := sum(stretch.length for _, stretch in taken):
        target = writer.add_segment(folder.new_token(), sources[0].dtype, total)
        store.segments.create(target)
        to = 0
        for _, stretch in taken:
            writer.move(stretch, target, to)
            to += stretch.length
        writer.use(target, total)
        store.segments.copy([(source, stretch.at, stretch.length) for source, stretch in taken], target)
        store.segments.sync_folder()
    writer.retire(sources)


def _live(usage: Usage) -> int:
    return (usage.used - usage.dead) * usage.segment.itemsize


def _waste(usage: Usage) -> float:
    return 1 - (usage.used - usage.dead) / max(usage.segment.capacity, 1)


def _nbytes(usages: Sequence[Usage]) -> int:
    return sum(usage.segment.end for usage in usages)
