"""A vector per user, trained to make what the user wrote likely.

Subramani, Suresh and Peters, "Extracting Latent Steering Vectors from Pretrained Language Models", Findings of ACL
2022, arXiv 2205.05124, with a user's texts in place of one sentence:

    min_v  −Σ_i log p( y_i | x_i ; h_l(x)_t + v )                                  t from the last prompt token on

Where users share a stage, as in PerFit (`perfit.py`), a common vector c is trained on everybody's texts
first, and each user's v on top of it, h_l + c + v, so that v is left with what is not common to all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from steer.errors import SteerError
from steer.history import History
from steer.inject import Edit
from steer.inject.positions import Positions, require_positions
from steer.method import Method
from steer.methods.vectors import (
    TrainedVectors,
    by_site,
    layer_sites,
    reference_norms,
    train_vectors,
    training_units,
    vector_edits,
)
from steer.read import Span, record_span
from steer.sites import Site
from steer.state import Artifact, Provenance, UserState
from steer.train import each_step

if TYPE_CHECKING:
    from torch import Tensor

    from steer.model import FrozenLM


@dataclass
class TrainedVector(Method):
    """Trains one vector for each user and layer; many users at once, as rows of a batch.

    Args:
        layer: after which block, or blocks, to add.
        shared_steps: optimizer steps of the common vector, which `train` then makes; 0 for users who share nothing.
        steps: optimizer steps of a user's own vector.
        learning_rate: of Adam, in units of what moves a prediction by half a nat (`training_units`): about the most
            that a step moves a vector.
        weight_decay: of AdamW.
        max_dose: bound of a vector's norm, in units of the median residual norm; None for no bound.
        batch: texts of a user in a step.
        holdout: share of a user's texts that decides after which step to stop; they are not trained on.
        positions: from which position on to add.
        seed: of the order of texts.

    Raises:
        SteerError: no layer, or unknown positions.
    """

    name: ClassVar[str] = "trained_vector"

    layer: int | Sequence[int]
    shared_steps: int = 0
    steps: int = 30
    learning_rate: float = 0.06
    weight_decay: float = 0.0
    max_dose: float | None = None
    batch: int = 8
    holdout: float = 0.0
    positions: Positions = "response"
    seed: int = 0

    def __post_init__(self) -> None:
        layer_sites(self.layer)
        require_positions(self.positions)

    @property
    def sites(self) -> list[Site]:
        """Where the vectors are added."""
        return layer_sites(self.layer)

    def train(
        self,
        lm: FrozenLM,
        histories: Iterable[History],
        on_progress: Callable[[float], None] | None = None,
        *,
        on_step: Callable[[int, float], None] | None = None,
    ) -> Artifact | None:
        """Trains the common vector on the texts of all users, if there is to be one.

        Raises:
            SteerError: there are no texts.
        """
        if not self.shared_steps:
            return None
        spans = [record_span(lm, record) for history in histories for record in history]
        if not spans:
            raise SteerError("there are no records to train the common vector on")
        told = each_step(self.shared_steps, on_progress, on_step)
        norms = reference_norms(lm, spans, self.sites)
        trained, (unit,) = self._descend(lm, [spans], self.shared_steps, norms=[norms], common=None, on_step=told)
        self.artifact = Artifact(
            method=self.name,
            version=self.version,
            model=lm.fingerprint,
            tensors=by_site({site: vectors[0] for site, vectors in trained.vectors.items()}),
            settings={
                "positions": self.positions,
                "shared_steps": self.shared_steps,
                "learning_rate": self.learning_rate,
                "training_unit": unit,
                "reference_norm": norms,
            },
        )
        return self.artifact

    def fit(self, lm: FrozenLM, history: History, on_step: Callable[[int, float], None] | None = None) -> UserState:
        """Trains one user's vector.

        Args:
            lm: the model; no gradient is computed for its parameters.
            history: what the user wrote.
            on_step: told the number of each step and its loss in nats per token.

        Raises:
            SteerError: the history is empty, or the common vector was not trained.
        """
        return self._fit(lm, [history], on_step)[0]

    def fit_many(
        self, lm: FrozenLM, histories: Sequence[History], on_progress: Callable[[float], None] | None = None
    ) -> list[UserState]:
        """Trains many users' vectors at once; each is what `fit` gives, to rounding."""
        return self._fit(lm, histories, each_step(self.steps, on_progress))

    @classmethod
    def bind(
        cls, lm: FrozenLM, states: Sequence[UserState | None], like: UserState, artifact: Artifact | None
    ) -> list[Edit]:
        """One residual edit for each layer: the user's own vector, and the common one where the state names it."""
        return vector_edits(states, like, artifact)

    @staticmethod
    def own_part(state: UserState) -> UserState:
        """The user's own vector without the common one, as a state of its own."""
        return replace(state, provenance=replace(state.provenance, artifact=None))

    @classmethod
    def common_part(cls, artifact: Artifact) -> UserState:
        """The common vector as a state of its own, to give it another strength than the users' own parts."""
        source = Provenance(
            method=cls.name,
            version=cls.version,
            model=artifact.model,
            sites=tuple(artifact.tensors),
            settings={"positions": artifact.settings["positions"], "part": "common"},
            calibration={"reference_norm": artifact.settings["reference_norm"]},
        )
        return UserState(source, artifact.tensors)

    def _fit(
        self, lm: FrozenLM, histories: Sequence[History], on_step: Callable[[int, float], None] | None
    ) -> list[UserState]:
        if empty := [history for history in histories if not len(history)]:
            raise SteerError(f"{empty[0].user_id!r} has no records to train a vector on")
        texts = [[record_span(lm, record) for record in history] for history in histories]
        norms = [reference_norms(lm, spans, self.sites) for spans in texts]
        trained, units = self._descend(lm, texts, self.steps, norms=norms, common=self._common(lm), on_step=on_step)
        settings = ("steps", "learning_rate", "weight_decay", "max_dose", "batch", "holdout", "positions")
        return [
            UserState(
                provenance=Provenance(
                    method=self.name,
                    version=self.version,
                    model=lm.fingerprint,
                    sites=tuple(str(site) for site in self.sites),
                    artifact=self.artifact.hash if self.shared_steps and self.artifact is not None else None,
                    records=tuple(record.id for record in history),
                    settings={name: getattr(self, name) for name in settings},
                    calibration={
                        "reference_norm": norms[user],
                        "training_unit": units[user],
                        "step": trained.steps[user],
                    },
                ),
                tensors=by_site({site: vectors[user] for site, vectors in trained.vectors.items()}),
            )
            for user, history in enumerate(histories)
        ]

    def _common(self, lm: FrozenLM) -> Mapping[str, Tensor] | None:
        if not self.shared_steps:
            return None
        if self.artifact is None:
            raise SteerError("the common vector comes first: call train(lm, histories), or use(lm, artifact)")
        self._require_model(lm, self.artifact)
        if set(self.artifact.tensors) != {str(site) for site in self.sites}:
            raise SteerError(f"the common vector was trained at {', '.join(self.artifact.tensors)}; train it again")
        if self.artifact.settings["positions"] != self.positions:
            raise SteerError(f"the common vector was trained from {self.artifact.settings['positions']!r} on")
        return self.artifact.tensors

    def _descend(
        self,
        lm: FrozenLM,
        texts: Sequence[Sequence[Span]],
        steps: int,
        *,
        norms: Sequence[Mapping[str, float]],
        common: Mapping[str, Tensor] | None,
        on_step: Callable[[int, float], None] | None,
    ) -> tuple[TrainedVectors, list[dict[str, float]]]:
        """Trains vectors; returns them, and what unit of the learning rate each user had at each site."""
        units = training_units(lm, texts, self.sites, norms=norms, positions=self.positions, common=common)
        longest = None
        if self.max_dose is not None:
            longest = [{site: self.max_dose * norm for site, norm in own.items()} for own in norms]
        trained = train_vectors(
            lm,
            texts,
            self.sites,
            units=units,
            positions=self.positions,
            common=common,
            longest=longest,
            steps=steps,
            batch=self.batch,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            seed=self.seed,
            holdout=self.holdout,
            on_step=on_step,
        )
        return trained, units
