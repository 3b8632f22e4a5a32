"""The texts of `steer.experiments.soft_prefixes`: three sets of histories, read and split by fixed rules."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steer.errors import SteerError
from steer.history import History, Record, read_histories
from steer.read import response_span

if TYPE_CHECKING:
    from steer.model import FrozenLM

# Later records of a user are the last ten, or the last third of a short history.
_LATER, _LATER_SHARE = 10, 3
# How much of a passage is told: the first quarter of its words, up to so many.
_BEGINNING = 24


@dataclass(frozen=True)
class Source:
    """How one set is read.

    Attributes:
        folder: with its `texts.jsonl`.
        order: key by which a history is in time order; of passages, their order in the author's books.
        query: key of what a record is about, without any instruction; None where only the text's beginning tells.
        instruction: makes a prompt of it; None where it is one.
    """

    folder: str
    order: str
    query: str | None
    instruction: str | None = None


SETS = {
    "commits": Source("git_commits", "time", "title", "Write the body of a Git commit message titled: {query}"),
    "answers": Source("stackexchange_answers", "date", "prompt"),
    "passages": Source("public_domain_authors", "seq", None, "Continue this text: {query}"),
}


@dataclass(frozen=True)
class User:
    """One person's records, as they are used.

    Attributes:
        set: which one of `SETS`.
        known: whether methods may train on the earlier records; of the others they see nothing before `fit`.
        earlier: what states are fitted on, and texts are chosen from.
        later: what is scored.
    """

    set: str
    known: bool
    earlier: History
    later: History

    @property
    def name(self) -> str:
        """Of the user, in this set."""
        return self.earlier.user_id

    @property
    def split(self) -> str:
        """In words."""
        return "known" if self.known else "unseen"

    def first(self, records: int | None) -> User:
        """With the oldest of the later records only, where a number is given."""
        return replace(self, later=self.later.first(records))


def read_users(folder: Path, *, unseen: float = 1 / 3, users: int | None = None) -> list[User]:
    """All users of all sets that the folder holds; nothing here depends on a model, or on results.

    Users of a set are in the order of a hash of their names. Those at the front, a share of `unseen`, are never trained
    on. Of `users`, where given, that share is kept.

    Raises:
        SteerError: the folder holds none of the sets, a file is none of records, or a record lacks what its set has.
    """
    found = []
    for name, source in SETS.items():
        path = folder / source.folder / "texts.jsonl"
        if path.is_file():
            histories = [_prepared(source, history) for _, history in read_histories(path)]
            histories.sort(key=lambda history: _hash(f"soft prefixes|{name}|{history.user_id}"))
            border = round(unseen * len(histories))
            sides = {False: histories[:border], True: histories[border:]}
            if users is not None:
                few = round(unseen * users)
                sides = {False: sides[False][:few], True: sides[True][: users - few]}
            found += [_split(name, known, history) for known, own in sides.items() for history in own]
    if not found:
        raise SteerError(f"{folder}: there is no {', '.join(f'{s.folder}/texts.jsonl' for s in SETS.values())} in it")
    return found


def _split(name: str, known: bool, history: History) -> User:
    earlier, later = history.split(min(_LATER, len(history) // _LATER_SHARE))
    if not len(later):
        raise SteerError(f"{history.user_id!r} of {name} has {len(history)} records, too few to hold some back")
    return User(name, known, earlier, later)


def _prepared(source: Source, history: History) -> History:
    """Records with prompts, in time order; `text` is all that was written and `query` what is known of it."""
    records = []
    for record in sorted(history, key=lambda record: _field(record, source.order)):
        if source.query is None:
            query, response = begun(record.response)
        else:
            query, response = str(_field(record, source.query)), record.response
        prompt = query if source.instruction is None else source.instruction.format(query=query)
        fields = {"query": query, "text": record.response}
        records.append(Record(record.user_id, response, prompt, record.id, _field(record, source.order), fields))
    return History(history.user_id, tuple(records))


def begun(text: str) -> tuple[str, str]:
    """The beginning of a text that has no prompt, and the rest, which is then its response."""
    words = text.split()
    beginning, rest = "", text
    for word in words[: min(_BEGINNING, max(len(words) // 4, 1))]:
        cut = rest.index(word) + len(word)
        beginning, rest = beginning + rest[:cut], rest[cut:]
    return beginning.strip(), rest.strip()


def _field(record: Record, key: str) -> Any:
    if key not in record.fields:
        has = ", ".join(record.fields)
        raise SteerError(f"record {record.id!r} of {record.user_id!r} has no {key!r}, it has {has}")
    return record.fields[key]


def before(history: History, record: Record) -> History:
    """What of a history was there when a record was written: all of it, unless the record is in it itself."""
    ids = [own.id for own in history]
    inside = record.user_id == history.user_id and record.id in ids
    return history.first(ids.index(record.id)) if inside else history


def shortened(lm: FrozenLM, users: Sequence[User], tokens: int) -> list[User]:
    """The same with responses of so many tokens at most, for all that is fitted and scored."""
    return [
        replace(user, earlier=_shortened(lm, user.earlier, tokens), later=_shortened(lm, user.later, tokens))
        for user in users
    ]


def _shortened(lm: FrozenLM, history: History, tokens: int) -> History:
    return History(history.user_id, tuple(replace(r, response=cut(lm, r.response, tokens)) for r in history))


def cut(lm: FrozenLM, text: str, tokens: int) -> str:
    """As much of a text as its first tokens hold."""
    assert lm.tokenizer is not None
    ends = lm.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return text if len(ends) <= tokens else text[: ends[tokens - 1][1]]


def strangers(users: Sequence[User], user: User, count: int) -> list[User]:
    """Others of the same set whose texts or states stand in for a user's own, the same ones for every arm.

    From the same site where there are such, and from the same side of the split, so that neither the subject nor the
    training tells them from the user.
    """

    def far(other: User) -> tuple[bool, bool, str]:
        return _site(other) != _site(user), other.known != user.known, _hash(f"{user.name}|{other.name}")

    return sorted((u for u in users if u.set == user.set and u.name != user.name), key=far)[:count]


def _site(user: User) -> str:
    """Answers name the site before the user's number; the other sets have none."""
    return user.name.partition(":")[0] if ":" in user.name else ""


def digest(users: Sequence[User]) -> str:
    """Tells the same users, with the same texts and splits, from others."""
    return _hash(repr(users))[:16]


def statistics(lm: FrozenLM, users: Sequence[User]) -> list[dict[str, Any]]:
    """Users, records and tokens of each set and side; of prompts the mean, with the model's template."""
    return list(_statistics(lm, users))


def _statistics(lm: FrozenLM, users: Sequence[User]) -> Iterator[dict[str, Any]]:
    sides: Mapping[str, bool] = {"known": True, "unseen": False}
    for name in dict.fromkeys(user.set for user in users):
        for side, known in sides.items():
            chosen = [user for user in users if (user.set, user.known) == (name, known)]
            earlier, later = (
                [response_span(lm, r.response, r.prompt) for user in chosen for r in getattr(user, part)]
                for part in ("earlier", "later")
            )
            if later:
                yield {
                    "set": name,
                    "split": side,
                    "users": len(chosen),
                    "earlier": len(earlier),
                    "earlier tokens": sum(span.end - span.start for span in earlier),
                    "later": len(later),
                    "later tokens": sum(span.end - span.start for span in later),
                    "prompt tokens": sum(span.start for span in later) / len(later),
                }


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
