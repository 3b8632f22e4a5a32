"""States that are one vector at each of some sites: how they are written down, bound, and follow their users."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from steer.errors import SteerError
from steer.history import Record
from steer.inject import Edit, ResidualEdit
from steer.likelihood import response_gradients
from steer.read import Span, read
from steer.sites import Site
from steer.state import Artifact, UserState
from steer.train import train_users

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from steer.cache import Cache
    from steer.inject.positions import Positions
    from steer.model import FrozenLM


# Of many texts, so many say how long the residual stream is, and so many how much a vector moves predictions.
_NORMS, _MOVED = 64, 8


def layer_sites(layer: int | Sequence[int], name: str = "resid_post") -> list[Site]:
    """A site of one block, or of several, each once; by default the residual stream after the block.

    Raises:
        SteerError: no block is named, or one by anything but its number.
    """
    layers = list(layer) if isinstance(layer, Sequence) else [layer]
    if not layers or not all(isinstance(at, int) and not isinstance(at, bool) for at in layers):
        raise SteerError(f"layer={layer!r} names no block, or not by its number; give layer=14, or layer=[8, 14]")
    return [Site(name, at) for at in dict.fromkeys(layers)]


def by_site(values: Mapping[Site, Float[Tensor, " d"]]) -> dict[str, Float[Tensor, " d"]]:
    """A state's tensors: float32, on the CPU, under the names of their sites."""
    return {str(site): value.detach().float().cpu() for site, value in values.items()}


