"""Prefix edits: soft tokens per row, written over the embeddings of placeholder tokens in the prompt.

They stand in front of the prompt, or at a place in it that has a name: `["About me:", Place("me"), "What now?"]`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from steer.errors import SteerError
from steer.inject.rows import Rows, erase, refill
from steer.kernels import overwrite_rows, slots_at

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


@dataclass(frozen=True)
class Place:
    """A place in a prompt where soft tokens may stand: an object, so that nobody's text can be taken for one.

    It stands between the pieces of a text, `["About me:", Place("me"), "What shall I read?"]`, between those of a chat
    message's content, or between token ids, `[5, Place("me"), 6]`. Nothing stands there for rows without soft tokens.
    """

    name: str


@dataclass(frozen=True)
class PrefixEdit:
    """Gives row b the soft tokens `embeddings[b, :lengths[b]]`, in front of its prompt and after a BOS token.

    Soft tokens live in the space of the model's token embeddings, at the scale of that table's rows (after the factor
    that Gemma applies): they are what `inputs_embeds` would hold.

    Attributes:
        embeddings: of the soft tokens.
        lengths: of each row; 0 is a row without.
        place: the name of the `Place` in the prompts where they stand; in front if None.
    """

    embeddings: Float[Tensor, "batch slot d"]
    lengths: Int[Tensor, " batch"]
    place: str | None = None

    def __post_init__(self) -> None:
        if int(self.lengths.max()) > self.embeddings.shape[1]:
            raise SteerError(f"a prefix of {int(self.lengths.max())} tokens in room for {self.embeddings.shape[1]}")

    @property
    def added(self) -> Int[Tensor, " batch"]:
        """By how many positions each row's prompt is longer."""
        return self.lengths

    @classmethod
    def from_rows(
        cls, prefixes: Sequence[Float[Tensor, "_ d"] | None], width: int, place: str | None = None
    ) -> PrefixEdit:
        """Pads prefixes of different lengths; None is a row without one."""
        rows = [torch.zeros(0, width) if prefix is None else prefix for prefix in prefixes]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        # There must be something to gather from, and a size of 1 is a special case to the compiler, as 0 is.
        padded = torch.nn.functional.pad(padded, (0, 0, 0, max(2 - padded.shape[1], 0)))
        return cls(padded, torch.tensor([len(row) for row in rows]), place)

    @staticmethod
    def concatenate(edits: Sequence[PrefixEdit]) -> PrefixEdit:
        """All soft tokens of each row, place by place as `runs_of` has them, in order."""
        edits = [edit for place in runs_of(edits) for edit in edits if edit.place == place]
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
        place: the name of the `Place` in the prompts where they stand; in front if None.
    """

    tokens: Callable[[Sequence[str]], Float[Tensor, "batch slot d"]]
    lengths: Int[Tensor, " batch"]
    width: int
    place: str | None = None

    def of(self, prompts: Sequence[str]) -> PrefixEdit:
        """The prefix for these prompts, one a row."""
        tokens = self.tokens(prompts)
        # As `from_rows` pads: a size of 1 is a special case to the compiler.
        padded = torch.nn.functional.pad(tokens, (0, 0, 0, max(2 - tokens.shape[1], 0)))
        return PrefixEdit(padded, self.lengths, self.place)

    @property
    def blank(self) -> PrefixEdit:
        """As many soft tokens of zeros."""
        rows = [torch.zeros(int(length), self.width) for length in self.lengths]
        return PrefixEdit.from_rows(rows, self.width, self.place)


def runs_of(edits: Sequence[PrefixEdit | PromptPrefix]) -> dict[str | None, Int[Tensor, " batch"]]:
    """How many soft tokens each row has at each place, in front (None) first and then by name.

    The places depend on the edits alone, and not on which row has soft tokens there.
    """
    runs: dict[str | None, Int[Tensor, " batch"]] = {}
    for edit in sorted(edits, key=lambda edit: (edit.place is not None, edit.place or "")):
        runs[edit.place] = runs.get(edit.place, 0) + edit.lengths
    return runs


class OverwriteEmbeddings:
    """The prefix edit at work at the `embed` site.

    Attributes:
        start: where soft tokens in front stand in a prompt.
        values: the rows' soft tokens, run by run.
        starts, counts: of each run, the position of its first token and the number of tokens.
    """

    def __init__(self, start: int) -> None:
        self.start = start
        self.values: Float[Tensor, "row slot d"] | None = None
        self.starts: Int[Tensor, "row run"] | None = None
        self.counts: Int[Tensor, "row run"] | None = None
        self.slots: Int[Tensor, "row pos"] | None = None
        self.fired = False

    def load(
        self,
        edit: PrefixEdit,
        starts: Int[Tensor, "batch run"],
        counts: Int[Tensor, "batch run"],
        rows: Rows,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Gathers the rows' soft tokens, and where they stand."""
        owners = rows.owners.to(device)
        self.values = refill(self.values, edit.embeddings.to(device, dtype)[owners])
        self.starts = refill(self.starts, starts.to(device)[owners])
        self.counts = refill(self.counts, rows.spared(counts.to(device)[owners], 0))

    def begin(self, positions: Int[Tensor, "row pos"]) -> None:
        """Finds the soft token that stands at each position of this forward pass."""
        assert self.starts is not None and self.counts is not None
        self.slots = slots_at(positions.to(self.starts.device), self.starts, self.counts)

    def end(self) -> None:
        """Forgets the slots, which belong to one forward pass."""
        self.slots = None

    def __call__(self, hidden: Float[Tensor, "row pos d"]) -> Float[Tensor, "row pos d"]:
        if self.slots is None:
            # Nobody reads a prompt now: this is a decoder that has its encoder's table.
            return hidden
        self.fired = True
        assert self.values is not None
        return overwrite_rows(hidden, self.values, self.slots.to(hidden.device))

    def clear(self) -> None:
        """Erases the users' soft tokens."""
        self.values = erase(self.values)
