"""Each kernel against its readable reference, over odd sizes and in several dtypes."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import TopPLogitsWarper

from steer.kernels import (
    add_rows,
    add_rows_keeping_norm,
    arithmetic,
    attend,
    geometric,
    keep_nucleus,
    low_rank_rows,
    naive_add_rows,
    naive_add_rows_keeping_norm,
    naive_arithmetic,
    naive_attend,
    naive_geometric,
    naive_keep_nucleus,
    naive_low_rank_rows,
    naive_overwrite_rows,
    naive_project_rows,
    naive_similarity_to_projection,
    naive_slots_at,
    naive_tilted_log_probs,
    naive_tilted_moments,
    overwrite_rows,
    project_rows,
    similarity_to_projection,
    slots_at,
    tilted_log_probs,
    tilted_moments,
)
from steer.kernels import mixture as mixture_module

MINUS_INF = float("-inf")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
sizes = pytest.mark.parametrize("pos", [1, 7, 63])
widths = pytest.mark.parametrize("d", [33, 60])
rows_ = pytest.mark.parametrize("rows", [1, 5])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def integers(high: int, *shape: int, low: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(0))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of the expected values."""
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).square().mean().sqrt() / expected.square().mean().sqrt().clamp(min=1e-300)).item()


@sizes
@widths
@rows_
@dtypes
def test_add_rows(pos: int, d: int, rows: int, dtype: torch.dtype) -> None:
    hidden, vectors = normal(rows, pos, d, dtype=dtype), 5 * normal(rows, 1, d, dtype=dtype, seed=1)
    mask = integers(2, rows, pos, 1).to(dtype)
    assert torch.equal(add_rows(hidden, vectors, mask), naive_add_rows(hidden, vectors, mask))


@dtypes
def test_add_rows_leaves_rows_of_zeros_as_they_are(dtype: torch.dtype) -> None:
    hidden = normal(2, 7, 33, dtype=dtype)
    hidden[0, 0, 0], hidden[0, 1, 1] = torch.inf, torch.finfo(dtype).smallest_normal
    vectors = torch.stack([torch.zeros(1, 33), torch.ones(1, 33)]).to(dtype)
    out = add_rows(hidden, vectors, torch.ones(2, 7, 1, dtype=dtype))
    assert torch.equal(out[0], hidden[0])
    assert not torch.equal(out[1], hidden[1])


def wide(dtype: torch.dtype) -> torch.dtype:
    """What users' tensors are kept in where more is done with them than an addition."""
    return torch.promote_types(dtype, torch.float32)


@sizes
@widths
@rows_
@dtypes
def test_add_rows_keeping_norm(pos: int, d: int, rows: int, dtype: torch.dtype) -> None:
    hidden, vectors = normal(rows, pos, d, dtype=dtype), 5 * normal(rows, 1, d, dtype=wide(dtype), seed=1)
    mask = integers(2, rows, pos, 1).to(dtype)
    out = add_rows_keeping_norm(hidden, vectors, mask)
    assert out.dtype == dtype
    assert relative_error(out, naive_add_rows_keeping_norm(hidden, vectors, mask)) < 5 * torch.finfo(dtype).eps
    assert relative_error(out.double().norm(dim=-1), hidden.double().norm(dim=-1)) < torch.finfo(dtype).eps
    assert torch.equal(out[mask[..., 0] == 0], hidden[mask[..., 0] == 0])


@dtypes
def test_norms_beyond_the_range_of_float16(dtype: torch.dtype) -> None:
    """300² alone is more than float16 holds."""
    hidden = torch.full((1, 1, 33), 300.0, dtype=dtype)
    out = add_rows_keeping_norm(hidden, hidden.to(wide(dtype)), torch.ones(1, 1, 1))
    torch.testing.assert_close(out, hidden)
    unit = torch.full((1, 1, 33), 33**-0.5, dtype=wide(dtype))
    zero = torch.zeros(1, 1, 1, dtype=wide(dtype))
    assert project_rows(hidden, unit, zero, zero, torch.ones(1, 1, 1)).abs().max() < 300 * torch.finfo(dtype).eps


