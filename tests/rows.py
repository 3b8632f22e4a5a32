"""Rows to steer by every kind of edit at once, and what the model makes of them."""

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
from steer import Condition, LowRankEdit, ProjectionEdit, ResidualEdit, Site
from steer.inject import Edit, GatedCrossAttention

MEMORY_WIDTH = 20
# Of the low-rank maps, and the width of the marks.
RANK, MARKED = 2, 12


@dataclass(frozen=True, eq=False)
class Row:
    """One row of a batch; without anything but a prompt it is a plain one."""

    prompt: str
    vector: Tensor | None = None
    prefix: Tensor | None = None
    memory: Tensor | None = None
    context: str | None = None
    lam: float = 0.0
    # Added with the norm kept, in the prompt.
    turn: Tensor | None = None
    # A direction to clamp, at marked positions.
    clamp: Tensor | None = None
    marks: Tensor | None = None
    # R, W and b of a low-rank map, side by side, and the direction of its condition.
    reft: Tensor | None = None
    condition: Tensor | None = None

    def without_context(self) -> Row:
        return replace(self, context=None, lam=0.0)


def text(rng: random.Random, shortest: int = 1, longest: int = 24) -> str:
    return "".join(rng.choices(string.ascii_letters + " .,", k=rng.randint(shortest, longest)))


def random_row(seed: int, share: float = 0.7) -> Row:
    """A row that has each of the edits with a probability of `share`."""
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
        turn=None if (turn := maybe(1, WIDTH, 1.0)) is None else turn[0],
        clamp=None if (clamp := maybe(1, WIDTH, 1.0)) is None else clamp[0],
        marks=torch.rand(MARKED, generator=generator) < 0.5,
        reft=maybe(RANK, 2 * WIDTH + 1, WIDTH**-0.5),
        condition=None if (condition := maybe(1, WIDTH, 1.0)) is None else condition[0],
    )


def cross_attention(gate: float = 1.0) -> GatedCrossAttention:
    """A layer for the rows' memories, open or shut."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = GatedCrossAttention(WIDTH, MEMORY_WIDTH, heads=4).requires_grad_(False)
    layer.gate.fill_(gate)
    return layer


def edits_of(rows: Sequence[Row], layer: GatedCrossAttention) -> list[Edit]:
    """All kinds of edits: plain vectors at two sites and from two starts, then the rest, the streams last."""
    vectors = stack([row.vector for row in rows], 2, WIDTH)
    maps = stack([row.reft for row in rows], RANK, 2 * WIDTH + 1)
    condition = Condition(Site("resid_post", 0), stack([row.condition for row in rows], WIDTH), torch.zeros(len(rows)))
    marks = torch.stack([torch.zeros(MARKED) if row.marks is None else row.marks for row in rows]).bool()
    contexts = [row.context for row in rows]
    lams = torch.tensor([0.0 if row.context is None else row.lam for row in rows])
    return [
        ResidualEdit(Site("resid_post", 1), vectors[:, 0]),
        ResidualEdit(Site("resid_post", 0), vectors[:, 1], positions="all"),
        ResidualEdit(Site("resid_post", 0), stack([row.turn for row in rows], WIDTH), "prompt", keep_norm=True),
        ProjectionEdit(
            Site("resid_post", 1), stack([row.clamp for row in rows], WIDTH), torch.full((len(rows),), 2.0), marks
        ),
        LowRankEdit(
            Site("resid_post", 1),
            maps[..., :WIDTH],
            maps[..., WIDTH:-1],
            10 * maps[..., -1],
            positions="generated",
            condition=condition,
        ),
        steer.PrefixEdit.from_rows([row.prefix for row in rows], WIDTH),
        steer.MemoryEdit.from_rows(Site("resid_mid", 1), layer, [row.memory for row in rows]),
        steer.StreamEdit.contrast(contexts, lams),
    ]


def stack(values: Sequence[Tensor | None], *shape: int) -> Tensor:
    """One a row; zeros for rows without."""
    return torch.stack([torch.zeros(shape) if value is None else value for value in values])


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
