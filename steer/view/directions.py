"""Directions to look at: vectors, or the vectors that users' states hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from steer.errors import SteerError
from steer.sites import Site
from steer.state import UserState

if TYPE_CHECKING:
    from jaxtyping import Float

    from steer.model import FrozenLM

# One vector, a user's state, or several of them by name.
Directions = Tensor | UserState | Mapping[str, Tensor | UserState]


def vectors_of(directions: Directions, site: Site | str | None = None) -> tuple[Site | None, dict[str, Tensor]]:
    """The vectors by name, in float32 on the CPU, and the site that they belong to.

    A state's vectors are the tensors that are named after one of its sites.

    Args:
        directions: a single vector is named "direction", a single state by its method.
        site: which of a state's vectors; needed only where states have several, or where they have different ones.

    Raises:
        SteerError: there is no vector, or not at that site; or the sites differ and none is named.
    """
    if isinstance(directions, Tensor):
        directions = {"direction": directions}
    elif isinstance(directions, UserState):
        directions = {directions.provenance.method: directions}
    if not directions:
        raise SteerError("there is nothing to look at: give at least one direction")
    wanted = None if site is None else Site.parse(site).canonical()
    known: set[Site] = set()
    for name, direction in directions.items():
        if isinstance(direction, UserState):
            known |= _sites(name, direction)
    if wanted is None and len(known) > 1:
        raise SteerError(f"these states have vectors at {_listed(known)}; name the site")
    wanted = wanted or next(iter(known), None)
    return wanted, {name: _vector(name, direction, wanted) for name, direction in directions.items()}


def require_fit(lm: FrozenLM, directions: Directions, vectors: Mapping[str, Tensor], width: int) -> None:
    """Raises SteerError unless the vectors belong to the model, are that wide, finite, and not zero."""
    states = {"": directions} if isinstance(directions, UserState) else directions
    for name, state in states.items() if isinstance(states, Mapping) else ():
        if isinstance(state, UserState) and state.provenance.model not in (None, lm.fingerprint):
            raise SteerError(
                f"the state {name!r} was read from {state.provenance.model}; this model is {lm.fingerprint}"
            )
    for name, vector in vectors.items():
        if vector.shape != (width,):
            raise SteerError(f"{name!r} has the shape {tuple(vector.shape)}; a direction is {width} wide there")
        if not torch.isfinite(vector).all():
            raise SteerError(f"{name!r} has values that are not finite")
        if not vector.any():
            raise SteerError(f"{name!r} is zero, which points nowhere")


def _sites(name: str, state: UserState) -> set[Site]:
    found = {Site.parse(site) for site in state.provenance.sites if site in state.tensors}
    if not found:
        raise SteerError(f"{name!r} is a {state.provenance.method} state, which holds no vector at a site")
    return found


def _vector(name: str, direction: Tensor | UserState, site: Site | None) -> Float[Tensor, " d"]:
    if isinstance(direction, UserState):
        if str(site) not in direction.tensors:
            raise SteerError(f"{name!r} has no vector at {site}; it has some at {_listed(_sites(name, direction))}")
        direction = direction.tensors[str(site)]
    return direction.detach().float().cpu()


def _listed(sites: set[Site]) -> str:
    return ", ".join(sorted(map(str, sites), key=lambda text: (len(text), text)))
