"""What shared weights are trained on: a record to predict, with the records its user had written before."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import TYPE_CHECKING

from torch.utils.data import Dataset

from steer.errors import SteerError
from steer.history import History, Record
from steer.read import Span, record_span

if TYPE_CHECKING:
    from steer.model import FrozenLM

# Of the histories, the record's place among the user's, and which of the copies: 0 has the whole history.
Place = tuple[int, int, int]


@dataclass(frozen=True)
class Example:
    """A record to predict.

    Attributes:
        history: the records of the same user that stand before it, which it may be conditioned on.
        record: what is to be predicted.
        span: its tokens, and which of them are the response.
    """

    history: History
    record: Record
    span: Span


@dataclass(frozen=True, eq=False)
class Examples(Dataset[Example]):
    """Examples of many users, put together when they are asked for.

    Attributes:
        histories: of the users.
        spans: tokens of the records to predict, by user and place.
        places: the examples.
        last: how many of the earlier records an example has at most, the newest ones; all if None.
        seed: of what is left out of the histories of copies.
    """

    histories: Sequence[History]
    spans: Mapping[tuple[int, int], Span]
    places: Sequence[Place]
    last: int | None = None
    seed: int = 0

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Example:
        user, position, copy = self.places[index]
        whole = self.histories[user]
        record = whole.records[position]
        first = 0 if self.last is None else max(position - self.last, 0)
        earlier = whole.records[first:position]
        if copy:
            # By name, so that an example does not depend on what else there is.
            earlier = _thinned(earlier, Random(f"{self.seed} {copy} {record.user_id} {record.id}"))
        return Example(History(whole.user_id, earlier), record, self.spans[user, position])

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    @property
    def lengths(self) -> list[int]:
        """How many tokens of each example are run."""
        return [self.spans[user, position].end for user, position, _ in self.places]

    @cached_property
    def digest(self) -> str:
        """SHA-256 over all that the examples are made of, as 64 hexadecimal digits."""
        digest = hashlib.sha256(repr((self.last, self.seed, list(self.places))).encode())
        for user in sorted({user for user, _, _ in self.places}):
            for record in self.histories[user]:
                digest.update(repr((record.user_id, record.id, record.prompt, record.response)).encode())
        for place in sorted({(user, position) for user, position, _ in self.places}):
            digest.update(repr((place, self.spans[place].start, list(self.spans[place].ids))).encode())
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Split:
    """Examples to train on, and two kinds to validate with.

    Attributes:
        train: earlier records of users.
        later: later records of the same users. They may be conditioned on the earlier ones and on one another.
        strangers: records of users of whom nothing was trained on.
        known: what may be looked at in training: the users of `train`, without their later records.
    """

    train: Examples
    later: Examples
    strangers: Examples
    known: Sequence[History]

    @property
    def validation(self) -> dict[str, Examples]:
        """Those of the two kinds that there are, by name."""
        kinds = {"later": self.later, "strangers": self.strangers}
        return {name: examples for name, examples in kinds.items() if len(examples)}


def split_examples(
    lm: FrozenLM,
    histories: Sequence[History],
    *,
    earlier: int = 1,
    last: int | None = None,
    copies: int = 0,
    later: float = 0.1,
    strangers: float = 0.1,
    max_tokens: int = 1024,
    seed: int = 0,
) -> Split:
    """Makes an example of every record that enough others stand before, and sets some aside for validation.

    An example is conditioned on what stands before its record in the user's history, never on the record itself nor on
    what came after it. Where records have the same time, their order in the history counts.

    Args:
        lm: the model, whose tokens are trained on.
        histories: of the users; those who wrote too little give no example.
        earlier: how many earlier records an example has at least; 0 also predicts users' first records, from nothing.
        last: how many it has at most, the newest ones.
        copies: further copies of each example to train on, from whose history a random 1 to 50 % of the records, and
            one more, are left out if it has more than two. PPlug's code makes ten; its paper does not mention them
            (arXiv 2409.11901; rucliujn/PPlug).
        later: share of each known user's examples, the last ones, that is set aside.
        strangers: share of the users that is set aside, drawn at random.
        max_tokens: of a record, with its prompt.
        seed: of who is set aside, and of what copies leave out.

    Raises:
        SteerError: there is nothing to train on, two histories are of the same user, a record is too short, or an
            argument is out of its range.
    """
    _require_sensible(earlier, last, copies, later, strangers)
    if len({history.user_id for history in histories}) < len(histories):
        names = [history.user_id for history in histories]
        twice = next(name for name in names if names.count(name) > 1)
        raise SteerError(f"there are two histories of {twice!r}; make them one, or one would tell of the other")
    # The order of the file is not to decide who is set aside.
    users = sorted((history for history in histories if len(history) > earlier), key=lambda history: history.user_id)
    if not users:
        raise SteerError(f"nobody has {earlier + 1} records: the last of them is to be predicted from those before it")
    unknown = set(Random(seed).sample(range(len(users)), _part(strangers, len(users))))
    cuts = [len(history) - _part(later, len(history) - earlier) for history in users]
    known = [users[user].first(cut) for user, cut in enumerate(cuts) if user not in unknown]
    kinds: dict[str, list[Place]] = {"train": [], "later": [], "strangers": []}
    for user, (history, cut) in enumerate(zip(users, cuts, strict=True)):
        for position in range(earlier, len(history)):
            kind = "strangers" if user in unknown else "train" if position < cut else "later"
            kinds[kind] += [(user, position, copy) for copy in range(copies + 1 if kind == "train" else 1)]
    spans = {
        (user, position): record_span(lm, history.records[position], max_tokens=max_tokens)
        for user, history in enumerate(users)
        for position in range(earlier, len(history))
    }
    sets = {kind: Examples(users, spans, places, last, seed) for kind, places in kinds.items()}
    return Split(**sets, known=known)


def _part(share: float, count: int) -> int:
    """A share of so many things, at least one of them and not all, if there are two or more."""
    return min(max(round(share * count), 1), count - 1) if share and count > 1 else 0


def _thinned(records: tuple[Record, ...], random: Random) -> tuple[Record, ...]:
    if len(records) <= 2:
        return records
    count = int(len(records) * random.randint(1, 50) / 100) + 1
    gone = set(random.sample(range(len(records)), count))
    return tuple(record for i, record in enumerate(records) if i not in gone)


def _require_sensible(earlier: int, last: int | None, copies: int, later: float, strangers: float) -> None:
    if earlier < 0 or copies < 0:
        raise SteerError(f"earlier={earlier} and copies={copies} are counts; they cannot be negative")
    if last is not None and last < max(earlier, 1):
        raise SteerError(f"last={last} leaves an example fewer earlier records than it is to have: {max(earlier, 1)}")
    for name, share in (("later", later), ("strangers", strangers)):
        if not 0 <= share < 1:
            raise SteerError(f"{name}={share} is not a share to set aside; give 0 for none, or such as 0.1")
