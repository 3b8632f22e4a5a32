"""Prefixes that depend on what each row is asked: blank until there are prompts, and plain ones from then on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from steer.inject.key_values import KeyValueEdit, PromptKeyValues
from steer.inject.prefix import PrefixEdit, PromptPrefix

T = TypeVar("T")


def asks(edits: Iterable[object]) -> bool:
    """Whether one of them depends on the rows' prompts."""
    return any(isinstance(edit, PromptPrefix | PromptKeyValues) for edit in edits)


def with_prompts(edits: Iterable[T], prompts: Sequence[str]) -> list[T | PrefixEdit | KeyValueEdit]:
    """The same edits, with those prefixes computed that depend on the rows' prompts."""
    return [edit.of(prompts) if isinstance(edit, PromptPrefix | PromptKeyValues) else edit for edit in edits]


def without_prompts(edits: Iterable[T]) -> list[T | PrefixEdit | KeyValueEdit]:
    """The same edits, with zeros in the place of those prefixes."""
    return [edit.blank if isinstance(edit, PromptPrefix | PromptKeyValues) else edit for edit in edits]
