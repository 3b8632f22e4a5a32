"""What is neutral has no effect: bit for bit where the shapes are the same, up to rounding where they are not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import WIDTH
from rows import MEMORY_WIDTH, Row, assert_close, cross_attention, generate, random_row
from torch import Tensor

import steer
from steer import ResidualEdit
from steer.inject import Edit

ROWS = [random_row(1, share=1.0), Row("plain one"), random_row(3, share=1.0), Row("p")]
VECTORS = 3 * torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(0))
ROTATION = torch.randn(4, 2, WIDTH, generator=torch.Generator().manual_seed(1))
MEMORY = torch.randn(5, MEMORY_WIDTH, generator=torch.Generator().manual_seed(0))
START = steer.Site("resid_post", 0)


def plain(lm: steer.FrozenLM, prompts: Sequence[str], **kwargs: object) -> Tensor:
    """Logits of transformers' own generation, `[row, step, vocab]`."""
    batch = lm.tokenizer(list(prompts), padding=True, padding_side="left", return_tensors="pt")
    batch = {key: batch[key] for key in ("input_ids", "attention_mask")}
    settings = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return torch.stack(lm.model.generate(**batch, **settings, **kwargs).logits, dim=1)


def steered(lm: steer.FrozenLM, edits: list[Edit], rows: Sequence[Row] = ROWS) -> Tensor:
    return generate(lm, rows, cross_attention(), edits=edits).logits


