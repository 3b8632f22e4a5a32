"""Per-user prefix tuning: soft tokens in front of the prompt, trained on one user's texts.

Zhong et al., "UserAdapter: Few-Shot User Learning in Sentiment Analysis", Findings of ACL 2021: each user owns a short
prefix of trainable embeddings, everything else is frozen. The loss is the likelihood of what the user wrote:

    max_P  Σ_i log p( y_i | P ; x_i )

In the paper the model is first tuned on everybody's texts, and each user's prefix behind that. Here the model stays as
it is: with `shared_steps` a common prefix is tuned on everybody's texts, and each user's begins there. It is also what
a user without texts gets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from torch import nn

from steer.errors import SteerError
from steer.history import History
from steer.inject import Edit, PrefixEdit
from steer.method import Method
from steer.read import Span, record_span
from steer.sites import Site
from steer.state import Artifact, Provenance, UserState
from steer.train import each_step, train_users

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from steer.model import FrozenLM

# The name of a state's tensor, and of an artifact's.
_PREFIX = "prefix"


@dataclass
class PrefixTuning(Method):
    """Trains `length` soft tokens per user.

    Args:
        length: soft tokens per user.
        shared_steps: optimizer steps of the common prefix, which `train` then makes; 0 for users who share nothing and
            begin with random rows of the model's own embedding table.
        steps: optimizer steps of a user's own prefix.
        learning_rate: of Adam, in units of the embedding table's root mean square.
        batch: records per step.
        holdout: share of a user's texts that decides after which step to stop; they are not trained on.
        seed: of the initial tokens and the order of records.
    """

    name: ClassVar[str] = "prefix_tuning"

    length: int = 4
    shared_steps: int = 0
    steps: int = 30
    learning_rate: float = 0.05
    batch: int = 8
    holdout: float = 0.0
    seed: int = 0

    def train(
        self,
        lm: FrozenLM,
        histories: Iterable[History],
        on_progress: Callable[[float], None] | None = None,
        *,
        on_step: Callable[[int, float], None] | None = None,
    ) -> Artifact | None:
        """Trains the common prefix on the texts of all users, if there is to be one.

        Raises:
            SteerError: there are no texts.
        """
        if not self.shared_steps:
            return None
        spans = [record_span(lm, record) for history in histories for record in history]
        if not spans:
            raise SteerError("there are no records to train the common prefix on")
        told = each_step(self.shared_steps, on_progress, on_step)
        (common,), _ = self._descend(lm, [spans], self._random(lm), self.shared_steps, 0.0, told)
        named = ("length", "shared_steps", "learning_rate", "batch")
        self.artifact = Artifact(
            method=self.name,
            version=self.version,
            model=lm.fingerprint,
            tensors={_PREFIX: common},
            settings={name: getattr(self, name) for name in named},
        )
        return self.artifact

    def fit(self, lm: FrozenLM, history: History, on_step: Callable[[int, float], None] | None = None) -> UserState:
        """Trains one user's prefix.

        Args:
            lm: the model; no gradient is computed for its parameters.
            history: what the user wrote; of nothing, the common prefix.
            on_step: told the number of each step and its loss in nats per token.

        Raises:
            SteerError: the history is empty and nothing is common, or the common prefix was not trained.
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
        prefixes = [None if state is None else state.tensors[_PREFIX].float() for state in states]
        return [PrefixEdit.from_rows(prefixes, like.tensors[_PREFIX].shape[-1])]

    def _fit(
        self, lm: FrozenLM, histories: Sequence[History], on_step: Callable[[int, float], None] | None
    ) -> list[UserState]:
        if not self.shared_steps and (empty := [history for history in histories if not len(history)]):
            raise SteerError(f"{empty[0].user_id!r} has no records to train a prefix on")
        shared = self._shared(lm) if self.shared_steps else None
        first = self._random(lm) if shared is None else shared.tensors[_PREFIX]
        wrote = [user for user, history in enumerate(histories) if len(history)]
        texts = [[record_span(lm, record) for record in histories[user]] for user in wrote]
        prefixes, kept = first.repeat(len(histories), 1, 1), [0] * len(histories)
        prefixes[wrote], steps = self._descend(lm, texts, first, self.steps, self.holdout, on_step)
        for user, step in zip(wrote, steps, strict=True):
            kept[user] = step
        named = ("length", "steps", "learning_rate", "batch", "holdout")
        return [
            UserState(
                provenance=Provenance(
                    method=self.name,
                    version=self.version,
                    model=lm.fingerprint,
                    sites=(str(Site("embed")),),
                    artifact=None if shared is None else shared.hash,
                    records=tuple(record.id for record in history),
                    settings={name: getattr(self, name) for name in named},
                    calibration={"step": kept[user]},
                ),
                tensors={_PREFIX: prefixes[user].clone()},
            )
            for user, history in enumerate(histories)
        ]

    def _shared(self, lm: FrozenLM) -> Artifact:
        if self.artifact is None:
            raise SteerError("the common prefix comes first: call train(lm, histories), or use(lm, artifact)")
        self._require_model(lm, self.artifact)
        if (length := len(self.artifact.tensors[_PREFIX])) != self.length:
            raise SteerError(f"the common prefix has {length} soft tokens; give length={length}, or train it again")
        return self.artifact

    def _random(self, lm: FrozenLM) -> Float[Tensor, "length width"]:
        """Rows of the embedding layer, so that they have the scale that the model knows."""
        embed = cast(nn.Embedding, lm.model.get_input_embeddings())
        generator = torch.Generator().manual_seed(self.seed)
        ids = torch.randint(embed.num_embeddings, (self.length,), generator=generator).to(lm.device)
        with torch.no_grad():
            return embed(ids).float().cpu().clone()

    def _descend(
        self,
        lm: FrozenLM,
        texts: Sequence[Sequence[Span]],
        first: Float[Tensor, "length width"],
        steps: int,
        holdout: float,
        on_step: Callable[[int, float], None] | None,
    ) -> tuple[Float[Tensor, "user length width"], list[int]]:
        """Trains prefixes; returns them, and after how many steps each was best."""
        prefixes = first.repeat(len(texts), 1, 1).requires_grad_(True)
        kept = train_users(
            lm,
            texts,
            [prefixes],
            lambda users: [PrefixEdit.from_rows([*prefixes[users]], lm.width_at(Site("embed")))],
            steps=steps,
            batch=self.batch,
            learning_rate=self.learning_rate * self._random(lm).square().mean().sqrt().item(),
            seed=self.seed,
            holdout=holdout,
            on_step=None if on_step is None else lambda step, losses: on_step(step, float(losses.nanmean())),
        )
        return prefixes.detach(), kept
