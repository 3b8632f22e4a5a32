"""Exponential tilts of next-token distributions: what one is at many strengths, and its derivatives.

Of log-probabilities `a` and a change `f` of each token's, the tilt by λ is the distribution p_λ ∝ exp(a + λ f). Its
log-probability is concave in λ, with the derivative f − E_λ[f] and the second derivative −Var_λ[f].
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

# Numbers that a CPU works on at once: they stay in the cache of a core, while λ after λ passes over them.
_BLOCK = 1 << 18


def tilted_log_probs(
    log_probs: Float[Tensor, "token vocab"],
    change: Float[Tensor, "token vocab"],
    chosen: Int[Tensor, " token"],
    lams: Float[Tensor, " lam"],
) -> Float[Tensor, "lam token"]:
    """Log-probability of the chosen tokens under the tilt by each λ, in nats, in the dtype of `log_probs`.

    `log_probs` may be −inf, at −inf for every λ, or lack a constant; `change` must be finite.
    """
    out = log_probs.new_empty(len(lams), len(chosen))
    for rows in _blocks(log_probs):
        base, slope = log_probs[rows], change[rows]
        for i, lam in enumerate(lams.tolist()):
            scores = torch.add(base, slope, alpha=lam)
            out[i, rows] = scores.gather(1, chosen[rows, None])[:, 0] - scores.logsumexp(1)
    return out


def tilted_moments(
    log_probs: Float[Tensor, "token vocab"], change: Float[Tensor, "token vocab"], lam: float
) -> tuple[Float[Tensor, " token"], Float[Tensor, " token"]]:
    """Mean and variance of `change` under the tilt by λ."""
    means, variances = log_probs.new_empty(len(log_probs)), log_probs.new_empty(len(log_probs))
    for rows in _blocks(log_probs):
        slope = change[rows]
        probs = torch.add(log_probs[rows], slope, alpha=lam).softmax(1)
        means[rows] = (probs * slope).sum(1)
        # Of deviations: the difference of two large numbers would be rounded away.
        variances[rows] = (probs * (slope - means[rows, None]).square()).sum(1)
    return means, variances


def naive_tilted_log_probs(
    log_probs: Float[Tensor, "token vocab"],
    change: Float[Tensor, "token vocab"],
    chosen: Int[Tensor, " token"],
    lams: Float[Tensor, " lam"],
) -> Float[Tensor, "lam token"]:
    """Reference of `tilted_log_probs` in float64: one λ and one token at a time."""
    out = torch.empty(len(lams), len(chosen), dtype=torch.float64)
    for i, lam in enumerate(lams.double().tolist()):
        for t, token in enumerate(chosen.tolist()):
            weights = (log_probs[t].double() + lam * change[t].double()).exp()
            out[i, t] = (weights[token] / weights.sum()).log()
    return out


def naive_tilted_moments(
    log_probs: Float[Tensor, "token vocab"], change: Float[Tensor, "token vocab"], lam: float
) -> tuple[Float[Tensor, " token"], Float[Tensor, " token"]]:
    """Reference of `tilted_moments` in float64."""
    weights = (log_probs.double() + lam * change.double()).exp()
    probs = weights / weights.sum(1, keepdim=True)
    mean = (probs * change.double()).sum(1)
    return mean, (probs * change.double() ** 2).sum(1) - mean**2


def _blocks(table: Float[Tensor, "token vocab"]) -> Iterator[slice]:
    size = max(_BLOCK // table.shape[1], 1) if table.device.type == "cpu" else max(len(table), 1)
    return (slice(start, start + size) for start in range(0, len(table), size))
