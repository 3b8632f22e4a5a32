"""CoSteer: a small model that knows the user's context steers a large one that does not, in closed form.

Lv et al., "CoSteer: Collaborative Decoding-Time Personalization via Local Delta Steering", arXiv 2507.04756. From
p_0 = log π_LLM(x | q), with Δ = log π_SLM(x | q, C) − log π_SLM(x | q), for t = 1 … T:

    S_t = S_{t−1} + α · (p_{t−1} − p_0) + β · Δ         p_t = ( tλ·p_0 + S_t + p_{t−1}/η ) / ( tλ + 1/η ),  normalized

All terms lie on a line, so that p_T = p_0 + b_T · Δ up to a constant, with

    b_t = ( Σ_{s≤t} (α · b_{s−1} + β) + b_{t−1}/η ) / ( tλ + 1/η ),   b_0 = 0

which is 1.7833 at the defaults, and linear in β. The paper's λ is called `anchor` here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from steer.errors import SteerError
from steer.inject import Mixture, Stream
from steer.inject.streams import LARGEST, Touched
from steer.methods.contrast import Contrast, require_not_negative, require_positive, require_text, require_whole
from steer.state import UserState

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass
class CoSteer(Contrast):
    """Adds what a context changes in a small model to the logits of the steered model, which does not read it.

    Args:
        model: the name of the small model, one of `models` of `FrozenLM.steered`.
        steps: T; 0 is the steered model as it is.
        alpha: α, how much of what was gained is added again.
        beta: β, the weight of Δ; 0 is the steered model as it is.
        anchor: λ of the paper, the weight of p_0.
        eta: η, the rate; the larger, the less each step keeps of the one before.
        records, steered: as for `Contrast`.

    Raises:
        SteerError: one of them is negative, `steps` is not whole, `anchor` or `eta` is 0, or the coefficient
            is out of all bounds.
    """

    name: ClassVar[str] = "costeer"

    model: str
    steps: int = 20
    alpha: float = 2.0
    beta: float = 1.0
    anchor: float = 2.0
    eta: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.steps = require_whole("steps", self.steps)
        require_not_negative("steps", self.steps)
        self.alpha = require_not_negative("alpha", self.alpha)
        self.beta = require_not_negative("beta", self.beta)
        self.anchor = require_positive("anchor", self.anchor)
        self.eta = require_positive("eta", self.eta)
        coefficient(self.steps, self.alpha, self.beta, self.anchor, self.eta)

    @property
    def coefficient(self) -> float:
        """b_T, of Δ."""
        return coefficient(self.steps, self.alpha, self.beta, self.anchor, self.eta)

    def state(self, context: str) -> UserState:
        """The state of a user about whom `context` is known, for the small model to read.

        Raises:
            SteerError: the context is empty.
        """
        return self._made({"context": require_text(context)})

    @staticmethod
    def mixture(
        context: str,
        model: str,
        steps: int,
        alpha: float,
        beta: float,
        anchor: float,
        eta: float,
        steered: Touched = "all",
    ) -> Mixture:
        """The closed form; the row itself is the prompt without the context."""
        weight = coefficient(steps, alpha, beta, anchor, eta)
        streams = Stream(1.0), Stream(weight, context, model=model), Stream(-weight, model=model)
        return Mixture(streams, steered=steered)


def coefficient(steps: int, alpha: float, beta: float, anchor: float, eta: float) -> float:
    """b_T.

    Raises:
        SteerError: it grows beyond all bounds.
    """
    b = total = 0.0
    for t in range(1, steps + 1):
        total += alpha * b + beta
        b = (total + b / eta) / (t * anchor + 1 / eta)
    if not abs(b) < LARGEST:
        raise SteerError(f"after {steps} steps the coefficient is {b:.3g}; take fewer steps, or a larger anchor")
    return b


def naive_policy(
    base: Float[Tensor, "... vocab"],
    informed: Float[Tensor, "... vocab"],
    plain: Float[Tensor, "... vocab"],
    steps: int,
    alpha: float,
    beta: float,
    anchor: float,
    eta: float,
) -> Float[Tensor, "... vocab"]:
    """The paper's iteration: p_T from the logits of the large model, and of the small one with and without context."""
    start, delta = base.log_softmax(-1), informed.log_softmax(-1) - plain.log_softmax(-1)
    policy, total = start, start * 0
    for t in range(1, steps + 1):
        total = total + alpha * (policy - start) + beta * delta
        policy = (t * anchor * start + total + policy / eta) / (t * anchor + 1 / eta)
        policy = policy.log_softmax(-1)
    return policy
