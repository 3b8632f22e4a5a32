"""Amulet: at each token a short optimization that pulls the policy towards a preference, in closed form.

Zhang, Z. et al., "Amulet: ReAlignment During Test Time for Personalized Preference Adaptation of LLMs", ICLR 2025,
arXiv 2502.19148. From p_0 = log π(x | q, preference), with r = log π(x | q), for t = 1 … T:

    Q_t = α · ( p_{t−1} − r )       p_t = ( λ·p_0 + 1/t · Σ_{s≤t} Q_s + p_{t−1} / (ηt) ) / ( λ + 1 / (ηt) ), normalized

All terms lie on the line from r through p_0, so that p_T = p_0 + c_T · (p_0 − r) up to a constant: it is CoS, with

    c_t = ( 1/t · Σ_{s≤t} α · (1 + c_{s−1}) + c_{t−1} / (ηt) ) / ( λ + 1 / (ηt) ),   c_0 = 0

in the place of its λ: 4.6487 at the defaults, above the 4 that CoS' authors advise. (That is CoSteer's b_T at β = α.)
Amulet's own λ is another thing, and called `anchor` here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from steer.inject import Mixture
from steer.inject.streams import Touched
from steer.methods.contrast import Contrast, require_not_negative, require_positive, require_text, require_whole
from steer.methods.costeer import coefficient
from steer.state import UserState

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass
class Amulet(Contrast):
    """Amplifies what a stated preference changes.

    Args:
        steps: T; 0 is plain prompting with the preference.
        alpha: α, the weight of the preference; 0 is plain prompting with it as well.
        anchor: λ of the paper, the weight of p_0.
        eta: η, the rate; the larger, the less each step keeps of the one before.
        records, steered: as for `Contrast`.

    Raises:
        SteerError: one of them is negative, `steps` is not whole, `anchor` or `eta` is 0, or the coefficient
            is out of all bounds.
    """

    name: ClassVar[str] = "amulet"

    steps: int = 60
    alpha: float = 2.0
    anchor: float = 2.0
    eta: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.steps = require_whole("steps", self.steps)
        require_not_negative("steps", self.steps)
        self.alpha = require_not_negative("alpha", self.alpha)
        self.anchor = require_positive("anchor", self.anchor)
        self.eta = require_positive("eta", self.eta)
        coefficient(self.steps, self.alpha, self.alpha, self.anchor, self.eta)

    @property
    def lam(self) -> float:
        """The λ of CoS that comes out."""
        return coefficient(self.steps, self.alpha, self.alpha, self.anchor, self.eta)

    def state(self, context: str) -> UserState:
        """The state of a user with this preference, such as "Answer briefly."

        Raises:
            SteerError: the preference is empty.
        """
        return self._made({"context": require_text(context)})

    @staticmethod
    def mixture(context: str, steps: int, alpha: float, anchor: float, eta: float, steered: Touched = "all") -> Mixture:
        """The closed form."""
        lam = coefficient(steps, alpha, alpha, anchor, eta)
        return Mixture.contrast(context, lam, steered=steered)


def naive_policy(
    preferred: Float[Tensor, "... vocab"],
    plain: Float[Tensor, "... vocab"],
    steps: int,
    alpha: float,
    anchor: float,
    eta: float,
) -> Float[Tensor, "... vocab"]:
    """The paper's iteration: p_T from the logits with the preference and those without."""
    start, reference = preferred.log_softmax(-1), plain.log_softmax(-1)
    policy, total = start, start * 0
    for t in range(1, steps + 1):
        total = total + alpha * (policy - reference)
        policy = (anchor * start + total / t + policy / (eta * t)) / (anchor + 1 / (eta * t))
        policy = policy.log_softmax(-1)
    return policy
