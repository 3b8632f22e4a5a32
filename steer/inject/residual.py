"""Residual edits: per row, a vector that is added, a projection that is clamped, or a low-rank map, at a site."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, get_args

import torch

from steer.errors import SteerError
from steer.inject.condition import Condition, ConditionedGate
from steer.inject.positions import Gate, Positions, require_positions
from steer.inject.rows import Rows, erase, refill
from steer.kernels import add_rows, add_rows_keeping_norm, low_rank_rows, project_rows
from steer.sites import Site

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

Limit = Literal["exact", "at_least", "at_most"]


class SiteEdit(ABC):
    """What all edits of the hidden states at a site have in common."""

    site: Site
    # Names, or marks for the first n real tokens of each row; what lies beyond is not edited.
    positions: Positions | Bool[Tensor, "batch n"]
    condition: Condition | None

    def __post_init__(self) -> None:
        if isinstance(self.positions, str):
            require_positions(self.positions)
        elif self.positions.dtype != torch.bool or self.positions.dim() != 2 or not self.positions.shape[1]:
            raise SteerError(
                "positions that are marked one by one need a bool tensor [batch, n], n ≥ 1; this one is "
                f"{self.positions.dtype} {list(self.positions.shape)}"
            )
        if self.condition is None:
            return
        if not isinstance(self.positions, str) or self.positions not in ("response", "generated"):
            raise SteerError(
                "a condition is decided at the end of the prompt, so its edit acts on the 'response' or 'generated' "
                "positions, not within the prompt"
            )
        if self.condition.site.canonical().depth > self.site.canonical().depth:
            raise SteerError(
                f"a condition at {self.condition.site} is decided after the forward pass has left {self.site}, where "
                "its edit is; read it at an earlier site"
            )

    @property
    @abstractmethod
    def states(self) -> Mapping[str, Float[Tensor, "batch *_ d"]]:
        """The users' tensors whose last axis is the width of the site, by what they are."""

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors that gradients may flow into."""
        return list(self.states.values())

    def at(self, site: Site) -> Self:
        """The same edit at another site."""
        return replace(self, site=site)  # type: ignore[type-var]

    @abstractmethod
    def at_strength(self, strength: Float[Tensor, " batch"]) -> Self:
        """Multiplies what each row's edit changes by its raw coefficient."""

    def at_dose(self, dose: Float[Tensor, " batch"]) -> Self:
        """Scales what is added to `dose` times the reference norm.

        Raises:
            SteerError: nothing of a length that is known beforehand is added, or no reference norm is known.
        """
        raise SteerError(
            f"a dose is the length of an added vector, and the {type(self).__name__} at {self.site} adds none; give a "
            "strength, or name the states that the dose is for: dose={'name': ...}"
        )


@dataclass(frozen=True)
class ResidualEdit(SiteEdit):
    """Adds `vectors[b]` to the hidden states of row b.

    Attributes:
        site: where.
        vectors: one per row; rows without a user hold zeros.
        positions: which positions are edited. `response` (the default) begins at the token that predicts the first new
            one, `generated` at the first new token itself (METHODS: StyleVector's t ≥ |x|), `all` is the whole row,
            `prompt` the prompt only. A bool tensor `[batch, n]` marks them among the row's first n real tokens.
        reference_norms: the median residual norm at the site, per row: the unit of a dose. None if not known.
        keep_norm: gives each state the norm that it had before, `(h + v) · ‖h‖ / ‖h + v‖` (ICV, Liu et al. 2023).
        condition: in which rows, by their prompts, the edit acts; in all if None.
    """

    site: Site
    vectors: Float[Tensor, "batch d"]
    positions: Positions | Bool[Tensor, "batch n"] = "response"
    reference_norms: Float[Tensor, " batch"] | None = None
    keep_norm: bool = False
    condition: Condition | None = None

    @property
    def states(self) -> Mapping[str, Float[Tensor, "batch d"]]:
        return {"vectors": self.vectors}

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


