"""Edits of hidden states: what each does to them, against float64 by hand; how several act together; errors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from models import WIDTH, tiny, tokenizer
from rows import assert_close
from torch import Tensor

import steer
from steer import LowRankEdit, ProjectionEdit, ResidualEdit
from steer.inject import SiteEdit

SITE = steer.Site("resid_post", 1)
IDS = torch.tensor([[9, 8, 7, 6, 5, 4], [4, 5, 6, 7, 8, 9], [7, 7, 5, 5, 6, 6]])
# As if the last two tokens had been generated.
LENGTHS = [4, 4, 4]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


DIRECTIONS, VECTORS = normal(3, WIDTH), 3 * normal(3, WIDTH, seed=1)
UNITS = (DIRECTIONS / DIRECTIONS.norm(dim=1, keepdim=True)).double()[:, None]
ROTATION = torch.linalg.qr(normal(3, WIDTH, 4, seed=2)).Q.mT.contiguous()
WEIGHT, BIAS = normal(3, 4, WIDTH, seed=3) / WIDTH**0.5, normal(3, 4, seed=4)
TARGETS = torch.tensor([5.0, 0.0, -2.0])
HALF = torch.tensor([0.5, 1.0, 2.0])


def hidden(lm: steer.FrozenLM, *edits: SiteEdit, lengths: list[int] | None = LENGTHS) -> Tensor:
    """What the model has after the site's block, `[row, pos, d]`, in float64."""
    with torch.no_grad(), lm.steered(states=[None] * 3, edits=edits, prompt_lengths=lengths):
        return lm.model(IDS, output_hidden_states=True).hidden_states[2].double()


def low_rank(h: Tensor) -> Tensor:
    r, w, b = ROTATION.double(), WEIGHT.double(), BIAS.double()[:, None]
    return h + (h @ w.mT + b - h @ r.mT) @ r


def test_norm_keeping_additions(llama: steer.FrozenLM) -> None:
    h = hidden(llama)
    out = hidden(llama, ResidualEdit(SITE, VECTORS, "all", keep_norm=True))
    moved = h + VECTORS.double()[:, None]
    assert_close(out, moved * h.norm(dim=-1, keepdim=True) / moved.norm(dim=-1, keepdim=True), 1e-5)


@pytest.mark.parametrize("limit", ["exact", "at_least", "at_most"])
def test_projections(llama: steer.FrozenLM, limit: Any) -> None:
    h = hidden(llama)
    p = (h * UNITS).sum(-1, keepdim=True)
    t = TARGETS.double()[:, None, None].expand_as(p)
    wanted = {"exact": t, "at_least": torch.maximum(p, t), "at_most": torch.minimum(p, t)}[limit]
    edit = ProjectionEdit(SITE, DIRECTIONS, TARGETS, "all", limit)
    assert_close(hidden(llama, edit), h + (wanted - p) * UNITS, 1e-5)
    halves = h + HALF.double()[:, None, None] * (wanted - p) * UNITS
    assert_close(hidden(llama, edit.at_strength(HALF)), halves, 1e-5)
    if limit != "exact":
        # Some are on either side.
        assert 0 < (wanted != p).sum() < p.numel()


def test_projecting_out(llama: steer.FrozenLM) -> None:
    out = hidden(llama, ProjectionEdit(SITE, DIRECTIONS, positions="all"))
    assert (out * UNITS).sum(-1).abs().max() < 1e-5
    h = hidden(llama)
    assert_close(out, h - (h * UNITS).sum(-1, keepdim=True) * UNITS, 1e-5)


