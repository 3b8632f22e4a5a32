"""Residual edits: a vector per row, added to the residual stream at a site."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

import torch

from steer.errors import SteerError
from steer.inject.rows import Rows, erase, refill
from steer.kernels import add_rows
from steer.sites import Site

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

Positions = Literal["response", "generated", "all"]


@dataclass(frozen=True)
class ResidualEdit:
    """Adds `vectors[b]` to the hidden states of row b.

    Attributes:
        site: where.
        vectors: one per row; rows without a user hold zeros.
        positions: first position that is edited. `response` (the default) is the token that predicts the first new one,
            `generated` the first new token itself (METHODS: StyleVector's t ≥ |x|), `all` the whole prompt.
        reference_norms: the median residual norm at the site, per row: the unit of a dose. None if not known.
    """

    site: Site
    vectors: Float[Tensor, "batch d"]
    positions: Positions = "response"
    reference_norms: Float[Tensor, " batch"] | None = None

    def __post_init__(self) -> None:
        if self.positions not in get_args(Positions):
            raise SteerError(f"positions={self.positions!r} is not one of {', '.join(get_args(Positions))}")

    def at_strength(self, strength: Float[Tensor, " batch"]) -> ResidualEdit:
        """Multiplies each row's vector by its raw coefficient."""
        return replace(self, vectors=self.vectors * strength[:, None].to(self.vectors))

    def at_dose(self, dose: Float[Tensor, " batch"]) -> ResidualEdit:
        """Scales each row's vector to `dose` times the reference norm.

        Raises:
            SteerError: the states were stored without a reference norm.
        """
        if self.reference_norms is None:
            raise SteerError(f"no reference norm is known at {self.site}, so a dose has no unit; give a strength")
        norms = self.vectors.float().norm(dim=1)
        target = dose.to(norms) * self.reference_norms.to(norms)
        return replace(self, vectors=self.vectors * torch.where(norms > 0, target / norms, 0.0)[:, None])


class Gate:
    """Which positions are edited, per row: computed once per forward pass and shared by all layers."""

    def __init__(self, positions: Positions) -> None:
        self.positions = positions
        self.first: Int[Tensor, " row"] | None = None
        self.known = False
        self.mask: Float[Tensor, "row pos 1"] | None = None

    def load(self, rows: Rows) -> None:
        """Takes the prompt lengths of the rows."""
        lengths = rows.prompt_lengths
        # Positions count from 0, so for "all" there is nothing to know.
        self.known = lengths is not None or self.positions == "all"
        if lengths is None or self.positions == "all":
            first = torch.zeros_like(rows.owners)
        else:
            first = lengths - 1 if self.positions == "response" else lengths
        self.first = refill(self.first, first)

    def begin(self, positions: Int[Tensor, "row pos"], dtype: torch.dtype) -> None:
        """Computes the mask of this forward pass."""
        if self.first is None or not self.known:
            raise SteerError(
                f"vectors are bound from {self.positions!r} on, and the prompt lengths are not known. Generate with "
                "model.generate(..., **steering.generate_kwargs()), or give lm.steered(..., prompt_lengths=[...])"
            )
        self.mask = (positions >= self.first[:, None]).unsqueeze(-1).to(dtype)

    def end(self) -> None:
        """Forgets the mask, which belongs to one forward pass."""
        self.mask = None


class AddVectors:
    """The sum of a site's residual edits, at work there."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.vectors: Float[Tensor, "row 1 d"] | None = None
        self.fired = False

    def load(self, edits: list[ResidualEdit], rows: Rows, dtype: torch.dtype, device: torch.device) -> None:
        """Gathers, sums and casts the rows' vectors once, so that a step costs one addition."""
        total = torch.stack([edit.vectors.to(device, torch.float32) for edit in edits]).sum(0)
        self.vectors = refill(self.vectors, total[rows.owners.to(device)].to(dtype)[:, None])

    def __call__(self, hidden: Float[Tensor, "row pos d"]) -> Float[Tensor, "row pos d"]:
        self.fired = True
        if self.gate.mask is None:
            raise SteerError(
                "the blocks ran and their decoder did not, so the tokens' positions are not known: this model calls "
                "its blocks in another way than through `base_model`, and cannot be steered yet"
            )
        assert self.vectors is not None
        return add_rows(hidden, self.vectors, self.gate.mask.to(hidden.device))

    def clear(self) -> None:
        """Erases the users' vectors."""
        self.vectors = erase(self.vectors)
