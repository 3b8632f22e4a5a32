"""Reading: hidden states of many texts at chosen sites, pooled per text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from steer.encoders import last_token, mean_over_response, token_norms
from steer.errors import SteerError
from steer.history import Record
from steer.sites import Site

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from steer.model import FrozenLM

Pool = Literal["last", "mean"]
_POOLS: dict[Pool, Callable[..., Tensor]] = {"last": last_token, "mean": mean_over_response}


@dataclass(frozen=True)
class Span:
    """Token ids of a text and the part of them, `[start, end)`, that is of interest."""

    ids: Sequence[int]
    start: int
    end: int


@dataclass(frozen=True)
class Reading:
    """What was read at one site.

    Attributes:
        pooled: one vector per text, in the order of the texts, float32, on the CPU.
        norm: median residual norm over the tokens of all spans, the first token of each text excluded.
    """

    pooled: Float[Tensor, "text d"]
    norm: float

    @property
    def mean(self) -> Float[Tensor, " d"]:
        """Over the texts."""
        return self.pooled.mean(0)


def response_span(lm: FrozenLM, response: str, prompt: str | None = None, *, max_tokens: int = 1024) -> Span:
    """The response after its prompt, as it would stand in a dialogue with the model, or the bare text.

    No end-of-text token is appended: on one side of a pair only, it would be all that the pair differs in. Of
    `max_tokens`, a prompt gets its last ones, up to half of them, and a response its first ones.

    Raises:
        SteerError: nothing of the response is left.
    """
    if lm.tokenizer is None:
        raise SteerError("this model was wrapped without a tokenizer and cannot read texts")
    if prompt is None:
        ids = lm.tokenizer(response).input_ids[:max_tokens]
        start = 0
    else:
        head = lm.encode(prompt)[-(max_tokens // 2) :]
        ids = (head + lm.tokenizer(response, add_special_tokens=False).input_ids)[:max_tokens]
        start = len(head)
    # The first token of a sequence never counts, so a span needs one more.
    if len(ids) <= max(start, 1):
        raise SteerError(f"a text is too short to read, it has no token besides the first: {response[:40]!r}")
    return Span(ids, start, len(ids))


def record_span(lm: FrozenLM, record: Record, **kwargs: Any) -> Span:
    """The span of a record's response. Raises SteerError, naming the record, if it is too short."""
    try:
        return response_span(lm, record.response, record.prompt, **kwargs)
    except SteerError as error:
        raise SteerError(f"record {record.id!r} of {record.user_id!r}: {error}") from None


@torch.no_grad()
def read(
    lm: FrozenLM,
    spans: Sequence[Span],
    sites: Iterable[Site | str],
    *,
    pool: Pool = "last",
    batch_tokens: int = 4096,
    on_progress: Callable[[int], None] | None = None,
) -> dict[Site, Reading]:
    """Runs the frozen model over texts and pools what it has at the sites.

    The model runs without its head and stops after the last site. Texts of like length share a batch of at most
    `batch_tokens` tokens with padding.

    Args:
        lm: the model; it must not be steered meanwhile.
        spans: the texts.
        sites: where to read; the keys of the result are their canonical names.
        pool: "last" token of the span, or "mean" over it.
        batch_tokens: size of a batch.
        on_progress: told the number of texts done after each batch.

    Raises:
        SteerError: no texts, no such site, or an unknown pool.
    """
    wanted = [Site.parse(site).canonical() for site in sites]
    if not spans or not wanted:
        raise SteerError("there is nothing to read: give at least one text and one site")
    if pool not in _POOLS:
        raise SteerError(f"pool={pool!r} is not one of {', '.join(get_args(Pool))}")
    lm.attachment.declare(wanted)
    recorder = _Recorder(wanted)
    pooled = {site: torch.empty(len(spans), lm.width_at(site)) for site in wanted}
    norms: dict[Site, list[Tensor]] = {site: [] for site in wanted}
    lm.attachment.bind(recorder)
    try:
        lm.attachment.install({site: (recorder.at(site),) for site in wanted})
        done = 0
        for batch in _batches(spans, batch_tokens):
            starts, ends = _run(lm, [spans[i] for i in batch])
            for site, hidden in recorder.take().items():
                pooled[site][batch] = _POOLS[pool](hidden, starts.to(hidden.device), ends.to(hidden.device)).cpu()
                norms[site].append(token_norms(hidden, starts.to(hidden.device), ends.to(hidden.device)).cpu())
            done += len(batch)
            if on_progress is not None:
                on_progress(done)
    finally:
        lm.attachment.unbind()
    return {site: Reading(pooled[site], float(torch.cat(norms[site]).median())) for site in wanted}


class _Enough(Exception):
    """Raised by the recorder's last site to end a forward pass that has nothing more to tell."""


class _Recorder:
    """Keeps what passes the sites during one forward pass."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self._missing = set(sites)
        self._sites = set(sites)
        self._kept: dict[Site, Tensor] = {}

    def begin(self, positions: Int[Tensor, "row pos"]) -> None:
        self._missing = set(self._sites)

    def end(self) -> None:
        pass

    def at(self, site: Site) -> Callable[[Tensor], Tensor]:
        def keep(hidden: Tensor) -> Tensor:
            # A clone, as some models go on to add into this very tensor.
            self._kept[site] = hidden.clone()
            self._missing.discard(site)
            if not self._missing:
                raise _Enough
            return hidden

        return keep

    def take(self) -> dict[Site, Tensor]:
        kept, self._kept = self._kept, {}
        return kept


def _run(lm: FrozenLM, spans: Sequence[Span]) -> tuple[Tensor, Tensor]:
    """One forward pass, padded on the right; returns where the spans begin and end."""
    length = max(len(span.ids) for span in spans)
    ids = torch.tensor([[*span.ids, *[lm.pad_token_id] * (length - len(span.ids))] for span in spans])
    mask = torch.tensor([[1] * len(span.ids) + [0] * (length - len(span.ids)) for span in spans])
    with suppress(_Enough):
        lm.attachment.decoder(input_ids=ids.to(lm.device), attention_mask=mask.to(lm.device), use_cache=False)
    return torch.tensor([span.start for span in spans]), torch.tensor([span.end for span in spans])


def _batches(spans: Sequence[Span], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of texts, the longest first, so that a batch that is too large fails at once."""
    order = sorted(range(len(spans)), key=lambda i: -len(spans[i].ids))
    while order:
        size = max(batch_tokens // len(spans[order[0]].ids), 1)
        yield order[:size]
        order = order[size:]
