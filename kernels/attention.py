"""Attention of token queries to per-row memories of different lengths."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor


def attend(
    queries: Float[Tensor, "row head pos k"],
    keys: Float[Tensor, "row head slot k"],
    values: Float[Tensor, "row head slot k"],
    visible: Bool[Tensor, "row slot"],
) -> Float[Tensor, "row head pos k"]:
    """Softmax attention over the visible slots of each row. Each row must see at least one slot."""
    return scaled_dot_product_attention(queries, keys, values, attn_mask=visible[:, None, None, :])


def naive_attend(
    queries: Float[Tensor, "row head pos k"],
    keys: Float[Tensor, "row head slot k"],
    values: Float[Tensor, "row head slot k"],
    visible: Bool[Tensor, "row slot"],
) -> Float[Tensor, "row head pos k"]:
    """Reference of `attend` in float64: each row attends to its own slots, cut to their number."""
    out = torch.empty_like(queries, dtype=torch.float64)
    for row in range(queries.shape[0]):
        q, k, v = (x.double() for x in (queries[row], keys[row][:, visible[row]], values[row][:, visible[row]]))
        weights = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, dim=-1)
        out[row] = weights @ v
    return out
