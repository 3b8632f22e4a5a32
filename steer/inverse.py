"""The inverse of CoS: at which strength of a context was a text written, and with which of several contexts?

He, Pandey, Schrum and Dragan, "CoS: Enhancing Personalization and Mitigating Bias with Context Steering", ICLR 2025,
arXiv 2405.01768, Eq. 4 and 5:

    P(λ | X, C, P) ∝ P(λ) · P_CoS,λ(X | C, P)            P(C | λ, X, P) ∝ P(C) · P_CoS,λ(X | C, P)

where P_CoS,λ(X | C, P) is the product of the text's token probabilities, each normalized. λ is that of Eq. 3: −1 is no
context, 0 the context as plain text, more amplifies it.

For one text the model runs once, for any number of λ. With F_t = lp(x_t | C, P) − lp(x_t | ∅, P), all given the tokens
before, the log-likelihood has the derivatives

    ℓ'(λ) = Σ_t ( F_t(x_t) − E_λ[F_t] )                  ℓ''(λ) = −Σ_t Var_λ[F_t]

so it is concave, and Newton's method finds its maximum. (Not in the paper, which has a grid.)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch

from steer.contrast import (
    Response,
    Text,
    chosen_of,
    finite,
    pairs,
    require_temperature,
    text_of,
    tilt_of,
)
from steer.errors import SteerError
from steer.kernels import tilted_log_probs, tilted_moments

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from steer.model import FrozenLM, Prompt

# Beyond |λ| = 4 texts fall apart, say the authors.
GRID = tuple(round(-4 + 0.2 * i, 1) for i in range(41))

_SHOWN = 4
_STEPS = 100
_TOLERANCE = 1e-6
# What rounding alone makes of F, in units of the dtype: at most so much per token (SmolLM2 in float32 and bfloat16).
_ROUNDING = 16


@dataclass(frozen=True, eq=False)
class LambdaPosterior:
    """At which λ texts were written. All tensors are in float64 and on the CPU; one row a text.

    Attributes:
        grid: of λ.
        log_likelihood: of each text at each λ of the grid, in nats, summed over its tokens.
        posterior: probability of each λ of the grid, the others being impossible.
        lam: the likeliest λ between the ends of the grid, not only on it: the maximum of the likelihood, and so of the
            posterior under a flat prior. NaN where the context changes nothing.
        low, high: the interval around it that holds the true λ in a share `level` of texts, where these are long: that
            in which the log-likelihood is less than z²/2 below its maximum, by its second-order expansion. Between the
            ends of the grid this is lam ± z/√information. Infinite on the side of an end that lam lies at, and on both
            where the context changes nothing.
        information: observed information at `lam`, the sum of Var_λ[F] over the tokens, in nats² per squared unit of λ.
        edge: −1 or 1 where the text gets ever likelier towards the lower or the upper end of the grid, else 0.
        tokens: how many each text has.
        level: of the interval.
        temperature: at which the texts were taken to be sampled.
    """

    grid: Float[Tensor, " lam"]
    log_likelihood: Float[Tensor, "text lam"]
    posterior: Float[Tensor, "text lam"]
    lam: Float[Tensor, " text"]
    low: Float[Tensor, " text"]
    high: Float[Tensor, " text"]
    information: Float[Tensor, " text"]
    edge: Int[Tensor, " text"]
    tokens: Int[Tensor, " text"]
    level: float
    temperature: float

    def __repr__(self) -> str:
        texts = zip(self.lam.tolist(), self.low.tolist(), self.high.tolist(), strict=True)
        shown = [f"{lam:+.2f} [{low:+.2f}, {high:+.2f}]" for lam, low, high in texts]
        few = [*shown[:_SHOWN], *(["…"] if len(shown) > _SHOWN else [])]
        return f"LambdaPosterior({len(shown)} texts, λ with its {self.level:.0%} interval: {', '.join(few)})"

    @property
    def informative(self) -> list[bool]:
        """Of each text, whether the context changes anything, so that λ can be told at all."""
        return (~self.lam.isnan()).tolist()

    @property
    def mean(self) -> Float[Tensor, " text"]:
        """Of λ over the posterior."""
        return self.posterior @ self.grid

    def to_json(self) -> dict[str, Any]:
        """As `steer infer-lambda --json` prints it; null for what is not finite."""
        names = ("lam", "low", "high", "information", "edge", "tokens", "log_likelihood", "posterior")
        rows = zip(*(getattr(self, name).tolist() for name in names), strict=True)
        texts = [{name: _plain(value) for name, value in zip(names, row, strict=True)} for row in rows]
        settings = {"level": self.level, "temperature": self.temperature}
        return {"grid": self.grid.tolist(), **settings, "texts": texts}


@dataclass(frozen=True, eq=False)
class ContextPosterior:
    """With which of several contexts texts were written; one row a text, one column a context, float64, on the CPU.

    Attributes:
        labels: of the contexts.
        log_likelihood: of each text with each context, in nats, summed over its tokens.
        posterior: probability of each context, the others being impossible.
        tokens: how many each text has.
        lam: the λ that was taken for granted.
    """

    labels: tuple[str, ...]
    log_likelihood: Float[Tensor, "text context"]
    posterior: Float[Tensor, "text context"]
    tokens: Int[Tensor, " text"]
    lam: float

    @property
    def best(self) -> list[str]:
        """The label of each text's likeliest context: a classification of the texts."""
        return [self.labels[i] for i in self.posterior.argmax(1).tolist()]


