"""What every method has in common, and the register by which a stored state finds its method."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar, cast

from steer.errors import SteerError
from steer.state import Provenance, UserState

if TYPE_CHECKING:
    from torch import Tensor, nn

    from steer.history import History
    from steer.inject import Edit
    from steer.model import FrozenLM
    from steer.state import Artifact


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


class TrainableMethod(Method):
    """A method whose users share weights that are trained in front of the frozen model; a dataclass.

    Attributes:
        enters: the sites of its edits, for provenance.
    """

    enters: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def module(self, lm: FrozenLM, histories: Sequence[History]) -> nn.Module:
        """The weights that users share, not yet trained, with `edits(examples)`: see `steer.train.trainer.MakesEdits`.

        Args:
            lm: the model.
            histories: what may be looked at, without what is set aside for validation.
        """

    @abstractmethod
    def artifact_of(self, lm: FrozenLM, module: nn.Module) -> Artifact:
        """What is stored of a trained module; its settings have the hyper-parameters."""

    def train(
        self, lm: FrozenLM, histories: Iterable[History], on_progress: Callable[[float], None] | None = None
    ) -> Artifact:
        """Trains the shared weights: one epoch as `steer.train.train_method` has it, and no checkpoint is left.

        For how long, how fast and where, and to go on after an interruption, call that.

        Raises:
            SteerError: as `train_method`.
        """
        # Late, as training knows methods.
        from steer.train import train_method

        with TemporaryDirectory() as folder:
            return train_method(lm, self, list(histories), out=Path(folder) / "run", epochs=1, on_progress=on_progress)[
                0
            ]

    def use(self, lm: FrozenLM, artifact: Artifact) -> None:
        """Takes what was trained before.

        Raises:
            SteerError: it is of another method, version or model, or was trained with other hyper-parameters, which
                `steer.train.method_of` takes from it.
        """
        super().use(lm, artifact)
        for name, own in self.hyper_parameters.items():
            if artifact.settings[name] != own:
                self.artifact = None
                raise SteerError(f"the artifact was trained with {name}={artifact.settings[name]!r}, this has {own!r}")

    @property
    def hyper_parameters(self) -> dict[str, Any]:
        """Those that shared weights are trained for, and work with no others."""
        return asdict(cast(Any, self))

    def _require_trained(self, lm: FrozenLM) -> Artifact:
        if self.artifact is None:
            raise SteerError(
                "the shared weights come first: train them (steer.train.train_method), or use(lm, artifact)"
            )
        self._require_model(lm, self.artifact)
        return self.artifact

    def _require_own(self, state: UserState) -> None:
        if self.artifact is None or state.provenance.artifact != self.artifact.hash:
            raise SteerError("the state was fitted with other shared weights; fit it again, or use those it names")

    def _state(self, tensors: Mapping[str, Tensor], records: Sequence[str]) -> UserState:
        """What a user has under the shared weights, made of these records."""
        assert self.artifact is not None
        provenance = Provenance(
            method=self.name,
            version=self.version,
            model=self.artifact.model,
            sites=self.enters,
            artifact=self.artifact.hash,
            records=tuple(records),
        )
        return UserState(provenance, tensors)


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