@sizes
@widths
@rows_
@dtypes
@pytest.mark.parametrize("bounds", [(0.5, 0.5), (0.5, torch.inf), (-torch.inf, 0.5), (-0.5, 1.0)], ids=str)
def test_project_rows(pos: int, d: int, rows: int, dtype: torch.dtype, bounds: tuple[float, float]) -> None:
    hidden, u = normal(rows, pos, d, dtype=dtype), normal(rows, 1, d, dtype=wide(dtype), seed=1)
    u = u / u.norm(dim=-1, keepdim=True)
    lowest, highest = (torch.full((rows, 1, 1), bound, dtype=wide(dtype)) for bound in bounds)
    amounts = integers(3, rows, pos, 1) / 2
    out = project_rows(hidden, u, lowest, highest, amounts)
    assert out.dtype == dtype
    assert relative_error(out, naive_project_rows(hidden, u, lowest, highest, amounts)) < torch.finfo(dtype).eps
    assert torch.equal(out[amounts[..., 0] == 0], hidden[amounts[..., 0] == 0])
    whole = project_rows(hidden.to(wide(dtype)), u, lowest, highest, torch.ones(rows, pos, 1)).double() @ u.double().mT
    before = hidden.double() @ u.double().mT
    torch.testing.assert_close(whole, before.clamp(*bounds), rtol=1e-5, atol=1e-5)


@sizes
@pytest.mark.parametrize("rank", [1, 3])
@widths
@rows_
@dtypes
def test_low_rank_rows(pos: int, rank: int, d: int, rows: int, dtype: torch.dtype) -> None:
    hidden, bias = normal(rows, pos, d, dtype=dtype), normal(rows, 1, rank, dtype=wide(dtype), seed=1)
    down, up = (normal(rows, rank, d, dtype=wide(dtype), seed=seed) / d**0.5 for seed in (2, 3))
    amounts = integers(3, rows, pos, 1) / 2
    out = low_rank_rows(hidden, down, bias, up, amounts)
    assert out.dtype == dtype
    assert relative_error(out, naive_low_rank_rows(hidden, down, bias, up, amounts)) < torch.finfo(dtype).eps
    assert torch.equal(out[amounts[..., 0] == 0], hidden[amounts[..., 0] == 0])


@dtypes
def test_kernels_leave_rows_without_an_amount_as_they_are(dtype: torch.dtype) -> None:
    """Whatever such a row holds, infinities included; and states of zeros give no NaN in the others."""
    hidden = normal(2, 7, 33, dtype=dtype)
    hidden[0, 0, 0], hidden[0, 1, 1], hidden[0, 2] = torch.inf, torch.finfo(dtype).smallest_normal, 0
    hidden[1, 0] = 0
    amounts = torch.tensor([0.0, 1.0])[:, None, None].expand(2, 7, 1)
    v = normal(2, 1, 33, dtype=wide(dtype), seed=1)
    hidden[1, 1], v[1, 0] = -v[1, 0].to(dtype), v[1, 0].to(dtype)
    zeros = torch.zeros(2, 1, 1, dtype=wide(dtype))
    for out in (
        add_rows_keeping_norm(hidden, v, amounts),
        project_rows(hidden, v, zeros, zeros, amounts),
        low_rank_rows(hidden, v, zeros, v, amounts),
    ):
        assert torch.equal(out[0], hidden[0])
        assert not torch.equal(out[1], hidden[1])
        assert not out[1].isnan().any()
    # What cancels, and what was nothing, is nothing afterwards.
    assert (add_rows_keeping_norm(hidden, v, amounts)[1, :2] == 0).all()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@widths
