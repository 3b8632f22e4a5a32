"""Pooling of hidden states over tokens. The first token of a sequence never counts.

Its residual norm is a massive outlier, about a hundred times the others', and would drown them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor


def last_token(
    hidden: Float[Tensor, "text pos d"], starts: Int[Tensor, " text"], ends: Int[Tensor, " text"]
) -> Float[Tensor, "text d"]:
    """The hidden state of each text's last token, `ends − 1`, in float32. `starts` plays no part."""
    return hidden[torch.arange(len(ends), device=hidden.device), ends - 1].float()


def mean_over_response(
    hidden: Float[Tensor, "text pos d"], starts: Int[Tensor, " text"], ends: Int[Tensor, " text"]
) -> Float[Tensor, "text d"]:
    """Mean over the tokens of `[starts, ends)`, without the sequence's first, in float32."""
    inside = _span(hidden, starts, ends)
    return (hidden.float() * inside[..., None]).sum(1) / inside.sum(1, keepdim=True)


def median_norm(
    hidden: Float[Tensor, "text pos d"], starts: Int[Tensor, " text"], ends: Int[Tensor, " text"]
) -> Float[Tensor, " text"]:
    """Each text's median norm of the hidden states in `[starts, ends)`, without the sequence's first, in float32.

    Of an even number of tokens it is the lower of the two in the middle.
    """
    norms = hidden.float().norm(dim=-1)
    return norms.masked_fill(~_span(hidden, starts, ends), float("nan")).nanmedian(dim=1).values


def _span(hidden: Tensor, starts: Tensor, ends: Tensor) -> Bool[Tensor, "text pos"]:
    positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
    return (positions >= starts.clamp(min=1)[:, None]) & (positions < ends[:, None])
