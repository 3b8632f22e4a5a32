"""The rows of a forward pass when some are mixed from several streams."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Protocol

import torch
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)

from steer.inject.streams import Mix

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

Processor = Callable[["Tensor", "Tensor"], "Tensor"]


class Companion(Protocol):
    """Rows of another model, for the same tokens."""

    def bound(self) -> AbstractContextManager[Any]:
        """Takes the model while the block lasts, so that nobody steers it meanwhile."""

    def logits(self, input_ids: Int[Tensor, "row pos"]) -> Float[Tensor, "stream vocab"]:
        """Next-token logits after the newest tokens of the batch."""


@dataclass(frozen=True)
class Heads:
    """What rows have in common at their beginning, to be read once.

    Attributes:
        input_ids, attention_mask: of each group of rows, left-padded.
        groups: for each row, the group whose head is its own.
    """

    input_ids: Int[Tensor, "group pos"]
    attention_mask: Int[Tensor, "group pos"]
    groups: Int[Tensor, " row"]


@dataclass(frozen=True)
class Streams:
    """The rows of one forward pass when some are mixed: the batch's own first, then the further ones.

    Attributes:
        input_ids, attention_mask: all rows, left-padded to one length. Behind a common head a row may be padded again.
        owners: for each row, the own row whose next token it shares.
        touched: for each row, whether it carries its owner's edits.
        heads: what groups of rows have in common; None if everybody reads their own.
        mix: from the logits of all rows, and of the companions', to those of the own rows.
        companions: other models that take part.
        prompts: the batch's own rows, as they were.
    """

    input_ids: Int[Tensor, "row pos"]
    attention_mask: Int[Tensor, "row pos"]
    owners: Int[Tensor, " row"]
    touched: Bool[Tensor, " row"]
    heads: Heads | None
    mix: Mix
    companions: Sequence[Companion]
    prompts: Int[Tensor, "own pos"]

    @property
    def batch(self) -> int:
        """How many own rows there are."""
        return len(self.prompts)

    @property
    def padding(self) -> int:
        """How much longer the rows are than the batch's own were."""
        return self.input_ids.shape[1] - self.prompts.shape[1]

    def own_ids(self, input_ids: Int[Tensor, "row pos"]) -> Int[Tensor, "own pos"]:
        """Of what all rows have by now, that of the batch's own, without the padding that streams brought."""
        new = input_ids[: self.batch, self.input_ids.shape[1] :]
        return torch.cat([self.prompts, new], dim=1)

    def processor(self, inner: Processor, *, sample: bool) -> Processor:
        """Mixes raw logits, lets transformers' own processors work on the own rows, and gives all rows one choice."""

        def process(input_ids: Tensor, logits: Tensor) -> Tensor:
            if self.companions:
                logits = torch.cat([logits, *as_wide(logits, [c.logits(input_ids) for c in self.companions])])
            scores = inner(self.own_ids(input_ids), self.mix(logits))
            if sample:
                # Rows that share a token must not draw it separately.
                scores = only(scores, torch.multinomial(scores.softmax(-1), 1).squeeze(1))
            return scores[self.owners]

        return process

    def criteria(self, criteria: StoppingCriteriaList) -> StoppingCriteriaList:
        """The same criteria for all rows: they look at the own rows, and decide for the others as well."""
        return StoppingCriteriaList(self._criterion(criterion) for criterion in criteria)

    def _criterion(self, criterion: StoppingCriteria) -> StoppingCriteria:
        # These two transformers looks for by their class or attributes, and they see no more than a length or a token.
        if isinstance(criterion, MaxLengthCriteria):
            return MaxLengthCriteria(criterion.max_length + self.padding, criterion.max_position_embeddings)
        return criterion if isinstance(criterion, EosTokenCriteria) else _OwnCriterion(criterion, self)

    def own(self, output: Any) -> Any:
        """Cuts what `generate` returns down to the batch's own rows."""
        if isinstance(output, torch.Tensor):
            return self.own_ids(output)
        output["sequences"] = self.own_ids(output["sequences"])
        for name in ("scores", "logits", "attentions", "hidden_states"):
            if output.get(name) is not None:
                output[name] = self.cut(output[name])
        # Its rows are not the batch's, so nobody could go on from it.
        output["past_key_values"] = None
        return output

    def cut(self, value: Any) -> Any:
        """The own rows of a tensor, or of each in a tuple of tuples."""
        return value[: self.batch] if isinstance(value, torch.Tensor) else tuple(self.cut(item) for item in value)


