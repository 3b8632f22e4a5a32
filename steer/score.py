"""Scoring: how likely what users wrote later is under their own states, under others', and under none.

The states are rows of one batch over the same text, so that a gain is a difference within one forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from steer.branches import Branches
from steer.errors import SteerError
from steer.history import History, Record
from steer.inject import Condition, Edit, KeyValueEdit, PrefixEdit, StreamEdit
from steer.inject.prompts import with_prompts
from steer.likelihood import response_losses
from steer.mixed import heads_of, mixed_losses
from steer.plan import Amount, Plan, edits_of
from steer.read import Span, record_span
from steer.state import Artifact, UserState

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from steer.model import FrozenLM

_RESAMPLES = 10_000


@torch.no_grad()
def row_losses(
    lm: FrozenLM,
    span: Span,
    edits: Sequence[Edit],
    rows: int,
    *,
    models: Mapping[str, FrozenLM] | None = None,
    batch_tokens: int = 2048,
) -> Float[Tensor, " row"]:
    """−log p of a span under each row of the edits, in nats, summed over its tokens.

    Args:
        lm: the model.
        span: one text for all rows.
        edits: of `rows` rows each.
        rows: how many.
        models: others whose logits take part in mixtures.
        batch_tokens: tokens, over all rows, that one forward pass may have.

    Raises:
        SteerError: some edits mix streams and others do not, there is no prompt that a context could stand before, or
            neighbours are to be mixed in.
    """
    edits = with_prompts(edits, [span.prompt or ""] * rows)
    plan = _plan_of(lm, edits, rows, models)
    if plan.mixes and plan.streams is not None:
        return mixed_losses(lm, span, plan.streams.mixtures, models=models, batch_tokens=batch_tokens)
    if lm.is_encoder_decoder or any(isinstance(edit, PrefixEdit | KeyValueEdit) for edit in edits):
        return _prefixed_losses(lm, span, edits, rows, batch_tokens)
    branches = Branches(lm, plan)
    branches.open()
    try:
        losses = branches.losses(span, batch_tokens=batch_tokens).sum(1)
    except BaseException:
        branches.close(check=False)
        raise
    branches.close()
    return losses


def _plan_of(lm: FrozenLM, edits: Sequence[Edit], rows: int, models: Mapping[str, FrozenLM] | None) -> Plan:
    """Raises SteerError unless rows can be scored under these edits."""
    plan = Plan.of(lm, edits, rows, models)
    if plan.neighbours:
        raise SteerError("neighbours are mixed in while a model generates, and cannot be scored yet")
    mixtures = () if plan.streams is None else plan.streams.mixtures
    if any(mixture is not None and mixture.rules_out for mixture in mixtures):
        raise SteerError(
            "a mixture that rules tokens out gives a text with one of them no probability at all; score it without its "
            "filter: DExperts(..., top_p=1), or floor=0 and nucleus=1 of a Mixture"
        )
    if plan.mixes and any(not isinstance(edit, StreamEdit) for edit in edits):
        raise SteerError("states that contrast contexts are scored alone; choose them, or others, by name")
    return plan


def _prefixed_losses(
    lm: FrozenLM, span: Span, edits: Sequence[Edit], rows: int, batch_tokens: int
) -> Float[Tensor, " row"]:
    """The same where rows share nothing: a prefix makes another text of each, or they have an encoder to read them."""
    prefixes = [edit for edit in edits if isinstance(edit, PrefixEdit | KeyValueEdit)]
    longest = span.end + sum(int(edit.lengths.max()) for edit in prefixes)
    parts = torch.arange(rows).split(max(batch_tokens // longest, 1))
    losses = [response_losses(lm, [span] * len(part), [_only(part, edit) for edit in edits])[0].cpu() for part in parts]
    return torch.cat(losses)


def _only(rows: Int[Tensor, " row"], edit: Any) -> Any:
    """An edit, or the condition of one, for some of its rows: each of its tensors has an entry a row."""
    values = {part.name: getattr(edit, part.name) for part in fields(edit)}
    own = {name: value[rows] for name, value in values.items() if isinstance(value, Tensor)}
    own |= {name: _only(rows, value) for name, value in values.items() if isinstance(value, Condition)}
    return replace(edit, **own)


@dataclass(frozen=True)
class UserScore:
    """Negative log-likelihood of one user's scored records, in nats per token.

    Attributes:
        user: whose records these are.
        base: without steering.
        own: under the user's own state.
        others: under the states of others, by user.
        tokens: how many were scored.
    """

    user: str
    base: float
    own: float
    others: Mapping[str, float]
    tokens: int

    @property
    def other_mean(self) -> float | None:
        """Mean over the others' states; None if there are none."""
        return float(np.mean(list(self.others.values()))) if self.others else None