def test_low_rank_maps(llama: steer.FrozenLM) -> None:
    h = hidden(llama)
    edit = LowRankEdit(SITE, ROTATION, WEIGHT, BIAS, "all")
    assert_close(hidden(llama, edit), low_rank(h), 1e-5)
    scaled = hidden(llama, edit.at_strength(HALF).at_strength(torch.full((3,), 0.5)))
    assert_close(scaled, h + 0.5 * HALF.double()[:, None, None] * (low_rank(h) - h), 1e-5)
    # Within the subspace the map replaces what there was; beside it nothing moves.
    inside = (hidden(llama, edit) @ ROTATION.double().mT) - (h @ WEIGHT.double().mT + BIAS.double()[:, None])
    assert inside.abs().max() < 1e-4
    assert torch.equal(hidden(llama, LowRankEdit(SITE, ROTATION, ROTATION, torch.zeros(3, 4), "all")), h)


def test_gradients_of_low_rank_maps(llama: steer.FrozenLM) -> None:
    """By finite differences, in the direction of the gradient."""
    values = [ROTATION, WEIGHT, BIAS]

    def loss(*values: Tensor) -> Tensor:
        with llama.steered(edits=[LowRankEdit(SITE, *values)], prompt_lengths=LENGTHS) as steering:
            assert steering.plan.trains == torch.is_grad_enabled()
            return llama.model(IDS).logits[:, -1].log_softmax(-1)[:, 7].sum()

    leaves = [value.clone().requires_grad_() for value in values]
    loss(*leaves).backward()
    for i, leaf in enumerate(leaves):
        assert leaf.grad is not None
        assert leaf.grad.flatten(1).norm(dim=1).min() > 1e-3
        step = 0.01 * leaf.grad / leaf.grad.norm()
        with torch.no_grad():
            ahead, back = (loss(*values[:i], values[i] + sign * step, *values[i + 1 :]) for sign in (1, -1))
        assert ((ahead - back) / 0.02).item() == pytest.approx(leaf.grad.norm().item(), rel=0.05)


# Several at one site.


def test_additions_come_first_and_the_others_in_the_order_given(llama: steer.FrozenLM) -> None:
    project, reft = ProjectionEdit(SITE, DIRECTIONS, TARGETS, "all"), LowRankEdit(SITE, ROTATION, WEIGHT, BIAS, "all")
    add, keep = ResidualEdit(SITE, VECTORS, "all"), ResidualEdit(SITE, DIRECTIONS, "all", keep_norm=True)
    h = hidden(llama)
    added = h + VECTORS.double()[:, None]
    turned = added + DIRECTIONS.double()[:, None]
    turned = turned * added.norm(dim=-1, keepdim=True) / turned.norm(dim=-1, keepdim=True)

    def projected(h: Tensor) -> Tensor:
        return h + (TARGETS.double()[:, None, None] - (h * UNITS).sum(-1, keepdim=True)) * UNITS

    assert_close(hidden(llama, project, keep, reft, add), low_rank(projected(turned)), 1e-5)
    assert_close(hidden(llama, reft, project, add, keep), projected(low_rank(turned)), 1e-5)
    assert (projected(low_rank(turned)) - low_rank(projected(turned))).abs().max() > 0.1


def test_vectors_are_summed_before_a_norm_is_kept(llama: steer.FrozenLM) -> None:
    whole = hidden(llama, ResidualEdit(SITE, VECTORS + DIRECTIONS, "all", keep_norm=True))
    parts = [ResidualEdit(SITE, vectors, "all", keep_norm=True) for vectors in (VECTORS, DIRECTIONS)]
    assert_close(hidden(llama, *parts), whole, 1e-6)


def test_projections_on_several_directions_act_one_after_the_other(llama: steer.FrozenLM) -> None:
    h, first = hidden(llama), ProjectionEdit(SITE, DIRECTIONS, TARGETS, "all")
    second = ProjectionEdit(SITE, VECTORS, positions="all")
    units = (VECTORS / VECTORS.norm(dim=1, keepdim=True)).double()[:, None]
    clamped = h + (TARGETS.double()[:, None, None] - (h * UNITS).sum(-1, keepdim=True)) * UNITS
    assert_close(hidden(llama, first, second), clamped - (clamped * units).sum(-1, keepdim=True) * units, 1e-5)


