"""A store of user states on disk."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from steer.bank import folder, segment
from steer.bank.index import Entry, Index, to_json
from steer.bank.segment import Key
from steer.errors import SteerError, UnknownUser
from steer.state import Artifact, Fingerprint, Provenance, UserState

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_HASH = re.compile(r"[0-9a-f]{64}")
_SEGMENT = re.compile(r"[0-9]{8,}-[0-9a-f]{8}\.safetensors")
_USER_BYTES = 1024


@dataclass(frozen=True)
class Row:
    """A summary of one entry.

    Attributes:
        model: name of the model it was read from; None for states that fit every model.
        tensors: dtype and shape of each tensor.
        nbytes: bytes of the tensors.
        records: number of records it was fitted on.
    """

    user: str
    name: str
    method: str
    model: str | None
    sites: tuple[str, ...]
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    nbytes: int
    records: int


class Bank:
    """Many states in a folder, keyed by (user, name): `bank["alice", "style"] = state`.

    A commit, be it one assignment or one `update`, is there as a whole or not at all, also after a crash or a power
    cut. Any number of threads and processes may read and write the same bank; writers take turns.

    Args:
        path: the folder.
        create: make an empty bank where there is none.

    Raises:
        SteerError: `path` is something else than a bank, or a bank of an unknown version; or there is none and `create`
            is False.
    """

    def __init__(self, path: str | Path, *, create: bool = True) -> None:
        self.path = Path(path).resolve()
        folder.open_or_create(self.path, create=create)
        # Read once, as whoever builds layers from an artifact wants to meet it again.
        self._artifacts: dict[str, Artifact] = {}
        self._index = Index(self.path / folder.INDEX)

    def __repr__(self) -> str:
        return f"Bank({str(self.path)!r}, {len(self)} states)"

    def __len__(self) -> int:
        return self._index.count()

    def __iter__(self) -> Iterator[Key]:
        """The keys, in the order in which they were first stored."""
        return self._index.keys()

    def __contains__(self, key: object) -> bool:
        try:
            return self._index.contains(_checked(key))
        except SteerError:
            return False

    def __getitem__(self, key: Key) -> UserState:
        """The state of a user under a name.

        Raises:
            UnknownUser: there is none; the message says what there is.
            SteerError: the file that holds it is damaged; the message names it. Other states stay readable.
        """
        key = _checked(key)
        found = self._index.find([key])
        if not found:
            raise self._unknown(*key)
        return self._load(found)[key]

    def __setitem__(self, key: Key, state: UserState) -> None:
        """Stores one state; many at once are much faster with `update`."""
        self.update({key: state})

    def users(self) -> list[str]:
        """All users, sorted."""
        return self._index.users()

    def names(self) -> list[str]:
        """All names under which anybody has a state, sorted."""
        return self._index.names()

    def names_of(self, user: str) -> list[str]:
        """The names under which a user has a state, sorted; none for a user who is not known."""
        return self._index.names_of(_checked_user(user))

    def rows(self, user: str | None = None) -> Iterator[Row]:
        """A summary of every entry, or of every entry of one user, without reading tensors."""
        if user is None:
            entries: Iterable[Entry] = self._index.entries()
        else:
            entries = self._index.find([(user, name) for name in self.names_of(user)]).values()
        return map(_row, entries)

    def templates(self) -> list[tuple[str, Provenance, dict[str, tuple[int, ...]]]]:
        """What may occur in a batch: name, provenance and shapes of one state of each kind.

        States are of one kind when name, method and its version, model, sites and artifact agree. The rest of the
        provenance, and the shapes, are those of the kind's oldest entry.
        """
        return [
            (entry.name, entry.provenance, {name: slot.shape for name, slot in entry.stored.slots.items()})
            for entry in self._index.templates()
        ]

    def get_many(self, users: Sequence[str | None], name: str) -> list[UserState | None]:
        """The states of a batch, all from one moment; each file is opened once.

        Returns:
            One item per user: None where the user is None or has no state of that name.
        """
        keys = {user: _checked((user, name)) for user in users if user is not None}
        states = self._load(self._index.find(keys.values()))
        return [None if user is None else states.get(keys[user]) for user in users]

    def update(self, states: Mapping[Key, UserState]) -> None:
        """Stores many states in one commit, replacing those there were under the same keys.

        Raises:
            SteerError: a key or a state cannot be stored. Then nothing is.
        """
        for key, state in states.items():
            _checked(key)
            if not isinstance(state, UserState):
                raise SteerError(f"{key}: expected a UserState, found {type(state).__name__}")
        if not states:
            return
        blocks, stored = segment.pack({key: state.tensors for key, state in states.items()})
        file = f"{self._index.last_segment() + 1:08d}-{folder.new_token()}.safetensors"
        entries = []
        for (user, name), state in states.items():
            where = stored[user, name]
            entries.append(Entry(user, name, state.provenance, state.data, where, file if where.slots else None))
        rows = [(entry, entry.to_row()) for entry in entries]
        # The segment first: killed in between, it is a file nobody refers to, while an entry never lacks its tensors.
        if blocks:
            folder.save_tensors(self.path / folder.SEGMENTS / file, blocks)
        self._index.put(rows)

    def put_artifact(self, artifact: Artifact) -> str:
        """Stores what a method shares between users; returns its hash, under which `artifact` finds it."""
        digest = artifact.hash
        file = self._artifact_file(digest)
        if not file.exists():
            described = {
                "method": artifact.method,
                "version": artifact.version,
                "model": artifact.model.to_json(),
                "settings": dict(artifact.settings),
            }
            metadata = {"artifact": to_json(described, f"the {artifact.method} artifact")}
            # Clones, as safetensors refuses tensors that share storage and would have to save a view's base.
            tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in artifact.tensors.items()}
            folder.save_tensors(file, tensors, metadata)
        return digest

    def has_artifact(self, digest: str) -> bool:
        """Whether the bank holds the artifact of that hash."""
        return _HASH.fullmatch(digest) is not None and self._artifact_file(digest).is_file()

    def artifact(self, digest: str) -> Artifact:
        """The artifact of that hash, which is verified when it is first read.

        Raises:
            SteerError: the bank has no such artifact, or its file is damaged.
        """
        if not isinstance(digest, str) or not _HASH.fullmatch(digest):
            raise SteerError(f"{digest!r} is not the hash of an artifact: expected 64 hexadecimal digits")
        if digest in self._artifacts:
            return self._artifacts[digest]
        file = self._artifact_file(digest)
        if not file.is_file():
            raise SteerError(f"{self.path}: has no artifact {digest}; store it with `put_artifact`")
        try:
            artifact = _read_artifact(file)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise SteerError(f"{file}: damaged, the artifact cannot be read ({error})") from error
        if artifact.hash != digest:
            raise SteerError(f"{file}: damaged, what it holds has the hash {artifact.hash}")
        self._artifacts[digest] = artifact
        return artifact

    def _artifact_file(self, digest: str) -> Path:
        return self.path / folder.ARTIFACTS / f"{digest}.safetensors"

    def _load(self, entries: Mapping[Key, Entry]) -> dict[Key, UserState]:
        by_segment: dict[str, dict[Key, segment.Stored]] = {}
        for key, entry in entries.items():
            if entry.segment is not None:
                by_segment.setdefault(entry.segment, {})[key] = entry.stored
        tensors = {}
        for file, wanted in by_segment.items():
            tensors.update(segment.read(self._segment_file(file), wanted))
        return {key: UserState(entry.provenance, tensors.get(key, {}), entry.data) for key, entry in entries.items()}

    def _segment_file(self, name: str) -> Path:
        # The name comes from the index, and an index from elsewhere must not point out of the bank.
        if not _SEGMENT.fullmatch(name):
            raise SteerError(f"{self.path}: damaged, its index refers to {name!r}, which is not the name of a segment")
        return self.path / folder.SEGMENTS / name

    def _unknown(self, user: str, name: str) -> UnknownUser:
        own = ", ".join(map(repr, self.names_of(user)))
        has = f"has only {own}" if own else "has no states at all"
        others = f"other users have {name!r}" if name in self.names() else f"nobody has {name!r}"
        return UnknownUser(f"{self.path}: no state {name!r} for user {user!r}, who {has}; {others}")


def _checked(key: object) -> Key:
    if not isinstance(key, tuple) or len(key) != 2:
        raise SteerError(f"a bank is indexed by user and name, such as bank['alice', 'style'], not by {key!r}")
    user, name = key
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise SteerError(f"{name!r} cannot name a state: expected 1 to 64 letters, digits, dots, dashes or underscores")
    return _checked_user(user), name


def _checked_user(user: object) -> str:
    if not isinstance(user, str) or not user:
        raise SteerError(f"{user!r} cannot be a user id: expected text that is not empty")
    if "\0" in user:
        raise SteerError(f"{user!r} cannot be a user id: it holds a NUL character")
    try:
        size = len(user.encode())
    except UnicodeEncodeError:
        raise SteerError(f"{user!r} cannot be a user id: it is not valid Unicode") from None
    if size > _USER_BYTES:
        raise SteerError(f"{user[:40]!r}… cannot be a user id: it has {size} bytes, at most {_USER_BYTES} are allowed")
    return user


def _row(entry: Entry) -> Row:
    source, slots = entry.provenance, entry.stored.slots
    return Row(
        user=entry.user,
        name=entry.name,
        method=source.method,
        model=None if source.model is None else source.model.name,
        sites=source.sites,
        tensors={name: (slot.dtype, slot.shape) for name, slot in slots.items()},
        nbytes=sum(slot.nbytes for slot in slots.values()),
        records=len(source.records),
    )


def _read_artifact(file: Path) -> Artifact:
    with safe_open(file, "pt") as opened:
        described: dict[str, Any] = json.loads((opened.metadata() or {})["artifact"])
        # Cloned, as these are views of the mapped file.
        tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
    return Artifact(
        method=described["method"],
        version=described["version"],
        model=Fingerprint.from_json(described["model"]),
        tensors=tensors,
        settings=described["settings"],
    )
