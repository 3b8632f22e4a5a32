"""Teacher-forced likelihood of responses under mixtures of streams."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from steer.errors import SteerError
from steer.inject.stream_rows import as_wide, pad_left
from steer.inject.streams import Mix, Mixture, Stream
from steer.likelihood import last_logits
from steer.read import Span

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from steer.model import FrozenLM

_PLAIN = Mixture((Stream(1.0),))


@torch.no_grad()
def mixed_losses(
    lm: FrozenLM,
    span: Span,
    mixtures: Sequence[Mixture | None],
    *,
    models: Mapping[str, FrozenLM] | None = None,
) -> Float[Tensor, " row"]:
    """−log p of a response under each mixture, in nats, summed over its tokens.

    The response is the same tokens in every stream. Streams that several mixtures have in common are read once, and
    each mixture is normalized at every token.

    Args:
        lm: the model; it must not be steered meanwhile.
        span: a response behind its prompt.
        mixtures: one a row; None for the prompt as it is.
        models: others, by the names under which streams mention them.

    Raises:
        SteerError: a stream has a context and the span has no prompt that it could stand in front of, or the whole is
            longer than the model's window.
    """
    rows = [mixture or _PLAIN for mixture in mixtures]
    wanted = list(dict.fromkeys((s.model, s.context, s.system) for mixture in rows for s in mixture.streams))
    response = list(span.ids[max(span.start, 1) : span.end])
    logits: dict[tuple[str | None, str | None, str | None], Float[Tensor, "token vocab"]] = {}
    for name in dict.fromkeys(model for model, _, _ in wanted):
        of_model = [key for key in wanted if key[0] == name]
        heads = [_head(lm, span, context, system) for _, context, system in of_model]
        found = _logits(lm if name is None else (models or {})[name], heads, response)
        logits |= dict(zip(of_model, found, strict=True))
    targets = torch.tensor(response, device=lm.device)[:, None]
    losses = []
    for mixture in rows:
        own, *others = [logits[s.model, s.context, s.system].to(lm.device) for s in mixture.streams]
        count = len(response)
        weights = [stream.weight for stream in mixture.streams for _ in range(count)]
        owners = torch.arange(count, device=lm.device).repeat(len(mixture.streams))
        # Each token is a row of its own.
        scores = Mix.of([mixture] * count, weights, owners)(torch.cat([own, *as_wide(own, others)]))
        losses.append(-scores.log_softmax(-1).gather(1, targets).sum())
    return torch.stack(losses).cpu()


def _head(lm: FrozenLM, span: Span, context: str | None, system: str | None) -> list[int]:
    """What stands in front of the response, with a context."""
    if context is None and system is None:
        return list(span.ids[: max(span.start, 1)])
    if span.prompt is None:
        raise SteerError("a context needs a prompt that it stands in front of, and this text has none")
    head = lm.encode(span.prompt, context=context, system=system)
    length = len(head) + span.end - span.start
    if lm.window is not None and length > lm.window:
        raise SteerError(f"context, prompt and response have {length} tokens, the model reads {lm.window} at most")
    return head


def _logits(lm: FrozenLM, heads: Sequence[list[int]], response: list[int]) -> Sequence[Float[Tensor, "token vocab"]]:
    """Of the response's tokens behind each of the heads."""
    ids, mask = pad_left([[*head, *response[:-1]] for head in heads], lm.pad_token_id)
    batch = {"input_ids": ids.to(lm.device), "attention_mask": mask.to(lm.device)}
    with lm.steered(states=[None] * len(heads)):
        return list(last_logits(lm, batch, len(response)))
