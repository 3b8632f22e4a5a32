"""Pooling of activations that another library has read, to the numbers that `steer.read` gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from steer.encoders import last_token, mean_over_response
from steer.errors import SteerError
from steer.sites import Site

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from steer.read import Pool, Span


def pooled(
    activations: Mapping[Site, Float[Tensor, "text pos d"]],
    spans: Sequence[Span],
    *,
    pool: Pool = "last",
    attention_mask: Int[Tensor, "text pos"] | None = None,
) -> dict[Site, Float[Tensor, "text d"]]:
    """Pools each text's activations over its span, as `steer.read(lm, spans, sites, pool=pool)[site].pooled` does.

    Args:
        activations: of a batch that holds the ids of the spans, one span a row.
        spans: the texts.
        pool: "last" token of the span, or "mean" over it, without the first token of the text.
        attention_mask: 1 at real tokens, 0 at padding, on either side; rows begin with their texts if it is None.

    Raises:
        SteerError: the batch is not the spans'.
    """
    offsets = torch.zeros(len(spans), dtype=torch.long) if attention_mask is None else attention_mask.argmax(1).cpu()
    starts = torch.tensor([max(span.start, 1) for span in spans]) + offsets
    ends = torch.tensor([span.end for span in spans]) + offsets
    for site, hidden in activations.items():
        if hidden.shape[0] != len(spans) or hidden.shape[1] < int(ends.max()):
            raise SteerError(
                f"{site}: activations of {hidden.shape[0]} texts with {hidden.shape[1]} tokens cannot hold "
                f"{len(spans)} spans that end at {int(ends.max())}"
            )
    pooling = {"last": last_token, "mean": mean_over_response}[pool]
    return {
        site: pooling(hidden, starts.to(hidden.device), ends.to(hidden.device)).cpu()
        for site, hidden in activations.items()
    }
