"""Pairs: two answers to one prompt, one that shows a behaviour and one that does not."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from steer.errors import SteerError
from steer.history import History


@dataclass(frozen=True)
class Pair:
    """Two answers to a prompt: `positive` is the one to steer towards."""

    prompt: str
    positive: str
    negative: str


def pairs_of(history: History, rejected: str = "rejected") -> list[Pair]:
    """A person's choices: each record's response, and the answer it was preferred to, from the record's own keys.

    Args:
        history: records with prompts.
        rejected: the key that holds the other answer.

    Raises:
        SteerError: the history is empty, or a record has no prompt or no text under that key.
    """
    if not len(history):
        raise SteerError(f"{history.user_id!r} has no records to take choices from")
    pairs = []
    for record in history:
        other = record.fields.get(rejected)
        if record.prompt is None or not isinstance(other, str) or not other.strip():
            lacks = "prompt" if record.prompt is None else f"text in {rejected!r}"
            raise SteerError(
                f"record {record.id!r} of {record.user_id!r} has no {lacks}; a choice is a prompt, the response that "
                "was preferred, and the other one"
            )
        pairs.append(Pair(record.prompt, record.response, other))
    return pairs


def read_pairs(path: str | Path) -> list[Pair]:
    """Reads CAA's data sets: a JSON list of objects with `question`, `answer_matching_behavior` (the positive answer)
    and `answer_not_matching_behavior`.

    Raises:
        SteerError: the file is missing, or is no such list; the message names the item.
    """
    try:
        items = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise SteerError(f"{path}: expected a JSON list of pairs ({error})") from None
    keys = "question", "answer_matching_behavior", "answer_not_matching_behavior"
    if not isinstance(items, list) or not items:
        raise SteerError(f"{path}: expected a JSON list of pairs")
    for number, item in enumerate(items):
        if not isinstance(item, dict) or not all(isinstance(item.get(key), str) and item[key] for key in keys):
            raise SteerError(f"{path}: item {number} is no pair; it needs {', '.join(keys)}")
    return [Pair(*(item[key] for key in keys)) for item in items]
