"""Teacher-forced likelihood of responses under mixtures of streams."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from steer.errors import SteerError
from steer.inject.stream_rows import as_wide, pad_left
from steer.inject.streams import Mix, Mixture, Stream
from steer.likelihood import last_logits
from steer.read import Span, require_room

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from steer.model import FrozenLM

_PLAIN = Mixture((Stream(1.0),))

# What tells streams apart, up to their weights: the model, and the context and the system message in front.
Key = tuple["FrozenLM", str | None, str | None]


@torch.no_grad()
def mixed_losses(
    lm: FrozenLM,
    span: Span,
    mixtures: Sequence[Mixture | None],
    *,
    models: Mapping[str, FrozenLM] | None = None,
    batch_tokens: int = 2048,
) -> Float[Tensor, " row"]:
    """−log p of a response under each mixture, in nats, summed over its tokens.

    The response is the same tokens in every stream. Streams that several mixtures have in common are read once, and
    each mixture is normalized at every token.

    Args:
        lm: the model; it must not be steered meanwhile.
        span: a response behind its prompt.
        mixtures: one a row; None for the prompt as it is.
        models: others, by the names under which streams mention them.
        batch_tokens: tokens, over all streams and with padding, that one forward pass may have.

    Raises:
        SteerError: as `heads_of` does, before any forward pass.
    """
    rows = [mixture or _PLAIN for mixture in mixtures]
    heads = heads_of(lm, span, rows, models)
    response = _response(span)
    passes = {
        other: _passes(other, {key: head for key, head in heads.items() if key[0] is other}, response, batch_tokens)
        for other, _, _ in heads
    }
    keys = [[_key(lm, stream, models) for stream in mixture.streams] for mixture in rows]
    left = Counter(key for own in keys for key in own)
    targets = torch.tensor(response, device=lm.device)[:, None]
    logits: dict[Key, Float[Tensor, "token vocab"]] = {}
    losses = []
    for mixture, wanted in zip(rows, keys, strict=True):
        for key in wanted:
            while key not in logits:
                logits |= next(passes[key[0]])
        scores = _mixed(mixture, [logits[key].to(lm.device) for key in wanted])
        losses.append(-scores.log_softmax(-1).gather(1, targets).sum())
        left.subtract(wanted)
        logits = {key: found for key, found in logits.items() if left[key]}
    return torch.stack(losses).cpu()


def heads_of(
    lm: FrozenLM,
    span: Span,
    mixtures: Sequence[Mixture | None],
    models: Mapping[str, FrozenLM] | None = None,
) -> dict[Key, list[int]]:
    """What stands in front of the response in each stream of the mixtures. Nothing is run.

    A span may have cut its prompt to the last tokens. A context stands in front of the whole prompt, so where there is
    one, every stream of every mixture has the whole prompt: they would be about different prompts otherwise.

    Raises:
        SteerError: a stream has a context and the span has no prompt that it could stand in front of, or the whole is
            longer than the window of the stream's model.
    """
    streams = {_key(lm, stream, models): stream for row in mixtures for stream in (row or _PLAIN).streams}
    whole = any(context is not None or system is not None for _, context, system in streams)
    heads = {}
    for (other, context, system), stream in streams.items():
        head = list(span.ids[: max(span.start, 1)])
        if whole:
            if span.prompt is None:
                raise SteerError("a context needs a prompt that it stands in front of, and this text has none")
            head = lm.encode(span.prompt, context=context, system=system)
        length = len(head) + len(_response(span))
        require_room(other, length, "context, prompt and response have", name=stream.model)
        heads[other, context, system] = head
    return heads


def _key(lm: FrozenLM, stream: Stream, models: Mapping[str, FrozenLM] | None) -> Key:
    return lm if stream.model is None else (models or {})[stream.model], stream.context, stream.system


def _response(span: Span) -> list[int]:
    return list(span.ids[max(span.start, 1) : span.end])


def _passes(
    lm: FrozenLM, heads: Mapping[Key, list[int]], response: list[int], batch_tokens: int
) -> Iterator[dict[Key, Float[Tensor, "token vocab"]]]:
    """Logits of the response's tokens behind each of the heads, in order, as many at a time as a pass may have."""
    keys, rows = list(heads), [[*head, *response[:-1]] for head in heads.values()]
    size = max(batch_tokens // max(map(len, rows)), 1)
    for start in range(0, len(rows), size):
        ids, mask = pad_left(rows[start : start + size], lm.pad_token_id)
        batch = {"input_ids": ids.to(lm.device), "attention_mask": mask.to(lm.device)}
        with lm.steered(states=[None] * len(ids)):
            found = last_logits(lm, batch, len(response))
        # Clones, so that one which others need later does not keep the whole pass.
        yield {key: own.clone() for key, own in zip(keys[start : start + size], found, strict=True)}


def _mixed(mixture: Mixture, streams: Sequence[Float[Tensor, "token vocab"]]) -> Float[Tensor, "token vocab"]:
    """The mixture at each token: a token is a row of its own."""
    own, *others = streams
    count = len(own)
    weights = [stream.weight for stream in mixture.streams for _ in range(count)]
    owners = torch.arange(count, device=own.device).repeat(len(streams))
    mix = Mix.of([mixture] * count, weights, owners, torch.promote_types(own.dtype, torch.float32))
    return mix(torch.cat([own, *as_wide(own, others)]))