def infer_lambda(
    lm: FrozenLM,
    prompts: Sequence[Prompt],
    responses: Sequence[Response],
    contexts: Sequence[str],
    *,
    opposites: Sequence[str | None] | None = None,
    grid: Sequence[float] = GRID,
    prior: Sequence[float] | None = None,
    level: float = 0.95,
    temperature: float = 1.0,
    chat: bool | None = None,
    batch_tokens: int = 2048,
    on_progress: Callable[[int], None] | None = None,
) -> LambdaPosterior:
    """How strongly a context acted when a text was written: the posterior of λ, and its maximum.

    The likelihood is that of sampling from all tokens at `temperature`. A text that was restricted to likely tokens, by
    greedy decoding or top-p, is no such sample, and its λ may come out as another than it was.

    Args:
        lm: the model; it must not be steered meanwhile.
        prompts: one a text, as for `FrozenLM.encode`.
        responses: the texts, or their token ids. No end-of-text token is appended to a text.
        contexts: one a text.
        opposites: contexts that `contexts` are compared with, in place of none (None: none): a pair isolates an
            attribute from its topic.
        grid: λ, in rising order. Its ends are also those between which the maximum is sought.
        prior: weight of each λ of the grid, in the posterior only; equal if None.
        level: of the interval.
        temperature: at which the texts were sampled.
        chat: as for `FrozenLM.encode`.
        batch_tokens: tokens, over all streams, that one forward pass may have.
        on_progress: told the number of texts done.

    Raises:
        SteerError: before anything is computed: nothing to infer from, texts and contexts of different number, an empty
            context or response, one longer than the model's window, or a grid, prior, level or temperature that is
            none.
    """
    _require_lists(prompts=prompts, responses=responses, contexts=contexts, opposites=opposites)
    lams = require_settings(grid, level, temperature)
    weights = _prior(prior, len(lams), "λ of the grid")
    negatives: Sequence[str | None] = [None] * len(prompts) if opposites is None else opposites
    texts = [
        text_of(lm, prompt, response, [context], opposite=negative, chat=chat)
        for prompt, response, context, negative in zip(prompts, responses, contexts, negatives, strict=True)
    ]
    found = torch.empty(len(texts), len(lams), dtype=torch.float64)
    lam, slope, information = torch.empty(3, len(texts), dtype=torch.float64)
    for i, _, with_context, without in pairs(lm, texts, batch_tokens=batch_tokens, on_progress=on_progress):
        scores, change = tilt_of(with_context, without, temperature)
        chosen = chosen_of(texts[i], scores)
        found[i] = tilted_log_probs(scores, change, chosen, lams).double().sum(1).cpu()
        derivatives, start = _derivatives(scores, change, chosen), lams[found[i].argmax()].item()
        lam[i], slope[i], information[i] = _maximum(derivatives, lams[0].item(), lams[-1].item(), start)
    return _posterior(lams, weights, found, lam, slope, information, texts, level, temperature, _noise(lm))


