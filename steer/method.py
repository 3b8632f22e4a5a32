"""What every method has in common, and the register by which a stored state finds its method."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from steer.errors import SteerError

if TYPE_CHECKING:
    from torch import nn

    from steer.history import History
    from steer.inject import Edit
    from steer.model import FrozenLM
    from steer.state import Artifact, Provenance, UserState


class Method(ABC):
    """A published method. The constructor takes its hyper-parameters, and nothing else.

    Attributes:
        name: under which states of this method are stored.
        version: of the stored form; raise it when old states would be read wrongly.
        trainable: whether there is a module that `steer.train.train_method` can train: `module` and `artifact_of`.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    trainable: ClassVar[bool] = False

    # What `train` learned, or `use` was given.
    artifact: Artifact | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # What several methods inherit from is no method itself, and has no name.
        if hasattr(cls, "name"):
            METHODS[cls.name] = cls

    def train(
        self, lm: FrozenLM, histories: Iterable[History], on_progress: Callable[[float], None] | None = None
    ) -> Artifact | None:
        """Learns what users share, if the method has such a thing; later calls of `fit` use it.

        Args:
            lm: the model.
            histories: of the users.
            on_progress: told from time to time what share of the work is done.
        """
        return None

    def module(self, lm: FrozenLM, histories: Sequence[History]) -> nn.Module:
        """The weights that users share, not yet trained, with `edits(examples)`: see `steer.train.trainer.MakesEdits`.

        Args:
            lm: the model.
            histories: what may be looked at, without what is set aside for validation.
        """
        raise NotImplementedError(f"{self.name} has no module to train")

    def artifact_of(self, lm: FrozenLM, module: nn.Module) -> Artifact:
        """What is stored of a trained module."""
        raise NotImplementedError(f"{self.name} has no module to train")

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

    def fit_many(
        self, lm: FrozenLM, histories: Sequence[History], on_progress: Callable[[float], None] | None = None
    ) -> list[UserState]:
        """Computes many users' states, in order; methods that can do users together do.

        Args:
            lm: the model.
            histories: one for each user.
            on_progress: told from time to time what share of the work is done.
        """
        states = []
        for done, history in enumerate(histories, start=1):
            states.append(self.fit(lm, history))
            if on_progress is not None:
                on_progress(done / len(histories))
        return states

    @classmethod
    def fits(cls, lm: FrozenLM, provenance: Provenance) -> bool:
        """Whether states from there are for this model; a bank may hold those of several."""
        return provenance.model in (None, lm.fingerprint)

    @classmethod
    @abstractmethod
    def bind(
        cls, lm: FrozenLM, states: Sequence[UserState | None], like: UserState, artifact: Artifact | None
    ) -> list[Edit]:
        """Turns the states of a batch, None for rows without one, into edits.

        `like` is a state of the same kind, to tell sites and widths when all rows are None; its values are not used.
        """


METHODS: dict[str, type[Method]] = {}


def make_method(name: str, /, **settings: Any) -> Method:
    """A method by its name, with these hyper-parameters.

    Raises:
        SteerError: there is no such method, or it has no such hyper-parameter, or needs one that is not given.
    """
    if name not in METHODS:
        raise SteerError(f"there is no method {name!r}; there are {', '.join(sorted(METHODS))}")
    known = inspect.signature(METHODS[name]).parameters
    wrong = [f"it has no {key!r}" for key in settings if key not in known]
    wrong += [f"it needs {key!r}" for key, own in known.items() if own.default is own.empty and key not in settings]
    if wrong:
        raise SteerError(f"{name}: {' and '.join(wrong)}; its hyper-parameters are {', '.join(known)}")
    return METHODS[name](**settings)


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