@rows_
def test_similarity_to_projection(rows: int, d: int, scale: float) -> None:
    states, directions = scale * normal(rows, d), normal(rows, d, seed=1)
    states[0] += 3 * scale * directions[0]
    out = similarity_to_projection(states, directions)
    assert out[0] > 0.5
    torch.testing.assert_close(out.double(), naive_similarity_to_projection(states, directions), rtol=1e-5, atol=1e-6)
    # The length of the direction does not matter, nor does its sign.
    torch.testing.assert_close(similarity_to_projection(states, -7 * directions), out)


def test_nothing_is_similar_to_nothing() -> None:
    states, directions = normal(3, 33), normal(3, 33, seed=1)
    states[0], directions[1] = 0, 0
    states[2] -= directions[2] * (states[2] @ directions[2]) / directions[2].square().sum()
    out = similarity_to_projection(states, directions)
    assert out[:2].tolist() == [0, 0]
    assert naive_similarity_to_projection(states, directions)[:2].tolist() == [0, 0]
    assert out.isfinite().all()


@sizes
@widths
@rows_
@dtypes
def test_overwrite_rows(pos: int, d: int, rows: int, dtype: torch.dtype) -> None:
    hidden, values = normal(rows, pos, d, dtype=dtype), normal(rows, 5, d, dtype=dtype, seed=1)
    slots = integers(6, rows, pos) - 1
    assert torch.equal(overwrite_rows(hidden, values, slots), naive_overwrite_rows(hidden, values, slots))


@sizes
@rows_
@pytest.mark.parametrize("runs", [1, 2, 5])
def test_slots_at(pos: int, rows: int, runs: int) -> None:
    """Positions begin anywhere, before, within or behind the runs; some runs are empty."""
    counts, gaps = integers(4, rows, 2, runs).unbind(1)
    # One behind the other with gaps of up to three tokens, and not in the order of their slots.
    starts = (counts + gaps).cumsum(1) - counts
    order = torch.randperm(runs, generator=torch.Generator().manual_seed(0))
    counts, starts = counts[:, order], starts[:, order]
    positions = torch.arange(pos)[None] + integers(12, rows, 1, low=-3)
    slots = slots_at(positions, starts, counts)
    assert torch.equal(slots, naive_slots_at(positions, starts, counts))


def test_slots_of_empty_and_full_runs() -> None:
    positions, starts = torch.arange(4).expand(3, 4), torch.tensor([[1, 0], [1, 0], [3, 0]])
    counts = torch.tensor([[3, 0], [0, 0], [1, 2]])
    assert slots_at(positions, starts, counts).tolist() == [[-1, 0, 1, 2], [-1, -1, -1, -1], [1, 2, -1, 0]]


@sizes
@pytest.mark.parametrize("d", [15, 33])
@rows_
@dtypes
def test_attend(pos: int, d: int, rows: int, dtype: torch.dtype) -> None:
    queries = normal(rows, 3, pos, d, dtype=dtype)
    keys, values = normal(rows, 3, 11, d, dtype=dtype, seed=1), normal(rows, 3, 11, d, dtype=dtype, seed=2)
    visible = torch.arange(11)[None] < integers(12, rows, 1, low=1)
    error = relative_error(attend(queries, keys, values, visible), naive_attend(queries, keys, values, visible))
    assert error < 5 * torch.finfo(dtype).eps


def test_attend_is_blind_to_what_is_not_visible() -> None:
    queries, keys, values = normal(2, 3, 5, 8), normal(2, 3, 6, 8, seed=1), normal(2, 3, 6, 8, seed=2)
    visible = torch.arange(6)[None] < torch.tensor([[2], [5]])
    out = attend(queries, keys, values, visible)
    keys[0, :, 2:], values[0, :, 2:] = 1e4, -1e4
    assert torch.equal(attend(queries, keys, values, visible), out)


def mixture_inputs(vocab: int, batch: int, streams: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, int]:
    generator = torch.Generator().manual_seed(seed)
    owners = torch.cat([torch.arange(batch), torch.randint(batch, (streams,), generator=generator)])
    return 4 * normal(batch + streams, vocab, seed=seed), normal(batch + streams, seed=seed + 1), owners, batch


