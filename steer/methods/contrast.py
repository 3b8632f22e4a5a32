"""What the recipes of the contrast family share: contexts made of a user's texts, and states that become mixtures.

A recipe is a paper's equation, its convention for coefficients, and its defaults. Rows, caches, other models and the
arithmetic are the business of `StreamEdit`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, ClassVar, get_args

from steer.errors import SteerError
from steer.history import History, Record
from steer.inject import Edit, Mixture, StreamEdit
from steer.inject.streams import Touched
from steer.method import Method
from steer.state import Artifact, Provenance, UserState

if TYPE_CHECKING:
    from steer.model import FrozenLM


@dataclass(kw_only=True)
class Contrast(Method):
    """A recipe: what the streams of a user's rows read, and how their logits are mixed.

    Args:
        records: how many of a user's newest records make up the context in `fit`.
        steered: which streams of the steered model carry the row's other edits: "all" of them, the row's "own", or the
            "further" ones.
    """

    # Makes a state by hand, of a context or of several texts.
    state: ClassVar[Callable[..., UserState]]
    # The mixture of a row, from the hyper-parameters and from what its state has in `data`, by name.
    mixture: ClassVar[Callable[..., Mixture]]

    records: int = 4
    steered: Touched = "all"

    def __post_init__(self) -> None:
        self.records = require_whole("records", self.records)
        if self.records < 1:
            raise SteerError(f"records={self.records}: a context needs one at least")
        if self.steered not in get_args(Touched):
            raise SteerError(f"steered={self.steered!r} is not one of {', '.join(get_args(Touched))}")

    def fit(self, lm: FrozenLM, history: History) -> UserState:
        """The user's newest records, as they are, become the context.

        Raises:
            SteerError: the history is empty.
        """
        newest = newest_records(history, self.records)
        return from_records(self.state(context_of(newest)), newest)

    @classmethod
    def bind(
        cls, lm: FrozenLM, states: Sequence[UserState | None], like: UserState, artifact: Artifact | None
    ) -> list[Edit]:
        """One stream edit."""
        return [StreamEdit([None if state is None else cls.mixture_of(state) for state in states])]

    @classmethod
    def mixture_of(cls, state: UserState) -> Mixture:
        """The mixture of a row with this state."""
        return cls.mixture(**{**state.provenance.settings, **state.data})

    def _made(self, data: Mapping[str, Any]) -> UserState:
        """A state of this data and of the hyper-parameters.

        Raises:
            SteerError: they make no mixture.
        """
        settings = {name: value for name, value in asdict(self).items() if name != "records"}
        state = UserState(Provenance(method=self.name, version=self.version, settings=settings), data=data)
        self.mixture_of(state)
        return state


class ContrastOfModels(Contrast):
    """A recipe whose streams are several models', which read the same."""

    def state(self, context: str | None = None) -> UserState:
        """The state of a user; all models read the context, if there is one, in front of the prompt.

        Raises:
            SteerError: the context is empty.
        """
        return self._made(given(context=context))


def newest_records(history: History, count: int) -> tuple[Record, ...]:
    """The newest of a user's records, oldest first. Raises SteerError if there is none."""
    newest = history.split(limit=count)[0].records
    if not newest:
        raise SteerError(f"{history.user_id!r} has no records to make a context of")
    return newest


def context_of(records: Sequence[Record]) -> str:
    """What somebody wrote, as a context to put in front of a prompt."""
    return texts_of([record.response for record in records])


def texts_of(texts: Sequence[str]) -> str:
    """The same of bare texts."""
    return "Texts that I wrote:\n\n" + "\n\n".join(texts) + "\n\n"


def from_records(state: UserState, records: Sequence[Record]) -> UserState:
    """A state that says which records it was made of."""
    return replace(state, provenance=replace(state.provenance, records=tuple(record.id for record in records)))


def require_text(text: str, what: str = "context") -> str:
    """The text. Raises SteerError if it is none, or there is nothing in it."""
    if not isinstance(text, str):
        raise SteerError(f"a {what} must be text, got {text!r}")
    if not text.strip():
        raise SteerError(f"a {what} is empty; a user without one needs no state")
    return text


def given(**texts: str | None) -> dict[str, str]:
    """Those of the texts that are not None. Raises SteerError, naming it, if there is nothing in one."""
    return {name: require_text(text, name) for name, text in texts.items() if text is not None}


# Numbers come as NumPy's as well; what is kept in a state is Python's own.


def require_number(name: str, value: object) -> float:
    """The value as a float. Raises SteerError, naming it, if it is no number."""
    # True and False are numbers to Python.
    if isinstance(value, bool) or not isinstance(value, Real):
        raise SteerError(f"{name} must be a number, got {value!r}")
    return float(value)


def require_finite(name: str, value: object) -> float:
    """The value as a float. Raises SteerError, naming it, if it is no finite number."""
    number = require_number(name, value)
    if not math.isfinite(number):
        raise SteerError(f"{name} must be finite, got {number}")
    return number


def require_positive(name: str, value: object) -> float:
    """The value as a float. Raises SteerError, naming it, if it is not finite and above 0."""
    number = require_number(name, value)
    if not (math.isfinite(number) and number > 0):
        raise SteerError(f"{name} must be above 0, got {value}")
    return number


def require_not_negative(name: str, value: object) -> float:
    """The value as a float. Raises SteerError, naming it, if it is not finite or below 0."""
    number = require_number(name, value)
    if not (math.isfinite(number) and number >= 0):
        raise SteerError(f"{name} must not be negative, got {value}")
    return number


def require_whole(name: str, value: object) -> int:
    """The value as an int. Raises SteerError, naming it, if it is no whole number."""
    require_number(name, value)
    if not isinstance(value, Integral):
        raise SteerError(f"{name} must be a whole number, got {value!r}")
    return int(value)


def require_list(name: str, values: Any) -> list[Any]:
    """The values as a list. Raises SteerError, naming them, if they are a bare text, no list, or none."""
    # A text would be a list of its characters; NumPy's scalars cannot be told from its arrays before they are listed.
    try:
        listed = [] if isinstance(values, str) else list(values)
    except TypeError:
        listed = []
    if not listed:
        raise SteerError(f"{name} must be a list of one or more, got {values!r}")
    return listed


def one_each(name: str, values: float | Sequence[float], texts: Sequence[object]) -> list[float]:
    """A coefficient for each of the texts; one number is for all of them."""
    if isinstance(values, int | float):
        return [float(values)] * len(texts)
    if len(values) != len(texts):
        raise SteerError(f"{len(values)} {name} for {len(texts)} contexts; give one for each, or one number for all")
    return [float(value) for value in values]