@dataclass(frozen=True)
class ProjectionEdit(SiteEdit):
    """Clamps what the hidden states of row b have along `directions[b]`: `h + s · (t − ⟨h, u⟩) · u`.

    With t = 0 the direction is projected out (Arditi et al. 2024, directional ablation). At strength 1 the projection
    is t afterwards, at 0 what it was.

    Attributes:
        site: where.
        directions: one per row, of any length: u is the unit vector. Rows without a user hold zeros.
        targets: t, per row; 0 if None.
        positions: as for `ResidualEdit`.
        limit: "exact" clamps every projection to t; "at_least" only those below it, "at_most" only those above.
        strengths: s, per row; 1 if None.
        condition: as for `ResidualEdit`.
    """

    site: Site
    directions: Float[Tensor, "batch d"]
    targets: Float[Tensor, " batch"] | None = None
    positions: Positions | Bool[Tensor, "batch n"] = "response"
    limit: Limit = "exact"
    strengths: Float[Tensor, " batch"] | None = None
    condition: Condition | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.limit not in get_args(Limit):
            raise SteerError(f"limit={self.limit!r} is not one of {', '.join(get_args(Limit))}")
        _check_numbers("targets", self.targets, len(self.directions))
        _check_numbers("strengths", self.strengths, len(self.directions))

    @property
    def states(self) -> Mapping[str, Float[Tensor, "batch d"]]:
        return {"directions": self.directions}

    def at_strength(self, strength: Float[Tensor, " batch"]) -> ProjectionEdit:
        return replace(self, strengths=_times(self.strengths, strength))


@dataclass(frozen=True)
class LowRankEdit(SiteEdit):
    """Moves the hidden states of row b within a small subspace: `h + s · Rᵀ(W h + b − R h)`.

    LoReFT (Wu et al. 2024, arXiv 2404.03592, Eq. 2), whose R has orthonormal rows; any R is taken here. Rows without a
    user hold zeros. With W = R and b = 0 nothing changes.

    Attributes:
        site: where.
        rotation: R, per row.
        weight: W, per row.
        bias: b, per row.
        positions: as for `ResidualEdit`.
        strengths: s, per row; 1 if None.
        condition: as for `ResidualEdit`.
    """

    site: Site
    rotation: Float[Tensor, "batch rank d"]
    weight: Float[Tensor, "batch rank d"]
    bias: Float[Tensor, "batch rank"]
    positions: Positions | Bool[Tensor, "batch n"] = "response"
    strengths: Float[Tensor, " batch"] | None = None
    condition: Condition | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        shapes = [list(values.shape) for values in (self.rotation, self.weight, self.bias)]
        if len(shapes[0]) != 3 or shapes[1] != shapes[0] or shapes[2] != shapes[0][:2]:
            raise SteerError(f"R and W are [batch, rank, d] and b is [batch, rank]; these are {shapes}")
        if not torch.isfinite(self.bias).all():
            raise SteerError(f"the biases for {self.site} hold values that are not finite")
        _check_numbers("strengths", self.strengths, len(self.rotation))

    @property
    def states(self) -> Mapping[str, Float[Tensor, "batch rank d"]]:
        return {"rotations": self.rotation, "weights": self.weight}

    @property
    def tensors(self) -> list[Tensor]:
        return [self.rotation, self.weight, self.bias]

    def at_strength(self, strength: Float[Tensor, " batch"]) -> LowRankEdit:
        return replace(self, strengths=_times(self.strengths, strength))