def reference_norms(
    lm: FrozenLM, spans: Sequence[Span], sites: Sequence[Site], cache: Cache | None = None
) -> dict[str, float]:
    """The median residual norm over the texts' tokens at each site, from 64 of many texts: the unit of a dose."""
    sample = spans[:: -(-len(spans) // _NORMS)]
    return {str(site): reading.norm for site, reading in read(lm, sample, sites, cache=cache).items()}


def training_units(
    lm: FrozenLM,
    texts: Sequence[Sequence[Span]],
    sites: Sequence[Site],
    *,
    norms: Sequence[Mapping[str, float]],
    positions: Positions,
    common: Mapping[str, Float[Tensor, " d"]] | None = None,
    cache: Cache | None = None,
) -> list[dict[str, float]]:
    """How long a vector of any direction is that moves predictions by about half a nat per token, for each user.

    It is √(d / tr F) at each site, F = 1/T · Σ_i ∇_i ∇_iᵀ over eight of the user's texts: E ½ vᵀFv = ½. In units of the
    residual norm it is 0.3 for one model and 0.02 for another, whose norm is that of a few large elements. It is the
    residual norm at most, as far as which nothing is nearly quadratic.

    Args:
        lm: the model.
        texts: of each user.
        sites: where vectors are added.
        norms: the residual's reference norms at the sites, for each user.
        positions: from which position on.
        common: vectors that are added already, by the names of the sites.
        cache: for the gradients.
    """
    samples = [spans[:: -(-len(spans) // _MOVED)] for spans in texts]
    at = None if common is None else {site: common[str(site)] for site in sites}
    gradients, tokens = response_gradients(
        lm, [span for sample in samples for span in sample], sites, at=at, positions=positions, cache=cache
    )
    units: list[dict[str, float]] = []
    ends = list(accumulate(map(len, samples)))
    for norm, start, end in zip(norms, [0, *ends], ends, strict=False):
        unit = {}
        for site, rows in gradients.items():
            trace = rows[start:end].square().sum() / tokens[start:end].sum()
            unit[str(site)] = min(math.sqrt(rows.shape[1] / trace), norm[str(site)])
        units.append(unit)
    return units


@dataclass(frozen=True)
class TrainedVectors:
    """What came of training vectors for some users.

    Attributes:
        vectors: at each site, one for each user.
        steps: after how many steps each user's vectors were kept.
        units: of the learning rate, for each user at each site.
    """

    vectors: Mapping[Site, Float[Tensor, "user d"]]
    steps: list[int]
    units: list[dict[str, float]]


def train_vectors(
    lm: FrozenLM,
    texts: Sequence[Sequence[Span]],
    sites: Sequence[Site],
    *,
    norms: Sequence[Mapping[str, float]],
    positions: Positions,
    common: Mapping[str, Float[Tensor, " d"]] | None = None,
    max_dose: float | None = None,
    on_step: Callable[[int, float], None] | None = None,
    cache: Cache | None = None,
    **settings: Any,
) -> TrainedVectors:
    """Trains vectors that make each user's texts likely; the learning rate is in `training_units`.

    Args:
        lm: the model; no gradient is computed for its parameters.
        texts: of each user.
        sites: where the vectors are added.
        norms: the residual's reference norms at the sites, for each user.
        positions: from which position on.
        common: vectors that are added to everybody's, by the names of the sites.
        max_dose: bound of a vector's norm, in units of the residual norms; None for no bound.
        on_step: told the number of each step and the users' mean loss, in nats per token.
        cache: for the gradients that say what the units are.
        settings: of `train_users`.
    """
    units = training_units(lm, texts, sites, norms=norms, positions=positions, common=common, cache=cache)
    # Elements are trained, of vectors as long as a unit where they are about 1.
    elements = {site: torch.zeros(len(texts), lm.width_at(site), device=lm.device) for site in sites}
    scales = {site: _column(units, site, values) / values.shape[1] ** 0.5 for site, values in elements.items()}

    def edits(users: Tensor) -> list[Edit]:
        own = {site: scales[site][users] * elements[site][users] for site in sites}
        if common is not None:
            own = {site: vectors + common[str(site)].to(vectors) for site, vectors in own.items()}
        return [ResidualEdit(site, vectors, positions) for site, vectors in own.items()]

    def bound() -> None:
        assert max_dose is not None
        for site, values in elements.items():
            doses = scales[site] * values.norm(dim=1, keepdim=True) / _column(norms, site, values)
            values.mul_((max_dose / doses).clamp(max=1))

    kept = train_users(
        lm,
        texts,
        [values.requires_grad_(True) for values in elements.values()],
        edits,
        constrain=None if max_dose is None else bound,
        on_step=None if on_step is None else lambda step, losses: on_step(step, float(losses.nanmean())),
        **settings,
    )
    vectors = {site: scales[site] * values.detach() for site, values in elements.items()}
    return TrainedVectors(vectors, kept, units)


def _column(
    values: Sequence[Mapping[str, float]], site: Site, like: Float[Tensor, "user d"]
) -> Float[Tensor, "user 1"]:
    """Each user's value at a site."""
    return torch.tensor([own[str(site)] for own in values]).to(like)[:, None]


def vector_edits(states: Sequence[UserState | None], like: UserState, artifact: Artifact | None = None) -> list[Edit]:
    """One residual edit for each site of the states; rows of None get zeros.

    Args:
        states: each holds a vector `[d]` under each of its sites' names, the reference norms in its calibration, and
            `positions` in its settings.
        like: a state of the same kind.
        artifact: holds vectors that are added to those of every row that has a state.
    """
    return [_edit(site, states, like, artifact) for site in like.provenance.sites]


def _edit(site: str, states: Sequence[UserState | None], like: UserState, artifact: Artifact | None) -> ResidualEdit:
    zero = torch.zeros(like.tensors[site].shape[-1])
    common = zero if artifact is None else artifact.tensors[site].float()
    norms = [
        float("nan") if state is None else state.provenance.calibration["reference_norm"][site] for state in states
    ]
    return ResidualEdit(
        site=Site.parse(site),
        vectors=torch.stack([zero if state is None else state.tensors[site].float() + common for state in states]),
        positions=like.provenance.settings["positions"],
        reference_norms=torch.tensor(norms),
    )


def ids_of_new(records: Sequence[Record], known: Collection[str]) -> tuple[str, ...]:
    """Ids of records that come to a state. Raises SteerError for one that is among the known, or comes twice."""
    ids = tuple(record.id for record in records)
    if twice := [id for id, times in Counter(ids).items() if id in known or times > 1]:
        raise SteerError(f"record {twice[0]!r} is in the state already, and would count twice")
    return ids


def ids_left(counted: Sequence[str], records: Sequence[Record], left_out: Collection[str] = ()) -> tuple[str, ...]:
    """Which of the ids that count stay in a state when some records go.

    Raises:
        SteerError: a record is neither among those that count nor among those left out, or none would be left.
    """
    going = {record.id for record in records}
    if strange := going - {*counted, *left_out}:
        raise SteerError(f"record {min(strange)!r} is not in the state, so it cannot be taken out")
    left = tuple(id for id in counted if id not in going)
    if not left:
        raise SteerError("no record would be left; delete the state instead")
    return left


def require_equal(theirs: Sequence[Any], ours: Sequence[Any]) -> None:
    """Raises SteerError, naming the first difference, unless a state was fitted as the method would fit it now."""
    if different := [pair for pair in zip(theirs, ours, strict=True) if pair[0] != pair[1]]:
        there, here = different[0]
        raise SteerError(f"the state was not fitted by this method as it is now: {there} there, {here} here")