@dataclass(frozen=True)
class Scores:
    """Scores of many users, each of whom counts once."""

    users: Sequence[UserScore]

    def totals(self, *, seed: int = 0) -> dict[str, Any]:
        """Means over users with 95 % bootstrap intervals over users, in nats per token.

        `own_minus_base` below zero says that states help, `own_minus_other` below zero that they are personal. `top1`
        is the share of users whose records are likelier under their own state than under any of the others'.
        """
        rng = np.random.default_rng(seed)
        own, base = (np.array([getattr(score, name) for score in self.users]) for name in ("own", "base"))
        totals: dict[str, Any] = {
            "users": len(self.users),
            "tokens": sum(score.tokens for score in self.users),
            "own_minus_base": _interval(own - base, rng),
            "better_than_base": float(np.mean(own < base)),
        }
        if all(score.others for score in self.users):
            other = np.array([score.other_mean for score in self.users])
            best = np.array([min(score.others.values()) for score in self.users])
            totals |= {
                "others": min(len(score.others) for score in self.users),
                "other_minus_base": _interval(other - base, rng),
                "own_minus_other": _interval(own - other, rng),
                "own_beats_others": float(np.mean(own < other)),
                "top1": float(np.mean(own < best)),
            }
        return totals

    def to_json(self) -> dict[str, Any]:
        """As `steer score --json` writes it."""
        return {
            "users": {
                score.user: {
                    "nll_base": score.base,
                    "nll_own": score.own,
                    "nll_other_mean": score.other_mean,
                    "n_tokens": score.tokens,
                }
                for score in self.users
            },
            "totals": self.totals(),
        }


def score(
    lm: FrozenLM,
    histories: Iterable[History],
    states: Mapping[str, UserState],
    *,
    others: int = 8,
    strength: Amount | None = None,
    dose: Amount | None = None,
    artifacts: Mapping[str, Artifact] | None = None,
    models: Mapping[str, FrozenLM] | None = None,
    seed: int = 0,
    max_tokens: int = 1024,
    on_progress: Callable[[int], None] | None = None,
) -> Scores:
    """Scores users' records under no steering, their own states, and states of others.

    Args:
        lm: the model.
        histories: the records to score, of users who have a state; none of them may have gone into their own.
        states: one for each user.
        others: how many other users' states to compare with, drawn for each user anew; all if there are fewer.
        strength, dose: of the vectors, as for `FrozenLM.steered`.
        artifacts: what the states' methods share, by hash.
        models: others whose logits take part in mixtures, as for `FrozenLM.steered`.
        seed: of the draw.
        max_tokens: longer records are cut. Where a user's states have contexts, prompts stay whole behind them.
        on_progress: told the number of records done.

    Raises:
        SteerError: a record was among those that its user's state was fitted on, a user has no state, there is
            nothing to score, or a record cannot be scored under the states, before any of them is.
    """
    histories = [history for history in histories if len(history)]
    if not histories:
        raise SteerError("there are no records to score")
    require_unseen(histories, states)
    rng, compared = np.random.default_rng(seed), []
    for history in histories:
        strangers = sorted(set(states) - {history.user_id})
        compared.append([strangers[i] for i in rng.permutation(len(strangers))[:others]])

    def bound(history: History, chosen: Sequence[str]) -> list[Edit]:
        rows = [{}, *({"state": states[user]} for user in (history.user_id, *chosen))]
        return edits_of(lm, rows, artifacts=artifacts, strength=strength, dose=dose)

    for history, chosen in zip(histories, compared, strict=True):
        plan = _plan_of(lm, bound(history, chosen), 2 + len(chosen), models)
        for record in history:
            span = record_span(lm, record, max_tokens=max_tokens)
            if plan.mixes and plan.streams is not None:
                _require_readable(lm, record, span, plan.streams, models)
    done, scores = 0, []
    for history, chosen in zip(histories, compared, strict=True):
        edits = bound(history, chosen)
        sums, tokens = torch.zeros(2 + len(chosen), dtype=torch.float64), 0
        for record in history:
            span = record_span(lm, record, max_tokens=max_tokens)
            sums += row_losses(lm, span, edits, len(sums), models=models).double()
            tokens += span.end - max(span.start, 1)
            done += 1
            if on_progress is not None:
                on_progress(done)
        base, own, *rest = (sums / tokens).tolist()
        scores.append(UserScore(history.user_id, base, own, dict(zip(chosen, rest, strict=True)), tokens))
    return Scores(scores)


def _require_readable(
    lm: FrozenLM, record: Record, span: Span, streams: StreamEdit, models: Mapping[str, FrozenLM] | None
) -> None:
    """Raises SteerError, naming the record, if it cannot stand behind some stream's context."""
    try:
        heads_of(lm, span, streams.mixtures, models)
    except SteerError as error:
        raise SteerError(f"record {record.id!r} of {record.user_id!r}: {error}") from None


def require_unseen(histories: Sequence[History], states: Mapping[str, UserState]) -> None:
    """Raises SteerError if a user has no state, or one that was fitted on a record to be scored.

    A record is its user's: where another's state names the same id, that is a record of the other.
    """
    for history in histories:
        if history.user_id not in states:
            raise SteerError(f"{history.user_id!r} has records to score and no state")
        fitted = set(states[history.user_id].provenance.records)
        if seen := [record.id for record in history if record.id in fitted]:
            raise SteerError(
                f"the state of {history.user_id!r} was fitted on record {seen[0]!r}, so its score would say nothing; "
                "leave the last records out when fitting (steer extract --holdout N), and score these (steer score "
                "--holdout N)"
            )


def _interval(differences: np.ndarray, rng: np.random.Generator) -> dict[str, float]:
    """The mean and its 95 % percentile bootstrap interval."""
    means = differences[rng.integers(len(differences), size=(_RESAMPLES, len(differences)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return {"mean": float(differences.mean()), "low": float(low), "high": float(high)}
