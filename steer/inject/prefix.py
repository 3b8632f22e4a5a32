"""Prefix edits: soft tokens per row, written over the embeddings of placeholder tokens in the prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch

from steer.errors import SteerError
from steer.inject.rows import Rows, erase, refill
from steer.kernels import overwrite_rows

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class PrefixEdit:
    """Gives row b the soft tokens `embeddings[b, :lengths[b]]`, in front of its prompt and after a BOS token.

    Soft tokens live in the space of the model's token embeddings, at the scale of that table's rows (after the factor
    that Gemma applies): they are what `inputs_embeds` would hold.
    """

    embeddings: Float[Tensor, "batch slot d"]
    lengths: Int[Tensor, " batch"]

    def __post_init__(self) -> None:
        if int(self.lengths.max()) > self.embeddings.shape[1]:
            raise SteerError(f"a prefix of {int(self.lengths.max())} tokens in room for {self.embeddings.shape[1]}")

    @classmethod
    def from_rows(cls, prefixes: Sequence[Float[Tensor, "_ d"] | None], width: int) -> PrefixEdit:
        """Pads prefixes of different lengths; None is a row without one."""
        rows = [torch.zeros(0, width) if prefix is None else prefix for prefix in prefixes]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        # There must be something to gather from, and a size of 1 is a special case to the compiler, as 0 is.
        padded = torch.nn.functional.pad(padded, (0, 0, 0, max(2 - padded.shape[1], 0)))
        return cls(padded, torch.tensor([len(row) for row in rows]))

    @staticmethod
    def concatenate(edits: Sequence[PrefixEdit]) -> PrefixEdit:
        """One prefix per row out of several, in order."""
        if len(edits) == 1:
            return edits[0]
        width = edits[0].embeddings.shape[2]
        rows = [
            torch.cat([edit.embeddings[row, : int(edit.lengths[row])] for edit in edits])
            for row in range(len(edits[0].lengths))
        ]
        return PrefixEdit.from_rows(rows, width)


@dataclass(frozen=True)
class PromptPrefix:
    """Gives row b the soft tokens `tokens(prompts)[b, :lengths[b]]`, which depend on what it is asked.

    How many they are is known when users are bound, so that the batch can be tokenized. What they are is computed with
    the prompts at hand, once for all tokens of the answers.

    Attributes:
        tokens: from the text of each row's prompt to soft tokens, as `PrefixEdit` has them.
        lengths: of each row; 0 is a row without.
        width: of the soft tokens.
    """

    tokens: Callable[[Sequence[str]], Float[Tensor, "batch slot d"]]
    lengths: Int[Tensor, " batch"]
    width: int

    def of(self, prompts: Sequence[str]) -> PrefixEdit:
        """The prefix for these prompts, one a row."""
        return PrefixEdit(self.tokens(prompts), self.lengths)

    @property
    def blank(self) -> PrefixEdit:
        """As many soft tokens of zeros."""
        return PrefixEdit.from_rows([torch.zeros(int(length), self.width) for length in self.lengths], self.width)


def with_prompts(edits: Sequence[T], prompts: Sequence[str]) -> list[T | PrefixEdit]:
    """The same edits, with those prefixes computed that depend on the rows' prompts."""
    return [edit.of(prompts) if isinstance(edit, PromptPrefix) else edit for edit in edits]


class OverwriteEmbeddings:
    """The prefix edit at work at the `embed` site."""

    def __init__(self, start: int) -> None:
        self.start = start
        self.values: Float[Tensor, "row slot d"] | None = None
        self.lengths: Int[Tensor, " row"] | None = None
        self.offsets: Int[Tensor, "row pos"] | None = None
        self.fired = False

    def load(self, edit: PrefixEdit, rows: Rows, dtype: torch.dtype, device: torch.device) -> None:
        """Gathers the rows' soft tokens."""
        owners = rows.owners.to(device)
        self.values = refill(self.values, edit.embeddings.to(device, dtype)[owners])
        self.lengths = refill(self.lengths, rows.spared(edit.lengths.to(device)[owners], 0))

    def begin(self, positions: Int[Tensor, "row pos"]) -> None:
        """Computes each token's place in the prefix, for this forward pass."""
        self.offsets = positions - self.start

    def end(self) -> None:
        """Forgets the offsets, which belong to one forward pass."""
        self.offsets = None

    def __call__(self, hidden: Float[Tensor, "row pos d"]) -> Float[Tensor, "row pos d"]:
        if self.offsets is None:
            # Nobody reads a prompt now: this is a decoder that has its encoder's table.
            return hidden
        self.fired = True
        assert self.values is not None and self.lengths is not None
        return overwrite_rows(hidden, self.values, self.offsets.to(hidden.device), self.lengths)

    def clear(self) -> None:
        """Erases the users' soft tokens."""
        self.values = erase(self.values)
