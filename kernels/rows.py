"""Per-row edits of hidden states: add a vector, clamp a projection, apply a low-rank map, overwrite a span."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


def add_rows(
    hidden: Float[Tensor, "row pos d"], vectors: Float[Tensor, "row 1 d"], mask: Float[Tensor, "row pos 1"]
) -> Float[Tensor, "row pos d"]:
    """Adds to each row its own vector at the positions where `mask` is 1; the mask holds nothing but 0 and 1.

    One pass over `hidden`. As the product is by 0 or 1, it is exact in every dtype, and a row of zeros leaves `hidden`
    as it was, bit for bit.
    """
    return torch.addcmul(hidden, vectors, mask)


def naive_add_rows(
    hidden: Float[Tensor, "row pos d"], vectors: Float[Tensor, "row 1 d"], mask: Float[Tensor, "row pos 1"]
) -> Float[Tensor, "row pos d"]:
    """Reference of `add_rows`: one row and one position at a time."""
    out = hidden.clone()
    for row in range(hidden.shape[0]):
        for pos in range(hidden.shape[1]):
            if mask[row, pos, 0]:
                out[row, pos] = hidden[row, pos] + vectors[row, 0]
    return out


def add_rows_keeping_norm(
    hidden: Float[Tensor, "row pos d"], vectors: Float[Tensor, "row 1 d"], mask: Float[Tensor, "row pos 1"]
) -> Float[Tensor, "row pos d"]:
    """Turns each state towards its row's vector and keeps its length: `(h + v) · ‖h‖ / ‖h + v‖` where `mask` is not 0.

    Computed in float32 at least, since sums of squares overflow float16 and lose small terms in bfloat16.
    """
    wide = hidden.to(_statistics(hidden))
    moved = wide + vectors
    before, after = (torch.linalg.vector_norm(states, dim=-1, keepdim=True) for states in (wide, moved))
    # What cancels to zero stays zero.
    moved = moved * (before / torch.where(after > 0, after, 1.0))
    return torch.where(mask != 0, moved.to(hidden.dtype), hidden)


def naive_add_rows_keeping_norm(
    hidden: Float[Tensor, "row pos d"], vectors: Float[Tensor, "row 1 d"], mask: Float[Tensor, "row pos 1"]
) -> Float[Tensor, "row pos d"]:
    """Reference of `add_rows_keeping_norm`: one state at a time, in float64."""
    out = hidden.clone()
    for row in range(hidden.shape[0]):
        for pos in range(hidden.shape[1]):
            h, v = hidden[row, pos].double(), vectors[row, 0].double()
            if mask[row, pos, 0] and (h + v).norm() > 0:
                out[row, pos] = (h + v) * (h.norm() / (h + v).norm())
            elif mask[row, pos, 0]:
                out[row, pos] = 0
    return out


def project_rows(
    hidden: Float[Tensor, "row pos d"],
    directions: Float[Tensor, "row 1 d"],
    lowest: Float[Tensor, "row 1 1"],
    highest: Float[Tensor, "row 1 1"],
    amounts: Float[Tensor, "row pos 1"],
) -> Float[Tensor, "row pos d"]:
    """Brings each state's projection p on its row's unit direction into `[lowest, highest]`: `h + a · (p' − p) · u`.

    Where the amount a is 0 the state stays as it is, bit for bit. Computed in float32 at least.
    """
    wide = hidden.to(_statistics(hidden))
    projections = (wide * directions).sum(-1, keepdim=True)
    change = amounts * (torch.minimum(torch.maximum(projections, lowest), highest) - projections)
    return torch.where(amounts != 0, (wide + change * directions).to(hidden.dtype), hidden)


def naive_project_rows(
    hidden: Float[Tensor, "row pos d"],
    directions: Float[Tensor, "row 1 d"],
    lowest: Float[Tensor, "row 1 1"],
    highest: Float[Tensor, "row 1 1"],
    amounts: Float[Tensor, "row pos 1"],
) -> Float[Tensor, "row pos d"]:
    """Reference of `project_rows`: one state at a time, in float64."""
    out = hidden.clone()
    for row in range(hidden.shape[0]):
        for pos in range(hidden.shape[1]):
            h, u, amount = hidden[row, pos].double(), directions[row, 0].double(), float(amounts[row, pos])
            p = float(h @ u)
            wanted = min(max(p, float(lowest[row])), float(highest[row]))
            if amount:
                out[row, pos] = h + amount * (wanted - p) * u
    return out


def low_rank_rows(
    hidden: Float[Tensor, "row pos d"],
    down: Float[Tensor, "row rank d"],
    bias: Float[Tensor, "row 1 rank"],
    up: Float[Tensor, "row rank d"],
    amounts: Float[Tensor, "row pos 1"],
) -> Float[Tensor, "row pos d"]:
    """Adds to each state a low-rank map of it, its row's own: `h + a · upᵀ(down h + bias)`.

    Where the amount a is 0 the state stays as it is, bit for bit. Computed in float32 at least.
    """
    wide = hidden.to(_statistics(hidden))
    change = (wide @ down.mT + bias) @ up
    return torch.where(amounts != 0, (wide + amounts * change).to(hidden.dtype), hidden)


def naive_low_rank_rows(
    hidden: Float[Tensor, "row pos d"],
    down: Float[Tensor, "row rank d"],
    bias: Float[Tensor, "row 1 rank"],
    up: Float[Tensor, "row rank d"],
    amounts: Float[Tensor, "row pos 1"],
) -> Float[Tensor, "row pos d"]:
    """Reference of `low_rank_rows`: one state and one rank at a time, in float64."""
    out = hidden.clone()
    for row in range(hidden.shape[0]):
        for pos in range(hidden.shape[1]):
            h, total = hidden[row, pos].double(), hidden[row, pos].double()
            for k in range(up.shape[1]):
                coordinate = down[row, k].double() @ h + bias[row, 0, k].double()
                total = total + float(amounts[row, pos]) * coordinate * up[row, k].double()
            if amounts[row, pos, 0]:
                out[row, pos] = total
    return out


def similarity_to_projection(
    states: Float[Tensor, "row d"], directions: Float[Tensor, "row d"]
) -> Float[Tensor, " row"]:
    """cos(h, tanh(P h)) with P = c cᵀ / (cᵀ c), the projection on the row's direction c; 0 where h or c is 0."""
    squares = directions.square().sum(-1, keepdim=True)
    shares = (states * directions).sum(-1, keepdim=True) / torch.where(squares > 0, squares, 1.0)
    return torch.nn.functional.cosine_similarity(states, torch.tanh(shares * directions), dim=-1)


