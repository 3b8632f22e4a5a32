"""Contrast of texts that are there already: one response, teacher-forced after its prompt with and without a context.

All streams of a text are rows of one forward pass, and the response is the same tokens in each of them. That one pass
is enough for every strength: CoS_λ = lp(x | C, P) + λ F with F = lp(x | C, P) − lp(x | ∅, P), normalized at each token,
is the tilt of the distribution with context by λ (METHODS §1.4).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING

import torch

from steer.errors import SteerError
from steer.kernels import tilted_log_probs
from steer.likelihood import last_logits
from steer.read import by_length, require_room

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from steer.model import FrozenLM, Prompt

# A text, or token ids that are used as they are.
Response = str | Sequence[int]


@dataclass(frozen=True)
class Text:
    """Token ids of a response, and of what it stands behind in each stream.

    Attributes:
        prompts: with a context each.
        without: the prompt without a context, or with the opposite one; None for a text without such a stream.
        response: the same in all streams.
    """

    prompts: Sequence[Sequence[int]]
    without: Sequence[int] | None
    response: Sequence[int]

    @property
    def streams(self) -> list[Sequence[int]]:
        """All prompts, the one without a context last."""
        return [*self.prompts, *([] if self.without is None else [self.without])]

    @property
    def longest(self) -> int:
        """Tokens of the longest stream."""
        return max(map(len, self.streams)) + len(self.response)

    def parts(self, batch_tokens: int) -> Iterator[tuple[int, Text]]:
        """The text with some of its contexts at a time, as many as one forward pass may have, and where these start."""
        size = max(batch_tokens // self.longest - (self.without is not None), 1)
        for start in range(0, len(self.prompts), size):
            yield start, replace(self, prompts=self.prompts[start : start + size])


def text_of(
    lm: FrozenLM,
    prompt: Prompt,
    response: Response,
    contexts: Sequence[str | None],
    *,
    opposite: str | None = None,
    chat: bool | None = None,
) -> Text:
    """A response behind its prompt, with each of the contexts and without.

    The response is tokenized once, by itself, and no end-of-text token is appended to it: `generate_tokens` returns
    none either. Whether the text ended there counts only where the response is given as token ids with that token.

    Args:
        lm: the model.
        prompt: what the response answers, as for `FrozenLM.encode`.
        response: a text, or token ids.
        contexts: each goes in front of the prompt; None is no context.
        opposite: the context of the stream that the others are compared with, in place of none.
        chat: as for `FrozenLM.encode`.

    Raises:
        SteerError: a context or the response is empty, the response has a token that the model has not, a context is
            its own opposite, or the whole is longer than the model's window.
    """
    if lm.tokenizer is None and isinstance(response, str):
        raise SteerError("this model was wrapped without a tokenizer: responses must be token ids")
    require_contexts(contexts, opposite)
    if isinstance(response, str):
        assert lm.tokenizer is not None
        ids = lm.tokenizer(response, add_special_tokens=False).input_ids
    else:
        ids = _known(lm, response)
    if not ids:
        raise SteerError("a response is empty: it has no token whose probability could change")
    text = Text(
        [lm.encode(prompt, context=context, chat=chat) for context in contexts],
        lm.encode(prompt, context=opposite, chat=chat),
        ids,
    )
    remedy = f"shorten them: {_shortened(str(response))}"
    require_room(lm, text.longest, "context, prompt and response have", remedy=remedy)
    return text


def _known(lm: FrozenLM, tokens: Sequence[int]) -> list[int]:
    """The token ids, as Python's own numbers. Raises SteerError for one that the model has no embedding of."""
    ids = tokens.tolist() if isinstance(tokens, torch.Tensor) else list(tokens)
    count = lm.vocabulary_size
    if wrong := [token for token in ids if not (isinstance(token, Integral) and 0 <= token < count)]:
        raise SteerError(f"a response has the token {wrong[0]!r}; this model's are whole numbers from 0 to {count - 1}")
    return [int(token) for token in ids]


def require_contexts(contexts: Sequence[str | None], opposite: str | None = None) -> None:
    """Raises SteerError if a context is no text, empty, or its own opposite."""
    for context in (*contexts, opposite):
        if context is not None and not isinstance(context, str):
            raise SteerError(f"a context must be text, got {context!r}")
        if context is not None and not context.strip():
            raise SteerError("a context is empty")
    if opposite is not None and opposite in contexts:
        raise SteerError(f"{_shortened(opposite)} is its own opposite, so that λ would change nothing; give another")


@torch.no_grad()
def log_probs(
    lm: FrozenLM,
    texts: Sequence[Text],
    *,
    batch_tokens: int = 2048,
) -> Iterator[tuple[int, Float[Tensor, "stream token vocab"]]]:
    """Log-probabilities of every token at the places of the responses' tokens, in nats, one text after the other.

    Texts of like length share a forward pass, and the head runs for the responses alone. What is yielded is in float32
    at least, on the device of the logits; at any time there are those of one text, and the logits of one batch.

    Args:
        lm: the model; it must not be steered meanwhile.
        texts: in what order they come is not theirs.
        batch_tokens: tokens, over all streams and with padding, that one forward pass may have; a text of more than
            these is a batch by itself.

    Yields:
        The index of a text, and its streams in the order of `Text.streams`.
    """
    for batch in _batches(texts, batch_tokens):
        rows = [[*prompt, *texts[i].response[:-1]] for i in batch for prompt in texts[i].streams]
        longest = max(len(texts[i].response) for i in batch)
        with lm.steered(states=[None] * len(rows), prompt_lengths=[len(row) for row in rows]) as steering:
            logits = last_logits(lm, steering.prepare(rows), longest)
        first = 0
        for i in batch:
            own = logits[first : first + len(texts[i].streams), -len(texts[i].response) :]
            first += len(own)
            yield i, own.to(torch.promote_types(own.dtype, torch.float32)).log_softmax(-1)