def require_settings(grid: Sequence[float], level: float, temperature: float) -> Float[Tensor, " lam"]:
    """The grid in float64. Raises SteerError if it, the level or the temperature is none."""
    lams = finite(grid)
    if len(lams) < 2 or not (lams.diff() > 0).all():
        raise SteerError(f"a grid is two or more λ in rising order, got {lams.tolist()}")
    require_temperature(temperature)
    if not (isinstance(level, Real) and 0 < level < 1):
        raise SteerError(f"level={level} is not between 0 and 1")
    return lams


def infer_context(
    lm: FrozenLM,
    prompts: Sequence[Prompt],
    responses: Sequence[Response],
    candidates: Mapping[str, str | None] | Sequence[str],
    *,
    lam: float = 0.0,
    opposite: str | None = None,
    prior: Sequence[float] | None = None,
    temperature: float = 1.0,
    chat: bool | None = None,
    batch_tokens: int = 2048,
    on_progress: Callable[[int], None] | None = None,
) -> ContextPosterior:
    """Which of several contexts a text was written with: a posterior over them at a given λ, and so a classification.

    Args:
        lm: the model; it must not be steered meanwhile.
        prompts: one a text, as for `FrozenLM.encode`.
        responses: the texts, or their token ids. No end-of-text token is appended to a text.
        candidates: contexts by their labels, the same for all texts, or a sequence of contexts that are labels too;
            None is no context.
        lam: λ that is taken for granted. 0 compares the texts' likelihoods with each context; the authors classify at
            −0.5, which weakens what the contexts do.
        opposite: a context that the candidates are contrasted with, in place of none.
        prior: weight of each candidate; equal if None.
        temperature: at which the texts were sampled.
        chat: as for `FrozenLM.encode`.
        batch_tokens: tokens, over all streams, that one forward pass may have. One text's candidates may take several.
        on_progress: told the number of texts done.

    Raises:
        SteerError: before anything is computed, as for `infer_lambda`; also for λ = −1, where no context counts.
    """
    _require_lists(prompts=prompts, responses=responses)
    named = candidates if isinstance(candidates, Mapping) else {context: context for context in candidates}
    if len(named) < 2 or len(named) < len(candidates):
        raise SteerError(f"there must be two or more contexts to choose from, all different; got {list(candidates)}")
    weights = _prior(prior, len(named), "context")
    lams = finite([lam])
    if lam == -1:
        raise SteerError("λ = −1 is the prompt without any context, which would tell none from another")
    require_temperature(temperature)
    texts = [
        text_of(lm, prompt, response, list(named.values()), opposite=opposite, chat=chat)
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    # At λ = 0 nothing is contrasted.
    streams = texts if lam else [replace(text, without=None) for text in texts]
    found = torch.empty(len(texts), len(named), dtype=torch.float64)
    for i, k, with_context, without in pairs(lm, streams, batch_tokens=batch_tokens, on_progress=on_progress):
        scores, change = tilt_of(with_context, without, temperature)
        found[i, k] = tilted_log_probs(scores, change, chosen_of(texts[i], scores), lams).double().sum().cpu()
    posterior = (found + weights.log()).softmax(1)
    return ContextPosterior(tuple(named), found, posterior, torch.tensor([len(t.response) for t in texts]), lam)


def _derivatives(
    scores: Float[Tensor, "token vocab"], change: Float[Tensor, "token vocab"], chosen: Int[Tensor, " token"]
) -> Callable[[float], tuple[float, float]]:
    """Of the log-likelihood at a λ: the first, and the second with its sign turned."""
    own = change.gather(1, chosen[:, None])[:, 0]

    def at(lam: float) -> tuple[float, float]:
        mean, variance = tilted_moments(scores, change, lam)
        return (own - mean).double().sum().item(), variance.double().sum().item()

    return at


def _maximum(
    derivatives: Callable[[float], tuple[float, float]], low: float, high: float, start: float
) -> tuple[float, float, float]:
    """Where a concave function is largest within [low, high], and its slope and minus its curvature there.

    Newton's method, kept between the points that are known to lie below and above the maximum.
    """
    lam, tried = start, set()
    for _ in range(_STEPS):
        tried.add(lam)
        slope, information = derivatives(lam)
        low, high = (lam if slope >= 0 else low), (lam if slope <= 0 else high)
        if low == high:
            break
        step = slope / information if information > 0 else math.copysign(math.inf, slope)
        new = min(max(lam + step, low), high)
        if new in tried:
            new = (low + high) / 2
        if abs(new - lam) <= _TOLERANCE:
            break
        lam = new
    return lam, slope, information


def _posterior(
    lams: Float[Tensor, " lam"],
    prior: Float[Tensor, " lam"],
    log_likelihood: Float[Tensor, "text lam"],
    lam: Float[Tensor, " text"],
    slope: Float[Tensor, " text"],
    information: Float[Tensor, " text"],
    texts: Sequence[Text],
    level: float,
    temperature: float,
    noise: float,
) -> LambdaPosterior:
    tokens = torch.tensor([len(text.response) for text in texts])
    # Where λ makes a text certain, the information vanishes as well: then the likelihoods of the grid tell it apart.
    alike = log_likelihood.amax(1) - log_likelihood.amin(1) <= tokens * (lams[-1] - lams[0]) * noise / temperature
    nothing = alike & (information <= tokens * (noise / temperature) ** 2)
    edge = (lam == lams[-1]).long() - (lam == lams[0]).long()
    # The slope that Newton's method ends with is 0 but for rounding, unless it is at an end.
    slope = torch.where(edge != 0, slope.abs(), 0.0)
    z = torch.special.ndtri(torch.tensor((1 + level) / 2, dtype=torch.float64))
    # Where slope · width + information · width² / 2 = z² / 2.
    width = z**2 / (slope + (slope**2 + information * z**2).sqrt())
    if nothing.any():
        which = nothing.nonzero()[:, 0].tolist()
        warnings.warn(
            f"the context changes nothing in {len(which)} of {len(texts)} texts (the first has index {which[0]}): "
            "there no λ can be told from another, but for rounding, and lam is NaN",
            stacklevel=3,
        )
    return LambdaPosterior(
        grid=lams,
        log_likelihood=log_likelihood,
        posterior=(log_likelihood + prior.log()).softmax(1),
        lam=lam.masked_fill(nothing, math.nan),
        low=(lam - width).masked_fill(nothing | (edge == -1), -math.inf),
        high=(lam + width).masked_fill(nothing | (edge == 1), math.inf),
        information=information,
        edge=edge.masked_fill(nothing, 0),
        tokens=tokens,
        level=level,
        temperature=temperature,
    )


def _noise(lm: FrozenLM) -> float:
    """Standard deviation of F, in nats, that rounding alone may make."""
    return _ROUNDING * torch.finfo(lm.dtype).eps


def _prior(weights: Sequence[float] | None, count: int, of: str) -> Float[Tensor, " value"]:
    """Probabilities. Raises SteerError if the weights are not one each, or no weights."""
    if weights is None:
        return torch.full((count,), 1 / count, dtype=torch.float64)
    try:
        prior = torch.as_tensor(weights, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise SteerError(f"a prior's weights are numbers, got {weights!r}") from None
    if prior.shape != (count,):
        raise SteerError(f"a prior has a weight for each {of}: {count}, not {prior.numel()}")
    if not torch.isfinite(prior).all() or (prior < 0).any() or prior.sum() == 0:
        raise SteerError(f"a prior's weights are finite, none is below 0 and one is above; got {prior.tolist()}")
    return prior / prior.sum()


def _require_lists(**lists: Sequence[Any] | None) -> None:
    """Raises SteerError unless all of them have an entry for each text."""
    for name, values in lists.items():
        if isinstance(values, str):
            raise SteerError(f"`{name}` holds one entry a text; write [{name.removesuffix('s')}]")
    counts = {name: len(values) for name, values in lists.items() if values is not None}
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise SteerError(f"{told}: there must be one of each for every text")
    if not min(counts.values()):
        raise SteerError("there is no text to infer anything from")


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
