"""Positions: which tokens of each row an edit changes, from position ids."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Literal, get_args

import torch

from steer.errors import SteerError
from steer.inject.rows import Rows, erase, refill

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

Positions = Literal["response", "generated", "all", "prompt"]


def require_positions(positions: str) -> None:
    """Raises SteerError unless these are one of `Positions`."""
    if positions not in get_args(Positions):
        raise SteerError(f"positions={positions!r} is not one of {', '.join(get_args(Positions))}")


class Gate(ABC):
    """Which positions are edited, per row: computed once per forward pass and shared by all layers."""

    def __init__(self) -> None:
        self.mask: Float[Tensor, "row pos 1"] | None = None

    @abstractmethod
    def load(self, rows: Rows) -> None:
        """Takes what the coming forward passes need of the rows."""

    @abstractmethod
    def begin(self, positions: Int[Tensor, "row pos"], dtype: torch.dtype) -> None:
        """Computes the mask of this forward pass."""

    def end(self) -> None:
        """Forgets the mask, which belongs to one forward pass."""
        self.mask = None


class NamedGate(Gate):
    """Positions before or after some place in the prompt."""

    def __init__(self, positions: Positions) -> None:
        super().__init__()
        self.positions = positions
        self.bound: Int[Tensor, " row"] | None = None
        self.known = False

    def load(self, rows: Rows) -> None:
        """Takes the prompt lengths of the rows."""
        lengths = rows.prompt_lengths
        # Positions count from 0, so for "all" there is nothing to know.
        self.known = lengths is not None or self.positions == "all"
        if lengths is None or self.positions == "all":
            bound = torch.zeros_like(rows.owners)
        else:
            bound = lengths - 1 if self.positions == "response" else lengths
        # No position is beyond the one, none before the other.
        nowhere = 0 if self.positions == "prompt" else torch.iinfo(bound.dtype).max
        self.bound = refill(self.bound, rows.spared(bound, nowhere))

    def begin(self, positions: Int[Tensor, "row pos"], dtype: torch.dtype) -> None:
        if self.bound is None or not self.known:
            raise SteerError(
                f"an edit is bound to the {self.positions!r} positions, and the prompt lengths are not known. Generate "
                "with model.generate(..., **steering.generate_kwargs()), or give lm.steered(..., prompt_lengths=[...])"
            )
        bound = self.bound[:, None]
        inside = positions < bound if self.positions == "prompt" else positions >= bound
        self.mask = inside.unsqueeze(-1).to(dtype)


class MarkedGate(Gate):
    """Positions that are marked one by one.

    Attributes:
        marks: those of the plan at hand.
    """

    def __init__(self) -> None:
        super().__init__()
        self.marks: Bool[Tensor, "batch n"] | None = None
        self.marked: Bool[Tensor, "row n"] | None = None

    def load(self, rows: Rows) -> None:
        """Gathers the rows' marks, and one more position that stands for all beyond: it is never marked."""
        assert self.marks is not None
        marks = torch.nn.functional.pad(self.marks.to(rows.owners.device), (0, 1))
        self.marked = refill(self.marked, rows.spared(marks[rows.owners], False))

    def begin(self, positions: Int[Tensor, "row pos"], dtype: torch.dtype) -> None:
        assert self.marked is not None
        beyond = self.marked.shape[1] - 1
        self.mask = self.marked.gather(1, positions.clamp(0, beyond)).unsqueeze(-1).to(dtype)

    def clear(self) -> None:
        """Erases the users' marks."""
        self.marks, self.marked = None, erase(self.marked)
