"""A vector per user: trained on what everybody wrote, then one step of natural gradient towards the user.

    c   = argmin_c −Σ_i log p( y_i | x_i ; h_l(x)_t + c )                        t from the last prompt token on
    ∇_i = ∇_δ −log p( y_i | x_i ; h_l(x)_t + δ ) at δ = c, summed over tokens
    F   = 1/T · Σ_i ∇_i ∇_iᵀ,   ḡ = 1/T · Σ_i ∇_i                                over texts of all users
    P_n = (F + (λ + T₀/n) · tr(F)/d · I)⁻¹                                       F⁻¹, as far as n tokens tell
    v_u = c − step · w_l · P_{T_u} (1/T_u · Σ_i ∇_i − ḡ),   w_l ∝ l + 1          over the user's texts
    h'_l(x)_t = h_l(x)_t + α · v_u

where T_u are the user's tokens and T everybody's. c is what all have in common, the genre; it is trained as in
`trained_vector.py`, by few steps of Adam, which see each text once at most. The rest is the user's own, read where c
has led and not in a model that knows nothing of the genre, by one forward and one backward pass for a text. F is the
empirical Fisher information, and the step that of Amari, "Natural Gradient Works Efficiently in Learning", Neural
Computation 10 (1998), for a constant offset of the residual stream, as far as the user's tokens allow against a
Gaussian prior worth T₀ of them: from fewer texts it stays shorter. Directions in which texts differ for all kinds of
reasons have large gradients of either sign and are damped by F⁻¹; what is left is more of the person than a difference
of means has. At each of several layers l the step is made as if there were no other, and shortened, Σ w_l² = 1: the
upper layers, which have more of the person, take more of it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from safetensors.torch import load, save

from steer.cache import head_key, key_of, model_key
from steer.errors import SteerError
from steer.history import History, Record
from steer.inject import Edit
from steer.inject.positions import Positions, require_positions
from steer.likelihood import response_gradients
from steer.method import Method
from steer.methods.vectors import (
    by_site,
    ids_left,
    ids_of_new,
    layer_sites,
    reference_norms,
    require_equal,
    train_vectors,
    training_units,
    vector_edits,
)
from steer.read import Span, record_span
from steer.sites import Site
from steer.state import Artifact, Provenance, UserState
from steer.train import each_step

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from steer.cache import Cache
    from steer.model import FrozenLM

# Texts whose gradients make F, at most.
_SAMPLE = 1024
# Those hyper-parameters that say how texts are read, the population's as a user's.
_OF_TEXTS = ("positions", "max_tokens")
# Layers 8, 16 and 23 of SmolLM2's 30.
_DEPTHS = (0.27, 0.53, 0.77)


@dataclass
class NaturalGradient(Method):
    """Reads a vector for each user and layer from the gradient of the user's texts.

    Args:
        layer: after which block, or blocks, to read and to add; if None three, at a quarter, a half and three quarters.
        step: how far to go to the user, over all layers; F overestimates the curvature, so that 1 falls far short.
        damping: λ, which bounds the step however much is known.
        prior: T₀, in tokens: somebody who wrote little goes less far.
        common_steps: of the training of c, 0 for none; fewer where there are too few texts for each to have new ones.
        learning_rate: of that training, in units of what moves a prediction by half a nat (`training_units`).
        batch: texts in a step of it.
        positions: from which position on the vector is added, in reading as in steering.
        max_tokens: longer texts are cut.
        seed: of the order of texts in training, and of those that are read where there are more than 1,024.

    Raises:
        SteerError: one of the numbers is not positive or, where things are counted, not whole; or there are no such
            positions or no such layer.
    """

    name: ClassVar[str] = "natural_gradient"
    version: ClassVar[int] = 2

    layer: int | Sequence[int] | None = None
    step: float = 16.0
    damping: float = 4.0
    prior: float = 60_000.0
    common_steps: int = 32
    learning_rate: float = 0.06
    batch: int = 4
    positions: Positions = "response"
    max_tokens: int = 512
    seed: int = 0
    # What `train` has read of each history, where the artifact of this hash says, so that `fit` need not read it again.
    _known: dict[tuple[FrozenLM, str, History], _Sums] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("step", "damping", "prior", "learning_rate"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise SteerError(f"{name}={value!r} is not a positive number")
        for name, least in (("common_steps", 0), ("batch", 1), ("max_tokens", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise SteerError(f"{name}={value!r} is not a whole number from {least} on")
        require_positions(self.positions)
        if self.layer is not None:
            layer_sites(self.layer)

    def sites(self, lm: FrozenLM) -> list[Site]:
        """Where the vectors are read and added."""
        if self.layer is not None:
            return layer_sites(self.layer)
        return layer_sites(sorted({round(share * lm.n_layers) for share in _DEPTHS}))

    def train(
        self,
        lm: FrozenLM,
        histories: Iterable[History],
        on_progress: Callable[[float], None] | None = None,
        *,
        cache: Cache | None = None,
    ) -> Artifact:
        """Trains what all users have in common and, where that leads, reads F and ḡ from a sample of their texts.

        Args:
            lm: the model; no gradient is computed for its parameters.
            histories: of the population; the users to be fitted may be among them.
            on_progress: told from time to time what share of the work is done.
            cache: what was trained or read before is taken from here, and what is new goes here.

        Raises:
            SteerError: there are fewer than two texts, or training came to nothing finite.
        """
        users = list(histories)
        records = [record for history in users for record in history]
        if len(records) < 2:
            raise SteerError(f"the Fisher information needs texts of a population, and there is {len(records)}")
        chosen = torch.randperm(len(records), generator=torch.Generator().manual_seed(self.seed))[:_SAMPLE].tolist()
        spans = [record_span(lm, records[i], max_tokens=self.max_tokens) for i in sorted(chosen)]
        norms = reference_norms(lm, spans, self.sites(lm), cache)
        steps = min(self.common_steps, max(len(spans) // self.batch, 1))
        trained = steps * self.batch / (steps * self.batch + len(spans))
        (unit,) = training_units(lm, [spans], self.sites(lm), norms=[norms], positions=self.positions, cache=cache)
        common = self._train_common(lm, spans, steps, unit, _part(on_progress, 0.0, trained), cache)
        gradients, tokens = self._gradients(lm, spans, common, _part(on_progress, trained, 1.0), cache)
        if not all(rows.isfinite().all() for rows in gradients.values()):
            raise SteerError(f"training with learning_rate={self.learning_rate} came to nothing finite; lower it")
        total = int(tokens.sum())
        tensors: dict[str, Tensor] = {}
        for site, rows in gradients.items():
            fisher = Fisher.of(rows, total)
            tensors |= {
                f"{site}.common": common[site],
                f"{site}.mean": rows.sum(0) / total,
                f"{site}.directions": fisher.directions,
                f"{site}.variances": fisher.variances,
            }
        self.artifact = Artifact(
            method=self.name,
            version=self.version,
            model=lm.fingerprint,
            tensors={name: tensor.float() for name, tensor in tensors.items()},
            settings={
                "texts": len(spans),
                "tokens": total,
                **{key: getattr(self, key) for key in _OF_TEXTS},
                **{key: getattr(self, key) for key in ("common_steps", "learning_rate", "batch", "seed")},
                "training_unit": unit,
                "reference_norm": norms,
            },
        )
        self._known = {}
        if len(spans) == len(records):
            read = zip(users, _by_user(users, gradients, tokens), strict=True)
            self._known = {(lm, self.artifact.hash, history): sums for history, sums in read}
        return self.artifact

    def fit(self, lm: FrozenLM, history: History) -> UserState:
        """Reads one user's vectors, one for each layer.

        Raises:
            SteerError: the history is empty, or `train` or `use` was not called.
        """
        return self.fit_many(lm, [history])[0]

    def fit_many(
        self,
        lm: FrozenLM,
        histories: Sequence[History],
        on_progress: Callable[[float], None] | None = None,
        *,
        cache: Cache | None = None,
    ) -> list[UserState]:
        """Reads many users' vectors, with texts of several users in a batch; each is what `fit` gives, to rounding."""
        artifact, shared = self._population(lm), self._shared(lm)
        if empty := [history for history in histories if not len(history)]:
            raise SteerError(f"{empty[0].user_id!r} has no records to read a gradient from")
        keys = [(lm, artifact.hash, history) for history in histories]
        known = {i: self._known.pop(key) for i, key in enumerate(keys) if key in self._known}
        missing = [history for i, history in enumerate(histories) if i not in known]
        new = iter(self._read(lm, missing, on_progress, cache))
        sums = [known[i] if i in known else next(new) for i in range(len(histories))]
        settings = self._settings(artifact)
        return [
            UserState(
                provenance=Provenance(
                    method=self.name,
                    version=self.version,
                    model=lm.fingerprint,
                    sites=tuple(str(site) for site in self.sites(lm)),
                    records=tuple(record.id for record in history),
                    settings=settings,
                    calibration={"reference_norm": artifact.settings["reference_norm"], "tokens": own.tokens},
                ),
                tensors=by_site(self._vectors(own, shared)),
            )
            for history, own in zip(histories, sums, strict=True)
        ]

    def update(self, lm: FrozenLM, state: UserState, new_records: Sequence[Record]) -> UserState:
        """The state of a user who has written more, at the cost of reading only that: what `fit` gives for all of it.

        Raises:
            SteerError: a record is in the state already, or the state is not of this method with these settings.
        """
        ids = ids_of_new(new_records, state.provenance.records)
        return self._combined(lm, state, new_records, (*state.provenance.records, *ids), operator.add)

    def remove(self, lm: FrozenLM, state: UserState, old_records: Sequence[Record]) -> UserState:
        """The state as if some of its records had never been there, at the cost of reading these once more.

        What the population's artifact learned of them stays there; call `train` again to change that.

        Raises:
            SteerError: a record is not in the state, or none would be left; else as for `update`.
        """
        left = ids_left(state.provenance.records, old_records)
        return self._combined(lm, state, list({r.id: r for r in old_records}.values()), left, operator.sub)

    def own_share(self, state: UserState) -> float:
        """How much of a state is the user's own, and not what all have in common: ‖v_u − c‖ / ‖v_u‖, mean over sites.

        Raises:
            SteerError: the state was made with another artifact.
        """
        if self.artifact is None or state.provenance.settings.get("population") != self.artifact.hash:
            raise SteerError("the state was made with another artifact than this method has")
        shares = [
            (vector - self.artifact.tensors[f"{site}.common"]).norm() / vector.norm()
            for site, vector in state.tensors.items()
        ]
        return torch.stack(shares).mean().item()

    @classmethod
    def bind(
        cls, lm: FrozenLM, states: Sequence[UserState | None], like: UserState, artifact: Artifact | None
    ) -> list[Edit]:
        """One residual edit for each layer."""
        return vector_edits(states, like)

    def _settings(self, artifact: Artifact) -> dict[str, Any]:
        chosen = {key: getattr(self, key) for key in ("step", "damping", "prior", "positions", "max_tokens")}
        return chosen | {"population": artifact.hash}

    def _population(self, lm: FrozenLM) -> Artifact:
        if self.artifact is None:
            raise SteerError("the population's gradients come first: call train(lm, histories), or use(lm, artifact)")
        self._require_model(lm, self.artifact)
        read_at = {name.removesuffix(".mean") for name in self.artifact.tensors if name.endswith(".mean")}
        if read_at != (asked := {str(site) for site in self.sites(lm)}):
            there, here = ", ".join(sorted(read_at)), ", ".join(sorted(asked))
            raise SteerError(f"the population was read at {there}, and this method reads at {here}; train again")
        for name in _OF_TEXTS:
            if (there := self.artifact.settings[name]) != (here := getattr(self, name)):
                raise SteerError(f"the population was read with {name}={there!r}, and here it is {here!r}; train again")
        return self.artifact

    def _gradients(
        self,
        lm: FrozenLM,
        spans: Sequence[Span],
        common: Mapping[Site, Float[Tensor, " d"]],
        on_progress: Callable[[float], None] | None,
        cache: Cache | None,
    ) -> tuple[dict[Site, Float[Tensor, "text d"]], Float[Tensor, " text"]]:
        """Each text's gradients where c has led, and number of tokens; float64, as sums over many texts follow."""
        told = None if on_progress is None else lambda done: on_progress(done / len(spans))
        gradients, tokens = response_gradients(
            lm, spans, self.sites(lm), at=common, positions=self.positions, on_progress=told, cache=cache
        )
        return {site: rows.double() for site, rows in gradients.items()}, tokens.double()

    def _read(
        self,
        lm: FrozenLM,
        users: Sequence[Sequence[Record] | History],
        on_progress: Callable[[float], None] | None = None,
        cache: Cache | None = None,
    ) -> list[_Sums]:
        """What is read of each user."""
        artifact = self._population(lm)
        common = {site: artifact.tensors[f"{site}.common"] for site in self.sites(lm)}
        spans = [record_span(lm, record, max_tokens=self.max_tokens) for records in users for record in records]
        return _by_user(users, *self._gradients(lm, spans, common, on_progress, cache))

    def _train_common(
        self,
        lm: FrozenLM,
        spans: Sequence[Span],
        steps: int,
        unit: Mapping[str, float],
        on_progress: Callable[[float], None] | None,
        cache: Cache | None,
    ) -> dict[Site, Float[Tensor, " d"]]:
        """c at each site, float32, on the CPU."""
        key = key_of(
            (model_key(lm), head_key(lm), "common", 2),
            ([str(site) for site in self.sites(lm)], self.positions, steps, self.learning_rate, self.batch, self.seed),
            [(list(span.ids[: span.end]), span.start) for span in spans],
        )
        if cache is not None and (known := cache.get([key])):
            if on_progress is not None:
                on_progress(1.0)
            return {Site.parse(name): vector for name, vector in load(known[key]).items()}
        trained = train_vectors(
            lm,
            [spans],
            self.sites(lm),
            units=[unit],
            positions=self.positions,
            steps=steps,
            batch=self.batch,
            learning_rate=self.learning_rate,
            seed=self.seed,
            on_step=each_step(steps, on_progress),
        )
        common = {site: vectors[0].float().cpu() for site, vectors in trained.vectors.items()}
        if cache is not None:
            cache.put({key: save(by_site(common))})
        return common

    def _shared(self, lm: FrozenLM) -> dict[Site, _Shared]:
        """What all users of the population have in common, at each site."""
        artifact, shared = self._population(lm), {}
        for site in self.sites(lm):
            common, mean, directions, variances = (
                artifact.tensors[f"{site}.{part}"].double() for part in ("common", "mean", "directions", "variances")
            )
            shared[site] = _Shared(common, mean, Fisher(directions, variances))
        return shared

    def _lengths(self, sites: Iterable[Site]) -> list[float]:
        """Of the step at each site: step · w_l."""
        heights = [(site.layer or 0) + 1 for site in sites]
        return [self.step * height / math.hypot(*heights) for height in heights]

    def _damping(self, tokens: int) -> float:
        return self.damping + self.prior / tokens

    def _vectors(self, sums: _Sums, shared: Mapping[Site, _Shared]) -> dict[Site, Float[Tensor, " d"]]:
        damping, vectors = self._damping(sums.tokens), {}
        for (site, population), length in zip(shared.items(), self._lengths(shared), strict=True):
            own = population.fisher.solve(sums.gradients[site] / sums.tokens - population.mean, damping)
            vectors[site] = population.common - length * own
        return vectors

    def _sums_of(self, state: UserState, shared: Mapping[Site, _Shared]) -> _Sums:
        """What the state was made of: the inverse of `_vectors`."""
        tokens, gradients = state.provenance.calibration["tokens"], {}
        for (site, population), length in zip(shared.items(), self._lengths(shared), strict=True):
            own = (population.common - state.tensors[str(site)].double()) / length
            gradients[site] = tokens * (population.fisher.times(own, self._damping(tokens)) + population.mean)
        return _Sums(gradients, tokens)

    def _combined(
        self,
        lm: FrozenLM,
        state: UserState,
        records: Sequence[Record],
        ids: tuple[str, ...],
        combine: Callable[[Any, Any], Any],
    ) -> UserState:
        self._require_own(lm, state)
        if len({record.user_id for record in records}) > 1:
            raise SteerError("these records are of several users; a state is of one")
        (new,) = self._read(lm, [records])
        shared = self._shared(lm)
        old = self._sums_of(state, shared)
        sums = _Sums(
            {site: combine(gradient, new.gradients[site]) for site, gradient in old.gradients.items()},
            combine(old.tokens, new.tokens),
        )
        calibration = dict(state.provenance.calibration) | {"tokens": sums.tokens}
        vectors = self._vectors(sums, shared)
        return UserState(replace(state.provenance, records=ids, calibration=calibration), by_site(vectors))

    def _require_own(self, lm: FrozenLM, state: UserState) -> None:
        """Raises SteerError unless the state is what `fit` of this very method could have given."""
        artifact, source = self._population(lm), state.provenance
        theirs = (source.method, source.model, source.sites, dict(source.settings))
        ours = (self.name, lm.fingerprint, tuple(map(str, self.sites(lm))), self._settings(artifact))
        require_equal(theirs, ours)


