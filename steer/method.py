"""What every method has in common, and the register by which a stored state finds its method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from steer.errors import SteerError

if TYPE_CHECKING:
    from steer.history import History
    from steer.inject import Edit
    from steer.model import FrozenLM
    from steer.state import Artifact, UserState


class Method(ABC):
    """A published method. The constructor takes its hyper-parameters, and nothing else.

    Attributes:
        name: under which states of this method are stored.
        version: of the stored form; raise it when old states would be read wrongly.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1

    # What `train` learned, or `use` was given.
    artifact: Artifact | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        METHODS[cls.name] = cls

    def train(self, lm: FrozenLM, histories: Iterable[History]) -> Artifact | None:
        """Learns what users share, if the method has such a thing; later calls of `fit` use it."""
        return None

    def use(self, lm: FrozenLM, artifact: Artifact) -> None:
        """Takes what was trained before, instead of `train`; a bank keeps it (`bank.put_artifact`, `bank.artifact`).

        Raises:
            SteerError: it is of another method, version or model.
        """
        if (artifact.method, artifact.version) != (self.name, self.version):
            raise SteerError(
                f"the artifact is of {artifact.method}, version {artifact.version}; this is {self.name}, {self.version}"
            )
        self._require_model(lm, artifact)
        self.artifact = artifact

    @staticmethod
    def _require_model(lm: FrozenLM, artifact: Artifact) -> None:
        if artifact.model != lm.fingerprint:
            raise SteerError(f"the artifact was made with {artifact.model}, this model is {lm.fingerprint}")

    @abstractmethod
    def fit(self, lm: FrozenLM, history: History) -> UserState:
        """Computes one user's state."""

    @classmethod
    @abstractmethod
    def bind(
        cls, lm: FrozenLM, states: Sequence[UserState | None], like: UserState, artifact: Artifact | None
    ) -> list[Edit]:
        """Turns the states of a batch, None for rows without one, into edits.

        `like` is a state of the same kind, to tell sites and widths when all rows are None; its values are not used.
        """


METHODS: dict[str, type[Method]] = {}


def method_of(state: UserState) -> type[Method]:
    """Returns the method of a state. Raises SteerError for an unknown method, or a form it no longer reads."""
    method = METHODS.get(state.provenance.method)
    if method is None:
        raise SteerError(
            f"the state was fitted by {state.provenance.method!r}, which is not loaded; known are "
            f"{', '.join(sorted(METHODS))}. Import the module that defines it"
        )
    if method.version != state.provenance.version:
        raise SteerError(
            f"the state is version {state.provenance.version} of {method.name}, this library reads version "
            f"{method.version}; fit it again"
        )
    return method
