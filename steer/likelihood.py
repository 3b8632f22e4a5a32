"""Teacher-forced likelihood of responses under a plan: what trained states minimize."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch.nn.functional import cross_entropy

from steer.inject import PrefixEdit
from steer.read import Span

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from steer.inject import Edit
    from steer.model import FrozenLM

T = TypeVar("T")


def response_losses(
    lm: FrozenLM, spans: Sequence[Span], edits: Sequence[Edit]
) -> tuple[Float[Tensor, " row"], Float[Tensor, " row"]]:
    """Sum over each span's tokens of −log p(token | what stands before it), in nats, and the number of tokens.

    One row a span; the rows of the edits are the rows of the spans. The first token of a sequence is never predicted.
    """
    prefixes = sum((edit.lengths for edit in edits if isinstance(edit, PrefixEdit)), torch.zeros(len(spans)).long())
    starts = [max(span.start, 1) + extra for span, extra in zip(spans, prefixes.tolist(), strict=True)]
    with lm.steered(states=[None] * len(spans), edits=edits, prompt_lengths=starts) as steering:
        batch = steering.prepare([span.ids for span in spans])
        positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        arguments = batch if not lm.attachment.architecture.takes_position_ids else {**batch, "position_ids": positions}
        logits = lm.model(**arguments, use_cache=False).logits
    # Left-padded: a span's tokens are the last ones of its row.
    width = max(span.end - max(span.start, 1) for span in spans)
    targets = torch.full((len(spans), width), -100)
    for row, span in enumerate(spans):
        inside = span.ids[max(span.start, 1) : span.end]
        targets[row, width - len(inside) :] = torch.tensor(inside)
    losses = cross_entropy(
        logits[:, -width - 1 : -1].float().transpose(1, 2), targets.to(logits.device), ignore_index=-100, reduction="none"
    )
    return losses.sum(1), (targets != -100).sum(1).to(losses)


def negative_log_likelihood(lm: FrozenLM, spans: Sequence[Span], edits: Sequence[Edit]) -> Float[Tensor, ""]:
    """Mean over all the spans' tokens, in nats per token."""
    sums, counts = response_losses(lm, spans, edits)
    return sums.sum() / counts.sum()


def batches_of(items: Sequence[T], size: int, steps: int, generator: torch.Generator) -> Iterator[list[T]]:
    """Yields `steps` batches, each item once per round, in an order drawn anew each round."""
    queue: list[int] = []
    for _ in range(steps):
        if len(queue) < min(size, len(items)):
            queue += torch.randperm(len(items), generator=generator).tolist()
        yield [items[i] for i in queue[:size]]
        queue = queue[size:]
