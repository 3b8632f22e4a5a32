"""Mixtures of the next-token distributions of several streams, and the filters that belong to them.

Both mixtures take raw logits in float32, bfloat16 or float16 and give float32, or float64 for float64. Rows 0 … batch−1
are the batch's own (`owners[r] == r`); further rows are contrasted streams, any number for each own row. Nothing waits
for the device, and what changes between users is in tensors.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

# Logits that are worked on at a time on a CPU, 1 MiB in float32: few enough that what is made of them stays in the
# processor's caches, enough that calls take little of the time.
BLOCK = 2**18


def geometric(
    logits: Float[Tensor, "row vocab"],
    weights: Float[Tensor, " row"],
    owners: Int[Tensor, " row"],
    batch: int,
    floors: Float[Tensor, " batch"] | None = None,
) -> Float[Tensor, "batch vocab"]:
    """Geometric mixture `out[b] = sum of weights[r] * logits[r] over the rows r with owners[r] == b`.

    A token that an own row rules out (logit −inf) stays ruled out, and so does one that a further row of positive
    weight rules out. One that a further row of negative weight rules out counts there as in the own row, so that it is
    not contrasted. Further rows of weight 0 do not count. There is thus no inf − inf, and no NaN.

    All of it follows from the form that is computed, `W own + Σ_r weights[r] (logits[r] − own)` with W the sum of b's
    weights: what is not contrasted has difference 0. It also rounds less than the sum where streams are alike. With all
    weight on the own row the result is that row bit for bit, with all of it on another row up to rounding.

    Bytes moved: each logit is read once, the own ones twice with a filter, and 4 bytes are written for each result; 12
    for a result of two float32 streams. That holds for blocks on a CPU. torch.compile makes three passes around the
    scatter to the own rows, 32 bytes; on a GPU without it every operation is a pass, 64 bytes.

    Args:
        floors: plausibility filter of contrastive decoding (Li et al. 2023): a token stays if
            `log p_own(token) >= floor + max log p_own`, with floor = log α, and is −inf otherwise. A floor of −inf
            filters nothing.
    """
    dtype = _working_dtype(logits)
    weights, further = weights.to(dtype), owners[batch:]
    scale = weights[batch:, None]
    total = weights[:batch].index_add(0, further, weights[batch:])[:, None]
    cutoffs = _cutoffs(logits[:batch], floors)
    out = logits.new_empty(batch, logits.shape[1], dtype=dtype)
    for part in _parts(logits):
        own = logits[:batch, part].to(dtype)
        differences = logits[batch:, part].to(dtype) - own.index_select(0, further)
        terms = _where_finite(differences.mul_(scale), otherwise=0.0)
        _finish((own * total).index_add_(0, further, terms), own, cutoffs, out[:, part])
    return out


def naive_geometric(
    logits: Float[Tensor, "row vocab"],
    weights: Float[Tensor, " row"],
    owners: Int[Tensor, " row"],
    batch: int,
    floors: Float[Tensor, " batch"] | None = None,
) -> Float[Tensor, "batch vocab"]:
    """Reference of `geometric` in float64: one batch row, one token and one stream at a time."""
    logits, weights = logits.double(), weights.double()
    out = torch.zeros(batch, logits.shape[1], dtype=torch.float64)
    minus_inf = float("-inf")
    for owner in range(batch):
        rows = [row for row in range(len(logits)) if owners[row] == owner]
        for token in range(logits.shape[1]):
            own = logits[owner, token].item()
            others = [(weights[row].item(), logits[row, token].item()) for row in rows if row != owner]
            if own == minus_inf or any(weight > 0 and logit == minus_inf for weight, logit in others):
                out[owner, token] = minus_inf
                continue
            out[owner, token] = weights[owner] * own
            for weight, logit in others:
                out[owner, token] += weight * (own if logit == minus_inf else logit)
    return _naive_filter(out, logits, floors)


def arithmetic(
    logits: Float[Tensor, "row vocab"],
    weights: Float[Tensor, " row"],
    owners: Int[Tensor, " row"],
    batch: int,
    powers: Float[Tensor, " batch"],
    scales: Float[Tensor, " batch"],
    floors: Float[Tensor, " batch"] | None = None,
) -> Float[Tensor, "batch vocab"]:
    """Power mean `out[b] = scales[b] · log Σ_r weights[r] · p_r ** powers[b]` of p_r = softmax(logits[r]).

    | power | scale | |
    |---|---|---|
    | 1 | 1 | arithmetic mixture, as in kNN-LM (Khandelwal et al. 2020) |
    | −1 | −1 | MOD's forward KL, `−logsumexp_r(−log p_r + log w_r)` (Shi et al. 2024) |
    | −α | −1 | MOD's α-divergence as its code has it; the power mean proper has scale −1/α |

    Weights are not negative and powers not 0. A positive power rules a token out (−inf) if every stream of positive
    weight does, a negative one if any does. Rows of weight 0 do not count. There is no NaN.

    Bytes moved: each logit is read twice, for its row's normalizer and for the mixture, and 4 bytes are written for
    each result; 20 for a result of two float32 streams. On a CPU the two exponentials of each logit and the logarithm
    of each result take longer. On a GPU without torch.compile every operation is a pass, about 230 bytes.

    Args:
        floors: as in `geometric`; the own row is the one that filters.
    """
    dtype, further = _working_dtype(logits), owners[batch:]
    weights, powers, scales = weights.to(dtype), powers.to(dtype), scales.to(dtype)
    # A term is 2 ** (slope · logit + offset): powers of 2 take a CPU a quarter of the time of powers of e.
    # The power of a row of weight 0 must not be negative, as its ∞ would meet the −∞ of log 0.
    slopes = (torch.where(weights > 0, powers[owners], 1.0) / math.log(2))[:, None]
    offsets = weights.log2()[:, None] - slopes * _normalizers(logits)[:, None]
    cutoffs = _cutoffs(logits[:batch], floors)
    out = logits.new_empty(batch, logits.shape[1], dtype=dtype)
    for part in _parts(logits):
        terms = (logits[:, part].to(dtype) * slopes).add_(offsets)
        highest = _highest(terms, further, batch)
        terms.sub_(highest.index_select(0, owners)).exp2_()
        total = terms[:batch].index_add_(0, further, terms[batch:])
        # The highest term is 1 now, or there is a NaN: no term is left, or one is infinite, and the token is ruled out.
        total.sub_(1.0).log1p_().add_(highest, alpha=math.log(2)).mul_(scales[:, None])
        _finish(total, logits[:batch, part], cutoffs, out[:, part])
    return out


def naive_arithmetic(
    logits: Float[Tensor, "row vocab"],
    weights: Float[Tensor, " row"],
    owners: Int[Tensor, " row"],
    batch: int,
    powers: Float[Tensor, " batch"],
    scales: Float[Tensor, " batch"],
    floors: Float[Tensor, " batch"] | None = None,
) -> Float[Tensor, "batch vocab"]:
    """Reference of `arithmetic` in float64: one batch row, one token and one stream at a time."""
    logits = logits.double()
    # A row that rules out all tokens gives none of them any probability.
    probabilities = logits.log_softmax(-1).nan_to_num(nan=float("-inf"), neginf=float("-inf"))
    out = torch.full((batch, logits.shape[1]), float("-inf"), dtype=torch.float64)
    for owner in range(batch):
        rows = [row for row in range(len(logits)) if owners[row] == owner and weights[row] > 0]
        power, scale = float(powers[owner]), float(scales[owner])
        for token in range(logits.shape[1]):
            terms = [math.log(weights[row]) + power * probabilities[row, token].item() for row in rows]
            highest = max(terms, default=float("-inf"))
            if math.isfinite(highest):
                out[owner, token] = scale * (highest + math.log(sum(math.exp(term - highest) for term in terms)))
    return _naive_filter(out, logits, floors)


def keep_nucleus(logits: Float[Tensor, "row vocab"], shares: Float[Tensor, " row"]) -> Float[Tensor, "row vocab"]:
    """Leaves in each row the fewest tokens that together have the row's share of the probability; others become −inf.

    As in top-p sampling (Holtzman et al. 2020); DExperts (Liu et al. 2021) filters its base so before it mixes. Tokens
    that tie with the least probable one of the set, in float32, all stay, so that no order among equals matters. A
    share of 1 leaves the row as it is, and at least one token always stays. The result has the dtype of the logits.

    The lowest probability of the set is searched bit by bit, most significant first, which is exact: floats from 0 to 1
    are ordered like the integers of their bits, the highest two of which are 0. 30 sums take a CPU an eighth of the
    time of one sort.
    """
    probabilities, shares = logits.softmax(-1, dtype=torch.float32), shares[:, None]
    lowest = torch.zeros_like(shares, dtype=torch.int32)
    inside = torch.empty_like(probabilities)
    for bit in reversed(range(30)):
        higher = lowest + (1 << bit)
        # As 0 and 1: a comparison into floats is vectorized on a CPU, one into bools is not.
        torch.ge(probabilities, higher.view(torch.float32), out=inside)
        lowest = torch.where(inside.mul_(probabilities).sum(-1, keepdim=True) >= shares, higher, lowest)
    cutoffs = torch.minimum(lowest.view(torch.float32), probabilities.amax(-1, keepdim=True))
    return logits.masked_fill((probabilities < cutoffs) & (shares < 1), float("-inf"))


def naive_keep_nucleus(logits: Float[Tensor, "row vocab"], shares: Float[Tensor, " row"]) -> Float[Tensor, "row vocab"]:
    """Reference of `keep_nucleus` with sums in float64: one row and one token at a time."""
    out = torch.full_like(logits, float("-inf"))
    for row in range(len(logits)):
        probabilities, total, lowest = logits[row].double().softmax(-1).tolist(), 0.0, float("-inf")
        for token in sorted(range(len(probabilities)), key=lambda token: -logits[row, token].item()):
            total += probabilities[token]
            if total >= shares[row]:
                lowest = logits[row, token].item()
                break
        for token in range(logits.shape[1]):
            if shares[row] >= 1 or logits[row, token].item() >= lowest:
                out[row, token] = logits[row, token]
    return out


def _working_dtype(logits: Tensor) -> torch.dtype:
    """At least float32: a mixture in half precision would round each term."""
    return torch.promote_types(logits.dtype, torch.float32)


def _parts(logits: Tensor) -> list[slice]:
    """The vocabulary in blocks whose intermediate results a CPU keeps in its caches.

    In one piece where that would cost launches (a GPU) or is the compiler's own work.
    """
    rows, vocab = logits.shape
    if logits.device.type != "cpu" or torch.compiler.is_compiling():
        return [slice(None)]
    step = max(1, BLOCK // rows)
    return [slice(start, start + step) for start in range(0, vocab, step)]


def _normalizers(logits: Float[Tensor, "row vocab"]) -> Float[Tensor, " row"]:
    """`log Σ exp(logits)` of each row; 0 for one that rules out every token, whose terms are infinite anyway."""
    dtype, sums = _working_dtype(logits), []
    for part in _parts(logits):
        block = logits[:, part].to(dtype)
        # Of nothing but −inf the highest must be finite: there is no −inf − −inf then.
        highest = block.amax(1, keepdim=True).clamp(min=torch.finfo(dtype).min)
        powers = (block - highest).mul_(1 / math.log(2)).exp2_()
        sums.append(powers.sum(1).log() + highest[:, 0])
    whole = torch.stack(sums).logsumexp(0)
    return torch.where(whole > float("-inf"), whole, 0.0)


def _highest(
    terms: Float[Tensor, "row part"], further: Int[Tensor, " stream"], batch: int
) -> Float[Tensor, "own part"]:
    """The highest term of each own row's streams, token by token."""
    if batch == 1:  # Inductor has no fast scatter to a single row on a CPU.
        return terms.amax(0, keepdim=True)
    index = further[:, None].expand(-1, terms.shape[1])
    return terms[:batch].scatter_reduce(0, index, terms[batch:], "amax")


