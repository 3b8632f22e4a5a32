"""Contrastive decoding: what an expert finds likelier than an amateur, among what the expert finds plausible.

Li, Holtzman, Fried, Liang, Eisner, Hashimoto, Zettlemoyer and Lewis, "Contrastive Decoding: Open-ended Text Generation
as Optimization", ACL 2023, arXiv 2210.15097, Eq. 2 to 4:

    score(x) = log p_exp(x) − log p_ama(x; τ)      where  p_exp(x) ≥ α · max_w p_exp(w),      −∞ elsewhere

τ divides the amateur's logits before its softmax, so what is subtracted is 1/τ times its logits. The expert is the
steered model, the amateur a smaller one. The authors search with beams; here it is greedy, or sampling.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from steer.errors import SteerError
from steer.inject import Mixture, Stream
from steer.inject.streams import Touched
from steer.methods.contrast import ContrastOfModels, require_number, require_positive


@dataclass
class ContrastiveDecoding(ContrastOfModels):
    """Contrasts the steered model with a weaker one.

    Args:
        amateur: the name of the other model, one of `models` of `FrozenLM.steered`.
        alpha: α, above 0 and up to 1: tokens less likely than this share of the likeliest one are ruled out. At 1 there
            is nothing but the expert's own first choice.
        temperature: τ of the amateur. The paper has 0.5 for GPT-2 and 1 for OPT.
        records, steered: as for `Contrast`.

    Raises:
        SteerError: α is no such share, or τ is not above 0.
    """

    name: ClassVar[str] = "contrastive_decoding"

    amateur: str
    alpha: float = 0.1
    temperature: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.alpha = require_number("alpha", self.alpha)
        if not 0 < self.alpha <= 1:
            raise SteerError(f"alpha={self.alpha} is not a share, above 0 and up to 1")
        self.temperature = require_positive("temperature", self.temperature)

    @staticmethod
    def mixture(
        amateur: str, alpha: float, temperature: float, context: str | None = None, steered: Touched = "all"
    ) -> Mixture:
        """Eq. 4; a constant in the logits does not count."""
        streams = Stream(1.0, context), Stream(-1 / temperature, context, model=amateur)
        return Mixture(streams, floor=alpha, steered=steered)