NEUTRAL: dict[str, Callable[[], Edit]] = {
    "zero vectors": lambda: ResidualEdit(START, torch.zeros(4, WIDTH)),
    "zero vectors everywhere": lambda: ResidualEdit(START, torch.zeros(4, WIDTH), positions="all"),
    "strength 0": lambda: ResidualEdit(START, VECTORS).at_strength(torch.zeros(4)),
    "dose 0": lambda: ResidualEdit(START, VECTORS, reference_norms=torch.ones(4)).at_dose(torch.zeros(4)),
    "zero vectors with the norm kept": lambda: ResidualEdit(START, torch.zeros(4, WIDTH), "all", keep_norm=True),
    "strength 0 with the norm kept": lambda: ResidualEdit(START, VECTORS, keep_norm=True).at_strength(torch.zeros(4)),
    "no directions": lambda: steer.ProjectionEdit(START, torch.zeros(4, WIDTH), torch.ones(4), "all"),
    "directions at strength 0": lambda: steer.ProjectionEdit(START, VECTORS, torch.ones(4)).at_strength(torch.zeros(4)),
    "projections within their limit": lambda: steer.ProjectionEdit(
        START, VECTORS, torch.full((4,), -1e4), "all", limit="at_least"
    ),
    "no low-rank maps": lambda: steer.LowRankEdit(START, 0 * ROTATION, 0 * ROTATION, torch.zeros(4, 2), "all"),
    "W = R and b = 0": lambda: steer.LowRankEdit(START, ROTATION, ROTATION, torch.zeros(4, 2), "all"),
    "low-rank maps at strength 0": lambda: steer.LowRankEdit(START, ROTATION, -ROTATION, torch.ones(4, 2)).at_strength(
        torch.zeros(4)
    ),
    "nothing marked": lambda: ResidualEdit(START, VECTORS, torch.zeros(4, 9, dtype=torch.bool)),
    "a condition that no prompt meets": lambda: ResidualEdit(
        START, VECTORS, condition=steer.Condition(START, VECTORS, torch.ones(4))
    ),
    "no prefixes": lambda: steer.PrefixEdit.from_rows([None] * 4, WIDTH),
    "no memories": lambda: steer.MemoryEdit.from_rows(steer.Site("resid_mid", 1), cross_attention(), [None] * 4),
    "shut gate": lambda: steer.MemoryEdit.from_rows(steer.Site("resid_mid", 1), cross_attention(0.0), [MEMORY] * 4),
    "no contexts": lambda: steer.StreamEdit.contrast([None] * 4, torch.zeros(4)),
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_edits_leave_every_bit(lm: steer.FrozenLM, name: str) -> None:
    assert torch.equal(steered(lm, [NEUTRAL[name]()]), plain(lm, [row.prompt for row in ROWS]))


def test_all_neutral_edits_together(lm: steer.FrozenLM) -> None:
    edits = [make() for name, make in NEUTRAL.items()]
    assert torch.equal(steered(lm, edits), plain(lm, [row.prompt for row in ROWS]))


def test_rows_without_a_user_beside_steered_ones(lm: steer.FrozenLM) -> None:
    """Same shapes for the vectors and the memory, which do not lengthen anything: bit for bit.

    Except in a mixture of experts: each expert takes its tokens from all rows, so their number depends on the others.
    """
    vectors = VECTORS * torch.tensor([1.0, 0.0, 1.0, 0.0])[:, None]
    memories = [MEMORY, None, MEMORY[:2], None]
    edits = [
        ResidualEdit(START, vectors),
        ResidualEdit(steer.Site("embed"), vectors, positions="all"),
        ResidualEdit(START, vectors, "prompt", keep_norm=True),
        steer.ProjectionEdit(START, vectors),
        steer.LowRankEdit(START, vectors[:, None], 0 * vectors[:, None], vectors[:, :1]),
        steer.MemoryEdit.from_rows(steer.Site("resid_mid", 1), cross_attention(), memories),
    ]
    logits, expected = steered(lm, edits), plain(lm, [row.prompt for row in ROWS])
    assert_close(logits[[1, 3]], expected[[1, 3]], 1e-6 if lm.model.config.model_type in ("mixtral", "gpt_oss") else 0)
    assert not torch.isclose(logits[[0, 2]], expected[[0, 2]]).all(-1).any()


def test_rows_without_a_prefix_beside_prefixed_ones(lm: steer.FrozenLM) -> None:
    prefixes = [row.prefix for row in ROWS]
    assert prefixes[0] is not None
    assert prefixes[1] is None
    logits = steered(lm, [steer.PrefixEdit.from_rows(prefixes, WIDTH)])
    assert_close(logits[[1, 3]], plain(lm, [row.prompt for row in ROWS])[[1, 3]])


def test_lambda_0_is_plain_prompting_with_the_context(lm: steer.FrozenLM) -> None:
    rows = [replace(row, lam=0.0, context=row.context or "no one") for row in ROWS]
    edit = steer.StreamEdit.contrast([row.context for row in rows], torch.zeros(4))
    assert_close(mixed(lm, edit, rows), plain(lm, [f"{row.context} {row.prompt}" for row in rows]))


def test_lambda_minus_1_is_the_prompt_alone(lm: steer.FrozenLM) -> None:
    rows = [replace(row, lam=-1.0, context=row.context or "no one") for row in ROWS]
    edit = steer.StreamEdit.contrast([row.context for row in rows], torch.full((4,), -1.0))
    assert_close(mixed(lm, edit, rows), plain(lm, [row.prompt for row in rows]))


def mixed(lm: steer.FrozenLM, edit: steer.StreamEdit, rows: Sequence[Row]) -> Tensor:
    """Scores after the mixture; `logits` are those of the rows' own streams."""
    with lm.steered(edits=[edit]) as steering:
        batch = steering.prepare([row.prompt for row in rows])
        settings = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
        output = lm.model.generate(**batch, **steering.generate_kwargs(), **settings)
    return torch.stack(output.scores, dim=1)


def test_a_closed_context_and_a_closed_model(lm: steer.FrozenLM) -> None:
    prompts = [row.prompt for row in ROWS]
    before = plain(lm, prompts)
    generate(lm, ROWS, cross_attention())
    assert torch.equal(plain(lm, prompts), before)
    lm.close()
    # PyTorch takes another matrix product, which rounds differently, for weights that require a gradient.
    lm.model.requires_grad_(False)
    assert torch.equal(plain(lm, prompts), before)


def test_states_of_nobody(llama: steer.FrozenLM, histories: list[steer.History], tmp_path: Path) -> None:
    """`users=[None, …]` with a bank whose states then have nothing to do, and strength 0 for rows that have states."""
    bank = steer.Bank(tmp_path / "people.bank")
    style = steer.StyleVector(layer=1, neutral="field:bland")
    for history in histories:
        bank[history.user_id, "style"] = style.fit(llama, history)
    prompts = ["one", "another"]
    expected = llama.generate_tokens(prompts)
    assert llama.generate_tokens(prompts, users=[None, None], bank=bank) == expected
    assert llama.generate_tokens(prompts, users=["ann", "bob"], bank=bank, strength=0.0) == expected
    assert llama.generate_tokens(prompts, users=["ann", "bob"], bank=bank, dose=0.0) == expected
    assert llama.generate_tokens(prompts, users=["zoe", None], bank=bank, unknown_user="plain") == expected
    assert llama.generate_tokens(prompts, users=["ann", "bob"], bank=bank, strength=9.0) != expected
    mixed_strengths = llama.generate_tokens(prompts, users=["ann", "bob"], bank=bank, strength=[9.0, 0.0])
    assert mixed_strengths[0] != expected[0]
    assert mixed_strengths[1] == expected[1]
