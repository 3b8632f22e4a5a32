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
    row rules out (logit −inf) stays ruled out; a term that is −inf in another stream only, or has weight 0, does not
    count. There is thus no inf − inf, and no NaN. METHODS: contexts (CoS), classifier-free guidance and their family.
    """
    logits = logits.float()
    own, further = logits[:batch], logits[batch:]
    terms = weights[batch:, None] * further
    # Rows of weight 0 and logits of -inf: 0 * inf would be NaN, and inf - inf too.
    terms = terms.masked_fill(torch.isinf(further) | (weights[batch:, None] == 0), 0.0)
    mixed = weights[:batch, None] * own
    mixed = mixed.index_add(0, owners[batch:], terms)
    return mixed.masked_fill(torch.isneginf(own), float("-inf"))


def naive_geometric(
    logits: Float[Tensor, "row vocab"], weights: Float[Tensor, " row"], owners: Int[Tensor, " row"], batch: int
) -> Float[Tensor, "batch vocab"]:
    """Reference of `geometric` in float64: one batch row and one stream at a time."""
    logits, weights = logits.double(), weights.double()
    out = torch.zeros(batch, logits.shape[1], dtype=torch.float64)
    for row, owner in enumerate(owners.tolist()):
        finite = torch.isfinite(logits[row])
        if weights[row] != 0:
            out[owner, finite] += weights[row] * logits[row, finite]
    out[torch.isneginf(logits[:batch])] = float("-inf")
    return out
