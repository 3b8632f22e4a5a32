"""Many users' parameters at once: each row of a batch is a text, under its own user's parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from steer.errors import SteerError
from steer.likelihood import batches_of, response_losses
from steer.read import Span, by_length

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from steer.inject import Edit
    from steer.model import FrozenLM

# Held-out texts are looked at every so many steps; a user who has not improved for so many steps is done.
_EVERY, _PATIENCE = 5, 20


@torch.enable_grad()
def train_users(
    lm: FrozenLM,
    texts: Sequence[Sequence[Span]],
    parameters: Sequence[Float[Tensor, "user ..."]],
    edits: Callable[[Int[Tensor, " row"]], Sequence[Edit]],
    *,
    steps: int | Sequence[int],
    batch: int,
    learning_rate: float,
    weight_decay: float = 0.0,
    seed: int = 0,
    holdout: float = 0.0,
    batch_tokens: int = 1024,
    constrain: Callable[[], None] | None = None,
    on_step: Callable[[int, Float[Tensor, " user"]], None] | None = None,
) -> list[int]:
    """Minimizes each user's mean of −log p per token over that user's texts, by AdamW, in place.

    A user's result is what training that user alone gives, to rounding: the order of texts and the number of steps are
    the user's own, the optimizer works element by element, and the loss is the sum of the users' losses.

    Args:
        lm: the model; no gradient is computed for its parameters.
        texts: of each user.
        parameters: leaves that require a gradient; the first dimension is that of the users.
        edits: the edits for rows of these users, by their numbers; gradients flow through them to the parameters.
        steps: optimizer steps, for all or for each user.
        batch: texts of a user in a step.
        learning_rate, weight_decay: of AdamW.
        seed: of the order of the texts.
        holdout: share of each user's texts (one at least, of two or more) that is not trained on but looked at every
            few steps: the parameters kept are those that were best on it, the initial ones included, and a user who no
            longer improves is done before all steps are made.
        batch_tokens: largest forward pass, with padding; the texts of a step are split to it.
        constrain: called after each step, to bring the parameters back to where they may be.
        on_step: told the number of each step and the losses of it, NaN for users who are done.

    Returns:
        After how many steps each user's parameters were kept.

    Raises:
        SteerError: a user has no texts, or `holdout` is not a share.
    """
    if not 0 <= holdout < 1:
        raise SteerError(f"holdout={holdout} is not a share of the texts; give 0 for none, or such as 0.25")
    if not all(texts):
        raise SteerError("there is nothing to train on: a user has no texts")
    counts = [steps] * len(texts) if isinstance(steps, int) else steps
    users = [_User.of(own, batch, count, seed, holdout) for own, count in zip(texts, counts, strict=True)]
    loss = _Loss(lm, len(users), edits, batch_tokens)
    kept = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)

    def keep(step: int, whose: list[int]) -> None:
        looked = [u for u in whose if users[u].held_out and (step % _EVERY == 0 or step == users[u].steps)]
        with torch.no_grad():
            losses = loss([(u, span) for u in looked for span in users[u].held_out]).tolist()
        better = [u for u in looked if users[u].improves(step, losses[u])]
        better += [u for u in whose if not users[u].held_out and users[u].ends(step)]
        for copy, parameter in zip(kept, parameters, strict=True):
            copy[better] = parameter.detach()[better]

    keep(0, list(range(len(users))))
    for step in range(1, max(counts, default=0) + 1):
        active = [u for u, user in enumerate(users) if step <= user.steps]
        if not active:
            break
        optimizer.zero_grad()
        losses = loss([(u, span) for u in active for span in next(users[u].batches)])
        optimizer.step()
        if constrain is not None:
            with torch.no_grad():
                constrain()
        if on_step is not None:
            on_step(step - 1, losses)
        keep(step, active)
    with torch.no_grad():
        for copy, parameter in zip(kept, parameters, strict=True):
            parameter.copy_(copy)
    return [user.kept for user in users]


@dataclass
class _User:
    """One user's texts in the order of training, and how it goes.

    Attributes:
        steps: the last step; lowered when held-out texts say that more would be in vain.
        kept: the step after which parameters were kept last.
    """

    batches: Iterator[list[Span]]
    held_out: list[Span]
    steps: int
    kept: int = 0
    lowest: float = float("inf")

    @classmethod
    def of(cls, texts: Sequence[Span], batch: int, steps: int, seed: int, holdout: float) -> _User:
        generator = torch.Generator().manual_seed(seed)
        order = [texts[i] for i in torch.randperm(len(texts), generator=generator).tolist()]
        cut = max(round(len(texts) * holdout), 1) if holdout and len(texts) > 1 else 0
        return cls(batches_of(order[cut:], batch, steps, generator), order[:cut], steps)

    def improves(self, step: int, loss: float) -> bool:
        if loss < self.lowest:
            self.kept, self.lowest = step, loss
            return True
        if step - self.kept >= _PATIENCE:
            self.steps = step
        return False

    def ends(self, step: int) -> bool:
        self.kept = step
        return step == self.steps


def each_step(
    steps: int, on_progress: Callable[[float], None] | None, on_step: Callable[[int, float], None] | None = None
) -> Callable[[int, float], None] | None:
    """One callback out of two: the share of the steps that are made, and each step's number and loss."""
    if on_progress is None:
        return on_step

    def told(step: int, loss: float) -> None:
        on_progress((step + 1) / steps)
        if on_step is not None:
            on_step(step, loss)

    return told


@dataclass(frozen=True)
class _Loss:
    """Each user's mean over the tokens of given texts; adds its gradients up where gradients are enabled."""

    lm: FrozenLM
    users: int
    edits: Callable[[Int[Tensor, " row"]], Sequence[Edit]]
    batch_tokens: int

    def __call__(self, texts: Sequence[tuple[int, Span]]) -> Float[Tensor, " user"]:
        tokens = torch.zeros(self.users)
        for user, span in texts:
            tokens[user] += span.end - max(span.start, 1)
        # NaN for users without any text.
        means = torch.zeros(self.users) / (tokens > 0)
        for part in by_length({i: span.end for i, (_, span) in enumerate(texts)}, self.batch_tokens):
            rows = torch.tensor([texts[i][0] for i in part])
            sums, _ = response_losses(self.lm, [texts[i][1] for i in part], self.edits(rows))
            losses = sums / tokens[rows].to(sums)
            if torch.is_grad_enabled():
                losses.sum().backward()
            means.index_add_(0, rows, losses.detach().float().cpu())
        return means
