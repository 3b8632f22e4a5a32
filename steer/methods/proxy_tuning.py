"""Proxy tuning: what tuning did to a small model, done to a large one.

Liu, Han, Wang, Tsvetkov, Choi and Smith, "Tuning Language Models by Proxy", COLM 2024, arXiv 2401.08565:

    p(x) = softmax( z(x) + α · ( z_tuned(x) − z_untuned(x) ) )

z are the logits of the large model, the steered one. α = 1 is the paper's, 0 leaves the large model as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from steer.inject import Mixture, Stream
from steer.inject.streams import Touched
from steer.methods.contrast import ContrastOfModels, require_finite


@dataclass
class ProxyTuning(ContrastOfModels):
    """Adds the difference between a tuned small model and the same one before it was tuned.

    Args:
        expert, antiexpert: the names of the tuned and of the untuned model, among `models` of `FrozenLM.steered`. A
            model that was tuned on one user's texts is that user's expert.
        alpha: α; 0 is neutral.
        records, steered: as for `Contrast`.

    Raises:
        SteerError: α is not finite.
    """

    name: ClassVar[str] = "proxy_tuning"

    expert: str
    antiexpert: str
    alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.alpha = require_finite("alpha", self.alpha)

    @staticmethod
    def mixture(
        expert: str, antiexpert: str, alpha: float, context: str | None = None, steered: Touched = "all"
    ) -> Mixture:
        """The paper's equation."""
        streams = Stream(1.0, context), Stream(alpha, context, model=expert), Stream(-alpha, context, model=antiexpert)
        return Mixture(streams, steered=steered)
