"""Nearest neighbours: what followed the most similar of stored states, mixed into next-token distributions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


def mix_neighbours(
    logits: Float[Tensor, "batch copy vocab"],
    queries: Float[Tensor, "batch copy d"],
    keys: Float[Tensor, "batch n d"],
    tokens: Int[Tensor, "batch n"],
    lengths: Int[Tensor, " batch"],
    scales: Float[Tensor, " batch"],
    weights: Float[Tensor, " batch"],
    count: int,
) -> Float[Tensor, "batch copy vocab"]:
    """`log( w · p_knn + (1 − w) · softmax(logits) )`, in float32; kNN-LM (Khandelwal et al. 2020, Eq. 2 and 3).

    p_knn gives each of the `count` entries of `keys[b, :lengths[b]]` that are nearest to a query a share proportional
    to `exp(−scales[b] · squared distance)`, and a token the shares of its entries. The copies of a row search in the
    same store. Rows of weight 0 or length 0 come back as they are, bit for bit. No NaN where the logits have none.
    """
    # Not by way of a product of matrices: the difference of large squares would keep little of small distances.
    distances = torch.cdist(queries, keys, compute_mode="donot_use_mm_for_euclid_dist").square()
    beyond = torch.arange(keys.shape[1], device=keys.device) >= lengths[:, None]
    nearest, which = distances.masked_fill(beyond[:, None], torch.inf).topk(min(count, keys.shape[1]), largest=False)
    # A scale may be 0, and 0 · ∞ is NaN. In rows without entries all shares are, and none is used.
    shares = (-scales[:, None, None] * nearest).masked_fill(nearest.isinf(), -torch.inf).softmax(-1)
    found = tokens[:, None].expand(-1, queries.shape[1], -1).gather(-1, which)
    recalled = torch.zeros_like(logits, dtype=torch.float32).scatter_add_(-1, found, shares)
    weight = weights[:, None, None]
    mixed = torch.logaddexp(logits.float().log_softmax(-1) + torch.log1p(-weight), recalled.log() + weight.log())
    return torch.where(((weights > 0) & (lengths > 0))[:, None, None], mixed, logits.float())


def naive_mix_neighbours(
    logits: Float[Tensor, "batch copy vocab"],
    queries: Float[Tensor, "batch copy d"],
    keys: Float[Tensor, "batch n d"],
    tokens: Int[Tensor, "batch n"],
    lengths: Int[Tensor, " batch"],
    scales: Float[Tensor, " batch"],
    weights: Float[Tensor, " batch"],
    count: int,
) -> Float[Tensor, "batch copy vocab"]:
    """Reference of `mix_neighbours` in float64: one query and one entry at a time."""
    out = logits.double()
    for row in range(logits.shape[0]):
        weight, length = weights[row].item(), int(lengths[row])
        if weight == 0 or length == 0:
            continue
        for copy in range(logits.shape[1]):
            query = queries[row, copy].double()
            distances = [((query - keys[row, i].double()) ** 2).sum().item() for i in range(length)]
            nearest = sorted(range(length), key=lambda i: distances[i])[:count]
            # Of the differences to the least, so that not all of them vanish.
            least = distances[nearest[0]]
            masses = [math.exp(-scales[row].item() * (distances[i] - least)) for i in nearest]
            mixed = (1 - weight) * out[row, copy].softmax(-1)
            for i, mass in zip(nearest, masses, strict=True):
                mixed[tokens[row, i]] += weight * mass / sum(masses)
            out[row, copy] = mixed.log()
    return out
