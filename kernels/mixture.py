"""Mixtures of next-token logits of several streams."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


def geometric(
    logits: Float[Tensor, "row vocab"], weights: Float[Tensor, " row"], owners: Int[Tensor, " row"], batch: int
) -> Float[Tensor, "batch vocab"]:
    """Geometric mixture `out[b] = sum of weights[r] * logits[r] over the rows r with owners[r] == b`, in float32.

    Rows 0 … batch−1 are the batch's own (`owners[r] == r`); further rows are contrasted streams. A token that an own
    row rules out (logit −inf) stays ruled out, and so does one that a further row of positive weight rules out. One
    that a further row of negative weight rules out counts there as in the own row, so that it is not contrasted. Rows
    of weight 0 do not count. There is thus no inf − inf, and no NaN.
    """
    logits = logits.float()
    own, further = logits[:batch], logits[batch:]
    scale = weights[batch:, None]
    ruled_out = torch.isneginf(further)
    # Nothing infinite may enter the sum: inf - inf and 0 * inf would be NaN.
    finite = own.masked_fill(torch.isneginf(own), 0.0)
    terms = scale * torch.where(ruled_out, finite[owners[batch:]], further)
    mixed = (weights[:batch, None] * finite).index_add(0, owners[batch:], terms)
    banned = torch.zeros_like(own).index_add(0, owners[batch:], (ruled_out & (scale > 0)).float()) > 0
    return mixed.masked_fill(banned | torch.isneginf(own), float("-inf"))


def naive_geometric(
    logits: Float[Tensor, "row vocab"], weights: Float[Tensor, " row"], owners: Int[Tensor, " row"], batch: int
) -> Float[Tensor, "batch vocab"]:
    """Reference of `geometric` in float64: one batch row and one stream at a time."""
    logits, weights = logits.double(), weights.double()
    out = torch.zeros(batch, logits.shape[1], dtype=torch.float64)
    minus_inf = float("-inf")
    for owner in range(batch):
        rows = [row for row in range(len(logits)) if owners[row] == owner]
        for token in range(logits.shape[1]):
            own = logits[owner, token].item()
            others = [(weights[row].item(), logits[row, token].item()) for row in rows if row != owner]
            if own == minus_inf or any(weight > 0 and logit == minus_inf for weight, logit in others):
                out[owner, token] = minus_inf
                continue
            out[owner, token] = weights[owner] * own
            for weight, logit in others:
                out[owner, token] += weight * (own if logit == minus_inf else logit)
    return out
