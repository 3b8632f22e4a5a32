"""MOD: a weighted mean of several policies, for a divergence that says which mean.

Shi, Chen, Hu, Liu, Hajishirzi, Smith and Du, "Decoding-Time Language Model Alignment with Multiple Objectives", NeurIPS
2024, arXiv 2406.18853, Table 1, with Σ_i w_i = 1:

    reverse KL     π ∝ Π_i π_i ^ w_i                            geometric mean
    forward KL     π ∝ ( Σ_i w_i / π_i ) ^ −1                   harmonic mean
    α-divergence   π ∝ ( Σ_i w_i · π_i ^ −α ) ^ (−1/α)          power mean; α = 1 is forward KL, α → 0 reverse KL

The authors' code leaves the 1/α out: log π = −log Σ_i w_i · π_i ^ −α. That is the power mean at temperature 1/α, the
same for greedy decoding and not for sampling; `tempered=True` is this form.

The policies are the steered model, or others, with the contexts or system messages that belong to the objectives. One
that has all the weight is the mixture. Under the reverse KL it is CoSMany with these weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

from steer.errors import SteerError
from steer.history import History
from steer.inject import Mixture, Stream
from steer.inject.streams import Touched
from steer.methods.contrast import (
    Contrast,
    context_of,
    from_records,
    newest_records,
    require_list,
    require_not_negative,
    require_number,
    require_text,
)
from steer.state import UserState

if TYPE_CHECKING:
    from steer.model import FrozenLM

Divergence = Literal["reverse-kl", "forward-kl", "alpha"]


@dataclass
class MOD(Contrast):
    """Mixes policies, each of which is good for one objective.

    Args:
        weights: w_i, none of them negative, with the sum 1; all the same if None.
        divergence: "reverse-kl", "forward-kl", or "alpha" for the α-divergence.
        alpha: α, above 0 and up to 1; for the α-divergence only.
        tempered: whether the α-divergence is taken as in the authors' code, without 1/α.
        records: how many of a user's newest records become contexts in `fit`, one policy each, where there are no
            weights; otherwise as many as there are weights.
        steered: as for `Contrast`.

    Raises:
        SteerError: the weights are not such, the divergence is unknown, or α is out of range.
    """

    name: ClassVar[str] = "mod"

    weights: Sequence[float] | None = None
    divergence: Divergence = "reverse-kl"
    alpha: float = 0.5
    tempered: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.divergence not in get_args(Divergence):
            raise SteerError(f"divergence={self.divergence!r} is not one of {', '.join(get_args(Divergence))}")
        self.alpha = require_number("alpha", self.alpha)
        if not 0 < self.alpha <= 1:
            raise SteerError(f"alpha={self.alpha} is not above 0 and up to 1")
        self.tempered = bool(self.tempered)
        if self.weights is not None:
            self.weights = [require_not_negative("weight", w) for w in require_list("weights", self.weights)]
            if not math.isclose(sum(self.weights), 1.0, abs_tol=1e-6):
                raise SteerError(f"the weights of MOD must add up to 1, and {self.weights} do not")

    def state(
        self,
        contexts: Sequence[str | None] | None = None,
        *,
        systems: Sequence[str | None] | None = None,
        models: Sequence[str | None] | None = None,
    ) -> UserState:
        """The state of a user, by what makes each policy; None is for what a policy has not.

        Args:
            contexts: what stands in front of the prompt.
            systems: what the system message says.
            models: names of other models, among `models` of `FrozenLM.steered`; None for the steered one.

        Raises:
            SteerError: there are no policies, not as many of one kind as of another or as weights, or a text is empty.
        """
        said = {"contexts": contexts, "systems": systems, "models": models}
        parts = {what: require_list(what, values) for what, values in said.items() if values is not None}
        counts = {len(values) for values in parts.values()}
        counts |= set() if self.weights is None else {len(self.weights)}
        if len(counts) != 1 or not parts:
            found = ", ".join(f"{len(values)} {what}" for what, values in parts.items()) or "no policies"
            counted = "no" if self.weights is None else len(self.weights)
            raise SteerError(f"{found}, and {counted} weights; give as many of each as there are policies")
        for what, values in parts.items():
            for value in values:
                require_text("-" if value is None else value, what.removesuffix("s"))
        return self._made(parts)

    def fit(self, lm: FrozenLM, history: History) -> UserState:
        """Each of the user's newest records is the context of a policy."""
        newest = newest_records(history, self.records if self.weights is None else len(self.weights))
        return from_records(self.state([context_of([record]) for record in newest]), newest)

    @staticmethod
    def mixture(
        weights: Sequence[float] | None,
        divergence: Divergence,
        alpha: float,
        tempered: bool,
        contexts: Sequence[str | None] | None = None,
        systems: Sequence[str | None] | None = None,
        models: Sequence[str | None] | None = None,
        steered: Touched = "all",
    ) -> Mixture:
        """The paper's Table 1."""
        count = next(len(values) for values in (contexts, systems, models) if values is not None)
        nothing = [None] * count
        parts = zip(
            weights or [1 / count] * count, contexts or nothing, systems or nothing, models or nothing, strict=True
        )
        policies = [Stream(weight, context, system, model) for weight, context, system, model in parts]
        # A row reads the prompt in the steered model, also where no policy does.
        own = next((policy for policy in policies if policy.model is None), Stream(0.0))
        streams = own, *(policy for policy in policies if policy is not own)
        if divergence == "reverse-kl":
            return Mixture(streams, steered=steered)
        power = -1.0 if divergence == "forward-kl" else -alpha
        scale = -1.0 if divergence == "alpha" and tempered else None
        return Mixture(streams, power=power, scale=scale, steered=steered)