def naive_similarity_to_projection(
    states: Float[Tensor, "row d"], directions: Float[Tensor, "row d"]
) -> Float[Tensor, " row"]:
    """Reference of `similarity_to_projection`: one row at a time, with the matrix P, in float64."""
    out = torch.zeros(len(states), dtype=torch.float64)
    for row in range(len(states)):
        h, c = states[row].double(), directions[row].double()
        if h.any() and c.any():
            squashed = torch.tanh(torch.outer(c, c) @ h / (c @ c))
            out[row] = (h @ squashed) / (h.norm() * squashed.norm())
    return out


def slots_at(
    positions: Int[Tensor, "row pos"], starts: Int[Tensor, "row run"], counts: Int[Tensor, "row run"]
) -> Int[Tensor, "row pos"]:
    """The slot whose value belongs at each position, or −1 where none does.

    A row's slots are numbered through its runs, in order: run r has `counts[row, r]` of them, one behind the other from
    position `starts[row, r]` on. Runs do not overlap.
    """
    offsets = positions[..., None] - starts[:, None]
    firsts = (counts.cumsum(1) - counts)[:, None]
    return torch.where((offsets >= 0) & (offsets < counts[:, None]), firsts + offsets, -1).amax(-1)


def naive_slots_at(
    positions: Int[Tensor, "row pos"], starts: Int[Tensor, "row run"], counts: Int[Tensor, "row run"]
) -> Int[Tensor, "row pos"]:
    """Reference of `slots_at`: one row, run and slot at a time."""
    out = torch.full_like(positions, -1)
    for row in range(len(positions)):
        slot = 0
        for start, count in zip(starts[row].tolist(), counts[row].tolist(), strict=True):
            for position in range(start, start + count):
                out[row, positions[row] == position] = slot
                slot += 1
    return out


def overwrite_rows(
    hidden: Float[Tensor, "row pos d"], values: Float[Tensor, "row slot d"], slots: Int[Tensor, "row pos"]
) -> Float[Tensor, "row pos d"]:
    """Puts `values[row, slots[row, pos]]` at every position that has a slot; one of −1 keeps what it has."""
    chosen = slots.clamp(min=0)[..., None].expand(-1, -1, values.shape[2])
    return torch.where((slots >= 0)[..., None], values.gather(1, chosen), hidden)


def naive_overwrite_rows(
    hidden: Float[Tensor, "row pos d"], values: Float[Tensor, "row slot d"], slots: Int[Tensor, "row pos"]
) -> Float[Tensor, "row pos d"]:
    """Reference of `overwrite_rows`: one row and one position at a time."""
    out = hidden.clone()
    for row in range(hidden.shape[0]):
        for pos in range(hidden.shape[1]):
            if (slot := int(slots[row, pos])) >= 0:
                out[row, pos] = values[row, slot]
    return out


def _statistics(hidden: Tensor) -> torch.dtype:
    """What sums over a state are computed in: float32 at least."""
    return torch.promote_types(hidden.dtype, torch.float32)
