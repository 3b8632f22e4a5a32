"""Reading: hidden states of any number of texts at chosen sites, pooled per text.

A text costs one pass through the layers up to the last site, without the head. Texts of like length share a batch.
What many of them begin with, a system prompt or a prompt that several responses answer, is run once: the keys and
values of such a stem serve all texts that grow from it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from safetensors.torch import load, save
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from steer.cache import Cache, key_of, model_key
from steer.encoders import last_token, mean_over_response, median_norm
from steer.errors import SteerError
from steer.history import Record
from steer.sites import Site

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from steer.model import FrozenLM

Pool = Literal["last", "mean"]
# Of the hidden states `[text, pos, d]`, and where each text's span starts and ends, `[text]`.
PoolFunction = Callable[["Tensor", "Tensor", "Tensor"], "Tensor"]
_POOLS: dict[Pool, PoolFunction] = {"last": last_token, "mean": mean_over_response}

# A pass of its own over what texts share breaks even at about four tokens (SmolLM2 135M on a CPU).
_SHORTEST_STEM = 8
_WINDOW = 2048


@dataclass(frozen=True)
class Span:
    """Token ids of a text and the part of them, `[start, end)`, that is of interest.

    A response may name the `prompt` that it stands behind, for those who want to read it behind another.
    """

    ids: Sequence[int]
    start: int
    end: int
    prompt: str | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Reading:
    """What was read at one site.

    Attributes:
        pooled: one vector per text, in the order of the texts, float32, on the CPU.
        norms: each text's median residual norm over the tokens of its span, without the first token of the text; NaN
            where there is no other.
    """

    pooled: Float[Tensor, "text d"]
    norms: Float[Tensor, " text"]

    @property
    def mean(self) -> Float[Tensor, " d"]:
        """Over the texts."""
        return self.pooled.mean(0)

    @property
    def norm(self) -> float:
        """The mean of the texts' median norms: the usual norm of the residual stream, and additive over texts."""
        return self.norms.double().nanmean().item()


@dataclass(frozen=True)
class Batch:
    """Some of the texts, as they were read.

    Attributes:
        indices: which ones, counted from the first text.
        pooled: one vector per text and site, float32, on the CPU.
        norms: the median norms, as in `Reading`.
    """

    indices: Sequence[int]
    pooled: Mapping[Site, Float[Tensor, "text d"]]
    norms: Mapping[Site, Float[Tensor, " text"]]


