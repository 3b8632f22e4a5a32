"""Sampling in which each row draws from random numbers of its own, whatever the batch around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from steer.inject.stream_rows import only

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class SeededRows:
    """A logits processor, to be the last one: chooses row r's token from a stream of numbers that starts at `seeds[r]`.

    The numbers are drawn on the CPU before decoding starts, so they depend on neither batch nor device, and no step
    waits for them. A token is the inverse of the cumulative distribution at one minus the row's number.
    """

    def __init__(self, inner: Callable[[Tensor, Tensor], Tensor], seeds: Sequence[int], steps: int, start: int) -> None:
        self.inner, self.start = inner, start
        draws = [torch.rand(steps, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        self.draws: Float[Tensor, "row step"] = torch.stack(draws)

    def __call__(self, input_ids: Tensor, logits: Tensor) -> Tensor:
        scores = self.inner(input_ids, logits)
        self.draws = self.draws.to(scores.device)
        cumulative = scores.softmax(-1).cumsum(-1)
        step = input_ids.shape[1] - self.start
        # In (0, total], so that neither end can fall on a token of probability 0.
        targets = (1 - self.draws[:, step, None]) * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, targets)
        return only(scores, tokens.squeeze(1))