class _OwnCriterion(StoppingCriteria):
    """A criterion that sees the own rows."""

    def __init__(self, inner: StoppingCriteria, streams: Streams) -> None:
        self.inner, self.streams = inner, streams

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        streams = self.streams
        # There are scores only if somebody asked for them.
        own = None if scores is None else streams.cut(scores)
        done = self.inner(streams.own_ids(input_ids), own, **kwargs)
        return done[streams.owners] if isinstance(done, torch.Tensor) else done


class OwnRows:
    """A streamer that sees the first `batch` rows only."""

    def __init__(self, streamer: Any, batch: int) -> None:
        self.streamer, self.batch = streamer, batch

    def put(self, value: Tensor) -> None:
        self.streamer.put(value[: self.batch])

    def end(self) -> None:
        self.streamer.end()


def only(scores: Float[Tensor, "row vocab"], tokens: Int[Tensor, " row"]) -> Float[Tensor, "row vocab"]:
    """Scores that leave nothing but one token per row to choose."""
    return torch.full_like(scores, float("-inf")).scatter(1, tokens[:, None], 0.0)


def pad_left(rows: Sequence[Sequence[int]], pad_token_id: int, at_least: int = 0) -> tuple[Tensor, Tensor]:
    """Left-pads token ids; returns ids and attention mask, both `[row, pos]`."""
    length = max(at_least, *(len(row) for row in rows))
    ids = torch.tensor([[pad_token_id] * (length - len(row)) + list(row) for row in rows], dtype=torch.long)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], dtype=torch.long)
    return ids, mask


def pad_right(rows: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """The same with the padding on the right."""
    ids, mask = pad_left([row[::-1] for row in rows], pad_token_id)
    return ids.flip(1), mask.flip(1)


def pad_behind_heads(
    rows: Sequence[Sequence[int]], groups: Sequence[int], pad_token_id: int, at_least: int
) -> tuple[Tensor, Tensor, Heads]:
    """Left-pads what rows of a group begin with, and behind it what follows.

    Args:
        rows: token ids.
        groups: the group of each row; they are numbered from 0.
        pad_token_id: what to pad with.
        at_least: how long the rows are to be.

    Returns:
        ids and mask, both `[row, pos]`, and the common heads, which are their first columns.
    """
    lengths = head_lengths(rows, groups)
    firsts = [rows[list(groups).index(group)][:length] for group, length in enumerate(lengths)]
    ids, mask = pad_behind(rows, [lengths[group] for group in groups], pad_token_id, at_least)
    return ids, mask, Heads(*pad_left(firsts, pad_token_id), torch.tensor(groups))


def pad_behind(
    rows: Sequence[Sequence[int]], lengths: Sequence[int], pad_token_id: int, at_least: int = 0
) -> tuple[Tensor, Tensor]:
    """Left-pads the first `lengths[b]` tokens of each row and behind them, apart, what follows."""
    heads, head_mask = pad_left([row[:length] for row, length in zip(rows, lengths, strict=True)], pad_token_id)
    tails = [row[length:] for row, length in zip(rows, lengths, strict=True)]
    ids, mask = pad_left(tails, pad_token_id, at_least=at_least - heads.shape[1])
    return torch.cat([heads, ids], 1), torch.cat([head_mask, mask], 1)


def head_lengths(rows: Sequence[Sequence[int]], groups: Sequence[int]) -> list[int]:
    """For each group, how many first tokens its rows have in common. Every row keeps one token of its own."""
    members: dict[int, list[Sequence[int]]] = {}
    for row, group in zip(rows, groups, strict=True):
        members.setdefault(group, []).append(row)
    found = []
    for _, own in sorted(members.items()):
        columns = zip(*own, strict=False)
        common = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
        found.append(min(common, min(map(len, own)) - 1))
    return found


def as_wide(logits: Tensor, others: Sequence[Tensor]) -> list[Tensor]:
    """Logits of other models, as wide as the first: tables of embeddings are padded to different sizes.

    What only one of them has are no tokens, as their vocabularies are the same. What another lacks it rules
    out (−inf): of positive weight it rules the token out of the mixture; of negative weight it leaves it as it is in
    the row itself, which may choose it (see `geometric`).
    """
    width = logits.shape[1]
    cut = (other[:, :width].to(logits.device) for other in others)
    return [torch.nn.functional.pad(other, (0, width - other.shape[1]), value=float("-inf")) for other in cut]
