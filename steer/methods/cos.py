"""CoS: context steering, with one context, with several, and with a pair of opposites.

He, Pandey, Schrum and Dragan, "CoS: Enhancing Personalization and Mitigating Bias with Context Steering", ICLR 2025,
arXiv 2405.01768.

    CoS       Eq. 3    (1 + λ) · LLM(x | C, P) − λ · LLM(x | ∅, P)
    CoSMany   App. B   LLM(x | ∅, P) + Σ_k λ_k · ( LLM(x | C_k, P) − LLM(x | ∅, P) )
    CoSPair   §3       LLM(x | C⁺, P) + λ · ( LLM(x | C⁺, P) − LLM(x | C⁻, P) )

The paper's two conventions of λ differ by one, so they have two names here. `lam`, of CoS and CoSPair: −1 takes the
context away, 0 is plain prompting with it, more amplifies it. `lams`, of CoSMany: 0 takes a context away, 1 is its
natural strength. CoS(lam) and CoSMany(lams=[1 + lam]) mix the same logits. The authors advise |λ| ≤ 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, ClassVar

from steer.errors import SteerError
from steer.history import History
from steer.inject import Mixture, Stream
from steer.inject.streams import Touched
from steer.methods.contrast import (
    Contrast,
    context_of,
    from_records,
    newest_records,
    one_each,
    require_finite,
    require_list,
    require_text,
    texts_of,
)
from steer.pairs import pairs_of
from steer.state import UserState

if TYPE_CHECKING:
    from steer.model import FrozenLM


@dataclass
class CoS(Contrast):
    """Amplifies what a context about the user changes in the next-token distribution.

    Args:
        lam: λ of Eq. 3, for the states that this object makes; every row keeps its own. −1 takes the context away, 0 is
            plain prompting with it.
        records, steered: as for `Contrast`.

    Raises:
        SteerError: λ is not finite.
    """

    name: ClassVar[str] = "cos"

    lam: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.lam = require_finite("lam", self.lam)

    def state(self, context: str) -> UserState:
        """The state of a user about whom `context` is known, such as "I am a beginner."

        Raises:
            SteerError: the context is empty.
        """
        return self._made({"context": require_text(context), "lam": self.lam})

    @staticmethod
    def mixture(context: str, lam: float, steered: Touched = "all") -> Mixture:
        """Eq. 3."""
        return Mixture.contrast(context, lam, steered=steered)


@dataclass
class CoSMany(Contrast):
    """Adds up what several contexts change, each with a λ of its own, whatever their order.

    It takes one stream for each context and one without.

    Args:
        lams: λ_k of App. B, one for each context, or one for all. 0 takes a context away, 1 is its natural strength.
        records: how many of a user's newest records become contexts in `fit`, each one by itself, where one λ is for
            all; otherwise as many as there are λ.
        steered: as for `Contrast`.

    Raises:
        SteerError: some λ is not finite, or there is none.
    """

    name: ClassVar[str] = "cos_many"

    lams: float | Sequence[float] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.lams, Real):
            self.lams = require_finite("lams", self.lams)
        else:
            self.lams = [require_finite("lams", lam) for lam in require_list("lams", self.lams)]

    def state(self, contexts: Sequence[str]) -> UserState:
        """The state of a user about whom all this is known.

        Raises:
            SteerError: there are no contexts, one is empty, or there is not one λ for each.
        """
        texts = [require_text(context) for context in require_list("contexts", contexts)]
        one_each("lams", self.lams, texts)
        return self._made({"contexts": texts})

    def fit(self, lm: FrozenLM, history: History) -> UserState:
        """Each of the user's newest records becomes a context."""
        count = self.records if isinstance(self.lams, float) else len(self.lams)
        newest = newest_records(history, count)
        return from_records(self.state([context_of([record]) for record in newest]), newest)

    @staticmethod
    def mixture(contexts: Sequence[str], lams: float | Sequence[float], steered: Touched = "all") -> Mixture:
        """The equation of App. B; the row itself is the prompt without a context."""
        weights = one_each("lams", lams, contexts)
        further = (Stream(weight, context) for weight, context in zip(weights, contexts, strict=True))
        return Mixture((Stream(1 - sum(weights)), *further), steered=steered)


@dataclass
class CoSPair(Contrast):
    """Contrasts a context with its opposite, so that the attribute counts in which they differ and not their topic.

    Args:
        lam: λ. 0 is plain prompting with the positive context, −1 with the negative one.
        rejected: the key of a record that holds the text which its response was preferred to, for `fit`.
        records, steered: as for `Contrast`.

    Raises:
        SteerError: λ is not finite.
    """

    name: ClassVar[str] = "cos_pair"

    lam: float = 1.0
    rejected: str = "rejected"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.lam = require_finite("lam", self.lam)

    def state(self, positive: str, negative: str) -> UserState:
        """The state of a user who is such as `positive` says, and not such as `negative` does.

        Raises:
            SteerError: a context is empty, or they are the same.
        """
        if require_text(positive) == require_text(negative):
            raise SteerError("the two contexts of a pair are the same, so there is nothing to contrast")
        return self._made({"positive": positive, "negative": negative})

    def fit(self, lm: FrozenLM, history: History) -> UserState:
        """The newest responses become the positive context, what they were preferred to the negative one.

        Raises:
            SteerError: the history is empty, or a record has no prompt or no other answer.
        """
        newest = newest_records(history, self.records)
        pairs = pairs_of(History(history.user_id, newest), self.rejected)
        positive, negative = (texts_of([getattr(pair, side) for pair in pairs]) for side in ("positive", "negative"))
        return from_records(self.state(positive, negative), newest)

    @staticmethod
    def mixture(
        positive: str, negative: str, lam: float, rejected: str = "rejected", steered: Touched = "all"
    ) -> Mixture:
        """Eq. 3 with C⁻ in the place of ∅."""
        return Mixture.contrast(positive, lam, against=negative, steered=steered)
