"""Teacher-forced likelihood of responses under a plan: what trained states minimize."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.nn.functional import cross_entropy

from steer.architectures import ONLY_PREFIXES
from steer.cache import head_key
from steer.errors import SteerError
from steer.inject import KeyValueEdit, PrefixEdit, ResidualEdit
from steer.inject.prompts import with_prompts
from steer.inject.stream_rows import pad_right
from steer.read import Kept, Span, by_length

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from steer.cache import Cache
    from steer.inject import Edit
    from steer.inject.positions import Positions
    from steer.model import FrozenLM
    from steer.sites import Site
    from steer.steering import Steering

T = TypeVar("T")

# What cross_entropy leaves out by default.
_NO_TARGET = -100


def response_losses(
    lm: FrozenLM, spans: Sequence[Span], edits: Sequence[Edit]
) -> tuple[Float[Tensor, " row"], Float[Tensor, " row"]]:
    """Sum over each span's tokens of −log p(token | what stands before it), in nats, and the number of tokens.

    One row a span; the rows of the edits are the rows of the spans. The first token of a sequence is never predicted,
    and what stands behind a span is not run.
    """
    edits = with_prompts(edits, [span.prompt or "" for span in spans])
    prefixes = [edit for edit in edits if isinstance(edit, PrefixEdit | KeyValueEdit)]
    added = sum((edit.added for edit in prefixes), torch.zeros(len(spans)).long())
    starts = [max(span.start, 1) + extra for span, extra in zip(spans, added.tolist(), strict=True)]
    with lm.steered(states=[None] * len(spans), edits=edits, prompt_lengths=starts) as steering:
        logits, targets = (_decoded if lm.is_encoder_decoder else _continued)(lm, steering, spans)
    losses = cross_entropy(
        logits.float().transpose(1, 2), targets.to(logits.device), ignore_index=_NO_TARGET, reduction="none"
    )
    return losses.sum(1), (targets != _NO_TARGET).sum(1).to(losses)


def _continued(
    lm: FrozenLM, steering: Steering, spans: Sequence[Span]
) -> tuple[Float[Tensor, "row pos vocab"], Int[Tensor, "row pos"]]:
    """Logits for the spans' tokens, of a model that reads them after what stands before them; and the tokens."""
    _require_what_is_before(spans, steering.plan.key_values)
    targets = _targets(spans).to(lm.device)
    batch = steering.forward_kwargs(steering.prepare([span.ids[: span.end] for span in spans]))
    return last_logits(lm, batch, targets.shape[1] + 1)[:, :-1], targets


def _decoded(
    lm: FrozenLM, steering: Steering, spans: Sequence[Span]
) -> tuple[Float[Tensor, "row pos vocab"], Int[Tensor, "row pos"]]:
    """The same of a decoder whose encoder reads what stands before the spans."""
    batch = steering.prepare([span.ids[: span.start] for span in spans])
    ids, mask = pad_right([span.ids[span.start : span.end] for span in spans], lm.pad_token_id)
    targets = ids.masked_fill(mask == 0, _NO_TARGET).to(lm.device)
    model: Any = lm.model
    shifted = model.prepare_decoder_input_ids_from_labels(targets)
    return model(**batch, decoder_input_ids=shifted, use_cache=False).logits, targets


