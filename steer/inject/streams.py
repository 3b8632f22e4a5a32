"""Stream edits: further rows of the same batch whose next-token logits are mixed into those of their owners."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.generation.stopping_criteria import MaxLengthCriteria, StoppingCriteriaList

from steer.errors import SteerError
from steer.kernels import geometric

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

Processor = Callable[["Tensor", "Tensor"], "Tensor"]


@dataclass(frozen=True)
class StreamEdit:
    """Contrasts row b with and without `contexts[b]`: `(1 + λ_b) · logits(context, prompt) − λ_b · logits(prompt)`.

    CoS, Eq. 3 (METHODS §1): λ = −1 is the prompt alone, 0 the context as plain text, more amplifies it. Equal to
    classifier-free guidance of scale 1 + λ. Rows without a context have no second stream.
    """

    contexts: Sequence[str | None]
    lams: Float[Tensor, " batch"]

    def __post_init__(self) -> None:
        if not torch.isfinite(self.lams).all():
            raise SteerError(f"λ must be finite, got {self.lams.tolist()}")
        if any(context is not None and not context.strip() for context in self.contexts):
            raise SteerError("a context is empty; use None for a row without one")

    @staticmethod
    def merge(edits: Sequence[StreamEdit]) -> StreamEdit:
        """One edit out of several that contrast different rows.

        Raises:
            SteerError: two of them contrast the same row.
        """
        contexts = [[edit.contexts[row] for edit in edits] for row in range(len(edits[0].contexts))]
        if crowded := [row for row, own in enumerate(contexts) if sum(context is not None for context in own) > 1]:
            raise SteerError(f"two states contrast streams in row {crowded[0]}; choose one of them with `names`")
        which = [next((i for i, context in enumerate(own) if context is not None), 0) for own in contexts]
        return StreamEdit(
            [own[i] for own, i in zip(contexts, which, strict=True)],
            torch.stack([edits[i].lams[row] for row, i in enumerate(which)]),
        )


@dataclass(frozen=True)
class Streams:
    """The rows of one forward pass when some are contrasted: the batch's own first, then the further ones.

    Attributes:
        input_ids, attention_mask: all rows, left-padded to one length.
        owners: for each row, the own row whose next token it shares.
        weights: of each row in the mixture.
        batch: how many own rows there are.
        padding: how much longer the rows are than the batch's own were.
    """

    input_ids: Int[Tensor, "row pos"]
    attention_mask: Int[Tensor, "row pos"]
    owners: Int[Tensor, " row"]
    weights: Float[Tensor, " row"]
    batch: int
    padding: int

    @classmethod
    def build(
        cls,
        input_ids: Int[Tensor, "own pos"],
        attention_mask: Int[Tensor, "own pos"],
        contrasts: Sequence[Sequence[int] | None],
        lams: Float[Tensor, " own"],
        pad_token_id: int,
    ) -> Streams:
        """Appends the prompts without context (None: a row without one) to the batch's own rows."""
        device = input_ids.device
        own = [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]
        further = [(row, list(ids)) for row, ids in enumerate(contrasts) if ids is not None]
        contrasted = torch.tensor([ids is not None for ids in contrasts], device=device)
        lams = lams.to(device, torch.float32)
        rows = own + [ids for _, ids in further]
        ids, mask = pad_left(rows, pad_token_id, at_least=input_ids.shape[1])
        owners = torch.tensor([*range(len(own)), *(row for row, _ in further)])
        return cls(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            owners=owners.to(device),
            weights=torch.cat([torch.where(contrasted, 1 + lams, 1.0), -lams[contrasted]]),
            batch=len(own),
            padding=ids.shape[1] - input_ids.shape[1],
        )

    def processor(self, inner: Processor, *, sample: bool) -> Processor:
        """Mixes raw logits, lets transformers' own processors work on the own rows, and gives all rows one choice."""

        def process(input_ids: Tensor, logits: Tensor) -> Tensor:
            mixed = geometric(logits, self.weights, self.owners, self.batch)
            scores = inner(input_ids[: self.batch, self.padding :], mixed)
            if sample:
                # Rows that share a token must not draw it separately.
                scores = only(scores, torch.multinomial(scores.softmax(-1), 1).squeeze(1))
            return scores[self.owners]

        return process

    def lengthened(self, criteria: StoppingCriteriaList) -> StoppingCriteriaList:
        """The same criteria for rows that are `padding` tokens longer."""
        return StoppingCriteriaList(
            MaxLengthCriteria(c.max_length + self.padding, c.max_position_embeddings)
            if isinstance(c, MaxLengthCriteria)
            else c
            for c in criteria
        )

    def own(self, output: Any) -> Any:
        """Cuts what `generate` returns down to the batch's own rows."""
        if isinstance(output, torch.Tensor):
            return output[: self.batch, self.padding :]
        output["sequences"] = output["sequences"][: self.batch, self.padding :]
        for name in ("scores", "logits", "attentions", "hidden_states"):
            if output.get(name) is not None:
                output[name] = self._cut(output[name])
        # Its rows are not the batch's, so nobody could go on from it.
        output["past_key_values"] = None
        return output

    def _cut(self, value: Any) -> Any:
        return value[: self.batch] if isinstance(value, torch.Tensor) else tuple(self._cut(item) for item in value)


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
    ids = torch.tensor([[pad_token_id] * (length - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return ids, mask
