"""DExperts: two small models, one of what is wanted and one of what is not, push a large one.

Liu, Sap, Lu, Swayamdipta, Bhagavatula, Smith and Choi, "DExperts: Decoding-Time Controlled Text Generation with Experts
and Anti-Experts", ACL 2021, arXiv 2105.03023, Eq. 1:

    P̃(x) = softmax( z(x) + α · ( z⁺(x) − z⁻(x) ) )

z are the logits of the base model, the steered one, among its nucleus: the smallest set of tokens with probability p
or more. z⁺ and z⁻ are those of expert and anti-expert. At α = 0 the base model is left, with its nucleus.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from steer.errors import SteerError
from steer.inject import Mixture, Stream
from steer.inject.streams import Touched
from steer.methods.contrast import ContrastOfModels, require_finite, require_number


@dataclass
class DExperts(ContrastOfModels):
    """Adds the difference between two other models.

    Args:
        expert, antiexpert: the names of the other models, among `models` of `FrozenLM.steered`.
        alpha: α; 0 is neutral. The paper steers towards a sentiment with 3.2, away from toxicity with 2.
        top_p: p, of the base model's nucleus, which is taken first; 1 for all tokens.
        records, steered: as for `Contrast`.

    Raises:
        SteerError: α is not finite, or p is not a probability.
    """

    name: ClassVar[str] = "dexperts"

    expert: str
    antiexpert: str
    alpha: float = 2.0
    top_p: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        self.alpha = require_finite("alpha", self.alpha)
        self.top_p = require_number("top_p", self.top_p)
        if not 0 < self.top_p <= 1:
            raise SteerError(f"top_p={self.top_p} is not a probability, above 0 and up to 1")

    @staticmethod
    def mixture(
        expert: str,
        antiexpert: str,
        alpha: float,
        top_p: float,
        context: str | None = None,
        steered: Touched = "all",
    ) -> Mixture:
        """Eq. 1."""
        streams = Stream(1.0, context), Stream(alpha, context, model=expert), Stream(-alpha, context, model=antiexpert)
        return Mixture(streams, nucleus=top_p, steered=steered)