@pytest.mark.parametrize(
    "edit",
    [
        ResidualEdit(SITE, VECTORS, "all", keep_norm=True),
        ProjectionEdit(SITE, DIRECTIONS, TARGETS, "all"),
        LowRankEdit(SITE, ROTATION, WEIGHT, BIAS, "all"),
    ],
    ids=lambda edit: type(edit).__name__,
)
def test_rows_of_zeros_are_left_alone_whatever_they_hold(llama: steer.FrozenLM, edit: SiteEdit) -> None:
    """Zero times infinity would not be zero."""
    present = torch.tensor([0.0, 1.0, 1.0])
    tensors = {name: value for name, value in vars(edit).items() if isinstance(value, Tensor)}
    edit = replace(edit, **{name: torch.einsum("b,b...->b...", present, value) for name, value in tensors.items()})
    seen: list[Tensor] = []

    def overflow(hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        hidden[:, 2, 5] = torch.inf
        seen.append(hidden)
        return hidden

    with torch.no_grad(), llama.steered(edits=[edit]):
        slot = llama.attachment.slots[SITE]
        slot.operators = (overflow, *slot.operators, lambda hidden: seen.append(hidden) or hidden)
        llama.model(IDS)
    assert torch.equal(seen[1][0], seen[0][0])
    assert not torch.equal(seen[1][1], seen[0][1])


# Errors.


def test_edits_that_make_no_sense(llama: steer.FrozenLM) -> None:
    def refused(message: str, *edits: SiteEdit) -> None:
        with pytest.raises(steer.SteerError, match=message):
            hidden(llama, *edits)

    refused("directions for resid_post.* are 5 wide, the model is 48 wide", ProjectionEdit(SITE, torch.ones(3, 5)))
    refused("2 rows for a batch of 3", LowRankEdit(SITE, ROTATION[:2], WEIGHT[:2], BIAS[:2]))
    refused("weights for .* not finite", LowRankEdit(SITE, ROTATION, WEIGHT.log(), BIAS))
    for shapes in ((ROTATION, WEIGHT[:, :3], BIAS), (ROTATION, WEIGHT, BIAS[:, :3]), (DIRECTIONS, VECTORS, BIAS)):
        with pytest.raises(steer.SteerError, match=r"R and W are \[batch, rank, d\]"):
            LowRankEdit(SITE, *shapes)
    with pytest.raises(steer.SteerError, match=r"biases .* not finite"):
        LowRankEdit(SITE, ROTATION, WEIGHT, BIAS.log())
    with pytest.raises(steer.SteerError, match="targets: there must be one for each of 3 rows"):
        ProjectionEdit(SITE, DIRECTIONS, torch.ones(2))
    with pytest.raises(steer.SteerError, match="targets must be finite"):
        ProjectionEdit(SITE, DIRECTIONS, torch.full((3,), torch.inf))
    with pytest.raises(steer.SteerError, match="limit='above' is not one of exact, at_least, at_most"):
        ProjectionEdit(SITE, DIRECTIONS, limit="above")  # type: ignore[arg-type]
    for edit in (ProjectionEdit(SITE, DIRECTIONS), LowRankEdit(SITE, ROTATION, WEIGHT, BIAS)):
        with pytest.raises(steer.SteerError, match=f"{type(edit).__name__} at resid_post.* adds none"):
            edit.at_dose(torch.ones(3))


# Numbers in half precision.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_statistics_are_not_rounded_to_half_precision(dtype: torch.dtype) -> None:
    """The result is that of float64, rounded once."""
    with steer.wrap(tiny("llama", dtype=dtype), tokenizer()) as lm:
        h = hidden(lm)
        for edit, expected in (
            (ProjectionEdit(SITE, DIRECTIONS, positions="all"), h - (h * UNITS).sum(-1, keepdim=True) * UNITS),
            (LowRankEdit(SITE, ROTATION, WEIGHT, BIAS, "all"), low_rank(h)),
        ):
            torch.testing.assert_close(hidden(lm, edit), expected, rtol=torch.finfo(dtype).eps, atol=1e-4)
