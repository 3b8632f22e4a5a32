"""Neighbour edits: what came after similar states in a user's own texts is mixed into the next-token distribution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from steer.errors import SteerError
from steer.inject.rows import Rows, erase, refill
from steer.kernels import mix_neighbours
from steer.sites import Site

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from steer.inject.stream_rows import Processor


@dataclass(frozen=True)
class NeighbourEdit:
    """Mixes row b's next-token distribution with that of its nearest entries in `keys[b, :lengths[b]]`.

    Where streams are mixed as well, theirs is the distribution; transformers' processors and sampling come after it.
    A row of length 0 or weight 0 stays as it is, bit for bit.

    Attributes:
        site: where the last position's hidden state is compared with the keys.
        keys: hidden states at the site.
        tokens: what came after each of them.
        lengths: how many entries a row has.
        weights: the share of the entries, from 0 to 1.
        scales: what squared distances are multiplied with: the reciprocal of a temperature.
        count: how many of the nearest entries take part.
    """

    site: Site
    keys: Float[Tensor, "batch n d"]
    tokens: Int[Tensor, "batch n"]
    lengths: Int[Tensor, " batch"]
    weights: Float[Tensor, " batch"]
    scales: Float[Tensor, " batch"]
    count: int

    def __post_init__(self) -> None:
        batch, entries = self.keys.shape[:2]
        shapes = [list(self.tokens.shape), *(list(v.shape) for v in (self.lengths, self.weights, self.scales))]
        if shapes != [[batch, entries], [batch], [batch], [batch]]:
            raise SteerError(f"{batch} rows of {entries} keys have other tokens, lengths, weights and scales: {shapes}")
        if not ((self.weights >= 0) & (self.weights <= 1)).all():
            raise SteerError(f"the weights of neighbours must lie between 0 and 1, got {self.weights.tolist()}")
        if not (torch.isfinite(self.scales) & (self.scales >= 0)).all():
            raise SteerError(f"the scales of distances must be finite and not negative, got {self.scales.tolist()}")
        if self.count < 1:
            raise SteerError(f"count={self.count}: one neighbour at least must take part")

    def on(self, device: torch.device) -> NeighbourEdit:
        """The same on a device, in the dtypes to compute with."""
        return replace(
            self,
            keys=self.keys.to(device, torch.float32),
            tokens=self.tokens.to(device, torch.long),
            lengths=self.lengths.to(device),
            weights=self.weights.to(device, torch.float32),
            scales=self.scales.to(device, torch.float32),
        )

    @classmethod
    def from_rows(
        cls,
        site: Site,
        stores: Sequence[tuple[Float[Tensor, "_ d"], Int[Tensor, " _"]] | None],
        weights: Sequence[float],
        scales: Sequence[float],
        *,
        count: int,
        width: int,
    ) -> NeighbourEdit:
        """Pads stores of keys and tokens; None is a row without one."""
        rows = [(torch.zeros(0, width), torch.zeros(0)) if store is None else store for store in stores]
        # There must be something to search in.
        room = max(1, *(len(keys) for keys, _ in rows))
        keys, tokens = torch.zeros(len(rows), room, width), torch.zeros(len(rows), room, dtype=torch.long)
        for row, (own, after) in enumerate(rows):
            keys[row, : len(own)], tokens[row, : len(own)] = own, after
        lengths = torch.tensor([len(own) for own, _ in rows])
        return cls(site, keys, tokens, lengths, torch.tensor(weights), torch.tensor(scales), count)


class RecallNeighbours:
    """A neighbour edit at work: at its site it only looks, and remembers the last position of each row."""

    def __init__(self) -> None:
        self.last: Float[Tensor, "row d"] | None = None
        self.edit: NeighbourEdit | None = None
        self.fired = False
        # Whether tokens were chosen by it.
        self.used = False

    def load(self, edit: NeighbourEdit, rows: Rows, device: torch.device) -> None:
        """Takes the stores, and makes room for a state of each row."""
        self.last = refill(self.last, torch.zeros(len(rows), edit.keys.shape[2], device=device))
        self.edit = edit.on(device)

    def __call__(self, hidden: Float[Tensor, "row pos d"]) -> Float[Tensor, "row pos d"]:
        self.fired = True
        assert self.last is not None
        # Prompts may come in chunks: the last one stays.
        self.last.copy_(hidden.detach()[:, -1])
        return hidden

    def processor(self, inner: Processor) -> Processor:
        """Mixes the neighbours into the batch's logits, then lets transformers' own processors work on them.

        With beams these are log-probabilities, which makes no difference: what comes out is normalized.
        """

        def process(input_ids: Tensor, logits: Tensor) -> Tensor:
            return inner(input_ids, self.mix(logits))

        return process

    def mix(self, logits: Float[Tensor, "row vocab"]) -> Float[Tensor, "row vocab"]:
        """Log-probabilities of the batch's own rows, which come first in the forward pass, with their copies."""
        assert self.last is not None and self.edit is not None
        self.used = True
        edit, batch = self.edit, len(self.edit.keys)
        mixed = mix_neighbours(
            logits.to(edit.keys.device).unflatten(0, (batch, -1)),
            self.last[: len(logits)].unflatten(0, (batch, -1)),
            edit.keys,
            edit.tokens,
            edit.lengths,
            edit.scales,
            edit.weights,
            edit.count,
        )
        return mixed.flatten(0, 1).to(logits.device)

    def clear(self) -> None:
        """Erases the last states, and forgets the users' stores."""
        self.last, self.edit = erase(self.last), None
