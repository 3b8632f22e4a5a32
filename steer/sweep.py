"""Sweeps: where in the model, and how strongly, users' vectors make what they wrote later most likely."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from steer.errors import SteerError
from steer.history import History
from steer.inject import MemoryEdit, SiteEdit
from steer.plan import edits_of
from steer.read import record_span
from steer.score import require_unseen, row_losses
from steer.sites import Site
from steer.state import Artifact, UserState
from steer.view.sweep import Sweep

if TYPE_CHECKING:
    from steer.inject import Edit
    from steer.model import FrozenLM


def sweep(
    lm: FrozenLM,
    histories: Iterable[History],
    states: Mapping[str, UserState],
    *,
    strengths: Sequence[float] | None = None,
    doses: Sequence[float] | None = None,
    others: int = 0,
    artifacts: Mapping[str, Artifact] | None = None,
    seed: int = 0,
    max_tokens: int = 1024,
    on_progress: Callable[[int], None] | None = None,
) -> Sweep:
    """Scores users' records under one site of their state at a time, at every strength.

    At each site the strengths, and the states compared with, are rows of one forward pass.

    Args:
        lm: the model.
        histories: the records to score, of users who have a state; none of them may have gone into their own.
        states: one for each user, with vectors at the sites to compare, such as `StyleVector(layer=[4, 8, 12])` fits.
        strengths, doses: the amounts of each vector; one of the two.
        others: how many other users' states to compare with, drawn for each user anew; all if there are fewer.
        artifacts: what the states' methods share, by hash.
        seed: of the draw.
        max_tokens: longer records are cut.
        on_progress: told the number of records done.

    Raises:
        SteerError: there is nothing to score or no amount to score at, a record was among those that its user's state
            was fitted on, the states are of several kinds, or one of their sites has no edit.
    """
    histories = [history for history in histories if len(history)]
    if not histories:
        raise SteerError("there are no records to score")
    if (strengths is None) == (doses is None):
        raise SteerError("give either strengths or doses to compare")
    amounts = list(strengths if strengths is not None else doses or [])
    if not amounts:
        raise SteerError("there is no strength to compare; give at least one")
    require_unseen(histories, states)
    sites, others = _sites(states), min(others, len(states) - 1)
    rng, done = np.random.default_rng(seed), 0
    shape = (len(histories), len(sites), len(amounts))
    own, other, base, tokens = torch.zeros(shape), torch.zeros(shape), torch.zeros(len(histories)), []
    for i, history in enumerate(histories):
        strangers = sorted(set(states) - {history.user_id})
        compared = [history.user_id, *(strangers[j] for j in rng.permutation(len(strangers))[:others])]
        rows = [{}, *({"state": states[user]} for user in compared for _ in amounts)]
        scale = [0.0, *amounts * len(compared)]
        strength, dose = (scale, None) if doses is None else (None, scale)
        edits = edits_of(lm, rows, artifacts=artifacts, strength=strength, dose=dose)
        sums, count = torch.zeros(len(sites), len(rows), dtype=torch.float64), 0
        for record in history:
            span = record_span(lm, record, max_tokens=max_tokens)
            for j, site in enumerate(sites):
                sums[j] += row_losses(lm, span, _at(edits, site), len(rows)).double()
            count += span.end - max(span.start, 1)
            done += 1
            if on_progress is not None:
                on_progress(done)
        means = sums / count
        # The plain row of each forward pass is the one that its other rows are compared with.
        change = (means[:, 1:] - means[:, :1]).unflatten(1, (len(compared), len(amounts)))
        own[i], base[i] = change[:, 0], means[0, 0]
        other[i] = change[:, 1:].mean(1) if others else 0
        tokens.append(count)
    return Sweep(
        users=tuple(history.user_id for history in histories),
        sites=tuple(sites),
        amounts=tuple(amounts),
        unit="strength" if doses is None else "dose",
        base=base,
        own=own,
        other=other if others else None,
        others=others,
        tokens=tuple(tokens),
    )


def _sites(states: Mapping[str, UserState]) -> list[Site]:
    kinds = {state.provenance.sites for state in states.values()}
    if len(kinds) > 1:
        raise SteerError("these states are at different sites, so no sweep over sites could compare them")
    if not any(kinds):
        raise SteerError("these states enter at no site of the residual stream, so there is nothing to sweep over")
    return [Site.parse(site).canonical() for site in next(iter(kinds))]


def _at(edits: Sequence[Edit], site: Site) -> Sequence[Edit]:
    found = [edit for edit in edits if isinstance(edit, SiteEdit | MemoryEdit) and edit.site.canonical() == site]
    if not found:
        raise SteerError(f"these states change nothing at {site}, so it cannot be compared with other sites")
    return found
