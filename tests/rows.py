"""Rows to steer by all four edits at once, and what the model makes of them."""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from models import WIDTH
from torch import Tensor

import steer
from steer.inject import Edit, GatedCrossAttention

MEMORY_WIDTH = 20


@dataclass(frozen=True, eq=False)
class Row:
    """One row of a batch; without anything but a prompt it is a plain one."""

    prompt: str
    vector: Tensor | None = None
    prefix: Tensor | None = None
    memory: Tensor | None = None
    context: str | None = None
    lam: float = 0.0

    def without_context(self) -> Row:
        return replace(self, context=None, lam=0.0)


def text(rng: random.Random, shortest: int = 1, longest: int = 24) -> str:
    return "".join(rng.choices(string.ascii_letters + " .,", k=rng.randint(shortest, longest)))


def random_row(seed: int, share: float = 0.7) -> Row:
    """A row that has each of the four edits with a probability of `share`."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def maybe(rows: int, width: int, scale: float) -> Tensor | None:
        return scale * torch.randn(rows, width, generator=generator) if rng.random() < share else None

    vector = maybe(2, WIDTH, 2.0)
    return Row(
        prompt=text(rng),
        vector=vector,
        prefix=maybe(rng.randint(1, 4), WIDTH, 0.5),
        memory=maybe(rng.randint(1, 5), MEMORY_WIDTH, 1.0),
        context=text(rng, 3, 12).strip(" ") or "x" if rng.random() < share else None,
        lam=rng.choice([-1.5, -0.5, 0.5, 1.0, 2.0]),
    )


def cross_attention(gate: float = 1.0) -> GatedCrossAttention:
    """A layer for the rows' memories, open or shut."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = GatedCrossAttention(WIDTH, MEMORY_WIDTH, heads=4).requires_grad_(False)
    layer.gate.fill_(gate)
    return layer


def edits_of(rows: Sequence[Row], layer: GatedCrossAttention) -> list[Edit]:
    """All four edits, the residual one at two sites and from two starts."""
    vectors = torch.stack([torch.zeros(2, WIDTH) if row.vector is None else row.vector for row in rows])
    contexts = [row.context for row in rows]
    lams = torch.tensor([0.0 if row.context is None else row.lam for row in rows])
    return [
        steer.ResidualEdit(steer.Site("resid_post", 1), vectors[:, 0]),
        steer.ResidualEdit(steer.Site("resid_post", 0), vectors[:, 1], positions="all"),
        steer.PrefixEdit.from_rows([row.prefix for row in rows], WIDTH),
        steer.MemoryEdit.from_rows(steer.Site("resid_mid", 1), layer, [row.memory for row in rows]),
        steer.StreamEdit(contexts, lams),
    ]


@dataclass(frozen=True)
class Generated:
    """New tokens `[row, step]` and the raw logits that they were chosen from, `[row, step, vocab]`."""

    tokens: Tensor
    logits: Tensor


def generate(
    lm: steer.FrozenLM,
    rows: Sequence[Row],
    layer: GatedCrossAttention,
    *,
    edits: list[Edit] | None = None,
    **kwargs: Any,
) -> Generated:
    """Greedy generation of rows under their edits, or under the given ones."""
    kwargs = {"max_new_tokens": 6, "do_sample": False} | kwargs
    with lm.steered(edits=edits_of(rows, layer) if edits is None else edits) as steering:
        batch = steering.prepare([row.prompt for row in rows])
        output = lm.model.generate(
            **batch, **steering.generate_kwargs(), return_dict_in_generate=True, output_logits=True, **kwargs
        )
    return Generated(output.sequences[:, batch["input_ids"].shape[1] :], torch.stack(output.logits, dim=1))


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """Equal up to a share of the largest of the expected values, or of 1."""
    assert actual.shape == expected.shape
    error = (actual - expected).abs().max().item()
    scale = max(expected.abs().max().item(), 1.0)
    assert error <= tolerance * scale, f"off by {error:.3g} where values reach {scale:.3g}"