@pytest.mark.parametrize("vocab", [1, 33, 1000])
@pytest.mark.parametrize(("batch", "streams"), [(1, 0), (1, 1), (5, 0), (5, 3), (2, 7)])
@dtypes
def test_geometric(vocab: int, batch: int, streams: int, dtype: torch.dtype) -> None:
    logits, weights, owners, batch = mixture_inputs(vocab, batch, streams)
    logits, weights = logits.to(dtype), weights.double()
    out = geometric(logits, weights, owners, batch)
    # At least in float32, as a mixture in half precision would round each term.
    assert out.dtype == torch.promote_types(dtype, torch.float32)
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6
    assert relative_error(out, naive_geometric(logits, weights, owners, batch)) < tolerance


def with_tokens_ruled_out(logits: Tensor, seed: int) -> Tensor:
    """Some in every row, and sometimes all tokens of a row."""
    generator = torch.Generator().manual_seed(seed)
    ruled_out = torch.rand(logits.shape, generator=generator) < 0.3
    whole = torch.rand(len(logits), 1, generator=generator) < 0.05
    return logits.masked_fill(ruled_out | whole, MINUS_INF)


def some_floors(batch: int, seed: int) -> Tensor:
    choices = torch.tensor([MINUS_INF, math.log(1e-3), math.log(0.1), 0.0])
    return choices[torch.randint(4, (batch,), generator=torch.Generator().manual_seed(seed))]


def assert_same(out: Tensor, expected: Tensor) -> None:
    """The same tokens are ruled out, the others agree to rounding, and nothing is NaN or ∞."""
    assert torch.equal(out.isneginf(), expected.isneginf())
    finite = expected.isfinite()
    assert torch.equal(finite, ~expected.isneginf())
    precise = {torch.float32: {"rtol": 1e-5, "atol": 2e-5}, torch.float64: {"rtol": 1e-13, "atol": 4e-14}}
    torch.testing.assert_close(out[finite].double(), expected[finite], **precise[out.dtype])


cases = given(st.integers(0, 10_000), st.integers(1, 4), st.integers(0, 5), st.booleans(), st.sampled_from([1, 4, 1e4]))
steadily = settings(deadline=None, derandomize=True, database=None)


@steadily
@cases
def test_geometric_with_tokens_that_are_ruled_out(
    seed: int, batch: int, streams: int, filtered: bool, scale: float
) -> None:
    logits, weights, owners, batch = mixture_inputs(12, batch, streams, seed)
    logits = with_tokens_ruled_out(scale * logits, seed)
    weights[torch.rand(weights.shape, generator=torch.Generator().manual_seed(seed)) < 0.2] = 0.0
    floors = some_floors(batch, seed) if filtered else None
    out = geometric(logits, weights, owners, batch, floors)
    assert_same(out / scale, naive_geometric(logits, weights, owners, batch, floors) / scale)
    assert out.isneginf()[logits[:batch].isneginf()].all()


def test_what_a_further_stream_rules_out() -> None:
    """Alone (λ = −1) it decides; contrasted with, it leaves the own logit."""
    logits, owners = torch.tensor([[-10.0, -20.0], [-10.0, float("-inf")]]), torch.tensor([0, 0])
    alone = geometric(logits, torch.tensor([0.0, 1.0]), owners, 1)
    assert torch.equal(alone, logits[1:])
    contrasted = geometric(logits, torch.tensor([2.0, -1.0]), owners, 1)
    assert torch.equal(contrasted, logits[:1])


def test_geometric_is_contrast_with_and_without_a_context() -> None:
    """λ = −1 gives the other stream, 0 the own one, and constants added to the logits change no distribution."""
    logits, owners = 4 * normal(2, 50), torch.tensor([0, 0])

    def contrast(logits: Tensor, lam: float) -> Tensor:
        return geometric(logits, torch.tensor([1 + lam, -lam]), owners, 1)[0].softmax(-1)

    torch.testing.assert_close(contrast(logits, -1.0), logits[1].softmax(-1))
    torch.testing.assert_close(contrast(logits, 0.0), logits[0].softmax(-1))
    shifted = logits + torch.tensor([[3.0], [-5.0]])
    torch.testing.assert_close(contrast(shifted, 1.7), contrast(logits, 1.7))
    expected = (logits[0].log_softmax(-1) * 2.7 - logits[1].log_softmax(-1) * 1.7).softmax(-1)
    torch.testing.assert_close(contrast(logits, 1.7), expected)


