"""Branches: one text under many plans, with everything below their first edit computed once."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch.nn.functional import cross_entropy
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from steer.errors import SteerError
from steer.inject.rows import Rows
from steer.plan import Plan
from steer.read import Span
from steer.sites import Site
from steer.steering import Steering

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from steer.attach import Operator
    from steer.model import FrozenLM


class Branches(Steering):
    """A plan whose rows are all the same text: they share one row up to the plan's first site, and part there.

    The rows must carry residual or memory edits only; a prefix would make texts of different lengths out of them.
    """

    def __init__(self, lm: FrozenLM, plan: Plan) -> None:
        if plan.prefix is not None or plan.key_values is not None or plan.mixes:
            raise SteerError(
                "prefixes and contexts change the text itself, so its rows share nothing; score them apart"
            )
        super().__init__(lm, plan)
        self.site = _fork(lm, plan)
        # As soon as the prompt is steered as well, it is another prompt for every row.
        # A condition is decided from the prompt, by the rows that it is for.
        spared = all(
            isinstance(edit.positions, str) and edit.positions in ("response", "generated") and edit.condition is None
            for edit in plan.residual
        )
        self._shares_prompt = spared and not plan.memory

    def losses(self, span: Span, *, batch_tokens: int = 2048) -> Float[Tensor, "row token"]:
        """−log p of each of the span's tokens under each row's edits, in nats, on the CPU.

        The first token of a sequence is never predicted.

        Args:
            span: a text and the part of it that is scored.
            batch_tokens: tokens, over all rows, that one forward pass may have.
        """
        start = max(span.start, 1)
        first = start - 1 if self._shares_prompt else 0
        prompt = self._read_prompt(span.ids[:first])
        ids = torch.tensor([list(span.ids[first : span.end - 1])], device=self.lm.device)
        targets = torch.tensor([list(span.ids[start : span.end])], device=self.lm.device)
        size = max(batch_tokens // ids.shape[1], 1)
        losses = []
        for rows in self.owners.split(size):
            lengths = torch.full_like(rows, start)
            with self.rows_loaded(Rows(rows, lengths)):
                logits = self._forward(ids, prompt, len(rows))[:, start - 1 - first :].float().transpose(1, 2)
                expected = targets.to(logits.device).expand(len(rows), -1)
                losses.append(cross_entropy(logits, expected, reduction="none").cpu())
        return torch.cat(losses)

    def begin(self, positions: Int[Tensor, "row pos"]) -> None:
        assert self._rows is not None
        super().begin(positions.expand(len(self._rows), -1))

    def _assemble(self) -> dict[Site, tuple[Operator, ...]]:
        operators = super()._assemble()
        if self.site is not None:
            self.lm.attachment.declare([self.site])
            operators[self.site] = (self._part, *operators.get(self.site, ()))
        return operators

    def _part(self, hidden: Float[Tensor, "1 pos d"]) -> Float[Tensor, "row pos d"]:
        assert self._rows is not None
        return hidden.expand(len(self._rows), -1, -1)

    def _read_prompt(self, ids: Sequence[int]) -> DynamicCache | None:
        """Keys and values of what no row edits, computed by the plain model."""
        if not ids:
            return None
        cache = DynamicCache(config=self.lm.model.config)
        # One row, and none of its positions edited.
        with self.rows_loaded(Rows(self.owners[:1], self.owners.new_full((1,), len(ids) + 1))):
            self.lm.attachment.decoder(
                input_ids=torch.tensor([list(ids)], device=self.lm.device), past_key_values=cache, use_cache=True
            )
        return cache

    def _forward(self, ids: Int[Tensor, "1 pos"], prompt: DynamicCache | None, rows: int) -> Float[Tensor, "row pos v"]:
        cache = copy.deepcopy(prompt)
        if cache is not None:
            for layer in cache.layers[0 if self.site is None else _blocks_before(self.site) :]:
                cast(DynamicLayer, layer).batch_repeat_interleave(rows)
        if self.site is None:
            ids = ids.expand(rows, -1)
        return self.lm.model(input_ids=ids, past_key_values=cache, use_cache=cache is not None).logits


def _fork(lm: FrozenLM, plan: Plan) -> Site | None:
    """The last place in the residual stream where the rows are still one; None if they must part at the input."""
    # Without position ids the model makes a bias for as many rows as its mask has, which does not broadcast.
    if not lm.attachment.architecture.takes_position_ids:
        return None
    return _entry(lm, min(plan.sites, key=lambda site: site.depth, default=_top(lm)))


def _entry(lm: FrozenLM, site: Site) -> Site:
    if site.name == "ln_final":
        return _top(lm)
    if site.layer is None or site.name == "resid_post":
        return site
    return Site("resid_post", site.layer - 1) if site.layer else Site("embed")


def _top(lm: FrozenLM) -> Site:
    return Site("resid_post", lm.n_layers - 1)


def _blocks_before(site: Site) -> int:
    return 0 if site.layer is None else site.layer + 1
