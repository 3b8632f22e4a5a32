"""Classifier-free guidance for language models.

Sanchez, Fan, Spangher, Levi, Ammanamanchi and Biderman, "Stay on topic with Classifier-Free Guidance", ICML 2024,
arXiv 2306.17806, Eq. 7:

    log P̂(x) = log P(x | neg, P) + γ · ( log P(x | c, P) − log P(x | neg, P) )

γ, here `scale`: 0 is the prompt with the negative condition or without any, 1 plain prompting with c, more amplifies c.
transformers' `guidance_scale` is the same γ; it is CoS with λ = γ − 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from steer.errors import SteerError
from steer.inject import Mixture, Stream
from steer.inject.streams import Touched
from steer.methods.contrast import Contrast, given, require_finite
from steer.state import UserState


@dataclass
class Guidance(Contrast):
    """Amplifies what a condition changes: a context, a system message, or the row's other edits.

    Args:
        scale: γ. 1 is plain prompting with the condition; the paper finds 1.25 to 1.5 best for prompts, and up to 5
            for system messages.
        records: as for `Contrast`.
        steered: as for `Contrast`; with "own" the row's other edits are a part of the condition.

    Raises:
        SteerError: γ is not finite.
    """

    name: ClassVar[str] = "guidance"

    scale: float = 1.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.scale = require_finite("scale", self.scale)

    def state(
        self,
        context: str | None = None,
        *,
        negative: str | None = None,
        system: str | None = None,
        negative_system: str | None = None,
    ) -> UserState:
        """The state of a user, by what is to be amplified, and against what.

        Args:
            context, system: what stands in front of the prompt, and what the system message says.
            negative, negative_system: the same in the other stream; None for nothing, or for the template's own.

        Raises:
            SteerError: a text is empty, or the two streams are the same.
        """
        texts = given(context=context, negative=negative, system=system, negative_system=negative_system)
        if (context, system) == (negative, negative_system) and self.steered == "all":
            raise SteerError("both streams read the same, so there is nothing to amplify; give a context or a system")
        return self._made(texts)

    @staticmethod
    def mixture(
        scale: float,
        context: str | None = None,
        negative: str | None = None,
        system: str | None = None,
        negative_system: str | None = None,
        steered: Touched = "all",
    ) -> Mixture:
        """Eq. 7; the row itself has the condition."""
        own, other = Stream(scale, context, system), Stream(1 - scale, negative, negative_system)
        return Mixture((own, other), steered=steered)