def test_the_references_keep_the_papers_identities_in_float64() -> None:
    """CoS without its context, as plain text, as guidance on log-probabilities and with several; one-hot policies."""
    own, plain, other = rows = 4 * normal(3, 50).double()
    owners, one = torch.zeros(3, dtype=torch.long), torch.ones(1, dtype=torch.float64)

    def mixed(*weights: float) -> Tensor:
        return naive_geometric(rows, torch.tensor(weights, dtype=torch.float64), owners, 1)[0].log_softmax(-1)

    def powered(power: float, *weights: float) -> Tensor:
        weighted = torch.tensor(weights, dtype=torch.float64)
        return naive_arithmetic(rows, weighted, owners, 1, power * one, one / power)[0].log_softmax(-1)

    def close(found: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(found, expected.log_softmax(-1), rtol=0, atol=1e-12)

    lam = 1.7
    close(mixed(0, 1, 0), plain)
    close(mixed(1, 0, 0), own)
    close(mixed(1 + lam, -lam, 0), plain.log_softmax(-1) + (1 + lam) * (own.log_softmax(-1) - plain.log_softmax(-1)))
    close(mixed(0.4, 1 - 0.4 - 0.9, 0.9), plain + 0.4 * (own - plain) + 0.9 * (other - plain))
    for power in (1.0, -1.0, -2.0):
        close(powered(power, 0, 0, 1), other)


@pytest.mark.parametrize("row", [0, 1, 2])
def test_geometric_with_all_weight_on_one_row_is_that_row(row: int) -> None:
    logits, owners = 4 * normal(3, 50), torch.tensor([0, 0, 0])
    out = geometric(logits, torch.eye(3)[row], owners, 1)[0]
    if row == 0:
        assert torch.equal(out, logits[0])
    torch.testing.assert_close(out, logits[row], rtol=0, atol=4e-6)


# (power, scale): kNN-LM, MOD's forward KL, MOD's α form at ½ and 2, its power mean proper, and one between.
POWERS = [(1.0, 1.0), (-1.0, -1.0), (-0.5, -1.0), (-2.0, -1.0), (-2.0, -0.5), (0.3, 1 / 0.3)]


def powers_and_scales(batch: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    which = torch.randint(len(POWERS), (batch,), generator=torch.Generator().manual_seed(seed))
    powers, scales = torch.tensor(POWERS)[which].T
    return powers, scales


@pytest.mark.parametrize("vocab", [1, 33, 1000])
@pytest.mark.parametrize(("batch", "streams"), [(1, 0), (1, 1), (5, 0), (5, 3), (2, 7)])
@dtypes
def test_arithmetic(vocab: int, batch: int, streams: int, dtype: torch.dtype) -> None:
    logits, weights, owners, batch = mixture_inputs(vocab, batch, streams)
    logits, weights, (powers, scales) = logits.to(dtype), weights.abs(), powers_and_scales(batch)
    out = arithmetic(logits, weights, owners, batch, powers, scales)
    assert out.dtype == torch.promote_types(dtype, torch.float32)
    assert_same(out, naive_arithmetic(logits, weights, owners, batch, powers, scales))


@steadily
@cases
def test_arithmetic_with_tokens_that_are_ruled_out(
    seed: int, batch: int, streams: int, filtered: bool, scale: float
) -> None:
    logits, weights, owners, batch = mixture_inputs(12, batch, streams, seed)
    logits = with_tokens_ruled_out(scale * logits, seed)
    weights = weights.abs()
    weights[torch.rand(weights.shape, generator=torch.Generator().manual_seed(seed)) < 0.2] = 0.0
    powers, scales = powers_and_scales(batch, seed)
    floors = some_floors(batch, seed) if filtered else None
    out = arithmetic(logits, weights, owners, batch, powers, scales, floors)
    expected = naive_arithmetic(logits, weights, owners, batch, powers, scales, floors)
    assert_same(out / scale, expected / scale)


@pytest.mark.parametrize(("power", "left"), [(1.0, [True, True, False]), (-1.0, [True, False, False])])
def test_who_rules_out_in_an_arithmetic_mixture(power: float, left: list[bool]) -> None:
    """One stream of two is enough at a negative power only; a stream of weight 0 never is."""
    logits = torch.tensor([[0.0, 0.0, MINUS_INF], [0.0, MINUS_INF, MINUS_INF], [MINUS_INF, 0.0, 0.0]])
    weights, owners, exponents = torch.tensor([0.5, 0.5, 0.0]), torch.zeros(3, dtype=torch.long), torch.tensor([power])
    for scale in (1.0, -1.0, 0.0):
        out = arithmetic(logits, weights, owners, 1, exponents, torch.tensor([scale]))
        assert out[0].isfinite().tolist() == left
        assert not out.isnan().any()


def test_arithmetic_is_the_published_mixtures() -> None:
    """kNN-LM's interpolation, MOD's forward KL, and its α form, as their papers write them, by NumPy in float64."""
    logits, owners, one = 4 * normal(2, 50), torch.tensor([0, 0]), torch.ones(1)
    w = torch.tensor([0.3, 0.7])
    p = np.exp(logits.double().numpy())
    p /= p.sum(-1, keepdims=True)
    expected = {
        (1.0, 1.0): np.log(0.3 * p[0] + 0.7 * p[1]),
        (-1.0, -1.0): -np.log(0.3 / p[0] + 0.7 / p[1]),
        (-2.0, -1.0): -np.log(0.3 / p[0] ** 2 + 0.7 / p[1] ** 2),
    }
    for (power, scale), values in expected.items():
        out = arithmetic(logits, w, owners, 1, power * one, scale * one)[0]
        np.testing.assert_allclose(out.numpy(), values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1, 1e4])
def test_arithmetic_of_one_stream_is_its_log_softmax(scale: float) -> None:
    logits, ones = scale * normal(5, 1000), torch.ones(5)
    out = arithmetic(logits, ones, torch.arange(5), 5, ones, ones)
    torch.testing.assert_close(out / scale, logits.log_softmax(-1) / scale, rtol=1e-6, atol=2e-6)


def test_arithmetic_of_a_small_power_is_geometric() -> None:
    """In the limit of power 0 the power mean is the geometric one; here both are normalized."""
    logits, owners, w = 2 * normal(3, 50), torch.tensor([0, 0, 0]), torch.tensor([0.5, 0.2, 0.3])
    for power in (1e-3, -1e-3):
        powers = torch.tensor([power])
        mixed = arithmetic(logits, w, owners, 1, powers, 1 / powers).log_softmax(-1)
        torch.testing.assert_close(mixed, geometric(logits, w, owners, 1).log_softmax(-1), rtol=0, atol=1e-2)


MIXTURES: dict[str, Callable[..., Tensor]] = {
    "geometric": lambda logits, weights, owners, batch, powers, scales, floors: geometric(
        logits, weights, owners, batch, floors
    ),
    "arithmetic": arithmetic,
}
mixtures = pytest.mark.parametrize("mix", MIXTURES.values(), ids=MIXTURES)


def whole_case(vocab: int = 33, batch: int = 3, streams: int = 4, seed: int = 0) -> list:
    logits, weights, owners, batch = mixture_inputs(vocab, batch, streams, seed)
    return [logits, weights.abs(), owners, batch, *powers_and_scales(batch, seed), some_floors(batch, seed + 1)]


@mixtures
@pytest.mark.parametrize("floor", [MINUS_INF, math.log(0.1), 0.0])
def test_plausibility_filter(mix: Callable[..., Tensor], floor: float) -> None:
    """As Li et al. 2023 write it, by the probabilities of the own row."""
    *inputs, _ = whole_case()
    logits, batch = inputs[0], inputs[3]
    plain, filtered = mix(*inputs, None), mix(*inputs, torch.full((batch,), floor))
    p = logits[:batch].double().softmax(-1)
    kept = p >= math.exp(floor) * p.amax(-1, keepdim=True)
    assert torch.equal(filtered, plain.masked_fill(~kept, MINUS_INF))
    if floor == 0:
        assert torch.equal(kept.sum(-1), torch.ones(batch))


@mixtures
@pytest.mark.parametrize("block", [1, 7, 70, 10_000])
def test_mixtures_in_blocks(mix: Callable[..., Tensor], block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = whole_case()
    inputs[0] = with_tokens_ruled_out(inputs[0], 0)
    whole = mix(*inputs)
    monkeypatch.setattr(mixture_module, "BLOCK", block)
    torch.testing.assert_close(mix(*inputs), whole, rtol=1e-6, atol=2e-6)


@mixtures
def test_mixtures_leave_their_inputs_as_they_are(mix: Callable[..., Tensor]) -> None:
    inputs = whole_case()
    assert inputs[0].dtype == torch.float32  # the dtype in which a cast is no copy
    before = [value.clone() if isinstance(value, Tensor) else value for value in inputs]
    mix(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True) if isinstance(a, Tensor))


@mixtures
def test_a_row_is_mixed_as_it_is_alone(mix: Callable[..., Tensor]) -> None:
    """Bit for bit, next to a row that rules out everything, one of huge logits and one that filters."""
    logits, weights, owners, batch, powers, scales, floors = whole_case(streams=9)
    logits[0], logits[2] = MINUS_INF, 1e4 * logits[2]
    floors[0], floors[1], floors[2] = 0.0, MINUS_INF, math.log(0.5)
    rows = [row for row in range(len(owners)) if owners[row] == 1]
    assert len(rows) > 1
    alone = mix(logits[rows], weights[rows], owners[rows] * 0, 1, powers[1:2], scales[1:2], floors[1:2])
    assert torch.equal(mix(logits, weights, owners, batch, powers, scales, floors)[1:2], alone)


@mixtures
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_masks_by_the_lowest_number(mix: Callable[..., Tensor], dtype: torch.dtype) -> None:
    """What all streams mask so overflows, and is ruled out or stays last."""
    inputs = whole_case()
    inputs[0] = inputs[0].to(dtype)
    inputs[0][:, 5] = torch.finfo(dtype).min
    out = mix(*inputs)
    assert not out.isnan().any()
    assert (out[:, 5] <= out.amin(-1)).all()


@mixtures
@pytest.mark.parametrize("batch", [1, 3])
def test_one_graph_for_all_weights_powers_and_floors(mix: Callable[..., Tensor], batch: int) -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(mix, backend=counter, fullgraph=True)
    for seed in range(4):
        inputs = whole_case(batch=batch, seed=seed)
        inputs[0] = with_tokens_ruled_out(inputs[0], seed)
        expected = mix(*inputs)
        assert_same(compiled(*inputs), expected.double())
    assert counter.frame_count == 1


def nucleus_inputs(rows: int, vocab: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    shares = torch.rand(rows, generator=torch.Generator().manual_seed(seed))
    return 4 * normal(rows, vocab, seed=seed), shares


@pytest.mark.parametrize("vocab", [1, 33, 1000])
@rows_
@dtypes
def test_keep_nucleus(vocab: int, rows: int, dtype: torch.dtype) -> None:
    logits, shares = nucleus_inputs(rows, vocab)
    logits = logits.to(dtype)
    out = keep_nucleus(logits, shares)
    assert out.dtype == dtype
    assert torch.equal(out, naive_keep_nucleus(logits, shares))


@pytest.mark.parametrize("share", [1e-6, 0.1, 0.5, 0.9, 0.99, 0.9999])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 10.0])
def test_keep_nucleus_is_the_filter_of_transformers(share: float, spread: float) -> None:
    logits = spread * normal(7, 999)
    logits[2, ::3] = MINUS_INF
    out = keep_nucleus(logits, torch.full((7,), share))
    for row in range(7):
        assert torch.equal(out[row : row + 1], TopPLogitsWarper(share)(None, logits[row : row + 1]))


