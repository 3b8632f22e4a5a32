"""Stream edits: a row's next token is chosen from a mixture of the logits of several streams.

A stream is the row's prompt with another context, or under another model. Two rules unite the family (METHODS §0):

    geometric    Σ_i w_i · logits_i                     CoS, guidance, contrastive decoding, proxy tuning, Amulet, …
    arithmetic   scale · log Σ_i w_i · p_i ^ power      the other divergences of MOD

A scale of 1 / power makes the latter a mean of the streams.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Literal, get_args

import torch

from steer.errors import SteerError
from steer.kernels import arithmetic, geometric, keep_nucleus

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

Touched = Literal["all", "own", "further"]

# Of weights and scales. Beyond that, float32 would keep nothing of the other logits.
LARGEST = 1e6


@dataclass(frozen=True)
class Stream:
    """Next-token logits that take part in a mixture.

    Attributes:
        weight: their coefficient, below a million in size.
        context: what stands in front of the prompt, joined by one space; None for the prompt alone.
        system: what the system message says; None for none, or the template's own.
        model: the name of another model, one of `models` of `FrozenLM.steered`; None for the steered model.
    """

    weight: float
    context: str | None = None
    system: str | None = None
    model: str | None = None

    def __post_init__(self) -> None:
        number = isinstance(self.weight, Real) and not isinstance(self.weight, bool)
        if not (number and abs(self.weight) < LARGEST):
            raise SteerError(
                f"the weight of a stream must be finite and below {LARGEST:g} in size, got {self.weight!r}"
            )
        for name in ("context", "system", "model"):
            text = getattr(self, name)
            if text is not None and not isinstance(text, str):
                raise SteerError(f"the {name} of a stream must be text, got {text!r}")
            if text is not None and not text.strip():
                raise SteerError(f"a {name} is empty; use None for a stream without one")


@dataclass(frozen=True)
class Mixture:
    """How the logits of a row's streams become one. The first stream is the row itself.

    A token that the row itself rules out (logit −inf) stays ruled out under the geometric rule, see `geometric`.

    Attributes:
        streams: the first one belongs to the steered model.
        power: of the probabilities under the arithmetic rule; 0 for the geometric rule.
        scale: of the logarithm under the arithmetic rule, with the power's sign; 1 / power, for a proper mean, if None.
        floor: tokens that are less likely in the row itself than this share of its likeliest token are ruled out.
        nucleus: the row itself keeps the smallest set of tokens with at least this probability.
        steered: which streams of the steered model carry the row's other edits: "all" of them, the row's "own", or the
            "further" ones.
    """

    streams: tuple[Stream, ...]
    power: float = 0.0
    scale: float | None = None
    floor: float = 0.0
    nucleus: float = 1.0
    steered: Touched = "all"

    def __post_init__(self) -> None:
        if not self.streams:
            raise SteerError("a mixture needs a stream")
        if self.streams[0].model is not None:
            raise SteerError("the first stream of a mixture is the row itself, so it cannot be another model's")
        if not math.isfinite(self.power):
            raise SteerError(f"power must be finite, got {self.power}")
        if self.power:
            self._require_mean()
        elif self.scale is not None:
            raise SteerError(f"scale={self.scale} belongs to the arithmetic rule; give a power other than 0 with it")
        if not 0 <= self.floor <= 1:
            raise SteerError(f"floor={self.floor} is not a share, from 0 to 1")
        if not 0 < self.nucleus <= 1:
            raise SteerError(f"nucleus={self.nucleus} is not a probability, above 0 and up to 1")
        if self.steered not in get_args(Touched):
            raise SteerError(f"steered={self.steered!r} is not one of {', '.join(get_args(Touched))}")

    def _require_mean(self) -> None:
        """Raises SteerError unless the arithmetic rule prefers what the streams do."""
        weights = [stream.weight for stream in self.streams]
        if min(weights) < 0 or not max(weights) > 0:
            raise SteerError(f"arithmetic weights must not be negative, and one must be above 0; got {weights}")
        scale = self.log_scale
        if not abs(scale) < LARGEST:
            raise SteerError(f"scale={scale:g} must be below {LARGEST:g} in size; near a power of 0, take power=0")
        if not scale * self.power > 0:
            raise SteerError(
                f"scale={scale:g} must have the sign of power={self.power:g}, or likely tokens would become unlikely; "
                "leave it out for 1 / power"
            )

    @property
    def log_scale(self) -> float:
        """The scale that counts; 1 under the geometric rule."""
        if not self.power:
            return 1.0
        return 1 / self.power if self.scale is None else self.scale

    @classmethod
    def contrast(
        cls, context: str | None, lam: float, *, against: str | None = None, steered: Touched = "all"
    ) -> Mixture:
        """`(1 + λ) · logits(context) − λ · logits(against)`: CoS, Eq. 3; the prompt alone where `against` is None."""
        if not math.isfinite(lam):
            raise SteerError(f"λ must be finite, got {lam}")
        return cls((Stream(1 + lam, context), Stream(-lam, against)), steered=steered)

    @property
    def contrasts_edits(self) -> bool:
        """Whether its streams differ in nothing but the row's other edits."""
        read = {(stream.context, stream.system, stream.model) for stream in self.streams}
        return self.steered != "all" and len(self.streams) > 1 and len(read) == 1

    @property
    def rules_out(self) -> bool:
        """Whether it leaves the unlikely tokens of the row itself no probability."""
        return self.floor > 0 or self.nucleus < 1

    def touches(self, stream: int) -> bool:
        """Whether a stream of the steered model carries the row's other edits."""
        return self.steered == "all" or (stream == 0) == (self.steered == "own")


