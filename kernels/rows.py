"""Per-row edits of hidden states: add one vector to each row, or overwrite a span of positions by soft tokens."""

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


def overwrite_rows(
    hidden: Float[Tensor, "row pos d"],
    values: Float[Tensor, "row slot d"],
    offsets: Int[Tensor, "row pos"],
    lengths: Int[Tensor, " row"],
) -> Float[Tensor, "row pos d"]:
    """Puts `values[row, offsets[row, pos]]` at every position whose offset lies in `[0, lengths[row])`.

    Offsets may be negative or too large: such positions keep what they have.
    """
    inside = (offsets >= 0) & (offsets < lengths[:, None])
    slots = offsets.clamp(0, values.shape[1] - 1)[..., None].expand(-1, -1, values.shape[2])
    return torch.where(inside[..., None], values.gather(1, slots), hidden)


def naive_overwrite_rows(
    hidden: Float[Tensor, "row pos d"],
    values: Float[Tensor, "row slot d"],
    offsets: Int[Tensor, "row pos"],
    lengths: Int[Tensor, " row"],
) -> Float[Tensor, "row pos d"]:
    """Reference of `overwrite_rows`: one row and one position at a time."""
    out = hidden.clone()
    for row in range(hidden.shape[0]):
        for pos in range(hidden.shape[1]):
            if 0 <= (slot := int(offsets[row, pos])) < int(lengths[row]):
                out[row, pos] = values[row, slot]
    return out