@steadily
@given(st.integers(0, 10_000), st.integers(1, 5))
def test_keep_nucleus_with_tokens_that_are_ruled_out(seed: int, rows: int) -> None:
    logits, shares = nucleus_inputs(rows, 12, seed)
    logits = with_tokens_ruled_out(logits.round(), seed)  # rounded, so that there are ties
    shares[seed % rows] = seed % 3 / 2
    out = keep_nucleus(logits, shares)
    assert torch.equal(out, naive_keep_nucleus(logits, shares))


def test_tokens_of_one_probability_stay_or_go_together() -> None:
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log().expand(4, 4)
    kept = keep_nucleus(logits, torch.tensor([0.4, 0.7, 0.8, 0.0])).isfinite()
    assert kept.sum(-1).tolist() == [1, 2, 4, 1]
    assert kept[:, 0].all()


def test_a_share_of_1_leaves_a_row_as_it_is() -> None:
    """Down to tokens whose probability is 0 in float32."""
    logits = torch.tensor([[0.0, -1e4, -5.0, MINUS_INF], [MINUS_INF] * 4])
    assert torch.equal(keep_nucleus(logits, torch.ones(2)), logits)
    assert keep_nucleus(logits, torch.full((2,), 0.5)).tolist() == [[0.0] + 3 * [MINUS_INF], 4 * [MINUS_INF]]


