"""Seeded sampling: from the right distribution, and the same for a row in any batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import VOCABULARY
from rows import Row, cross_attention, edits_of, random_row
from torch import Tensor

import steer
from steer.sampling import SeededRows

ROWS = [random_row(1, share=1.0), Row("plain"), random_row(3)]
SEEDS = [11, 12, 13]


def sample(lm: steer.FrozenLM, picks: list[int], seeds: list[int] | None = None, **kwargs: Any) -> list[list[int]]:
    rows = [ROWS[i] for i in picks]
    return lm.generate_tokens(
        [row.prompt for row in rows],
        edits=edits_of(rows, cross_attention()),
        seeds=seeds or [SEEDS[i] for i in picks],
        **{"do_sample": True, "temperature": 2.0, "top_k": 0, "max_new_tokens": 6} | kwargs,
    )


def choose(scores: Tensor, seed: int, steps: int, start: int = 3) -> Tensor:
    """The tokens that one row chooses from the same scores at every step."""
    rows = SeededRows(lambda ids, logits: logits, [seed], steps, start)
    chosen = [rows(torch.zeros(1, start + step), scores[None]) for step in range(steps)]
    assert all(torch.isfinite(one).sum() == 1 for one in chosen)
    return torch.stack(chosen).argmax(-1).flatten()


def test_the_distribution_is_that_of_the_scores() -> None:
    """Chi-square over 20,000 draws, 19 degrees of freedom: 43.8 is exceeded once in a thousand times."""
    scores = 1.5 * torch.randn(20, generator=torch.Generator().manual_seed(0))
    expected = 20_000 * scores.softmax(-1)
    observed = torch.bincount(choose(scores, seed=5, steps=20_000), minlength=20)
    assert ((observed - expected) ** 2 / expected).sum() < 43.8
    wrong = 20_000 * (scores * 1.1).softmax(-1)
    assert ((observed - wrong) ** 2 / wrong).sum() > 43.8


def test_tokens_that_are_ruled_out_are_never_chosen() -> None:
    scores = torch.full((10,), float("-inf"))
    scores[[3, 4, 7]] = torch.tensor([0.0, 1.0, -1.0])
    assert set(choose(scores, seed=0, steps=500).tolist()) == {3, 4, 7}
    # Also at both ends of the numbers that can be drawn.
    for draw, token in [(0.0, 7), (1 - 2**-24, 3)]:
        rows = SeededRows(lambda ids, logits: logits, [0], 1, 0)
        rows.draws = torch.tensor([[draw]])
        assert rows(torch.zeros(1, 0), scores[None]).argmax().item() == token


def test_a_row_samples_the_same_in_any_batch(lm: steer.FrozenLM) -> None:
    alone = [sample(lm, [i])[0] for i in range(3)]
    assert len({tuple(tokens) for tokens in alone}) == 3
    for picks in ([0, 1], [2, 1, 0], [1, 1, 2, 0]):
        assert sample(lm, picks) == [alone[i] for i in picks]


def test_seeds_decide(llama: steer.FrozenLM) -> None:
    assert sample(llama, [1, 1, 1], seeds=[1, 2, 1])[0] == sample(llama, [1], seeds=[1])[0]
    distinct = sample(llama, [1] * 8, seeds=list(range(8)))
    assert len({tuple(tokens) for tokens in distinct}) == 8


def test_copies_of_a_row_differ_and_repeat(llama: steer.FrozenLM) -> None:
    copies = sample(llama, [0, 1], num_return_sequences=3)
    assert len({tuple(tokens) for tokens in copies}) == 6
    assert copies[3:] == sample(llama, [1], num_return_sequences=3)
    # The first copy is the row itself.
    assert copies[::3] == sample(llama, [0, 1])


def test_warpers_come_first(llama: steer.FrozenLM) -> None:
    """With top-k 1 there is nothing left to draw."""
    rows = [ROWS[1]]
    greedy = llama.generate_tokens([rows[0].prompt], max_new_tokens=6, do_sample=False)
    assert sample(llama, [1], top_k=1) == greedy
    assert sample(llama, [1]) != greedy
    assert all(0 <= token < VOCABULARY for token in sample(llama, [1])[0])


def test_seeds_that_make_no_sense_are_refused(llama: steer.FrozenLM) -> None:
    with pytest.raises(steer.SteerError, match="seeds are for sampling"):
        sample(llama, [0, 1], do_sample=False)
    with pytest.raises(steer.SteerError, match="one for each of the 2 rows"):
        sample(llama, [0, 1], seeds=[1])
