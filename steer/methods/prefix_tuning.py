"""Per-user prefix tuning: soft tokens in front of the prompt, trained on one user's texts.

Zhong et al., "UserAdapter: Few-Shot User Learning in Sentiment Analysis", Findings of ACL 2021: each user owns a short
prefix of trainable embeddings, everything else is frozen. The loss is the likelihood of what the user wrote:

    max_P  Σ_i log p( y_i | P ; x_i )
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, cast

import torch

from steer.errors import SteerError
from steer.history import History
from steer.inject import Edit, PrefixEdit
from steer.method import Method
from steer.read import record_span
from steer.sites import Site
from steer.state import Artifact, Provenance, UserState
from steer.train import each_step, train_users

if TYPE_CHECKING:
    from steer.model import FrozenLM


@dataclass
class PrefixTuning(Method):
    """Trains `length` soft tokens per user.

    Args:
        length: soft tokens per user.
        steps: optimizer steps.
        learning_rate: of Adam, in units of the embedding table's root mean square.
        batch: records per step.
        seed: of the initial tokens and the order of records.
    """

    name: ClassVar[str] = "prefix_tuning"

    length: int = 4
    steps: int = 30
    learning_rate: float = 0.05
    batch: int = 8
    seed: int = 0

    def fit(self, lm: FrozenLM, history: History, on_step: Callable[[int, float], None] | None = None) -> UserState:
        """Trains one user's prefix, starting from random rows of the model's own embedding table.

        Args:
            lm: the model; no gradient is computed for its parameters.
            history: what the user wrote.
            on_step: told the number of each step and its loss in nats per token.

        Raises:
            SteerError: the history is empty.
        """
        return self._fit(lm, [history], on_step)[0]

    def fit_many(
        self, lm: FrozenLM, histories: Sequence[History], on_progress: Callable[[float], None] | None = None
    ) -> list[UserState]:
        """Trains many users' prefixes at once; each is what `fit` gives, to rounding."""
        return self._fit(lm, histories, each_step(self.steps, on_progress))

    @classmethod
    def bind(
        cls, lm: FrozenLM, states: Sequence[UserState | None], like: UserState, artifact: Artifact | None
    ) -> list[Edit]:
        """One prefix edit."""
        prefixes = [None if state is None else state.tensors["prefix"].float() for state in states]
        return [PrefixEdit.from_rows(prefixes, like.tensors["prefix"].shape[-1])]

    def _fit(
        self, lm: FrozenLM, histories: Sequence[History], on_step: Callable[[int, float], None] | None
    ) -> list[UserState]:
        if empty := [history for history in histories if not len(history)]:
            raise SteerError(f"{empty[0].user_id!r} has no records to train a prefix on")
        first = _random_tokens(lm, self.length, torch.Generator().manual_seed(self.seed))
        prefixes = first.repeat(len(histories), 1, 1).requires_grad_(True)
        train_users(
            lm,
            [[record_span(lm, record) for record in history] for history in histories],
            [prefixes],
            lambda users: [PrefixEdit.from_rows([*prefixes[users]], lm.width_at(Site("embed")))],
            steps=self.steps,
            batch=self.batch,
            learning_rate=self.learning_rate * first.square().mean().sqrt().item(),
            seed=self.seed,
            on_step=None if on_step is None else lambda step, losses: on_step(step, float(losses.nanmean())),
        )
        return [
            UserState(
                provenance=Provenance(
                    method=self.name,
                    version=self.version,
                    model=lm.fingerprint,
                    sites=(str(Site("embed")),),
                    records=tuple(record.id for record in history),
                    settings={"length": self.length, "steps": self.steps, "learning_rate": self.learning_rate},
                ),
                tensors={"prefix": prefix.detach().clone()},
            )
            for history, prefix in zip(histories, prefixes, strict=True)
        ]


def _random_tokens(lm: FrozenLM, length: int, generator: torch.Generator) -> torch.Tensor:
    """Soft tokens drawn from the embedding layer, so that they have the scale that the model knows."""
    embed = cast(torch.nn.Embedding, lm.model.get_input_embeddings())
    ids = torch.randint(embed.num_embeddings, (length,), generator=generator).to(lm.device)
    with torch.no_grad():
        return embed(ids).float().cpu().clone()
