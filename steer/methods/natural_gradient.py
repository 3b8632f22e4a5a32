"""A vector per user that is one step of natural gradient on the likelihood of what the user wrote.

    g_u = 1/T_u · Σ_i ∇_δ −log p( y_i | x_i ; h_l(x)_t + δ ) at δ = 0              t from the last prompt token on
    F   = 1/T · Σ_i ∇_i ∇_iᵀ,   ḡ = 1/T · Σ_i ∇_i                                   over texts of all users
    v_u = −step/√L · (F + λ · tr(F)/d · I)⁻¹ ( (g_u − ḡ) + common · ḡ )             h'_l(x)_t = h_l(x)_t + α · v_u

where ∇_i is the gradient of text i, summed over its tokens, T_u the user's tokens and T everybody's. F is the empirical
Fisher information, so that v_u is the direction of Amari, "Natural Gradient Works Efficiently in Learning", Neural
Computation 10 (1998), for a constant offset of the residual stream. It takes one forward and one backward pass for a
text, where training a vector (`trained_vector.py`) takes many. Directions in which texts differ for all kinds of
reasons have large gradients of either sign and are damped by F⁻¹; what is left is more of the person than a difference
of means has. ḡ is what is common to all, the genre: known from many more texts, it may go further than the user's own
part. At each of L layers the step is made as if there were no other, and shortened.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from steer.errors import SteerError
from steer.history import History, Record
from steer.inject import Edit
from steer.inject.positions import Positions
from steer.likelihood import response_gradients
from steer.method import Method
from steer.methods.vectors import by_site, layer_sites, reference_norms, vector_edits
from steer.read import record_span
from steer.sites import Site
from steer.state import Artifact, Provenance, UserState

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from steer.model import FrozenLM

# Texts whose gradients make F, at most, and texts that the reference norm is measured on.
_SAMPLE, _NORMS = 1024, 64
# Layers 8 and 23 of SmolLM2's 30.
_DEPTHS = (0.27, 0.77)


@dataclass
class NaturalGradient(Method):
    """Reads a vector for each user and layer from the gradient of the user's texts.

    Args:
        layer: after which block, or blocks, to read and to add; if None, two, about a quarter and three quarters up.
        damping: λ, in units of F's mean diagonal.
        step: length of the step at strength 1, at one layer. F overestimates the curvature, so that 1 falls short.
        common: how much of the population's mean gradient a vector has: 0 leaves the user's own part alone.
        positions: from which position on the vector is added, in reading as in steering.
        max_tokens: longer texts are cut.
        seed: of the texts that make F where there are more than 1,024.
    """

    name: ClassVar[str] = "natural_gradient"

    layer: int | Sequence[int] | None = None
    damping: float = 3.0
    step: float = 3.0
    common: float = 2.0
    positions: Positions = "response"
    max_tokens: int = 1024
    seed: int = 0

    def sites(self, lm: FrozenLM) -> list[Site]:
        """Where the vectors are read and added."""
        if self.layer is not None:
            return layer_sites(self.layer)
        return layer_sites(sorted({round(share * lm.n_layers) for share in _DEPTHS}))

    def train(
        self, lm: FrozenLM, histories: Iterable[History], on_progress: Callable[[float], None] | None = None
    ) -> Artifact:
        """Reads the gradients of a sample of all users' texts, which are F, and their mean.

        Args:
            lm: the model; no gradient is computed for its parameters.
            histories: of the population; the users to be fitted may be among them.
            on_progress: told from time to time what share of the texts is read.

        Raises:
            SteerError: there are fewer than two texts.
        """
        records = [record for history in histories for record in history]
        if len(records) < 2:
            raise SteerError(f"the Fisher information needs texts of a population, and there is {len(records)}")
        chosen = torch.randperm(len(records), generator=torch.Generator().manual_seed(self.seed))[:_SAMPLE].tolist()
        spans = [record_span(lm, records[i], max_tokens=self.max_tokens) for i in sorted(chosen)]
        gradients, tokens = response_gradients(
            lm, spans, self.sites(lm), positions=self.positions, on_progress=_share(on_progress, len(spans))
        )
        self.artifact = Artifact(
            method=self.name,
            version=self.version,
            model=lm.fingerprint,
            tensors=by_site(gradients),
            settings={
                "tokens": int(tokens.sum()),
                "positions": self.positions,
                "reference_norm": reference_norms(lm, spans[:_NORMS], self.sites(lm)),
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
        self, lm: FrozenLM, histories: Sequence[History], on_progress: Callable[[float], None] | None = None
    ) -> list[UserState]:
        """Reads many users' vectors, with texts of several users in a batch; each is what `fit` gives, to rounding."""
        artifact = self._population(lm)
        if empty := [history for history in histories if not len(history)]:
            raise SteerError(f"{empty[0].user_id!r} has no records to read a gradient from")
        sums, tokens = self._sums(lm, [list(history) for history in histories], on_progress)
        return [
            UserState(
                provenance=Provenance(
                    method=self.name,
                    version=self.version,
                    model=lm.fingerprint,
                    sites=tuple(str(site) for site in self.sites(lm)),
                    records=tuple(record.id for record in history),
                    settings=self._settings(artifact),
                    calibration={"reference_norm": artifact.settings["reference_norm"], "tokens": tokens[user]},
                ),
                tensors=by_site({site: vectors[user] for site, vectors in self._steps(sums, tokens).items()}),
            )
            for user, history in enumerate(histories)
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
        chosen = {key: getattr(self, key) for key in ("damping", "step", "common", "positions", "max_tokens")}
        return chosen | {"population": artifact.hash}

    def _population(self, lm: FrozenLM) -> Artifact:
        if self.artifact is None:
            raise SteerError("the population's gradients come first: call train(lm, histories), or use(lm, artifact)")
        self._require_model(lm, self.artifact)
        if missing := [site for site in self.sites(lm) if str(site) not in self.artifact.tensors]:
            raise SteerError(f"the population was not read at {missing[0]}; train again")
        if self.artifact.settings["positions"] != self.positions:
            raise SteerError(f"the population was read for positions {self.artifact.settings['positions']!r}")
        return self.artifact

    def _sums(
        self, lm: FrozenLM, users: Sequence[Sequence[Record]], on_progress: Callable[[float], None] | None = None
    ) -> tuple[dict[Site, Float[Tensor, "user d"]], list[int]]:
        """Each user's sum of gradients, and number of tokens."""
        spans = [record_span(lm, r, max_tokens=self.max_tokens) for records in users for r in records]
        owners = torch.tensor([user for user, records in enumerate(users) for _ in records])
        gradients, tokens = response_gradients(
            lm, spans, self.sites(lm), positions=self.positions, on_progress=_share(on_progress, len(spans))
        )
        counts = torch.zeros(len(users), dtype=tokens.dtype).index_add(0, owners, tokens)
        sums = {
            site: torch.zeros(len(users), rows.shape[1], dtype=torch.float64).index_add(0, owners, rows.double())
            for site, rows in gradients.items()
        }
        return sums, counts.long().tolist()

    def _steps(
        self, sums: Mapping[Site, Float[Tensor, "user d"]], tokens: Sequence[int]
    ) -> dict[Site, Float[Tensor, "user d"]]:
        assert self.artifact is not None
        total, counts = self.artifact.settings["tokens"], torch.tensor(tokens, dtype=torch.float64)[:, None]
        steps = {}
        for site, summed in sums.items():
            sample = self.artifact.tensors[str(site)].double()
            wanted = summed / counts + (self.common - 1) * sample.sum(0) / total
            steps[site] = -self.step / len(sums) ** 0.5 * natural_direction(wanted, sample, total, self.damping)
        return steps

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
        sums, (tokens,) = self._sums(lm, [records])
        before = source.calibration["tokens"]
        after = int(combine(before, tokens))
        # A step is linear in the mean gradient, so steps can be averaged as gradients can.
        new = self._steps(sums, [tokens])
        tensors = {
            site: combine(before * state.tensors[str(site)].double(), tokens * steps[0]) / after
            for site, steps in new.items()
        }
        calibration = dict(source.calibration) | {"tokens": after}
        return UserState(replace(source, records=ids, calibration=calibration), by_site(tensors))


def natural_direction(
    wanted: Float[Tensor, "user d"], gradients: Float[Tensor, "text d"], tokens: int, damping: float
) -> Float[Tensor, "user d"]:
    """`(F + λ · tr(F)/d · I)⁻¹ g` with `F = GᵀG / tokens`, by Woodbury's identity: texts are fewer than dimensions."""
    ridge = damping * gradients.square().sum() / (tokens * gradients.shape[1])
    gram = gradients @ gradients.T + tokens * ridge * torch.eye(len(gradients), dtype=gradients.dtype)
    inner = torch.linalg.solve(gram, gradients @ wanted.T)
    return (wanted - (gradients.T @ inner).T) / ridge


def _share(on_progress: Callable[[float], None] | None, total: int) -> Callable[[int], None] | None:
    return None if on_progress is None else lambda done: on_progress(done / total)
