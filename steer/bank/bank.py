"""A store of user states on disk."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch

from steer.bank import artifacts, folder, upkeep, writing
from steer.bank.facts import Facts, require_storable
from steer.bank.gather import Gatherer, Rows
from steer.bank.index import Address, Entry, Kind, Writer
from steer.bank.layout import Layout
from steer.bank.store import Store
from steer.bank.upkeep import Compaction, Fault, Progress
from steer.bank.writing import Conflict, Packed
from steer.errors import Damage, SteerError, UnknownUser
from steer.files import draft_folder
from steer.state import Artifact, Provenance, UserState

Key = tuple[str, str]
"""User and name of a state."""

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_HASHED = re.compile(r"[0-9a-f]{32}")
_USER_BYTES = 1024
# States that are read and written together where a bank is merged into another.
_TOGETHER, _TOGETHER_BYTES = 4096, 64 << 20


class UserHash(str):
    """The hash of a user id, as a bank that keeps only hashes gives it; such a bank takes it in place of the id."""

    __slots__ = ()


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
    cut. What is deleted or replaced is overwritten on the disk before the call returns. Any number of threads and
    processes may read and write the same bank; writers take turns.

    Args:
        path: the folder.
        create: make an empty bank where there is none.
        hashed: a new bank keeps salted hashes of user ids in place of the ids; None for no, and for a bank that is
            there already as it is.

    Raises:
        SteerError: `path` is something else than a bank, or a bank of an unknown version; there is none and `create` is
            False; or it keeps user ids otherwise than `hashed` says.
    """

    def __init__(self, path: str | Path, *, create: bool = True, hashed: bool | None = None) -> None:
        self.path = Path(path).resolve()
        manifest = folder.open_or_create(self.path, create=create, hashed=hashed)
        self._store = Store.open(self.path, manifest)
        # Read once, as whoever builds layers from an artifact wants to meet it again.
        self._artifacts: dict[str, Artifact] = {}
        writing.recover_if_needed(self._store)

    def __repr__(self) -> str:
        return f"Bank({str(self.path)!r}, {len(self)} states)"

    def __enter__(self) -> Bank:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of all files. The bank cannot be used any more; others that read or write it are not affected."""
        self._store.index.close()
        self._store.segments.forget()

    @property
    def hashed(self) -> bool:
        """Whether the bank keeps only hashes of user ids."""
        return self._store.manifest.hashed

    # Reading.

    def __len__(self) -> int:
        return self._store.index.count()

    def __bool__(self) -> bool:
        # As one writes `bank or …` for a bank that may be None, and not for an empty one.
        return True

    def __reduce__(self) -> tuple[Any, ...]:
        # For workers that are not forked: they open it themselves.
        return partial(Bank, self.path, create=False), ()

    def __iter__(self) -> Iterator[Key]:
        """The keys, in the order in which they were first stored; of a hashed bank `UserHash`es and names."""
        if self.hashed:
            for page in self._store.index.pages():
                yield from ((UserHash(entry.user.hex()), entry.name) for entry in page)
        else:
            for entry, facts in self._described():
                yield self._user(entry, facts), entry.name

    def __contains__(self, key: object) -> bool:
        try:
            address = self._address(key)
        except SteerError:
            return False
        return bool(self._store.index.find([address]))

    def __getitem__(self, key: Key) -> UserState:
        """The state of a user under a name.

        Raises:
            UnknownUser: there is none; the message says what there is.
            SteerError: the file that holds it is damaged; the message names it. Other states stay readable.
        """
        address = self._address(key)
        if (state := self._load({address: key[0]})[address]) is None:
            raise self._unknown(*key)
        return state

    def users(self) -> list[str]:
        """All users, sorted."""
        return sorted({user for user, _ in self})

    def names(self) -> list[str]:
        """All names under which anybody has a state, sorted."""
        return self._store.index.names()

    def names_of(self, user: str) -> list[str]:
        """The names under which a user has a state, sorted; none for a user who is not known."""
        return self._store.index.names_of(self._hash(user))

    def rows(self, user: str | None = None) -> Iterator[Row]:
        """A summary of every entry, or of every entry of one user, without reading tensors.

        Raises:
            SteerError: some of them are damaged, after all others have been given.
        """
        addresses = None if user is None else [self._address((user, name)) for name in self.names_of(user)]
        for entry, facts in self._described(addresses):
            yield self._row(entry, facts)

    def templates(self) -> list[tuple[str, Provenance, dict[str, tuple[int, ...]]]]:
        """What may occur in a batch: name, provenance and shapes of one state of each kind.

        States are of one kind when name, method and its version, model, sites and artifact agree. The rest of the
        provenance, and the shapes, are those of the kind's oldest entry that is not damaged.
        """
        index = self._store.index
        return self._store.settled(index.examples, lambda found: [self._template(few) for few in found])

    def get_many(self, users: Sequence[str | None], name: str) -> list[UserState | None]:
        """The states of a batch, all from one moment.

        Returns:
            One item per user: None where the user is None or has no state of that name.

        Raises:
            SteerError: a state is damaged; the message names the file and the user.
        """
        addresses = self._addresses(users, name)
        states = self._load({address: user for address, user in zip(addresses, users, strict=True) if address})
        return [None if address is None else states[address] for address in addresses]

    def gatherer(self, name: str, device: str | torch.device = "cpu") -> Callable[..., Rows]:
        """A function that reads the tensors of a batch of users at once: `bank.gatherer("style")(["ada", None])`.

        It leaves out what describes the states and costs the same whatever the number of users in the bank: for those
        who bind tensors themselves. For a GPU it keeps a pinned buffer, so make it once. `into=rows` reads into the
        memory of an earlier result that is no longer needed.

        Args:
            name: of the states.
            device: where the tensors are to be.
        """
        gather = Gatherer(self._store, _checked_name(name), torch.device(device))
        return lambda users, into=None: gather(self._addresses(users, name), into)

    # Writing.

    def __setitem__(self, key: Key, state: UserState) -> None:
        """Stores one state; many at once are much faster with `update`."""
        self.update({key: state})

    def __delitem__(self, key: Key) -> None:
        """Deletes one state, and erases it; many at once are much faster with `delete` or `forget`."""
        self.delete([key])

    def update(self, states: Mapping[Key, UserState], *, conflict: Conflict = "replace") -> int:
        """Stores many states in one commit; returns how many.

        Args:
            states: by user and name.
            conflict: what to do where there is a state already: "replace" and erase it, "keep" it, or store nothing at
                all and raise an "error".

        Raises:
            SteerError: a key or a state cannot be stored, or the disk is full; then nothing is. Or what was replaced
                could not be erased yet, and the message says so.
        """
        _require_choice(conflict)
        packed = [self._packed(key, state) for key, state in states.items()]
        if len({state.address for state in packed}) < len(packed):
            raise SteerError("a user is given twice, by id and by hash")
        return writing.put(self._store, packed, conflict) if packed else 0

    def delete(self, keys: Iterable[Key]) -> None:
        """Deletes states in one commit. When it returns, none of their bytes is in any file of the bank.

        Raises:
            UnknownUser: one of them does not exist. Then nothing is deleted.
        """
        wanted = {self._address(key): key for key in keys}

        def choose(writer: Writer) -> list[Entry]:
            entries = writer.find(wanted)
            if missing := wanted.keys() - {entry.address for entry in entries}:
                raise self._unknown(*wanted[missing.pop()])
            return entries

        writing.delete(self._store, choose)

    def forget(self, users: Iterable[str]) -> int:
        """Deletes all states of some users, as `delete` does; returns how many there were."""
        _require_several(users)
        hashes = {self._hash(user) for user in users}
        return writing.delete(self._store, lambda writer: writer.find_users(list(hashes)))

    def merge(
        self,
        other: Bank,
        *,
        conflict: Conflict = "error",
        on_progress: Progress | None = None,
        on_damage: Callable[[Damage], None] | None = None,
    ) -> int:
        """Copies the states and artifacts of another bank; returns how many states.

        Some thousand states are one commit; if it is interrupted, go on with `conflict="keep"`.

        Args:
            other: stays as it is.
            conflict: what to do where both have a state: nothing at all and raise, "keep" one's own, or "replace" it.
            on_progress: told what share of the states is done.
            on_damage: told of each state that is left out because it cannot be read; None to raise instead.

        Raises:
            SteerError: there are conflicts; a state is damaged; or only hashes of the other's users are known, and this
                bank has another salt.
        """
        _require_choice(conflict)
        if other.hashed and not (self.hashed and self._store.manifest == other._store.manifest):
            raise SteerError(
                f"{other.path}: keeps only hashes of user ids, so it can be merged only into a hashed bank with the "
                "same salt, such as a copy of it"
            )
        for fault in other._store.index.faults():
            _tell(Damage(f"{other.path / folder.INDEX}: damaged ({fault}); states could be left out"), on_damage)
        if conflict == "error" and len(self):
            self._require_apart(other, on_damage)
        for digest in artifacts.stored(other.path / folder.ARTIFACTS):
            try:
                self.put_artifact(other.artifact(digest))
            except Damage as damage:
                _tell(damage, on_damage)
        copied, done, total = 0, 0, max(len(other), 1)
        for page in _pages(other._states(on_damage)):
            copied += self.update(page, conflict=conflict)
            done += len(page)
            if on_progress is not None:
                on_progress(min(done / total, 1.0))
        return copied

    def copy(
        self,
        path: str | Path,
        *,
        hashed: bool = False,
        on_progress: Progress | None = None,
        on_damage: Callable[[Damage], None] | None = None,
    ) -> Bank:
        """A copy of the bank, packed, at a place where nothing is; it is there when everything is in it.

        It has the salt of this one, so that hashes mean the same users in both. With `hashed` it keeps only hashes of
        user ids, also where this one has ids. The rest is as for `merge`.
        """
        target, manifest = Path(path).resolve(), self._store.manifest
        with draft_folder(target) as draft:
            folder.open_or_create(draft, create=True, hashed=hashed or manifest.hashed, salt=manifest.salt)
            with Bank(draft) as bank:
                # What is deleted and stored again meanwhile comes twice.
                bank.merge(self, conflict="replace", on_progress=on_progress, on_damage=on_damage)
                bank.compact()
        return Bank(target, create=False)

    # Upkeep.

    def verify(self, on_progress: Progress | None = None) -> list[Fault]:
        """Reads everything there is and compares it with its checksums; returns what is wrong, nothing if all is well.

        Others may read meanwhile, and write but for the moment in which the index is checked.
        """
        return upkeep.verify(self._store, on_progress)

    def compact(self, on_progress: Progress | None = None) -> Compaction:
        """Packs small and sparse segments into large ones, and gives the space of what was deleted back to the disk.

        Others may read and write meanwhile. If it is interrupted, what is done is done.
        """
        return upkeep.compact(self._store, on_progress)

    # Artifacts.

    def put_artifact(self, artifact: Artifact) -> str:
        """Stores what a method shares between users; returns its hash, under which `artifact` finds it."""
        file = self._artifact_file(artifact.hash)
        if not artifacts.is_sound(file, artifact.hash):
            with writing.writing(self._store):
                artifacts.save(file, artifact)
        return artifact.hash

    def has_artifact(self, digest: str) -> bool:
        """Whether the bank holds the artifact of that hash."""
        return artifacts.is_hash(digest) and self._artifact_file(digest).is_file()

    def artifact(self, digest: str) -> Artifact:
        """The artifact of that hash, which is verified when it is first read.

        Raises:
            SteerError: the bank has no such artifact, or its file is damaged.
        """
        if not artifacts.is_hash(digest):
            raise SteerError(f"{digest!r} is not the hash of an artifact: expected 64 hexadecimal digits")
        if digest not in self._artifacts:
            if not self.has_artifact(digest):
                raise SteerError(f"{self.path}: has no artifact {digest}; store it with `put_artifact`")
            self._artifacts[digest] = artifacts.load(self._artifact_file(digest), digest)
        return self._artifacts[digest]

    def _artifact_file(self, digest: str) -> Path:
        return self.path / folder.ARTIFACTS / f"{digest}.safetensors"

    # Keys.

    def _address(self, key: object) -> Address:
        if not isinstance(key, tuple) or len(key) != 2:
            raise SteerError(f"a bank is indexed by user and name, such as bank['alice', 'style'], not by {key!r}")
        user, name = key
        return self._hash(user), _checked_name(name)

    def _addresses(self, users: Sequence[str | None], name: str) -> list[Address | None]:
        _require_several(users)
        _checked_name(name)
        return [None if user is None else (self._hash(user), name) for user in users]

    def _hash(self, user: object) -> bytes:
        if isinstance(user, UserHash):
            if not self.hashed or not _HASHED.fullmatch(user):
                raise SteerError(
                    f"{user!r} is the hash of a user id; only a bank that keeps hashes takes 32 such digits"
                )
            return bytes.fromhex(user)
        return self._store.manifest.hash(_checked_user(user))

    def _user(self, entry: Entry, facts: Facts) -> str:
        return UserHash(entry.user.hex()) if facts.user is None else facts.user

    def _packed(self, key: Key, state: UserState) -> Packed:
        address = self._address(key)
        user, name = key
        owner = f"state {name!r} of user {user!r}"
        if not isinstance(state, UserState):
            raise SteerError(f"{key}: expected a UserState, found {type(state).__name__}")
        try:
            require_storable(state.provenance)
            layout = Layout.of(state.tensors)
            state.require_finite()
        except SteerError as error:
            raise SteerError(f"{owner}: {error}") from error
        source = state.provenance
        kind = Kind(name, source.method, source.version, source.model, tuple(source.sites), source.artifact)
        facts = Facts.of(None if self.hashed else user, state).to_bytes(owner)
        return Packed(address, kind, layout, layout.pack(state.tensors), facts)

    # Entries.

    def _load(self, users: Mapping[Address, str | None]) -> dict[Address, UserState | None]:
        """The states at some addresses, whose users are given for messages; None where there is none."""

        def read(found: Mapping[Address, Entry]) -> dict[Address, UserState | None]:
            return {address: self._state(user, found.get(address)) for address, user in users.items()}

        return self._store.settled(lambda: self._store.index.find(users), read)

    def _state(self, user: str | None, entry: Entry | None) -> UserState | None:
        try:
            return None if entry is None else self._store.state(entry)
        except Damage as damage:
            name = "" if entry is None else entry.name
            raise Damage(f"state {name!r} of user {user!r} cannot be read: {damage}") from damage

    def _described(self, addresses: Sequence[Address] | None = None) -> Iterator[tuple[Entry, Facts]]:
        """Entries with their facts; raises SteerError at the end if there were damaged ones."""
        index, damages = self._store.index, []
        pages = index.pages() if addresses is None else [list(index.find(addresses).values())]
        for entry in itertools.chain.from_iterable(pages):
            try:
                described = self._store.settled_entry(entry, lambda found: (found, self._store.facts(found)))
            except Damage as damage:
                damages.append(damage)
            else:
                if described is not None:
                    yield described
        if damages:
            raise SteerError(
                f"{len(damages)} entries cannot be read, the first because: {damages[0]}. `steer bank verify "
                f"{self.path}` lists them"
            )

    def _states(self, on_damage: Callable[[Damage], None] | None) -> Iterator[tuple[Key, UserState]]:
        """All keys and states, in order; read entry by entry, so also where looking them up by key would fail."""

        def read(entry: Entry) -> tuple[Key, UserState]:
            facts = self._store.facts(entry)
            return (self._user(entry, facts), entry.name), self._store.described(entry, facts)

        for page in self._store.index.pages(on_damage):
            for entry in page:
                try:
                    found = self._store.settled_entry(entry, read)
                except Damage as damage:
                    _tell(damage, on_damage)
                else:
                    if found is not None:
                        yield found

    def _require_apart(self, other: Bank, on_damage: Callable[[Damage], None] | None) -> None:
        for entries in other._store.index.pages(on_damage):
            keys: list[Key] = []
            for entry in entries:
                # What is damaged is not merged, and told of when the rest is.
                with suppress(Damage):
                    keys.append((other._user(entry, other._store.facts(entry)), entry.name))
            own = self._store.index.find(map(self._address, keys))
            for user, name in keys:
                if self._address((user, name)) in own:
                    raise SteerError(
                        f"both banks have a state {name!r} of {user!r}; say with conflict (--conflict) whether to keep "
                        "this bank's, or to replace it by the other's"
                    )

    def _template(self, entries: Sequence[Entry]) -> tuple[str, Provenance, dict[str, tuple[int, ...]]]:
        damage = None
        for entry in entries:
            try:
                source = self._store.facts(entry).provenance(self._store.index.kind(entry.kind))
                shapes = {slot.name: slot.shape for slot in self._store.index.layout(entry.layout).slots}
                return entry.name, source, shapes
            except Damage as error:
                damage = damage or error
        assert damage is not None
        raise damage

    def _row(self, entry: Entry, facts: Facts) -> Row:
        kind, layout = self._store.index.kind(entry.kind), self._store.index.layout(entry.layout)
        return Row(
            user=self._user(entry, facts),
            name=entry.name,
            method=kind.method,
            model=None if kind.model is None else kind.model.name,
            sites=kind.sites,
            tensors={slot.name: (slot.dtype, slot.shape) for slot in layout.slots},
            nbytes=layout.nbytes,
            records=len(facts.records),
        )

    def _unknown(self, user: str, name: str) -> UnknownUser:
        own = ", ".join(map(repr, self.names_of(user)))
        has = f"has only {own}" if own else "has no states at all"
        others = f"other users have {name!r}" if name in self.names() else f"nobody has {name!r}"
        return UnknownUser(f"{self.path}: no state {name!r} for user {user!r}, who {has}; {others}")


def _tell(damage: Damage, on_damage: Callable[[Damage], None] | None) -> None:
    if on_damage is None:
        raise damage
    on_damage(damage)


def _pages(states: Iterable[tuple[Key, UserState]]) -> Iterator[dict[Key, UserState]]:
    """States in groups of some thousand, or of fewer that are large."""
    page: dict[Key, UserState] = {}
    nbytes = 0
    for key, state in states:
        page[key] = state
        nbytes += state.nbytes
        if len(page) == _TOGETHER or nbytes > _TOGETHER_BYTES:
            yield page
            page, nbytes = {}, 0
    if page:
        yield page


def _checked_name(name: object) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise SteerError(f"{name!r} cannot name a state: expected 1 to 64 letters, digits, dots, dashes or underscores")
    return name


def _require_choice(conflict: str) -> None:
    if conflict not in get_args(Conflict):
        raise SteerError(f"conflict={conflict!r} is not one of {', '.join(get_args(Conflict))}")


def _require_several(users: object) -> None:
    if isinstance(users, str):
        raise SteerError(f"several users are expected here; write [{users!r}]")


def _checked_user(user: object) -> bytes:
    """A user id in UTF-8."""
    if not isinstance(user, str) or not user:
        raise SteerError(f"{user!r} cannot be a user id: expected text that is not empty")
    if "\0" in user:
        raise SteerError(f"{user!r} cannot be a user id: it holds a NUL character")
    try:
        encoded = user.encode()
    except UnicodeEncodeError:
        raise SteerError(f"{user!r} cannot be a user id: it is not valid Unicode") from None
    if len(encoded) > _USER_BYTES:
        raise SteerError(
            f"{user[:40]!r}… cannot be a user id: it has {len(encoded)} bytes, at most {_USER_BYTES} are allowed"
        )
    return encoded
