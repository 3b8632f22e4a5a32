"""The other side of a contrast: what anybody might have written where a user wrote their own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steer.cache import answers_cache, head_key, if_possible, key_of, model_key
from steer.errors import SteerError
from steer.history import Record

if TYPE_CHECKING:
    from steer.model import FrozenLM

NEUTRAL = "model, population, field:NAME or file:PATH"
_ANSWERS_AT_ONCE = 32


class Neutral:
    """A source of neutral responses.

    Args:
        source: "model", the frozen model's own greedy answers to the records' prompts; "field:NAME", a key of the
            records; "file:PATH", JSONL lines with `id` and `response`; or "population", which has no texts.
        tokens: length of the model's answers.

    Raises:
        SteerError: it is none of these.
    """

    def __init__(self, source: str, tokens: int) -> None:
        self.kind, _, self._argument = source.partition(":")
        if self.kind not in ("model", "population", "field", "file") or (self.kind in ("field", "file")) != bool(
            self._argument
        ):
            raise SteerError(f"neutral={source!r} is none of {NEUTRAL}")
        self._tokens = tokens
        self._file: Mapping[str, Any] | None = None

    def require(self, records: Sequence[Record]) -> None:
        """Raises SteerError if some record can have no neutral response, before anything is computed."""
        for record in records:
            whose = f"record {record.id!r} of {record.user_id!r}"
            if self.kind == "model" and record.prompt is None:
                raise SteerError(
                    f"neutral='model' lets the model answer the prompts of {record.user_id!r}, and some records have "
                    "none; give an instruction, or use neutral='population'"
                )
            if self.kind == "field" and not _is_text(record.fields.get(self._argument)):
                raise SteerError(f"{whose} has no text in {self._argument!r}")
            if self.kind == "file" and not _is_text(self._answers.get(record.id)):
                raise SteerError(f"{self._argument} has no response for {whose}")

    def texts(self, lm: FrozenLM, records: Sequence[Record]) -> list[str | None]:
        """A response to each record's prompt, or None where the model answers nothing."""
        if self.kind == "field":
            return [record.fields[self._argument] for record in records]
        if self.kind == "file":
            return [self._answers[record.id] for record in records]
        answers = own_answers(lm, [record.prompt or "" for record in records], self._tokens)
        return [answer if answer.strip() else None for answer in answers]

    @property
    def _answers(self) -> Mapping[str, Any]:
        if self._file is None:
            self._file = _read_answers(Path(self._argument))
        return self._file


def own_answers(lm: FrozenLM, prompts: Sequence[str], tokens: int) -> list[str]:
    """The frozen model's greedy answers, kept on disk so that a model answers a prompt once.

    Where they cannot be kept, a warning says so.
    """
    ids = [lm.encode(prompt) for prompt in prompts]
    settings = lm.model.generation_config.to_json_string(ignore_metadata=True)
    model = key_of("answer", 1, model_key(lm), head_key(lm), settings, tokens)
    keys = [key_of(model, own) for own in ids]
    cache, known = answers_cache(), dict[str, str]()
    with if_possible("the model's answers"):
        known = {key: value.decode() for key, value in cache.get(keys).items()}
    # Each prompt once, and prompts of like length together.
    missing = sorted({key: own for key, own in zip(keys, ids, strict=True) if key not in known}.items(), key=_length)
    for start in range(0, len(missing), _ANSWERS_AT_ONCE):
        some = dict(missing[start : start + _ANSWERS_AT_ONCE])
        answers = lm.generate(list(some.values()), max_new_tokens=tokens, do_sample=False)
        new = dict(zip(some, answers, strict=True))
        known |= new
        with if_possible("the model's answers"):
            cache.put({key: answer.encode() for key, answer in new.items()})
    return [known[key] for key in keys]


def _length(item: tuple[str, list[int]]) -> int:
    return len(item[1])


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _read_answers(path: Path) -> dict[str, Any]:
    try:
        # Bytes, as lines of text would end at separators that JSON leaves as they are, such as U+2028.
        entries = [json.loads(line) for line in path.read_bytes().splitlines() if line.strip()]
        return {str(entry["id"]): entry["response"] for entry in entries}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SteerError(f"{path}: expected JSONL lines with `id` and `response` ({error})") from None
