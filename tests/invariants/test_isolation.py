"""A row's result depends on its own user and prompt, and on nothing else in the batch."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import ARCHITECTURES, tiny, tokenizer
from rows import Generated, Row, assert_close, cross_attention, edits_of, generate, random_row

import steer
from steer.inject import GatedCrossAttention

STEPS = 6
# Row 0 is plain, row 1 has everything, the others what chance gives them.
POOL = [Row("plain"), random_row(1, share=1.0), *(random_row(seed) for seed in (2, 5, 6, 7, 9, 10))]
UNCONTRASTED = [row.without_context() for row in POOL]
compositions = st.lists(st.sampled_from(range(len(POOL))), min_size=1, max_size=5)
examples = pytest.mark.parametrize("count", [25, pytest.param(250, marks=pytest.mark.full)], ids=["few", "many"])


@dataclass(frozen=True)
class Bench:
    """A model that stays wrapped, and what every row of the pool gives alone."""

    lm: steer.FrozenLM
    layer: GatedCrossAttention
    alone: list[Generated]
    # Without the contexts, as streams take another path.
    uncontrasted: list[Generated]


@cache
def bench(arch: str) -> Bench:
    lm, layer = steer.wrap(tiny(arch), tokenizer()), cross_attention()
    alone, uncontrasted = (
        [generate(lm, [row], layer, max_new_tokens=STEPS) for row in pool] for pool in (POOL, UNCONTRASTED)
    )
    return Bench(lm, layer, alone, uncontrasted)


def search(count: int, check, **strategies) -> None:  # type: ignore[no-untyped-def]
    settings(max_examples=count, deadline=None, derandomize=True, database=None)(given(**strategies)(check))()


def test_the_rows_of_the_pool_differ_by_their_steering(arch: str) -> None:
    """Else all that follows would hold for a library that does nothing."""
    lm, layer, alone = bench(arch).lm, bench(arch).layer, bench(arch).alone
    for row, steered in zip(POOL, alone, strict=True):
        plain = generate(lm, [Row(row.prompt)], layer, max_new_tokens=STEPS)
        moved = (steered.logits[:, 0] - plain.logits[:, 0]).abs().max()
        assert (moved == 0) == (row is POOL[0])
        margins = steered.logits.topk(2).values
        if row.context is None:
            # No tie that rounding could break.
            assert (margins[..., 0] - margins[..., 1]).min() > 1e-3


@examples
def test_any_batch_mates_in_any_order(arch: str, count: int) -> None:
    lm, layer = bench(arch).lm, bench(arch).layer

    def check(picks: list[int], contrast: bool) -> None:
        pool, alone = (POOL, bench(arch).alone) if contrast else (UNCONTRASTED, bench(arch).uncontrasted)
        together = generate(lm, [pool[i] for i in picks], layer, max_new_tokens=STEPS)
        for row, i in enumerate(picks):
            assert together.tokens[row].tolist() == alone[i].tokens[0].tolist()
            assert_close(together.logits[row], alone[i].logits[0])

    search(count, check, picks=compositions, contrast=st.booleans())


@pytest.mark.full
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_two_thousand_random_batches(arch: str, record_property: Callable[[str, object], None]) -> None:
    """So many over all architectures, of rows that differ in length, in who steers them and by what."""
    lm, layer, rng = bench(arch).lm, bench(arch).layer, random.Random(arch)
    contrasted = [random_row(seed) for seed in range(100, 132)]
    pools = [contrasted, [row.without_context() for row in contrasted]]

    @cache
    def alone(pool: int, i: int) -> Generated:
        return generate(lm, [pools[pool][i]], layer, max_new_tokens=STEPS)

    worst = reach = 0.0
    for _ in range(2000 // len(ARCHITECTURES)):
        pool, picks = rng.randrange(2), rng.choices(range(32), k=rng.randint(2, 8))
        together = generate(lm, [pools[pool][i] for i in picks], layer, max_new_tokens=STEPS)
        for row, i in enumerate(picks):
            assert together.tokens[row].tolist() == alone(pool, i).tokens[0].tolist()
            expected = alone(pool, i).logits[0]
            worst = max(worst, (together.logits[row] - expected).abs().max().item())
            reach = max(reach, expected.abs().max().item())
    record_property("worst logit difference", f"{worst:.1e}, where logits reach {reach:.0f}")
    assert worst < 5e-4


@examples
def test_beams_and_return_sequences(arch: str, count: int) -> None:
    lm, layer, pool = bench(arch).lm, bench(arch).layer, UNCONTRASTED

    @cache
    def beams(*picks: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [pool[i] for i in picks]
        with lm.steered(edits=edits_of(rows, layer)) as steering:
            batch = steering.prepare([row.prompt for row in rows])
            output = lm.model.generate(
                **batch,
                **steering.generate_kwargs(),
                max_new_tokens=STEPS,
                num_beams=3,
                num_return_sequences=2,
                return_dict_in_generate=True,
                output_scores=True,
            )
        new = output.sequences[:, batch["input_ids"].shape[1] :]
        return new.unflatten(0, (-1, 2)), output.sequences_scores.unflatten(0, (-1, 2))

    def check(picks: list[int]) -> None:
        tokens, scores = beams(*picks)
        for row, i in enumerate(picks):
            assert torch.equal(tokens[row], beams(i)[0][0])
            assert_close(scores[row], beams(i)[1][0])

    search(count // 5, check, picks=compositions)


@examples
def test_any_padding_on_either_side_of_a_forward_pass(arch: str, count: int) -> None:
    lm, layer, pool = bench(arch).lm, bench(arch).layer, UNCONTRASTED

    def forward(picks: list[int], left: list[int], right: int) -> list[torch.Tensor]:
        """Logits of each row's real tokens, in a batch with so much padding on its left, and some on its right."""
        rows = [pool[i] for i in picks]
        lengths = [len(row.prompt) + (0 if row.prefix is None else len(row.prefix)) for row in rows]
        width = max(a + b for a, b in zip(left, lengths, strict=True)) + right
        ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
        spans = [slice(start, start + length) for start, length in zip(left, lengths, strict=True)]
        # Without the streams, which only generation has.
        with lm.steered(edits=edits_of(rows, layer)[:-1], prompt_lengths=lengths) as steering:
            prompts = steering.prepare([row.prompt for row in rows])["input_ids"]
            for row, span in enumerate(spans):
                ids[row, span], mask[row, span] = prompts[row, -lengths[row] :], 1
            arguments = {"input_ids": ids, "attention_mask": mask}
            if lm.attachment.architecture.takes_position_ids:
                arguments["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
            with torch.no_grad():
                logits = lm.model(**arguments, use_cache=False).logits
        return [logits[row, span] for row, span in enumerate(spans)]

    alone = [forward([i], [0], 0)[0] for i in range(len(pool))]

    def check(picks: list[int], seed: int, right: int) -> None:
        left = random.Random(seed).choices(range(5), k=len(picks))
        for i, logits in zip(picks, forward(picks, left, right), strict=True):
            assert_close(logits, alone[i])

    search(count // 2, check, picks=compositions, seed=st.integers(0, 99), right=st.integers(0, 4))
