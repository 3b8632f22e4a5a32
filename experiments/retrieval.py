"""A person's earlier texts as plain text in the prompt: which ones, and in what words.

BM25 is that of the package `bm25s` (Lù, "BM25S: Orders of magnitude faster lexical search via eager sparse scoring",
2024), with its defaults; dense similarity is the cosine between a sentence encoder's embeddings. Both compare what a
record is about, without any instruction, with what earlier records are about and say.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from steer.errors import SteerError
from steer.history import History, Record

if TYPE_CHECKING:
    from steer.model import Prompt

_INSTALL = "pip install 'steer-toolkit[retrieval]'"


class Ranker(Protocol):
    """Says how well each of somebody's records fits a further one."""

    def __call__(self, history: History, record: Record) -> Sequence[float]:
        """One number a record of the history, higher for those that fit better."""


def chosen(ranker: Ranker, history: History, record: Record, count: int) -> list[Record]:
    """The `count` records that fit best, the best one first; of equal ones the newest."""
    scores = ranker(history, record) if len(history) else []
    order = sorted(range(len(history)), key=lambda i: (-scores[i], -i))
    return [history.records[i] for i in order[:count]]


def newest(history: History, record: Record) -> Sequence[float]:
    """The last ones."""
    return range(len(history))


def drawn(history: History, record: Record) -> Sequence[float]:
    """Any, the same ones each time."""
    return [float(int(hashlib.sha256(f"{record.id}|{own.id}".encode()).hexdigest()[:8], 16)) for own in history]


class BM25:
    """Ranks by the words that two texts have in common. Raises SteerError if the package bm25s is missing."""

    def __init__(self) -> None:
        try:
            import bm25s
        except ImportError:
            raise SteerError(f"BM25 needs the package bm25s: {_INSTALL}") from None
        self._package = bm25s
        self._indices: dict[History, Any] = {}

    def __call__(self, history: History, record: Record) -> Sequence[float]:
        if history not in self._indices:
            self._indices[history] = self.index(history)
        words = set(self._indices[history].vocab_dict)
        # Words that no text has would be refused, and the ones of a query count each time that they occur.
        known = [word for word in self._words([query_of(record)])[0] if word in words]
        return self._indices[history].get_scores(known).tolist() if known else [0.0] * len(history)

    def index(self, history: History) -> Any:
        """What is kept of a history."""
        index = self._package.BM25()
        index.index(self._words([document_of(own) for own in history]), show_progress=False)
        return index

    def _words(self, texts: Sequence[str]) -> list[list[str]]:
        return self._package.tokenize(texts, stopwords="en", return_ids=False, show_progress=False)


def query_of(record: Record) -> str:
    """What a record is about, as far as it is known before it is written."""
    return record.fields["query"]


def document_of(record: Record) -> str:
    """What a record is about, and what was written."""
    query, text = record.fields["query"], record.fields["text"]
    return text if text.startswith(query) else f"{query}\n\n{text}"


def with_texts(prompt: str, texts: Sequence[str]) -> str:
    """One message that shows the texts, the first of which stands nearest to the prompt."""
    shown = [f"Text {number}:\n{text}" for number, text in enumerate(reversed(texts), start=1)]
    return "\n\n".join(
        ["These are texts that I wrote before.", *shown, "Now write the next text in my name, as I would.", prompt]
    )


def with_turns(prompt: str, texts: Sequence[tuple[str, str]]) -> Prompt:
    """The same as a dialogue, in which the model wrote the texts in answer to their prompts."""
    turns = [*((asked, text) for asked, text in reversed(texts)), (prompt, None)]
    return [
        {"role": role, "content": content}
        for asked, text in turns
        for role, content in (("user", asked), ("assistant", text))
        if content is not None
    ]
