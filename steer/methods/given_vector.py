"""GivenVector: vectors that were found elsewhere, added as they are.

    h'(x)_t = h(x)_t + α · v                                        at each site that has a vector, at every token t

repeng (https://github.com/vgel/repeng), llama.cpp and the package steering-vectors add their vectors in this way.
`steer.interop.vector_files` and `steer.interop.vector_objects` read them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, cast, get_args

import torch

from steer.errors import SteerError
from steer.history import History
from steer.inject import Edit, ResidualEdit
from steer.inject.positions import Positions, require_positions
from steer.method import Method, method_of
from steer.methods.vectors import by_site, vector_edits
from steer.sites import Site
from steer.state import Artifact, Provenance, UserState

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from steer.model import FrozenLM


@dataclass
class GivenVector(Method):
    """Vectors that were found elsewhere.

    Nothing is fitted: `state` makes states of vectors, `of` of other methods' states.

    Args:
        positions: where to add; by default at all tokens, which is what other programs do.

    Raises:
        SteerError: unknown positions.
    """

    name: ClassVar[str] = "given_vector"

    positions: Positions = "all"

    def __post_init__(self) -> None:
        require_positions(self.positions)

    def state(
        self,
        vectors: Mapping[Site, Float[Tensor, " d"]] | Mapping[str, Float[Tensor, " d"]],
        *,
        lm: FrozenLM | None = None,
        reference_norms: Mapping[str, float] | None = None,
        source: Mapping[str, Any] | None = None,
    ) -> UserState:
        """Makes a state of vectors.

        Args:
            vectors: one for each site, which may be written out: `resid_post[14]`.
            lm: the model they are for: widths are checked, and the state is refused by all others. Without it the state
                is taken by every model that has the sites in these widths.
            reference_norms: the median residual norms at the sites, if they are known; without them the state can be
                given a strength, and no dose.
            source: what else is to be kept, as JSON: where the vectors come from.

        Raises:
            SteerError: there is no vector, or one that is none; a site comes twice, or is not in the model; the widths
                do not fit; or a value is not finite.
        """
        own = _by_site(vectors)
        settings = {"positions": self.positions, "widths": [len(vector) for vector in own.values()]}
        provenance = Provenance(
            method=self.name,
            version=self.version,
            model=None if lm is None else lm.fingerprint,
            sites=tuple(map(str, own)),
            settings=settings,
            calibration={} if reference_norms is None else {"reference_norm": _norms(reference_norms, own)},
        )
        if lm is not None:
            _require_sites(lm, provenance)
        return UserState(provenance, by_site(own), {} if source is None else dict(source))

    @classmethod
    def of(cls, state: UserState, artifact: Artifact | None = None) -> UserState:
        """The vectors that a state of any method adds, as a state of this one, with the same model and positions.

        Args:
            state: of a method that does nothing but add vectors, such as `StyleVector`.
            artifact: the one that the state names, if any: a common vector becomes part of the user's.

        Raises:
            SteerError: the state does something else, or its artifact is missing.
        """
        wanted = state.provenance.artifact
        if wanted is not None and (artifact is None or artifact.hash != wanted):
            raise SteerError(
                f"a {state.provenance.method} state needs the artifact {wanted[:10]}… to tell what it adds"
            )
        method = method_of(state)
        edits = method.bind(cast("FrozenLM", _NoModel()), [state], state, artifact)
        vectors: dict[Site, Tensor] = {}
        places: set[str] = set()
        for edit in edits:
            if not isinstance(edit, ResidualEdit) or edit.keep_norm or edit.condition is not None:
                raise SteerError(f"a {method.name} state is no plain vector that could be added elsewhere")
            site = edit.site.canonical()
            vectors[site] = vectors[site] + edit.vectors[0] if site in vectors else edit.vectors[0]
            places.add(edit.positions if isinstance(edit.positions, str) else "")
        if len(places) != 1 or not places <= {*get_args(Positions)}:
            raise SteerError(f"a {method.name} state does not add all of its vectors at the same positions")
        source = state.provenance
        norms = source.calibration.get("reference_norm")
        given = cls(cast(Positions, places.pop())).state(vectors, reference_norms=norms, source=state.data)
        provenance = replace(given.provenance, model=source.model, records=source.records)
        return UserState(provenance, given.tensors, given.data)

    def fit(self, lm: FrozenLM, history: History) -> UserState:
        """Raises SteerError: these vectors are not fitted to texts."""
        raise SteerError("given vectors are found elsewhere and not fitted; make a state with GivenVector().state(...)")

    @classmethod
    def fits(cls, lm: FrozenLM, provenance: Provenance) -> bool:
        """Whether the model has the sites in the vectors' widths, as most of these states name no model."""
        return super().fits(lm, provenance) and not _misfit(lm, provenance)

    @classmethod
    def bind(
        cls, lm: FrozenLM, states: Sequence[UserState | None], like: UserState, artifact: Artifact | None
    ) -> list[Edit]:
        """One residual edit for each site.

        Raises:
            SteerError: the model has not these sites, or not in these widths.
        """
        if not isinstance(lm, _NoModel):
            _require_sites(lm, like.provenance)
        return vector_edits(states, like)


