"""Records and histories: what a person wrote, in time order, and how to read it from JSONL."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from string import Formatter
from typing import Any

from steer.errors import SteerError


@dataclass(frozen=True)
class Record:
    """One piece of a user's data: what they wrote (`response`) and, where known, to what (`prompt`).

    Its `id` is a hash of its content where none is given.
    """

    user_id: str
    response: str
    prompt: str | None = None
    id: str = ""
    time: float | str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.id:
            object.__setattr__(self, "id", self._digest)

    @property
    def _digest(self) -> str:
        content = json.dumps([self.user_id, self.prompt, self.response, self.time])
        return hashlib.sha256(content.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class History:
    """All of one user's records, oldest first, each with an id of its own.

    Where a user wrote the same thing several times and no ids were given, those of the repeats end in -2, -3, ….

    Raises:
        SteerError: two records were given the same id.
    """

    user_id: str
    records: tuple[Record, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "records", tuple(_told_apart(self.user_id, self.records)))

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    def first(self, count: int | None) -> History:
        """The oldest `count` records; all of them if None."""
        return History(self.user_id, self.records[:count])

    def split(self, holdout: int = 0, limit: int | None = None) -> tuple[History, History]:
        """Leaves out the last `holdout` records, then keeps the newest `limit` of the rest.

        Returns:
            The history to fit on, and the records held out.
        """
        cut = max(len(self) - holdout, 0)
        known = self.records[:cut]
        if limit is not None:
            known = known[max(len(known) - limit, 0) :]
        return History(self.user_id, known), History(self.user_id, self.records[cut:])


def read_histories(path: str | Path, *, instruction: str | None = None) -> list[tuple[str, History]]:
    """Reads a JSONL file of records, one a line, into one history per user.

    A line has `user_id` and `response` (or `text`), optionally `id`, `time` and `prompt`; further keys are kept in
    `Record.fields`. A history is in time order where all its records carry a `time`, else in the order of the file.

    Args:
        path: the JSONL file.
        instruction: template that makes the prompt of a record without one from its other keys, such as
            `"Write a commit message titled: {title}"`.

    Raises:
        SteerError: the file is missing or empty, or two records of a user have the same id; or a line is not such a
            record, and the message names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise SteerError(f"{path}: there is no such file")
    records: dict[str, list[Record]] = {}
    # Bytes first, so that an error can name the line; a byte order mark is no part of it.
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                record = _parse(line, f"{path}:{number}", instruction)
                records.setdefault(record.user_id, []).append(record)
    if not records:
        raise SteerError(f"{path}: the file holds no records")
    return [(user, History(user, _in_time_order(user, own))) for user, own in records.items()]


def _told_apart(user: str, records: Sequence[Record]) -> Iterator[Record]:
    """Numbers the repeats among the records without an id of their own; the first keeps its hash."""
    given, seen = {record.id for record in records}, set()
    numbers: dict[str, Iterator[int]] = defaultdict(lambda: count(2))
    for record in records:
        name = record.id
        if name in seen:
            if name != record._digest:
                raise SteerError(f"two records of {user!r} have the id {name!r}; give each its own, or none at all")
            # What was numbered before may stand among the records.
            name = next(new for n in numbers[name] if (new := f"{name}-{n}") not in given)
        seen.add(name)
        yield record if name == record.id else replace(record, id=name)


def _parse(line: bytes, where: str, instruction: str | None) -> Record:
    try:
        entry = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise SteerError(f"{where}: the line is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise SteerError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(entry, dict):
        raise SteerError(f"{where}: expected an object with `user_id` and `response`, found {type(entry).__name__}")
    user = entry.get("user_id")
    response = entry.get("response") or entry.get("text")
    if not isinstance(user, str | int) or isinstance(user, bool) or str(user) == "":
        raise SteerError(f"{where}: `user_id` is missing or empty")
    if not isinstance(response, str) or not response.strip():
        raise SteerError(f"{where}: neither `response` nor `text` holds any text")
    prompt = entry.get("prompt")
    if prompt is None and instruction is not None:
        prompt = _fill(instruction, entry, where)
    if prompt is not None and not isinstance(prompt, str):
        raise SteerError(f"{where}: `prompt` must be text, found {type(prompt).__name__}")
    return Record(
        user_id=str(user),
        response=response,
        prompt=prompt,
        id="" if entry.get("id") is None else str(entry["id"]),
        time=entry.get("time"),
        fields=entry,
    )


def _fill(template: str, entry: Mapping[str, Any], where: str) -> str:
    try:
        wanted = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise SteerError(f"the instruction {template!r} is not a template: {error}") from None
    missing = [name for name in wanted if name not in entry]
    if missing:
        raise SteerError(
            f"{where}: the instruction asks for {{{missing[0]}}}, the record has {', '.join(sorted(entry))}"
        )
    return template.format_map(entry)


def _in_time_order(user: str, records: list[Record]) -> tuple[Record, ...]:
    times = [record.time for record in records]
    if len({isinstance(time, str) for time in times if time is not None}) > 1:
        raise SteerError(
            f"the records of {user!r} have times of two kinds, numbers and texts; their order is not known"
        )
    comparable = all(isinstance(t, int | float) for t in times) or all(isinstance(t, str) for t in times)
    return tuple(sorted(records, key=lambda record: record.time) if comparable else records)  # type: ignore[arg-type, return-value]