def response_span(lm: FrozenLM, response: str, prompt: str | None = None, *, max_tokens: int = 1024) -> Span:
    """The response after its prompt, as it would stand in a dialogue with the model, or the bare text.

    No end-of-text token is appended: on one side of a pair only, it would be all that the pair differs in. Of
    `max_tokens`, a prompt gets its last ones, up to half of them with its BOS token, and a response its first ones.

    In an encoder-decoder model a span is the decoder's part, behind the encoder's: a response as the tokenizer makes a
    target of it, which for T5 and BART ends with an end-of-sequence token, as it does in their training. That token
    counts as any other. A bare text stands behind what the tokenizer makes of no text at all.

    Raises:
        SteerError: nothing of the response is left, or of the prompt that an encoder is to read.
    """
    if lm.tokenizer is None:
        raise SteerError("this model was wrapped without a tokenizer and cannot read texts")
    if lm.is_encoder_decoder:
        head = _last(lm, lm.tokenizer("").input_ids if prompt is None else lm.encode(prompt), max_tokens // 2)
        if not head:
            raise SteerError("there is no prompt, and the encoder must read something")
        ids = (head + lm.tokenizer(text_target=response).input_ids)[:max_tokens]
        start = len(head)
    elif prompt is None:
        ids = lm.tokenizer(response).input_ids[:max_tokens]
        start = 0
    else:
        head = _last(lm, lm.encode(prompt), max_tokens // 2)
        ids = (head + lm.tokenizer(response, add_special_tokens=False).input_ids)[:max_tokens]
        start = len(head)
    # The first token of a sequence never counts, so a span needs one more.
    if len(ids) <= max(start, 1):
        raise SteerError(f"a text is too short to read, it has no token besides the first: {response[:40]!r}")
    return Span(ids, start, len(ids), prompt)


def _last(lm: FrozenLM, ids: list[int], count: int) -> list[int]:
    """So many tokens from the end, behind the BOS token if the tokenizer begins every prompt with one."""
    begun = int(lm.adds_bos)
    return ids if len(ids) <= count else ids[:begun] + ids[len(ids) - max(count - begun, 0) :]


def record_span(lm: FrozenLM, record: Record, **kwargs: Any) -> Span:
    """The span of a record's response. Raises SteerError, naming the record, if it is too short."""
    try:
        return response_span(lm, record.response, record.prompt, **kwargs)
    except SteerError as error:
        raise SteerError(f"record {record.id!r} of {record.user_id!r}: {error}") from None


def require_room(
    lm: FrozenLM, tokens: int, what: str, *, name: str | None = None, remedy: str = "shorten them"
) -> None:
    """Raises SteerError if there are more tokens than a model was made to read.

    Args:
        lm: the model.
        tokens: how many it would read.
        what: has them, with its verb, as in "the prompt has".
        name: of the model, if it is not the steered one.
        remedy: what to do about it.
    """
    if lm.window is not None and tokens > lm.window:
        whose = "the model's window" if name is None else f"the window of the model {name!r}"
        raise SteerError(f"{what} {tokens} tokens and {whose} is {lm.window}; {remedy}")


def read(
    lm: FrozenLM,
    spans: Iterable[Span],
    sites: Iterable[Site | str],
    *,
    pool: Pool | PoolFunction = "last",
    batch_tokens: int = 4096,
    on_progress: Callable[[int], None] | None = None,
    cache: Cache | None = None,
) -> dict[Site, Reading]:
    """Runs the frozen model over texts and pools what it has at the sites.

    Keeps one vector per text and site; `read_batches` keeps none.

    Args:
        lm: the model; it must not be steered meanwhile.
        spans: the texts.
        sites: where to read; the keys of the result are their canonical names.
        pool: "last" token of the span, "mean" over it, or a function like those in `steer.encoders`. Such a function
            must not look at what stands before a span, as that may be missing.
        batch_tokens: size of a batch, with padding.
        on_progress: told the number of texts done after each batch.
        cache: texts that were read before are taken from here, and new ones go here. It needs a pool with a name.

    Raises:
        SteerError: no texts, no such site, an unknown pool, or a span without a token that counts.
    """
    batches, done = [], 0
    for batch in read_batches(lm, spans, sites, pool=pool, batch_tokens=batch_tokens, cache=cache):
        batches.append(batch)
        done += len(batch.indices)
        if on_progress is not None:
            on_progress(done)
    if not batches:
        raise SteerError("there is nothing to read: give at least one text and one site")
    order = torch.tensor([i for batch in batches for i in batch.indices]).argsort()
    return {
        site: Reading(
            torch.cat([batch.pooled[site] for batch in batches])[order],
            torch.cat([batch.norms[site] for batch in batches])[order],
        )
        for site in batches[0].pooled
    }


def read_batches(
    lm: FrozenLM,
    spans: Iterable[Span],
    sites: Iterable[Site | str],
    *,
    pool: Pool | PoolFunction = "last",
    batch_tokens: int = 4096,
    window: int = _WINDOW,
    cache: Cache | None = None,
) -> Iterator[Batch]:
    """Reads like `read`, batch by batch, and remembers nothing: memory does not grow with the number of texts.

    Texts are taken `window` at a time, and sorted by length within the window. Between two batches the model is free.
    """
    wanted = list(dict.fromkeys(Site.parse(site).canonical() for site in sites))
    if not wanted:
        raise SteerError("there is nothing to read: give at least one text and one site")
    if not callable(pool) and pool not in _POOLS:
        raise SteerError(f"pool={pool!r} is not one of {', '.join(get_args(Pool))}")
    if cache is not None and callable(pool):
        raise SteerError("a cache cannot tell one pooling function from another; give pool by name")
    lm.attachment.declare(wanted)
    reader = _Reader(lm, wanted, _POOLS[pool] if not callable(pool) else pool, batch_tokens)
    kept = None if cache is None else Kept(cache, lm, wanted, "reading", 1, str(pool))
    return _stream(reader, kept, iter(spans), window)


def _stream(reader: _Reader, kept: Kept | None, spans: Iterator[Span], size: int) -> Iterator[Batch]:
    first = 0
    while window := list(islice(spans, size)):
        for span in window:
            # The first token of a text has a state, which can be read, and plays no part in means and norms.
            if not max(span.start, 0 if reader.pool is last_token else 1) < span.end <= len(span.ids):
                raise SteerError(f"[{span.start}, {span.end}) of {len(span.ids)} tokens holds none that counts")
        missing = list(range(len(window)))
        if kept is not None:
            found = kept.find(window)
            missing = [i for i in missing if i not in found]
            if found:
                pooled, norms = (
                    {site: torch.stack([text[site][name] for text in found.values()]) for site in reader.sites}
                    for name in ("pooled", "norm")
                )
                yield Batch([first + i for i in found], pooled, norms)
        for batch in reader.read([window[i] for i in missing]):
            indices = [missing[i] for i in batch.indices]
            if kept is not None:
                tensors = {site: {"pooled": batch.pooled[site], "norm": batch.norms[site]} for site in reader.sites}
                kept.keep([window[i] for i in indices], tensors)
            yield Batch([first + i for i in indices], batch.pooled, batch.norms)
        first += len(window)


class Kept:
    """What was computed of single texts at single sites, in a cache: an entry of tensors by name for each.

    Args:
        cache: where.
        lm: the model that computed it.
        sites: where it was computed.
        what: tells it from everything else that is computed of a text; JSON.
    """

    def __init__(self, cache: Cache, lm: FrozenLM, sites: Sequence[Site], *what: Any) -> None:
        self._cache, self._sites, self._what = cache, sites, key_of(model_key(lm), *what)

    def find(self, spans: Sequence[Span]) -> dict[int, dict[Site, dict[str, Tensor]]]:
        """What is known, by index, of the texts of which everything is."""
        keys = [self._keys(span) for span in spans]
        known = self._cache.get([key for own in keys for key in own.values()])
        return {
            i: {site: load(known[key]) for site, key in own.items()}
            for i, own in enumerate(keys)
            if all(key in known for key in own.values())
        }

    def keep(self, spans: Sequence[Span], tensors: Mapping[Site, Mapping[str, Float[Tensor, "text ..."]]]) -> None:
        """Adds what was computed of some texts, all of it or, if the process is killed meanwhile, none."""
        self._cache.put(
            {
                key: save({name: values[row].contiguous() for name, values in tensors[site].items()})
                for row, span in enumerate(spans)
                for site, key in self._keys(span).items()
            }
        )

    def _keys(self, span: Span) -> dict[Site, str]:
        text = list(span.ids[: span.end]), span.start
        return {site: key_of(self._what, str(site), *text) for site in self._sites}


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


@dataclass
class _Past:
    """Keys and values of some rows' tokens, in the layers up to the last site, and which tokens are no padding."""

    cache: DynamicCache
    mask: Int[Tensor, "row pos"]

    def of(self, owners: Sequence[int]) -> _Past:
        """A copy for further rows, each of which continues one of these."""
        chosen = torch.tensor(owners, device=self.mask.device)
        # Without the model's configuration a cache keeps every token, also those that a sliding window has passed:
        # the window is then the mask's business alone, and layers above the last site need no mention.
        cache = DynamicCache()
        for i, layer in enumerate(self.cache.layers):
            keys, values = cast(DynamicLayer, layer).keys, cast(DynamicLayer, layer).values
            assert keys is not None and values is not None
            cache.update(keys[chosen.to(keys.device)], values[chosen.to(values.device)], i)
        return _Past(cache, self.mask[chosen])


@dataclass(frozen=True)
class _Tree:
    """Texts that begin with `root`, and each of them then with one of the stems; either may be empty.

    `texts` says which stem a text grows from, by the indices of both.
    """

    root: tuple[int, ...]
    stems: Sequence[tuple[int, ...]]
    texts: Mapping[int, int]

    def shared(self, text: int) -> int:
        """How many of a text's tokens are in root and stem."""
        return len(self.root) + len(self.stems[self.texts[text]])


class _Reader:
    """Runs texts through the model."""

    def __init__(self, lm: FrozenLM, sites: Sequence[Site], pool: PoolFunction, batch_tokens: int) -> None:
        self.pool, self.sites = pool, sites
        self._lm, self._batch_tokens = lm, batch_tokens
        self._recorder = _Recorder(sites)

    def read(self, spans: Sequence[Span]) -> Iterator[Batch]:
        """Reads all of them, in an order of its own."""
        for tree in _trees(spans, self._batch_tokens, self._lm.sliding_window):
            past = self._grow(tree)
            shared = {i: tree.shared(i) if past is not None else 0 for i in tree.texts}
            width = 0 if past is None else past.mask.shape[1]
            for texts in by_length({i: spans[i].end - shared[i] for i in tree.texts}, self._batch_tokens, width):
                rows = [spans[i].ids[shared[i] : spans[i].end] for i in texts]
                self._run(rows, None if past is None else past.of([tree.texts[i] for i in texts]))
                starts, ends = (
                    torch.tensor([getattr(spans[i], edge) - shared[i] for i in texts]) for edge in ("start", "end")
                )
                hidden = self._recorder.take()
                yield Batch(
                    texts,
                    {s: self.pool(h, starts.to(h.device), ends.to(h.device)).cpu() for s, h in hidden.items()},
                    {s: median_norm(h, starts.to(h.device), ends.to(h.device)).cpu() for s, h in hidden.items()},
                )

    def _grow(self, tree: _Tree) -> _Past | None:
        """Runs root and stems; None if there are none, or if the layers up to the last site keep nothing of them."""
        past = _Past(DynamicCache(), torch.ones(1, 0, dtype=torch.long, device=self._lm.device))
        if tree.root:
            self._run([tree.root], past)
        if any(tree.stems):
            past = past.of([0] * len(tree.stems))
            self._run(tree.stems, past, align="right")
        return past if past.cache.get_seq_length() == past.mask.shape[1] > 0 else None

    @torch.no_grad()
    def _run(self, rows: Sequence[Sequence[int]], past: _Past | None, *, align: str = "left") -> None:
        """One forward pass up to the last site; what is past grows by these tokens."""
        attachment = self._lm.attachment
        ids = _padded(rows, self._lm.pad_token_id, align).to(self._lm.device)
        mask = _padded([[1] * len(row) for row in rows], 0, align).to(self._lm.device)
        arguments: dict[str, Any] = {"input_ids": ids, "use_cache": past is not None}
        if past is not None:
            past.mask = mask = torch.cat([past.mask, mask], dim=1)
            arguments["past_key_values"] = past.cache
        if attachment.architecture.takes_position_ids:
            arguments["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        attachment.bind(self._recorder)
        try:
            attachment.install({site: (self._recorder.at(site),) for site in self.sites})
            with suppress(_Enough):
                attachment.decoder(attention_mask=mask, **arguments)
        finally:
            attachment.unbind()


def _padded(rows: Sequence[Sequence[int]], fill: int, align: str) -> Int[Tensor, "row pos"]:
    width = max(len(row) for row in rows)
    fills = [[fill] * (width - len(row)) for row in rows]
    parts = zip(rows, fills, strict=True) if align == "left" else zip(fills, rows, strict=True)
    return torch.tensor([[*first, *second] for first, second in parts])


def _trees(spans: Sequence[Span], batch_tokens: int, sliding_window: int | None) -> Iterator[_Tree]:
    """Finds what texts share: all prompts their beginning, and some texts the whole prompt."""
    # A prompt's last token stays with the response, so that no span starts at the first token of what is run.
    prompts = [tuple(span.ids[: max(span.start - 1, 0)]) for span in spans]
    root = _common_beginning([prompt for prompt in prompts if prompt])
    by_prompt: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, prompt in enumerate(prompts):
        by_prompt[prompt].append(i)
    bare: list[int] = []
    rooted: list[int] = []
    shared: list[tuple[tuple[int, ...], list[int]]] = []
    for prompt, texts in by_prompt.items():
        if len(texts) > 1 and len(prompt) - len(root) >= _SHORTEST_STEM:
            shared.append((prompt[len(root) :], texts))
        else:
            (rooted if prompt and root else bare).extend(texts)
    for beginning, texts in (((), bare), (root, rooted)):
        if texts:
            yield _Tree(beginning, [()], dict.fromkeys(texts, 0))
    shared.sort(key=lambda group: -max(spans[i].end for i in group[1]))
    while shared:
        longest = len(root) + max(len(stem) for stem, _ in shared)
        size = max(batch_tokens // longest, 1)
        chosen, shared = shared[:size], shared[size:]
        stems = [stem for stem, _ in chosen]
        texts_of = {i: row for row, (_, texts) in enumerate(chosen) for i in texts}
        # Shorter stems are padded between root and stem, and a sliding window would count the padding.
        widest = longest + max(spans[i].end - len(root) - len(stems[row]) for i, row in texts_of.items())
        if sliding_window is not None and widest > sliding_window:
            yield _Tree((), [root + stem for stem in stems], texts_of)
        else:
            yield _Tree(root, stems, texts_of)


def _common_beginning(prompts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """What all of them begin with, unless it is too short to be of use."""
    if len(prompts) < 2:
        return ()
    first, last = min(prompts), max(prompts)
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:length] if length >= _SHORTEST_STEM else ()


def by_length(lengths: Mapping[int, int], batch_tokens: int, past: int = 0) -> Iterator[list[int]]:
    """Texts of like length together, the longest first, so that a batch that is too large fails at once.

    Args:
        lengths: tokens of each text, by its number.
        batch_tokens: tokens of a batch, with padding.
        past: further tokens that stand before each text.
    """
    order = sorted(lengths, key=lambda i: -lengths[i])
    while order:
        size = max(batch_tokens // (past + lengths[order[0]]), 1)
        yield order[:size]
        order = order[size:]
