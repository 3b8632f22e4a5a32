"""Conditions: whether a row's edit acts, decided from what the model makes of the row's prompt.

CAST: Lee et al., "Programming Refusal with Conditional Activation Steering", ICLR 2025, arXiv 2409.05907:

    h' = h + f(cos(h, tanh(P h))) · α v,   P = c cᵀ / (cᵀ c),   f(s) = 1 where s > θ, else 0
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch

from steer.errors import SteerError
from steer.inject.positions import Gate
from steer.inject.rows import Rows, erase, refill
from steer.kernels import similarity_to_projection
from steer.sites import Site

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

Side = Literal["above", "below"]


@dataclass(frozen=True, eq=False)
class Condition:
    """Lets an edit act in the rows whose prompt is similar enough to a direction: cos(h, tanh(P h)) > threshold.

    h is the mean hidden state over the prompt's tokens, without the first, a massive outlier; P projects on the
    direction. The decision falls when the prompt has passed the site and holds while the row is generated, also for
    the row's beams, return sequences and contrasted stream. Edits that carry the same condition share the decision.

    Attributes:
        site: where the prompt is read; not behind the site of the edit. Edits at earlier sites are seen.
        directions: c, per row, of any length. A row of zeros has no condition: its edit always acts.
        thresholds: per row, from −1 to 1.
        acts: whether the similarity has to lie "above" the threshold, or "below".
    """

    site: Site
    directions: Float[Tensor, "batch d"]
    thresholds: Float[Tensor, " batch"]
    acts: Side = "above"

    def __post_init__(self) -> None:
        if self.acts not in get_args(Side):
            raise SteerError(f"acts={self.acts!r} is not one of {', '.join(get_args(Side))}")
        if self.thresholds.shape != self.directions.shape[:1]:
            raise SteerError(f"{list(self.thresholds.shape)} thresholds for {len(self.directions)} directions")
        if not torch.isfinite(self.thresholds).all():
            raise SteerError(f"thresholds must be finite, got {self.thresholds.tolist()}")


@dataclass(frozen=True, eq=False)
class Decision:
    """What became of a condition in the prompts of a batch.

    Attributes:
        condition: which one.
        similarities: of each row's prompt to its direction; 0 where there is none, or the prompt is a single token.
        acts: whether the row's edits act.
    """

    condition: Condition
    similarities: Float[Tensor, " batch"]
    acts: Bool[Tensor, " batch"]


class Decide:
    """A condition at work at its site. It changes nothing there; the prompts may pass in any number of chunks."""

    def __init__(self) -> None:
        # Of the condition, a value for each row of the batch.
        self.directions: Float[Tensor, "batch d"] | None = None
        self.thresholds: Float[Tensor, " batch"] | None = None
        self.signs: Float[Tensor, " batch"] | None = None
        self.always: Bool[Tensor, " batch"] | None = None
        # Of the prompts: they are read in each batch row's first row of the forward pass.
        self.firsts: Int[Tensor, " batch"] | None = None
        self.owners: Int[Tensor, " row"] | None = None
        self.lengths: Int[Tensor, "batch 1"] | None = None
        self.last: Int[Tensor, "batch 1"] | None = None
        self.counts: Int[Tensor, "batch 1"] | None = None
        self.sums: Float[Tensor, "batch d"] | None = None
        self.similarities: Float[Tensor, " batch"] | None = None
        self.acts: Bool[Tensor, " batch"] | None = None
        # Of one forward pass.
        self.counted: Bool[Tensor, "batch pos"] | None = None
        self.carried: Bool[Tensor, "batch 1"] | None = None
        self.open: Float[Tensor, "row 1 1"] | None = None
        self.fired = False

    def load(self, condition: Condition, rows: Rows, device: torch.device) -> None:
        """Takes the rows, of whose prompts nothing has been seen yet."""
        batch, owners = len(condition.directions), rows.owners
        firsts = (owners[None] == torch.arange(batch, device=owners.device)[:, None]).int().argmax(1)
        # Without lengths the edits' gates refuse the forward pass.
        lengths = torch.zeros_like(firsts) if rows.prompt_lengths is None else rows.prompt_lengths[firsts]
        self.firsts, self.owners = refill(self.firsts, firsts), refill(self.owners, owners)
        self.lengths = refill(self.lengths, lengths[:, None])
        self.last = refill(self.last, torch.full_like(self.lengths, -1))
        self.counts = refill(self.counts, torch.zeros_like(self.lengths))
        directions = condition.directions.detach().to(device, torch.float32)
        thresholds = condition.thresholds.detach().to(directions)
        self.directions = refill(self.directions, directions)
        self.thresholds = refill(self.thresholds, thresholds)
        self.signs = refill(self.signs, torch.full_like(thresholds, 1.0 if condition.acts == "above" else -1.0))
        self.always = refill(self.always, (directions == 0).all(1))
        self.sums = refill(self.sums, torch.zeros_like(directions))

    def reset(self, batch: int, device: torch.device) -> None:
        """Forgets the decisions, which outlast a generation."""
        self.similarities = refill(self.similarities, torch.zeros(batch, device=device))
        self.acts = refill(self.acts, torch.zeros(batch, dtype=torch.bool, device=device))

    def begin(self, positions: Int[Tensor, "row pos"]) -> None:
        """Finds the tokens of this forward pass that belong to a prompt, without the first one.

        Padding has no position of its own, beyond that of the token before. A prompt begins anew at position 1, not 0,
        which padding on the right may have as well.
        """
        assert self.firsts is not None and self.lengths is not None and self.last is not None
        assert self.counts is not None
        positions = positions[self.firsts]
        before = torch.cat([self.last, positions[:, :-1]], dim=1)
        counted = (positions > before) & (positions > 0) & (positions < self.lengths)
        columns = torch.arange(positions.shape[1], device=positions.device)
        begin = torch.where(counted & (positions == 1), columns, -1).amax(1, keepdim=True)
        self.counted, self.carried = counted & (columns >= begin), begin < 0
        self.counts.copy_(self.counts * self.carried + self.counted.sum(1, keepdim=True))
        self.last.copy_(positions[:, -1:])

    def __call__(self, hidden: Float[Tensor, "row pos d"]) -> Float[Tensor, "row pos d"]:
        self.fired = True
        if self.counted is None:
            # The edits will say what is wrong.
            return hidden
        assert self.firsts is not None and self.owners is not None and self.carried is not None
        assert self.directions is not None and self.thresholds is not None and self.signs is not None
        assert self.counts is not None and self.sums is not None and self.always is not None
        assert self.similarities is not None and self.acts is not None
        device = hidden.device
        states = hidden.detach()[self.firsts.to(device)].to(self.sums.dtype)
        states = torch.where(self.counted.to(device)[..., None], states, 0.0).sum(1)
        self.sums.copy_(torch.where(self.carried.to(device), self.sums, 0.0) + states)
        means = self.sums / self.counts.to(device).clamp(min=1)
        self.similarities.copy_(similarity_to_projection(means, self.directions))
        self.acts.copy_(self.always | (self.signs * (self.similarities - self.thresholds) > 0))
        self.open = self.acts[self.owners.to(device), None, None].to(hidden.dtype)
        return hidden

    def end(self) -> None:
        """Forgets what belonged to one forward pass."""
        self.counted = self.carried = self.open = None

    def decision(self, condition: Condition) -> Decision:
        """What was decided last."""
        assert self.similarities is not None and self.acts is not None
        return Decision(condition, self.similarities.to("cpu", copy=True), self.acts.to("cpu", copy=True))

    def clear(self) -> None:
        """Erases what is the users'."""
        for name in ("directions", "thresholds", "sums", "similarities", "acts"):
            setattr(self, name, erase(getattr(self, name)))


class ConditionedGate:
    """A gate that is shut in the rows whose condition is not met."""

    def __init__(self, gate: Gate, decide: Decide) -> None:
        self.gate, self.decide = gate, decide

    @property
    def mask(self) -> Float[Tensor, "row pos 1"] | None:
        """Which positions are edited; known once the condition's site has been passed."""
        if self.gate.mask is None or self.decide.open is None:
            return None
        return self.gate.mask * self.decide.open.to(self.gate.mask.device)