class EditStates(ABC):
    """A group of edits of one kind at work at their site.

    `amounts` are 0 where a row has no state: the kernels leave such rows as they are.
    """

    what: ClassVar[str]
    # Names of the attributes that hold users' tensors.
    held: ClassVar[Sequence[str]]

    def __init__(self, gate: Gate | ConditionedGate) -> None:
        self.gate = gate
        self.amounts: Float[Tensor, "row 1 1"] | None = None
        self.fired = False

    @abstractmethod
    def load(self, edits: Sequence[Any], rows: Rows, dtype: torch.dtype, device: torch.device) -> None:
        """Gathers the rows' tensors once, in the buffers of the batch before if they fit."""

    @abstractmethod
    def edit(self, hidden: Float[Tensor, "row pos d"], mask: Float[Tensor, "row pos 1"]) -> Float[Tensor, "row pos d"]:
        """The states after the edit, where the mask is 1."""

    def clear(self) -> None:
        """Erases the users' tensors."""
        for name in self.held:
            setattr(self, name, erase(getattr(self, name)))

    def __call__(self, hidden: Float[Tensor, "row pos d"]) -> Float[Tensor, "row pos d"]:
        self.fired = True
        if self.gate.mask is None:
            raise SteerError(
                "the blocks ran and their decoder did not, so the tokens' positions are not known: this model calls "
                "its blocks in a way of its own, and cannot be steered yet"
            )
        return self.edit(hidden, self.gate.mask.to(hidden.device))


class AddVectors(EditStates):
    """The sum of several edits' vectors."""

    what = "vectors"
    held: ClassVar[Sequence[str]] = ("vectors",)

    def __init__(self, gate: Gate | ConditionedGate) -> None:
        super().__init__(gate)
        self.vectors: Float[Tensor, "row 1 d"] | None = None

    def load(self, edits: Sequence[ResidualEdit], rows: Rows, dtype: torch.dtype, device: torch.device) -> None:
        """Gathers, sums and casts the rows' vectors once, so that a step costs one addition."""
        total = torch.stack([edit.vectors.to(device, torch.float32) for edit in edits]).sum(0)
        self.vectors = refill(self.vectors, total[rows.owners.to(device)].to(dtype)[:, None])

    def edit(self, hidden: Float[Tensor, "row pos d"], mask: Float[Tensor, "row pos 1"]) -> Float[Tensor, "row pos d"]:
        assert self.vectors is not None
        return add_rows(hidden, self.vectors, mask)


class AddVectorsKeepingNorm(AddVectors):
    """The same, each state with its own norm afterwards."""

    what = "norm-keeping vectors"
    held = ("vectors", "amounts")

    def load(self, edits: Sequence[ResidualEdit], rows: Rows, dtype: torch.dtype, device: torch.device) -> None:
        super().load(edits, rows, _statistics(dtype), device)
        assert self.vectors is not None
        self.amounts = refill(self.amounts, _present(self.vectors).to(self.vectors.dtype))

    def edit(self, hidden: Float[Tensor, "row pos d"], mask: Float[Tensor, "row pos 1"]) -> Float[Tensor, "row pos d"]:
        assert self.vectors is not None and self.amounts is not None
        return add_rows_keeping_norm(hidden, self.vectors, mask * self.amounts)


class ClampProjections(EditStates):
    """One edit's directions, and between what the projections on them are to lie."""

    what = "directions"
    held = ("directions", "lowest", "highest", "amounts")

    def __init__(self, gate: Gate | ConditionedGate) -> None:
        super().__init__(gate)
        self.directions: Float[Tensor, "row 1 d"] | None = None
        self.lowest: Float[Tensor, "row 1 1"] | None = None
        self.highest: Float[Tensor, "row 1 1"] | None = None

    def load(self, edits: Sequence[ProjectionEdit], rows: Rows, dtype: torch.dtype, device: torch.device) -> None:
        (edit,), dtype, owners = edits, _statistics(dtype), rows.owners.to(device)
        units = torch.nn.functional.normalize(edit.directions.to(device, dtype), dim=-1)
        targets = torch.zeros(len(units)) if edit.targets is None else edit.targets
        targets = targets.to(device, dtype)[owners, None, None]
        unbounded = torch.full_like(targets, torch.inf)
        self.directions = refill(self.directions, units[owners, None])
        self.lowest = refill(self.lowest, -unbounded if edit.limit == "at_most" else targets)
        self.highest = refill(self.highest, unbounded if edit.limit == "at_least" else targets)
        self.amounts = refill(self.amounts, _amounts(edit.strengths, _present(units[:, None]), owners))

    def edit(self, hidden: Float[Tensor, "row pos d"], mask: Float[Tensor, "row pos 1"]) -> Float[Tensor, "row pos d"]:
        assert self.directions is not None and self.amounts is not None
        assert self.lowest is not None and self.highest is not None
        return project_rows(hidden, self.directions, self.lowest, self.highest, mask * self.amounts)


