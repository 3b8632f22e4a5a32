"""RepE: the direction along which two answers differ most, over many pairs.

Zou et al., "Representation Engineering: A Top-Down Approach to AI Transparency", 2023, arXiv 2310.01405, linear
artificial tomography (LAT). At each layer, with h⁺ and h⁻ the residual stream at the last token of the two answers:

    Δ_i = ε_i · ( h_l(x_i ⊕ y_i⁺) − h_l(x_i ⊕ y_i⁻) ),   v_l = ± first principal component of { Δ_i − mean Δ }

The signs ε_i shuffle which side comes first; without them the centring would remove the very direction that is sought.
The paper draws them, here they alternate. A principal component has no sign: v points to where more of the positive
answers lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from steer.errors import SteerError
from steer.history import History
from steer.inject import Edit
from steer.inject.positions import Positions, require_positions
from steer.method import Method
from steer.methods.vectors import by_site, layer_sites, vector_edits
from steer.pairs import Pair, pairs_of
from steer.read import read, response_span
from steer.sites import Site
from steer.state import Artifact, Provenance, UserState

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from steer.model import FrozenLM


@dataclass
class RepEPCA(Method):
    """First principal component of the recentred differences, at several layers.

    Args:
        layer: after which block, or blocks, to read and to add; the paper takes many.
        rejected: the key of a record that holds the answer which its response was preferred to.
        unit: whether vectors have length 1, as in the paper, and need a dose or a large strength; else they have that
            of the mean difference, so that a strength means what it does for CAA.
        positions: from which position on to add; the paper's is "all".

    Raises:
        SteerError: no layer, or unknown positions.
    """

    name: ClassVar[str] = "repe_pca"

    layer: int | Sequence[int]
    rejected: str = "rejected"
    unit: bool = False
    positions: Positions = "response"

    def __post_init__(self) -> None:
        layer_sites(self.layer)
        require_positions(self.positions)

    @property
    def sites(self) -> list[Site]:
        """Where the vectors are read and added."""
        return layer_sites(self.layer)

    def fit(self, lm: FrozenLM, history: History) -> UserState:
        """Reads the vectors of a person's choices: what they preferred, and what they preferred it to.

        Raises:
            SteerError: there are fewer than two records, or a record has no prompt or no other answer.
        """
        return self.fit_pairs(lm, pairs_of(history, self.rejected), records=[record.id for record in history])

    def fit_pairs(self, lm: FrozenLM, pairs: Sequence[Pair], *, records: Sequence[str] = ()) -> UserState:
        """Reads the vectors of a behaviour.

        Args:
            lm: the model.
            pairs: two answers to each prompt.
            records: ids for the state's provenance.

        Raises:
            SteerError: there are fewer than two pairs, or the answers do not differ.
        """
        if len(pairs) < 2:
            raise SteerError(f"a principal component needs two pairs at least, and there is {len(pairs)}")
        spans = [response_span(lm, pair.positive, pair.prompt) for pair in pairs]
        spans += [response_span(lm, pair.negative, pair.prompt) for pair in pairs]
        readings = read(lm, spans, self.sites, pool="last")
        vectors, agreement = {}, {}
        for site, reading in readings.items():
            differences = (reading.pooled[: len(pairs)] - reading.pooled[len(pairs) :]).double()
            direction = lat_direction(differences)
            agreement[str(site)] = (differences @ direction > 0).double().mean().item()
            vectors[site] = direction if self.unit else direction * differences.mean(0).norm()
        return UserState(
            provenance=Provenance(
                method=self.name,
                version=self.version,
                model=lm.fingerprint,
                sites=tuple(str(site) for site in self.sites),
                records=tuple(records),
                settings={"unit": self.unit, "positions": self.positions},
                calibration={
                    "reference_norm": {str(site): reading.norm for site, reading in readings.items()},
                    "agreement": agreement,
                },
            ),
            tensors=by_site(vectors),
        )

    @classmethod
    def bind(
        cls, lm: FrozenLM, states: Sequence[UserState | None], like: UserState, artifact: Artifact | None
    ) -> list[Edit]:
        """One residual edit for each layer."""
        return vector_edits(states, like)


def lat_direction(differences: Float[Tensor, "pair d"]) -> Float[Tensor, " d"]:
    """The paper's direction of differences, positive minus negative: of length 1, in float64.

    Unlike `steer.encoders.principal_direction`, StyleVector's, it turns every other difference round and centres them,
    and it points to where most of them lie, not to their mean.

    Raises:
        SteerError: there is no such direction, as the differences are all the same up to sign, or zero.
    """
    shuffled = differences.double().clone()
    shuffled[1::2] *= -1
    centred = shuffled - shuffled.mean(0)
    if not centred.any():
        raise SteerError("the pairs' answers do not differ where they are read, so there is no direction")
    direction = torch.linalg.svd(centred, full_matrices=False).Vh[0]
    sides = (differences.double() @ direction).sign()
    return direction if sides.mean() >= 0 else -direction