@dataclass(frozen=True)
class StreamEdit:
    """Chooses row b's tokens from `mixtures[b]`; None is a row that is not mixed."""

    mixtures: Sequence[Mixture | None]

    @classmethod
    def contrast(
        cls,
        contexts: Sequence[str | None],
        lam: float | Sequence[float] | Float[Tensor, " batch"],
        *,
        against: str | None = None,
        steered: Touched = "all",
    ) -> StreamEdit:
        """Contrasts row b with and without `contexts[b]`: CoS of strength λ_b (see `Mixture.contrast`).

        λ = −1 is the prompt alone, 0 the context as plain text, more amplifies it; one number, or one a row. Rows of
        None are not contrasted.
        """
        values = torch.as_tensor(lam, dtype=torch.float64)
        if values.ndim == 0:
            values = values.expand(len(contexts))
        if values.shape != (len(contexts),):
            raise SteerError(f"{len(contexts)} contexts and {values.numel()} λ; give one for each, or one for all")

        def mixture(context: str | None, own: float) -> Mixture | None:
            return None if context is None else Mixture.contrast(context, own, against=against, steered=steered)

        return cls(list(map(mixture, contexts, values.tolist())))

    @property
    def models(self) -> set[str]:
        """Names of the other models that take part."""
        streams = (stream for mixture in self.mixtures if mixture is not None for stream in mixture.streams)
        return {stream.model for stream in streams if stream.model is not None}

    @staticmethod
    def merge(edits: Sequence[StreamEdit]) -> StreamEdit:
        """One edit out of several that mix different rows.

        Raises:
            SteerError: two of them mix the same row.
        """
        rows = [[m for m in own if m is not None] for own in zip(*(edit.mixtures for edit in edits), strict=True)]
        if crowded := [row for row, own in enumerate(rows) if len(own) > 1]:
            raise SteerError(f"two states contrast streams in row {crowded[0]}; choose one of them with `names`")
        return StreamEdit([own[0] if own else None for own in rows])


@dataclass(frozen=True)
class Mix:
    """The mixtures of a batch at work: from the logits of all streams, the batch's own first, to those of the batch.

    Attributes:
        weights, owners: of each stream, its coefficient and the row that it belongs to.
        batch: number of rows.
        powers, scales: of rows under the arithmetic rule; None if there are none. A power of 0 is the geometric rule.
        only_arithmetic: whether all rows are under it.
        floors: the logarithm of what `Mixture.floor` says; None where no row has one.
        nuclei: what `Mixture.nucleus` says; None where no row has one.
    """

    weights: Float[Tensor, " stream"]
    owners: Int[Tensor, " stream"]
    batch: int
    powers: Float[Tensor, " batch"] | None
    scales: Float[Tensor, " batch"] | None
    only_arithmetic: bool
    floors: Float[Tensor, " batch"] | None
    nuclei: Float[Tensor, " batch"] | None

    @classmethod
    def of(
        cls,
        mixtures: Sequence[Mixture | None],
        weights: Sequence[float],
        owners: Int[Tensor, " stream"],
        dtype: torch.dtype = torch.float32,
    ) -> Mix:
        """Puts the rows' mixtures into tensors of this dtype on the device of `owners`."""
        rows = [mixture or Mixture((Stream(1.0),)) for mixture in mixtures]

        def tensor(values: Sequence[float], neutral: float) -> Tensor | None:
            return None if set(values) == {neutral} else torch.tensor(values, dtype=dtype, device=owners.device)

        powers = tensor([row.power for row in rows], 0.0)
        scales = torch.tensor([row.log_scale for row in rows], dtype=dtype, device=owners.device)
        return cls(
            weights=torch.tensor(weights, dtype=dtype, device=owners.device),
            owners=owners,
            batch=len(rows),
            powers=powers,
            scales=None if powers is None else scales,
            only_arithmetic=all(row.power for row in rows),
            floors=tensor([math.log(row.floor) if row.floor else -math.inf for row in rows], -math.inf),
            nuclei=tensor([row.nucleus for row in rows], 1.0),
        )

    def __call__(self, logits: Float[Tensor, "stream vocab"]) -> Float[Tensor, "batch vocab"]:
        """Mixes raw logits, in float32 at least."""
        mixed = self._mixed(logits)
        if self.nuclei is None:
            return mixed
        return mixed.masked_fill_(keep_nucleus(logits[: self.batch], self.nuclei).isneginf(), -math.inf)

    def _mixed(self, logits: Float[Tensor, "stream vocab"]) -> Float[Tensor, "batch vocab"]:
        if self.powers is None or self.scales is None:
            return geometric(logits, self.weights, self.owners, self.batch, self.floors)
        # A weight below 0 belongs to a row under the other rule.
        powers, weights = self.powers.where(self.powers != 0, 1.0), self.weights.clamp(min=0)
        mean = arithmetic(logits, weights, self.owners, self.batch, powers, self.scales, self.floors)
        if self.only_arithmetic:
            return mean
        mixed = geometric(logits, self.weights, self.owners, self.batch, self.floors)
        return torch.where((self.powers != 0)[:, None], mean, mixed)