@torch.enable_grad()
def response_gradients(
    lm: FrozenLM,
    spans: Sequence[Span],
    sites: Sequence[Site],
    *,
    at: Mapping[Site, Float[Tensor, " d"]] | None = None,
    positions: Positions = "response",
    batch_tokens: int = 2048,
    on_progress: Callable[[int], None] | None = None,
    cache: Cache | None = None,
) -> tuple[dict[Site, Float[Tensor, "row d"]], Float[Tensor, " row"]]:
    """The gradient of each span's sum of −log p by a vector that is added at a site; and its tokens.

    One forward and one backward pass a batch, for all sites; no gradient is computed for the model, nor below the
    lowest site. float32, on the CPU.

    Args:
        lm: the model.
        spans: texts and the parts of them that count.
        sites: where vectors are added.
        at: the vectors at which the gradient is taken, one for each site; zero if not given.
        positions: from which position on.
        batch_tokens: size of a batch, with padding.
        on_progress: told the number of texts done after each batch.
        cache: gradients that were computed before are taken from here, and new ones go here.
    """
    gradients = {site: torch.empty(len(spans), lm.width_at(site)) for site in sites}
    point = {site: torch.zeros(lm.width_at(site)) if at is None else at[site].float().cpu() for site in sites}
    # A gradient depends on what is added at all the sites.
    where = None if at is None else {str(site): vector.tolist() for site, vector in point.items()}
    kept = None if cache is None else Kept(cache, lm, sites, "gradient", 1, head_key(lm), positions, where)
    found = {} if kept is None else kept.find(spans)
    for i, known in found.items():
        for site in sites:
            gradients[site][i] = known[site]["gradient"]
    done = len(found)
    if found and on_progress is not None:
        on_progress(done)
    for batch in by_length({i: span.end for i, span in enumerate(spans) if i not in found}, batch_tokens):
        texts = [spans[i] for i in batch]
        offsets = {site: vector.repeat(len(batch), 1).requires_grad_() for site, vector in point.items()}
        losses, _ = response_losses(
            lm, texts, [ResidualEdit(site, vectors, positions) for site, vectors in offsets.items()]
        )
        for site, gradient in zip(sites, torch.autograd.grad(losses.sum(), list(offsets.values())), strict=True):
            gradients[site][batch] = gradient.float().cpu()
        if kept is not None:
            kept.keep(texts, {site: {"gradient": gradients[site][batch]} for site in sites})
        done += len(batch)
        if on_progress is not None:
            on_progress(done)
    return gradients, torch.tensor([float(span.end - max(span.start, 1)) for span in spans])


def _require_what_is_before(spans: Sequence[Span], given: KeyValueEdit | None) -> None:
    """Raises SteerError if a text's first token is behind keys and values alone, whose logits nobody computes."""
    if given is None or not given.bos:
        return
    for row, (span, length) in enumerate(zip(spans, given.lengths.tolist(), strict=True)):
        if length and span.start <= 1:
            raise SteerError(
                f"row {row}: the text follows its keys and values at once, and nothing is read that could predict its "
                "first token; give the text a prompt, or use soft tokens (PrefixEdit)"
            )


def _targets(spans: Sequence[Span]) -> Int[Tensor, "row pos"]:
    """The spans' tokens, on the right: rows are padded on the left, and end where their spans do."""
    width = max(span.end - max(span.start, 1) for span in spans)
    targets = torch.full((len(spans), width), _NO_TARGET)
    for row, span in enumerate(spans):
        inside = span.ids[max(span.start, 1) : span.end]
        targets[row, width - len(inside) :] = torch.tensor(inside)
    return targets


def last_logits(lm: FrozenLM, batch: Mapping[str, Any], count: int) -> Float[Tensor, "row pos vocab"]:
    """Logits at the last `count` positions; the head does not run at the others where the model can leave them out.

    Args:
        lm: the model.
        batch: `input_ids` and `attention_mask`; with `position_ids` if `past_key_values` stand in front of them.
        count: of positions.

    Raises:
        SteerError: a decoder that has an encoder does not continue what that reads.
    """
    if lm.is_encoder_decoder:
        raise SteerError(f"responses behind contexts: {ONLY_PREFIXES}")
    arguments: dict[str, Any] = {**batch, "use_cache": "past_key_values" in batch}
    if lm.attachment.architecture.takes_position_ids:
        arguments.setdefault("position_ids", (batch["attention_mask"].cumsum(1) - 1).clamp(min=0))
    if "logits_to_keep" in inspect.signature(lm.model.forward).parameters:
        arguments["logits_to_keep"] = count
    return lm.model(**arguments).logits[:, -count:]


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