class MapLowRank(EditStates):
    """One edit's low-rank maps."""

    what = "low-rank maps"
    held = ("down", "bias", "up", "amounts")

    def __init__(self, gate: Gate | ConditionedGate) -> None:
        super().__init__(gate)
        self.down: Float[Tensor, "row rank d"] | None = None
        self.bias: Float[Tensor, "row 1 rank"] | None = None
        self.up: Float[Tensor, "row rank d"] | None = None

    def load(self, edits: Sequence[LowRankEdit], rows: Rows, dtype: torch.dtype, device: torch.device) -> None:
        (edit,), dtype, owners = edits, _statistics(dtype), rows.owners.to(device)
        up, weight, bias = (values.to(device, dtype) for values in (edit.rotation, edit.weight, edit.bias))
        self.down = refill(self.down, (weight - up)[owners])
        self.bias = refill(self.bias, bias[owners, None])
        self.up = refill(self.up, up[owners])
        present = _present(torch.cat([up, weight, bias[..., None]], dim=-1))
        self.amounts = refill(self.amounts, _amounts(edit.strengths, present, owners))

    def edit(self, hidden: Float[Tensor, "row pos d"], mask: Float[Tensor, "row pos 1"]) -> Float[Tensor, "row pos d"]:
        assert self.down is not None and self.bias is not None and self.up is not None and self.amounts is not None
        return low_rank_rows(hidden, self.down, self.bias, self.up, mask * self.amounts)


def operator_of(edit: SiteEdit) -> type[EditStates]:
    """What an edit is at work."""
    if isinstance(edit, ResidualEdit):
        return AddVectorsKeepingNorm if edit.keep_norm else AddVectors
    return ClampProjections if isinstance(edit, ProjectionEdit) else MapLowRank


def in_turn(edits: Iterable[SiteEdit]) -> list[SiteEdit]:
    """Edits in the order in which they act at their sites: additions, norm-keeping additions, then the others as given.

    So a sum does not depend on what stands between its terms, which may belong to other rows.
    """
    names = get_args(Positions)

    def turn(edit: SiteEdit) -> tuple[int, int]:
        kind = operator_of(edit)
        if not issubclass(kind, AddVectors):
            return 2, 0
        return int(kind is not AddVectors), names.index(edit.positions) if isinstance(edit.positions, str) else len(
            names
        )

    return sorted(edits, key=turn)


def _check_numbers(what: str, numbers: Tensor | None, batch: int) -> None:
    if numbers is None:
        return
    if numbers.shape != (batch,):
        raise SteerError(f"{what}: there must be one for each of {batch} rows, and the shape is {list(numbers.shape)}")
    if not torch.isfinite(numbers).all():
        raise SteerError(f"{what} must be finite, got {numbers.tolist()}")


def _times(strengths: Tensor | None, further: Tensor) -> Tensor:
    return further if strengths is None else strengths * further.to(strengths)


def _statistics(dtype: torch.dtype) -> torch.dtype:
    """What is not only added keeps float32 at least, as the kernels compute in it."""
    return torch.promote_types(dtype, torch.float32)


def _present(states: Float[Tensor, "row n d"]) -> Bool[Tensor, "row 1 1"]:
    """Rows that hold anything but zeros."""
    return (states != 0).flatten(1).any(1)[:, None, None]


def _amounts(strengths: Tensor | None, present: Bool[Tensor, "batch 1 1"], owners: Tensor) -> Float[Tensor, "row 1 1"]:
    """Each row's strength, and 0 for rows without a state."""
    values = torch.ones(len(present)) if strengths is None else strengths.float()
    return (values.to(present.device)[:, None, None] * present)[owners]