@dataclass(frozen=True)
class _Shared:
    """What all users have in common at one site: a vector, the mean gradient there, and the Fisher information."""

    common: Float[Tensor, " d"]
    mean: Float[Tensor, " d"]
    fisher: Fisher


@dataclass(frozen=True)
class _Sums:
    """Gradients of some texts, summed, at each site, and how many tokens they are of."""

    gradients: Mapping[Site, Float[Tensor, " d"]]
    tokens: int


def _part(on_progress: Callable[[float], None] | None, start: float, end: float) -> Callable[[float], None] | None:
    """Told the share of one part of the work, tells that of the whole."""
    return None if on_progress is None else lambda share: on_progress(start + share * (end - start))


def _by_user(
    users: Sequence[Sequence[Record] | History],
    gradients: Mapping[Site, Float[Tensor, "text d"]],
    tokens: Float[Tensor, " text"],
) -> list[_Sums]:
    """Sums over each user's texts, which follow one another."""
    counts = [len(records) for records in users]
    split = {site: rows.split(counts) for site, rows in gradients.items()}
    return [
        _Sums({site: rows[user].sum(0) for site, rows in split.items()}, int(own.sum()))
        for user, own in enumerate(tokens.split(counts))
    ]


@dataclass(frozen=True)
class Fisher:
    """The empirical Fisher information F by its principal axes, which are of all texts and of none.

    Attributes:
        directions: orthonormal; F is zero across them.
        variances: F along each.
    """

    directions: Float[Tensor, "k d"]
    variances: Float[Tensor, " k"]

    @classmethod
    def of(cls, gradients: Float[Tensor, "text d"], tokens: float) -> Fisher:
        """`F = GᵀG / tokens`."""
        _, sizes, directions = torch.linalg.svd(gradients / tokens**0.5, full_matrices=False)
        return cls(directions, sizes.square())

    def solve(self, gradient: Float[Tensor, " d"], damping: float) -> Float[Tensor, " d"]:
        """`(F + damping · tr(F)/d · I)⁻¹ g`."""
        ridge = self._ridge(damping)
        along = self.directions @ gradient
        return (gradient - along * self.variances / (self.variances + ridge) @ self.directions) / ridge

    def times(self, vector: Float[Tensor, " d"], damping: float) -> Float[Tensor, " d"]:
        """`(F + damping · tr(F)/d · I) v`."""
        return (self.directions @ vector) * self.variances @ self.directions + self._ridge(damping) * vector

    def _ridge(self, damping: float) -> Float[Tensor, ""]:
        return damping * self.variances.sum() / self.directions.shape[1]
