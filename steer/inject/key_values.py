"""Prefixes as keys and values: what every layer's attention looks back at, in front of a prompt.

Li & Liang, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", ACL 2021; RECAP emits them from a user's
history. They enter a forward pass as a cache that is filled already, and are never computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from steer.errors import SteerError

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor
    from transformers import Cache


@dataclass(frozen=True)
class KeyValues:
    """A prefix of one row.

    Attributes:
        keys, values: as the model's own cache holds them: in a model with rotary positions the keys are turned already,
            by the positions 0, 1, …
        bos: whether the first slot is that of the BOS token with which the tokenizer begins every prompt, so that the
            prompt's own is not read again.
    """

    keys: Float[Tensor, "layer head slot k"]
    values: Float[Tensor, "layer head slot v"]
    bos: bool = False

    def __post_init__(self) -> None:
        if self.keys.dim() != 4 or self.keys.shape[:3] != self.values.shape[:3]:
            raise SteerError(
                "keys and values are [layer, head, slot, width] with the same layers, heads and slots; these are "
                f"{list(self.keys.shape)} and {list(self.values.shape)}"
            )

    def __len__(self) -> int:
        return self.keys.shape[2]


@dataclass(frozen=True)
class KeyValueEdit:
    """Puts keys and values in front of row b's prompt: the last `lengths[b]` slots of `keys[b]` and `values[b]`.

    The prompt's tokens have the positions behind them. No other edit reaches into them: edits of the residual stream,
    memories and soft tokens act on the tokens that are read, and these are behind.

    Attributes:
        keys, values: on the left stands padding.
        lengths: of each row; 0 is a row without.
        bos: whether the first slot is that of the BOS token, see `KeyValues`.
    """

    keys: Float[Tensor, "batch layer head slot k"]
    values: Float[Tensor, "batch layer head slot v"]
    lengths: Int[Tensor, " batch"]
    bos: bool = False

    def __post_init__(self) -> None:
        if int(self.lengths.max()) > self.keys.shape[3]:
            raise SteerError(f"{int(self.lengths.max())} keys and values in room for {self.keys.shape[3]}")

    @classmethod
    def from_rows(cls, rows: Sequence[KeyValues | None], like: KeyValues | None = None) -> KeyValueEdit:
        """Pads prefixes of different lengths; None is a row without one.

        Args:
            rows: one a row.
            like: tells layers, heads and widths where all rows are None.

        Raises:
            SteerError: all rows are None and `like` is not given, or they differ in more than their number of slots.
        """
        like = next((row for row in rows if row is not None), like)
        if like is None:
            raise SteerError("no row has keys and values, and nothing tells what they are like; give like=...")
        for row in rows:
            if row is not None and (_kind(row) != _kind(like)):
                raise SteerError(
                    "keys and values of one batch differ in their number of slots only; there are some of "
                    f"{_kind(like)} and of {_kind(row)} as layers, heads, widths and whether BOS is among them"
                )
        slots = max((len(row) for row in rows if row is not None), default=0)
        keys = torch.stack([_padded(like.keys[:, :, :0] if row is None else row.keys, slots) for row in rows])
        values = torch.stack([_padded(like.values[:, :, :0] if row is None else row.values, slots) for row in rows])
        return cls(keys, values, torch.tensor([0 if row is None else len(row) for row in rows]), like.bos)

    @property
    def rows(self) -> list[KeyValues | None]:
        """One a row, without padding; None for those of length 0."""
        return [
            KeyValues(keys[:, :, -length:], values[:, :, -length:], self.bos) if length else None
            for keys, values, length in zip(self.keys, self.values, self.lengths.tolist(), strict=True)
        ]

    @property
    def added(self) -> Int[Tensor, " batch"]:
        """By how many positions each row's prompt is longer: a BOS token is in it anyway."""
        return self.lengths - (self.lengths > 0).long() if self.bos else self.lengths

    @staticmethod
    def merge(edits: Sequence[KeyValueEdit]) -> KeyValueEdit:
        """One edit out of several, of which each is for rows of its own.

        Raises:
            SteerError: two are for the same row: both would stand at its first positions.
        """
        if len(edits) == 1:
            return edits[0]
        rows: list[KeyValues | None] = list(edits[0].rows)
        for edit in edits[1:]:
            for row, more in enumerate(edit.rows):
                if more is not None and rows[row] is not None:
                    raise SteerError(
                        f"row {row} has two prefixes of keys and values, and both are for its first positions; give it "
                        "one of them, or soft tokens behind it"
                    )
                rows[row] = more if more is not None else rows[row]
        first = edits[0]
        return KeyValueEdit.from_rows(rows, KeyValues(first.keys[0, :, :, :0], first.values[0, :, :, :0], first.bos))

    def fill(
        self, cache: Cache, owners: Int[Tensor, " row"], dtype: torch.dtype, devices: Sequence[torch.device]
    ) -> None:
        """Writes the prefixes of the rows into an empty cache, as many slots as the longest has."""
        slots = int(self.lengths.max())
        for layer, device in enumerate(devices):
            keys, values = (
                states[:, layer, :, states.shape[3] - slots :].to(device, dtype)[owners.to(device)]
                for states in (self.keys, self.values)
            )
            cache.update(keys, values, layer)


@dataclass(frozen=True)
class PromptKeyValues:
    """Puts keys and values in front of row b's prompt that depend on what it is asked; else as `PromptPrefix`.

    Attributes:
        key_values: from the text of each row's prompt to keys and values, as `KeyValueEdit` has them.
        lengths: of each row; 0 is a row without.
        like: tells layers, heads, widths, and whether the first slot is that of a BOS token.
    """

    key_values: Callable[
        [Sequence[str]], tuple[Float[Tensor, "batch layer head slot k"], Float[Tensor, "batch layer head slot v"]]
    ]
    lengths: Int[Tensor, " batch"]
    like: KeyValues

    def of(self, prompts: Sequence[str]) -> KeyValueEdit:
        """The keys and values for these prompts, one a row."""
        return KeyValueEdit(*self.key_values(prompts), self.lengths, self.like.bos)

    @property
    def blank(self) -> KeyValueEdit:
        """As many of zeros, which take up no memory."""
        batch, slots = len(self.lengths), int(self.lengths.max())
        keys, values = (
            states.new_zeros(()).expand(batch, *states.shape[:2], slots, states.shape[3])
            for states in (self.like.keys, self.like.values)
        )
        return KeyValueEdit(keys, values, self.lengths, self.like.bos)


def _kind(row: KeyValues) -> tuple[int, int, int, int, bool]:
    return (*row.keys.shape[:2], row.keys.shape[3], row.values.shape[3], row.bos)


def _padded(states: Float[Tensor, "layer head _ k"], slots: int) -> Float[Tensor, "layer head slot k"]:
    return torch.nn.functional.pad(states, (0, 0, slots - states.shape[2], 0))
