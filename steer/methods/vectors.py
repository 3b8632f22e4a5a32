"""States that are one vector at each of some sites: how they are written down, bound, and follow their users."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
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
_NORM_TEXTS, _FISHER_TEXTS = 64, 8


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
    sample = _some(spans, _NORM_TEXTS)
    return {str(site): reading.norm for site, reading in read(lm, sample, sites, cache=cache).items()}


def _some(spans: Sequence[Span], most: int) -> Sequence[Span]:
    """At most so many of them, at even distances."""
    return spans[:: max(-(-len(spans) // most), 1)]


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
    """How long a vector of random direction is that, on average, moves a prediction by about half a nat, for each user.

    At each site by itself it is √(d / tr F), F = 1/T · Σ_i ∇_i ∇_iᵀ over at most eight of the user's texts: the mean of
    ½ vᵀFv is ½ then. As a share of the residual norm this is about 0.3 in SmolLM2 135M and 0.02 in Gemma 3 270M, whose
    norm is that of a few large elements. It is never more than the residual norm, where F has long ceased to tell.

    Args:
        lm: the model.
        texts: of each user.
        sites: where vectors are added.
        norms: the residual's reference norms at the sites, for each user.
        positions: from which position on.
        common: vectors that are added already, by the names of the sites.
        cache: for the gradients.

    Raises:
        SteerError: a gradient is not finite.
    """
    samples = [_some(spans, _FISHER_TEXTS) for spans in texts]
    at = None if common is None else {site: common[str(site)] for site in sites}
    gradients, tokens = response_gradients(
        lm, [span for sample in samples for span in sample], sites, at=at, positions=positions, cache=cache
    )
    counts = [len(sample) for sample in samples]
    units: list[dict[str, float]] = [{} for _ in texts]
    for site, rows in gradients.items():
        for user, (own, lengths) in enumerate(zip(rows.split(counts), tokens.split(counts), strict=True)):
            trace = (own.double().square().sum() / lengths.sum()).item()
            if not math.isfinite(trace):
                raise SteerError(f"gradients at {site} are not finite in {lm.dtype}; load the model in torch.float32")
            norm = norms[user][str(site)]
            units[user][str(site)] = min(math.sqrt(rows.shape[1] / trace), norm) if trace else norm
    return units


@dataclass(frozen=True)
class TrainedVectors:
    """What came of training vectors for some users.

    Attributes:
        vectors: at each site, one for each user.
        steps: after how many steps each user's vectors were kept.
    """

    vectors: Mapping[Site, Float[Tensor, "user d"]]
    steps: list[int]


def train_vectors(
    lm: FrozenLM,
    texts: Sequence[Sequence[Span]],
    sites: Sequence[Site],
    *,
    units: Sequence[Mapping[str, float]],
    positions: Positions,
    common: Mapping[str, Float[Tensor, " d"]] | None = None,
    longest: Sequence[Mapping[str, float]] | None = None,
    on_step: Callable[[int, float], None] | None = None,
    **settings: Any,
) -> TrainedVectors:
    """Trains vectors that make each user's texts likely.

    Args:
        lm: the model; no gradient is computed for its parameters.
        texts: of each user.
        sites: where the vectors are added.
        units: of the learning rate at the sites, for each user: `training_units`.
        positions: from which position on.
        common: vectors that are added to everybody's, by the names of the sites.
        longest: bounds of the vectors' norms at the sites, for each user; None for no bound.
        on_step: told the number of each step and the users' mean loss, in nats per token.
        settings: of `train_users`.
    """
    # Elements are trained, of vectors as long as a unit where they are about 1.
    elements = {site: torch.zeros(len(texts), lm.width_at(site), device=lm.device) for site in sites}
    scales = {site: _column(units, site, values) / values.shape[1] ** 0.5 for site, values in elements.items()}
    bounds = {site: _column(longest, site, values) for site, values in elements.items()} if longest else {}

    def edits(users: Tensor) -> list[Edit]:
        own = {site: scales[site][users] * elements[site][users] for site in sites}
        if common is not None:
            own = {site: vectors + common[str(site)].to(vectors) for site, vectors in own.items()}
        return [ResidualEdit(site, vectors, positions) for site, vectors in own.items()]

    def shorten() -> None:
        for site, bound in bounds.items():
            norms = (scales[site] * elements[site]).norm(dim=1, keepdim=True)
            elements[site].mul_(torch.where(norms > bound, bound / norms, 1.0))

    kept = train_users(
        lm,
        texts,
        [values.requires_grad_(True) for values in elements.values()],
        edits,
        constrain=shorten,
        on_step=None if on_step is None else lambda step, losses: on_step(step, float(losses.nanmean())),
        **settings,
    )
    return TrainedVectors({site: scales[site] * values.detach() for site, values in elements.items()}, kept)


def _column(
    values: Sequence[Mapping[str, float]], site: Site, like: Float[Tensor, "user d"]
) -> Float[Tensor, "user 1"]:
    """Each user's value at a site."""
    return torch.tensor([own[str(site)] for own in values]).to(like)[:, None]


def vector_edits(states: Sequence[UserState | None], like: UserState, artifact: Artifact | None = None) -> list[Edit]:
    """One residual edit for each site of the states; rows of None get zeros.

    Args:
        states: each holds a vector `[d]` under each of its sites' names, `positions` in its settings, and the reference
            norms in its calibration if they are known; a batch in which one has none can be given no dose.
        like: a state of the same kind.
        artifact: holds vectors that are added to those of every row that has a state.

    Raises:
        SteerError: the vectors at a site are not all of one width.
    """
    return [_edit(site, states, like, artifact) for site in like.provenance.sites]


def _edit(site: str, states: Sequence[UserState | None], like: UserState, artifact: Artifact | None) -> ResidualEdit:
    zero = torch.zeros(like.tensors[site].shape[-1])
    common = zero if artifact is None else artifact.tensors[site].float()
    references = [
        {site: float("nan")} if state is None else state.provenance.calibration.get("reference_norm", {})
        for state in states
    ]
    known = all(site in norms for norms in references)
    widths = {state.tensors[site].shape[-1] for state in states if state is not None} | {len(zero), len(common)}
    if len(widths) > 1:
        raise SteerError(
            f"vectors for {site} are {' and '.join(map(str, sorted(widths)))} wide, so some are of another model"
        )
    return ResidualEdit(
        site=Site.parse(site),
        vectors=torch.stack([zero if state is None else state.tensors[site].float() + common for state in states]),
        positions=like.provenance.settings["positions"],
        reference_norms=torch.tensor([norms[site] for norms in references]) if known else None,
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
