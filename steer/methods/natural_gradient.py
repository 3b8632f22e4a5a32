"""A vector per user that is one step of natural gradient on the likelihood of what the user wrote.

    ∇_i = ∇_δ −log p( y_i | x_i ; h_l(x)_t + δ ) at δ = 0, summed over tokens        t from the last prompt token on
    F   = 1/T · Σ_i ∇_i ∇_iᵀ,   ḡ = 1/T · Σ_i ∇_i                                    over texts of all users
    P   = (F + λ · tr(F)/d · I)⁻¹
    S_u = −step/√L · P ( Σ_i ∇_i − T_u · ḡ ),   c = −common/√L · P ḡ                 over the user's texts
    v_u = c + S_u / (T_u + T₀)                                                       h'_l(x)_t = h_l(x)_t + α · v_u

where T_u are the user's tokens and T everybody's. F is the empirical Fisher information, and both steps are those of
Amari, "Natural Gradient Works Efficiently in Learning", Neural Computation 10 (1998), for a constant offset of the
residual stream. They take one forward and one backward pass for a text, where training a vector (`trained_vector.py`)
takes many. Directions in which texts differ for all kinds of reasons have large gradients of either sign and are damped
by F⁻¹; what is left is more of the person than a difference of means has. c is what is common to all, the genre: known
from many more texts, it may go further than the user's own part, which T₀ shortens for those who wrote little. At each
of L layers the step is made as if there were no other, and shortened.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from steer.errors import SteerError
from steer.history import History, Record
from steer.inject import Edit
from steer.inject.positions import Positions
from steer.likelihood import response_gradients
from steer.method import Method
from steer.methods.vectors import by_site, layer_sites, reference_norms, vector_edits
from steer.read import Span, record_span
from steer.sites import Site
from steer.state import Artifact, Provenance, UserState

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from steer.cache import Cache
    from steer.model import FrozenLM

# Texts whose gradients make F, at most.
_SAMPLE = 1024
# Layers 8 and 23 of SmolLM2's 30.
_DEPTHS = (0.27, 0.77)


@dataclass
class NaturalGradient(Method):
    """Reads a vector for each user and layer from the gradient of the user's texts.

    Args:
        layer: after which block, or blocks, to read and to add; if None, two, about a quarter and three quarters up.
        damping: λ, in units of F's mean diagonal.
        step: length of the user's own step. F overestimates the curvature, so that 1 falls short.
        common: length of the step that is common to all; 0 leaves the user's own part alone.
        prior: T₀, in tokens: a user who wrote as many goes half their own way.
        positions: from which position on the vector is added, in reading as in steering.
        max_tokens: longer texts are cut.
        seed: of the texts that make F where there are more than 1,024.
    """

    name: ClassVar[str] = "natural_gradient"

    layer: int | Sequence[int] | None = None
    damping: float = 3.0
    step: float = 3.0
    common: float = 18.0
    prior: float = 0.0
    positions: Positions = "response"
    max_tokens: int = 1024
    seed: int = 0
    # What `train` has read of each history, so that `fit` need not read it again.
    _known: dict[tuple[FrozenLM, History], _Sums] = field(default_factory=dict, init=False, repr=False)

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
        """Reads the gradients of a sample of all users' texts: F, as its principal directions, and their mean.

        Args:
            lm: the model; no gradient is computed for its parameters.
            histories: of the population; the users to be fitted may be among them.
            on_progress: told from time to time what share of the texts is read.
            cache: texts that were read before are taken from here, and new ones go here.

        Raises:
            SteerError: there are fewer than two texts.
        """
        users = list(histories)
        records = [record for history in users for record in history]
        if len(records) < 2:
            raise SteerError(f"the Fisher information needs texts of a population, and there is {len(records)}")
        chosen = torch.randperm(len(records), generator=torch.Generator().manual_seed(self.seed))[:_SAMPLE].tolist()
        spans = [record_span(lm, records[i], max_tokens=self.max_tokens) for i in sorted(chosen)]
        gradients, tokens = self._gradients(lm, spans, on_progress, cache)
        if len(spans) == len(records):
            for history, sums in zip(users, _by_user(users, gradients, tokens), strict=True):
                self._known[lm, history] = sums
        total = tokens.sum()
        means = {f"{site}.mean": rows.sum(0) / total for site, rows in gradients.items()}
        factors = {f"{site}.factor": _principal(rows / total.sqrt()) for site, rows in gradients.items()}
        self.artifact = Artifact(
            method=self.name,
            version=self.version,
            model=lm.fingerprint,
            tensors={name: tensor.float() for name, tensor in (means | factors).items()},
            settings={
                "texts": len(spans),
                "positions": self.positions,
                "reference_norm": reference_norms(lm, spans, self.sites(lm), cache),
            },
        )
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
        artifact = self._population(lm)
        if empty := [history for history in histories if not len(history)]:
            raise SteerError(f"{empty[0].user_id!r} has no records to read a gradient from")
        known = {i: self._known.pop((lm, h)) for i, h in enumerate(histories) if (lm, h) in self._known}
        missing = [history for i, history in enumerate(histories) if i not in known]
        new = iter(self._read(lm, missing, on_progress, cache))
        sums = [known[i] if i in known else next(new) for i in range(len(histories))]
        return [
            UserState(
                provenance=Provenance(
                    method=self.name,
                    version=self.version,
                    model=lm.fingerprint,
                    sites=tuple(str(site) for site in self.sites(lm)),
                    records=tuple(record.id for record in history),
                    settings=self._settings(artifact),
                    calibration={"reference_norm": artifact.settings["reference_norm"], "tokens": own.tokens},
                ),
                tensors=by_site(self._vectors(self._steps(own), own.tokens)),
            )
            for history, own in zip(histories, sums, strict=True)
        ]

    def update(self, lm: FrozenLM, state: UserState, new_records: Sequence[Record]) -> UserState:
        """The state of a user who has written more, at the cost of reading only that: what `fit` gives for all of it.

        Raises:
            SteerError: a record is in the state already, or the state is not of this method with these settings.
        """
        ids = [record.id for record in new_records]
        if twice := [id for i, id in enumerate(ids) if id in state.provenance.records or id in ids[:i]]:
            raise SteerError(f"record {twice[0]!r} is in the state already, and would count twice")
        return self._combined(lm, state, new_records, (*state.provenance.records, *ids), operator.add)

    def remove(self, lm: FrozenLM, state: UserState, old_records: Sequence[Record]) -> UserState:
        """The state as if some of its records had never been there, at the cost of reading these once more.

        What the population's artifact learned of them stays there; call `train` again to change that.

        Raises:
            SteerError: a record is not in the state, or none would be left; else as for `update`.
        """
        ids = {record.id for record in old_records}
        if strange := ids - set(state.provenance.records):
            raise SteerError(f"record {min(strange)!r} is not in the state, so it cannot be taken out")
        left = tuple(id for id in state.provenance.records if id not in ids)
        if not left:
            raise SteerError("no record would be left; delete the state instead")
        return self._combined(lm, state, list({r.id: r for r in old_records}.values()), left, operator.sub)

    @classmethod
    def bind(
        cls, lm: FrozenLM, states: Sequence[UserState | None], like: UserState, artifact: Artifact | None
    ) -> list[Edit]:
        """One residual edit for each layer."""
        return vector_edits(states, like)

    def _settings(self, artifact: Artifact) -> dict[str, Any]:
        chosen = {key: getattr(self, key) for key in ("damping", "step", "common", "prior", "positions", "max_tokens")}
        return chosen | {"population": artifact.hash}

    def _population(self, lm: FrozenLM) -> Artifact:
        if self.artifact is None:
            raise SteerError("the population's gradients come first: call train(lm, histories), or use(lm, artifact)")
        self._require_model(lm, self.artifact)
        if missing := [site for site in self.sites(lm) if f"{site}.mean" not in self.artifact.tensors]:
            raise SteerError(f"the population was not read at {missing[0]}; train again")
        if self.artifact.settings["positions"] != self.positions:
            raise SteerError(f"the population was read for positions {self.artifact.settings['positions']!r}")
        return self.artifact

    def _gradients(
        self,
        lm: FrozenLM,
        spans: Sequence[Span],
        on_progress: Callable[[float], None] | None,
        cache: Cache | None,
    ) -> tuple[dict[Site, Float[Tensor, "text d"]], Float[Tensor, " text"]]:
        """Each text's gradients, and number of tokens; float64, as sums over many texts follow."""
        told = None if on_progress is None else lambda done: on_progress(done / len(spans))
        gradients, tokens = response_gradients(
            lm, spans, self.sites(lm), positions=self.positions, on_progress=told, cache=cache
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
        spans = [record_span(lm, record, max_tokens=self.max_tokens) for records in users for record in records]
        return _by_user(users, *self._gradients(lm, spans, on_progress, cache))

    def _direction(self, site: Site, gradient: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
        assert self.artifact is not None
        factor = self.artifact.tensors[f"{site}.factor"].double()
        return natural_direction(gradient[None], factor, self.damping)[0]

    def _steps(self, sums: _Sums) -> dict[Site, Float[Tensor, " d"]]:
        """S of some texts, which is additive over texts."""
        assert self.artifact is not None
        length = self.step / len(sums.gradients) ** 0.5
        return {
            site: -length * self._direction(site, own - sums.tokens * self.artifact.tensors[f"{site}.mean"].double())
            for site, own in sums.gradients.items()
        }

    def _common(self, site: Site, sites: int) -> Float[Tensor, " d"]:
        """c, which is everybody's."""
        assert self.artifact is not None
        mean = self.artifact.tensors[f"{site}.mean"].double()
        return -self.common / sites**0.5 * self._direction(site, mean)

    def _vectors(self, steps: Mapping[Site, Tensor], tokens: int) -> dict[Site, Float[Tensor, " d"]]:
        return {site: self._common(site, len(steps)) + step / (tokens + self.prior) for site, step in steps.items()}

    def _combined(
        self,
        lm: FrozenLM,
        state: UserState,
        records: Sequence[Record],
        ids: tuple[str, ...],
        combine: Callable[[Any, Any], Any],
    ) -> UserState:
        artifact = self._population(lm)
        source = state.provenance
        if source.method != self.name or source.settings != self._settings(artifact):
            raise SteerError("the state was fitted by another method, with other settings or another population")
        if source.model != lm.fingerprint:
            raise SteerError(f"the state was read from {source.model}, this model is {lm.fingerprint}")
        (new,) = self._read(lm, [records])
        before = source.calibration["tokens"]
        after = combine(before, new.tokens)
        steps = {}
        for site, step in self._steps(new).items():
            common = self._common(site, len(new.gradients))
            steps[site] = combine((state.tensors[str(site)].double() - common) * (before + self.prior), step)
        calibration = dict(source.calibration) | {"tokens": after}
        return UserState(replace(source, records=ids, calibration=calibration), by_site(self._vectors(steps, after)))


@dataclass(frozen=True)
class _Sums:
    """Gradients of some texts, summed, at each site, and how many tokens they are of."""

    gradients: Mapping[Site, Float[Tensor, " d"]]
    tokens: int


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


def _principal(rows: Float[Tensor, "text d"]) -> Float[Tensor, "direction d"]:
    """R with `RᵀR = GᵀG`, which keeps the texts' second moments and no single text."""
    _, sizes, directions = torch.linalg.svd(rows, full_matrices=False)
    return sizes[:, None] * directions


def natural_direction(
    wanted: Float[Tensor, "user d"], factor: Float[Tensor, "direction d"], damping: float
) -> Float[Tensor, "user d"]:
    """`(F + λ · tr(F)/d · I)⁻¹ g` with `F = RᵀR`, by Woodbury's identity: directions may be fewer than dimensions."""
    ridge = damping * factor.square().sum() / factor.shape[1]
    gram = factor @ factor.T + ridge * torch.eye(len(factor), dtype=factor.dtype)
    inner = torch.linalg.solve(gram, factor @ wanted.T)
    return (wanted - (factor.T @ inner).T) / ridge