def _batches(texts: Sequence[Text], batch_tokens: int) -> Iterator[list[int]]:
    """Numbers of texts that have as many streams each and are of like length."""
    streams = [len(text.streams) for text in texts]
    for count in sorted(set(streams), reverse=True):
        alike = {i: text.longest for i, text in enumerate(texts) if streams[i] == count}
        yield from by_length(alike, batch_tokens // count)


def pairs(
    lm: FrozenLM,
    texts: Sequence[Text],
    *,
    batch_tokens: int = 2048,
    on_progress: Callable[[int], None] | None = None,
) -> Iterator[tuple[int, int, Float[Tensor, "token vocab"], Float[Tensor, "token vocab"]]]:
    """The same for one context at a time, however many a text has: memory does not grow with their number.

    Args:
        lm: the model; it must not be steered meanwhile.
        texts: in what order they come is not theirs.
        batch_tokens: as for `log_probs`. Where a text's contexts take several forward passes, each of these has the
            stream without a context again.
        on_progress: told the number of texts done.

    Yields:
        The indices of a text and of one of its contexts; log-probabilities with the context, and without. The latter
        are the former's where the text has no such stream.
    """
    parts = [(i, start, part) for i, text in enumerate(texts) for start, part in text.parts(batch_tokens)]
    left = Counter(i for i, _, _ in parts)
    for p, streams in log_probs(lm, [part for _, _, part in parts], batch_tokens=batch_tokens):
        i, start, part = parts[p]
        for k in range(len(part.prompts)):
            yield i, start + k, streams[k], streams[k if part.without is None else -1]
        left[i] -= 1
        if on_progress is not None and not left[i]:
            on_progress(sum(not count for count in left.values()))


def influence_of(
    with_context: Float[Tensor, "*batch vocab"], without: Float[Tensor, "*batch vocab"]
) -> Float[Tensor, "*batch vocab"]:
    """F of CoS, Eq. 2: what the context adds to each token's log-probability.

    0 for a token that either stream rules out (−inf): one that the context rules out stays so at every λ, the other
    keeps what it has with the context. There is no inf − inf.
    """
    ruled_out = torch.isneginf(with_context) | torch.isneginf(without)
    return (with_context - without).masked_fill_(ruled_out, 0.0)


def log_likelihoods(
    lm: FrozenLM,
    texts: Sequence[Text],
    lams: Sequence[float],
    *,
    temperature: float = 1.0,
    batch_tokens: int = 2048,
    on_progress: Callable[[int], None] | None = None,
) -> tuple[Float[Tensor, "text lam"], Int[Tensor, " text"]]:
    """Log-likelihood of each text's response under CoS at each λ, in nats, and how many tokens it has.

    Args:
        lm: the model; it must not be steered meanwhile.
        texts: of one context each.
        lams: λ, in CoS' convention: −1 is no context, 0 the context as plain text.
        temperature: at which a text that is sampled would be.
        batch_tokens, on_progress: as for `pairs`.

    Raises:
        SteerError: λ is not finite, the temperature not above 0, or a text has not one context.

    Returns:
        Sums over the responses' tokens, in float64, and numbers of tokens; both on the CPU.
    """
    grid = finite(lams)
    require_temperature(temperature)
    if wrong := [i for i, text in enumerate(texts) if len(text.prompts) != 1]:
        raise SteerError(f"text {wrong[0]} has {len(texts[wrong[0]].prompts)} contexts; make a text of each of them")
    out = torch.empty(len(texts), len(grid), dtype=torch.float64)
    for i, _, with_context, without in pairs(lm, texts, batch_tokens=batch_tokens, on_progress=on_progress):
        scores, change = tilt_of(with_context, without, temperature)
        out[i] = tilted_log_probs(scores, change, chosen_of(texts[i], scores), grid).double().sum(1).cpu()
    return out, torch.tensor([len(text.response) for text in texts])


def tilt_of(
    with_context: Float[Tensor, "token vocab"], without: Float[Tensor, "token vocab"], temperature: float = 1.0
) -> tuple[Float[Tensor, "token vocab"], Float[Tensor, "token vocab"]]:
    """What is tilted, and by what: the log-probabilities with context and F, both over the temperature."""
    return with_context / temperature, influence_of(with_context, without).div_(temperature)


def chosen_of(text: Text, like: Tensor) -> Int[Tensor, " token"]:
    """The response's tokens, where `like` is."""
    return torch.tensor(text.response, device=like.device)


def finite(lams: Sequence[float]) -> Float[Tensor, " lam"]:
    """λ in float64. Raises SteerError if there are none, or one is no finite number."""
    try:
        grid = torch.as_tensor(lams, dtype=torch.float64).flatten()
    except (TypeError, ValueError, RuntimeError):
        raise SteerError(f"λ must be finite, and at least one, got {lams!r}") from None
    if not len(grid) or not torch.isfinite(grid).all():
        raise SteerError(f"λ must be finite, and at least one, got {grid.tolist()}")
    return grid


def require_temperature(temperature: float) -> None:
    """Raises SteerError if no text could be sampled at it."""
    if not (isinstance(temperature, Real) and math.isfinite(temperature) and temperature > 0):
        raise SteerError(f"temperature={temperature} is not above 0")


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}…")