def test_one_graph_for_all_shares() -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(keep_nucleus, backend=counter, fullgraph=True)
    for seed in range(3):
        logits, shares = nucleus_inputs(3, 33, seed)
        assert torch.equal(compiled(logits, shares), keep_nucleus(logits, shares))
    assert counter.frame_count == 1


@pytest.mark.parametrize("vocab", [1, 37, 100_003])
@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_tilts(vocab: int, tokens: int, dtype: torch.dtype) -> None:
    """Of tables that are worked on whole, and in several blocks."""
    log_probs = (3 * normal(tokens, vocab, dtype=dtype)).log_softmax(1)
    change, chosen = 2 * normal(tokens, vocab, dtype=dtype, seed=1), integers(vocab, tokens)
    if vocab > 1:
        # Ruled out at every λ, and never chosen.
        log_probs[:, 1] = float("-inf")
        chosen = torch.where(chosen == 1, 0, chosen)
    lams = torch.tensor([-3.7, -1.0, 0.0, 0.3, 5.0])
    limit = 1e-12 if dtype == torch.float64 else 2e-6
    arguments = log_probs, change, chosen
    actual, expected = tilted_log_probs(*arguments, lams), naive_tilted_log_probs(*arguments, lams)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, rtol=limit, atol=limit)
    for lam in lams.tolist():
        for actual, expected in zip(
            tilted_moments(log_probs, change, lam), naive_tilted_moments(log_probs, change, lam), strict=True
        ):
            torch.testing.assert_close(actual.double(), expected, rtol=20 * limit, atol=20 * limit)


def test_tilts_do_not_overflow() -> None:
    log_probs, change = torch.tensor([[0.0, -2000.0, -3000.0]]), torch.tensor([[-500.0, 500.0, 0.0]])
    lams = torch.tensor([-100.0, 2.0, 100.0])
    assert tilted_log_probs(log_probs, change, torch.tensor([1]), lams)[:, 0].tolist() == pytest.approx(
        [-102_000.0, -math.log(2), 0.0], abs=1e-4
    )
    assert [tilted_moments(log_probs, change, lam)[0].item() for lam in lams.tolist()] == [-500.0, 0.0, 500.0]