class _NoModel:
    """Stands for the model where only the vectors of a state are wanted."""

    def __getattr__(self, name: str) -> Any:
        raise SteerError("what this state does depends on the model, so it is no plain vector")


def _by_site(vectors: Mapping[Any, Tensor]) -> dict[Site, Tensor]:
    """The vectors in the order in which a forward pass comes to their sites, checked."""
    if not vectors:
        raise SteerError("there is no vector")
    found: dict[Site, Tensor] = {}
    for named, vector in vectors.items():
        site = Site.parse(named).canonical()
        if site in found:
            raise SteerError(f"there are two vectors for {site}, one of them as {named}")
        if vector.dim() != 1 or not vector.numel() or not vector.is_floating_point():
            shape, dtype = list(vector.shape), str(vector.dtype).removeprefix("torch.")
            raise SteerError(f"what is given for {site} is no vector but {dtype} {shape}; expected floats [d]")
        found[site] = vector.detach().float()
        # After the cast, which a large float64 does not survive.
        if not torch.isfinite(found[site]).all():
            raise SteerError(f"the vector for {site} has values that are not finite")
    # Heads may be wider or narrower together than the stream, and OPT's embeddings are narrower at times.
    widths = {site: len(vector) for site, vector in found.items() if site.layer is not None and site.name != "z"}
    if len(set(widths.values())) > 1:
        narrow, wide = min(widths, key=widths.__getitem__), max(widths, key=widths.__getitem__)
        raise SteerError(f"the vector for {narrow} is {widths[narrow]} wide, that for {wide} {widths[wide]}")
    return dict(sorted(found.items(), key=lambda item: item[0].depth))


def _norms(norms: Mapping[str, float], vectors: Mapping[Site, Tensor]) -> dict[str, float]:
    known = {Site.parse(named).canonical(): float(norm) for named, norm in norms.items()}
    for site in vectors:
        if not (site in known and math.isfinite(known[site]) and known[site] > 0):
            raise SteerError(f"reference norms are above 0, one for each site; for {site} it is {known.get(site)}")
    return {str(site): known[site] for site in vectors}


def _require_sites(lm: FrozenLM, provenance: Provenance) -> None:
    if misfit := _misfit(lm, provenance):
        raise SteerError(misfit)


def _misfit(lm: FrozenLM, provenance: Provenance) -> str:
    """Why a model cannot take the vectors; empty if it can."""
    for site, width in zip(map(Site.parse, provenance.sites), provenance.settings["widths"], strict=True):
        try:
            lm.attachment.place_of(site)
        except SteerError as error:
            return str(error)
        if width != lm.width_at(site):
            return f"vectors for {site} are {width} wide, the model is {lm.width_at(site)} wide there"
    return ""