def _cutoffs(own: Float[Tensor, "own vocab"], floors: Float[Tensor, " own"] | None) -> Float[Tensor, "own 1"] | None:
    """The lowest logit that is still plausible in each own row; the normalizer is on both sides and cancels."""
    return None if floors is None else (floors + own.amax(1).to(_working_dtype(own)))[:, None]


def _finish(mixed: Tensor, own: Tensor, cutoffs: Tensor | None, out: Tensor) -> None:
    """Writes the mixture of a block; a token that is ruled out, or not plausible, gets −inf."""
    if cutoffs is not None:
        # By 1 or by 0: no division by 0 is finite. Comparisons into bools and masks are slow on a CPU, this is not.
        mixed.div_(own.to(mixed.dtype, copy=True).ge_(cutoffs))
    _where_finite(mixed, otherwise=float("-inf"), out=out)


def _where_finite(values: Tensor, otherwise: float, out: Tensor | None = None) -> Tensor:
    """Puts `otherwise` for NaN and ∞, not for −∞; in place if `out` is not given.

    Eager, `nan_to_num` is a fast pass of its own; Inductor's tests each element for NaN one by one on a CPU.
    """
    out = values if out is None else out
    if torch.compiler.is_compiling():
        return out.copy_(torch.where(values < float("inf"), values, otherwise))
    return torch.nan_to_num(values, otherwise, otherwise, float("-inf"), out=out)


def _naive_filter(out: Tensor, logits: Tensor, floors: Tensor | None) -> Tensor:
    """Reference of the plausibility filter: one row and one token at a time."""
    if floors is None:
        return out
    for owner in range(len(out)):
        lowest = float(floors[owner]) + logits[owner].max().item()
        for token in range(out.shape[1]):
            if logits[owner, token].item() < lowest:
                out[owner, token] = float("-inf")
    return out
