"""CoS: context steering, with one context per user.

He, Pandey, Schrum and Dragan, "CoS: Enhancing Personalization and Mitigating Bias with Context Steering", ICLR 2025,
arXiv 2405.01768, Eq. 3:

    CoS_λ(x_i | C, P) = (1 + λ) · LLM(x_i | C, P) − λ · LLM(x_i | ∅, P)

λ = −1 is the prompt without the context, 0 plain prompting with it, more amplifies it; the authors advise |λ| ≤ 4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from steer.errors import SteerError
from steer.history import History
from steer.inject import Edit, StreamEdit
from steer.method import Method
from steer.state import Artifact, Provenance, UserState

if TYPE_CHECKING:
    from steer.model import FrozenLM


@dataclass
class CoS(Method):
    """Amplifies what a context about the user changes in the next-token distribution.

    Args:
        lam: λ of Eq. 3, for the states that this object makes. Every row keeps its own.
        records: how many of a user's newest records make up the context in `fit`.
    """

    name: ClassVar[str] = "cos"

    lam: float = 1.0
    records: int = 4

    def __post_init__(self) -> None:
        if not math.isfinite(self.lam):
            raise SteerError(f"λ must be finite, got {self.lam}")

    def state(self, context: str) -> UserState:
        """The state of a user about whom `context` is known, such as "I am a beginner."

        Raises:
            SteerError: the context is empty.
        """
        if not context.strip():
            raise SteerError("a context is empty; a user without one needs no state")
        return UserState(self._provenance(()), data={"context": context, "lam": self.lam})

    def fit(self, lm: FrozenLM, history: History) -> UserState:
        """The user's newest records, as they are, become the context."""
        newest = history.split(limit=self.records)[0].records
        if not newest:
            raise SteerError(f"{history.user_id!r} has no records to make a context of")
        context = "Texts that I wrote:\n\n" + "\n\n".join(record.response for record in newest) + "\n\n"
        return UserState(
            self._provenance(tuple(record.id for record in newest)), data={"context": context, "lam": self.lam}
        )

    def _provenance(self, records: tuple[str, ...]) -> Provenance:
        return Provenance(method=self.name, version=self.version, records=records, settings={"lam": self.lam})

    @classmethod
    def bind(
        cls, lm: FrozenLM, states: Sequence[UserState | None], like: UserState, artifact: Artifact | None
    ) -> list[Edit]:
        """One stream edit."""
        contexts = [None if state is None else state.data["context"] for state in states]
        lams = [0.0 if state is None else float(state.data["lam"]) for state in states]
        return [StreamEdit.contrast(contexts, lams)]
