"""kNN-LM: what a user wrote after similar contexts, recalled at every token.

Khandelwal, Levy, Jurafsky, Zettlemoyer and Lewis, "Generalization through Memorization: Nearest Neighbor Language
Models", ICLR 2020, arXiv 1911.00172, Eq. 2 and 3:

    p_knn(x) ∝ Σ_{(k_i, x_i) among the nearest} 1[x = x_i] · exp( −d(f(c), k_i)² / T )
    p(x) = λ · p_knn(x) + (1 − λ) · p_lm(x)

k_i is f(c_i), the hidden state of the frozen model after the text c_i that token x_i follows. λ, here `weight`, is a
share of probability: 0 is the model as it is, 1 the user's texts alone. It is no λ of contrast.

Differences from the paper. f is the final norm's output, what the head reads, instead of the last feed-forward layer's
input: every architecture has it, and on texts of a few people the two, and layers below, came out the same (SmolLM2
135M). T is in units of the store's spread, the mean squared distance of its keys to their mean, so that one value suits
all models and sites. The store is some thousand tokens of one person and not 10⁸, and λ smaller for it, 0.1 for 0.25.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from steer.errors import SteerError
from steer.history import History
from steer.inject import Edit, NeighbourEdit
from steer.method import Method
from steer.methods.contrast import require_number, require_positive, require_whole
from steer.read import Span, read_batches, record_span
from steer.sites import Site
from steer.state import Artifact, Provenance, UserState

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from steer.model import FrozenLM


@dataclass
class KNNLM(Method):
    """Keeps a hidden state for each token that a user wrote, and mixes the tokens behind similar states into the next.

    Args:
        weight: λ, from 0 to 1; 0 is neutral.
        k: how many of the nearest states take part; all where there are fewer.
        temperature: T, in units of the store's spread. The smaller, the more the very nearest count.
        site: where states are compared. `resid_mid[l]` of the last layer l comes nearest to the paper's.
        max_tokens: longer texts are cut.

    Raises:
        SteerError: λ is no share, k or `max_tokens` is no whole number above 0, T is not above 0, or there is no such
            site.
    """

    name: ClassVar[str] = "knn_lm"

    weight: float = 0.1
    k: int = 1024
    temperature: float = 0.2
    site: str | Site = "ln_final"
    max_tokens: int = 1024

    def __post_init__(self) -> None:
        self.site = Site.parse(self.site).canonical()
        self.weight = require_number("weight", self.weight)
        if not 0 <= self.weight <= 1:
            raise SteerError(f"weight={self.weight} is not a share, from 0 to 1")
        self.k, self.max_tokens = require_whole("k", self.k), require_whole("max_tokens", self.max_tokens)
        require_positive("k", self.k)
        require_positive("max_tokens", self.max_tokens)
        self.temperature = require_positive("temperature", self.temperature)

    def fit(self, lm: FrozenLM, history: History) -> UserState:
        """Reads the states after which the tokens of the user's records come.

        Raises:
            SteerError: the history is empty, a record is too short, or the model has no such site.
        """
        if not len(history):
            raise SteerError(f"{history.user_id!r} has no records to remember")
        site = Site.parse(self.site)
        spans = [record_span(lm, record, max_tokens=self.max_tokens) for record in history]
        keys, tokens = store_of(lm, spans, site)
        spread = (keys - keys.mean(0)).square().sum(1).mean().item()
        return UserState(
            provenance=Provenance(
                method=self.name,
                version=self.version,
                model=lm.fingerprint,
                sites=(str(site),),
                records=tuple(record.id for record in history),
                settings={"weight": self.weight, "k": self.k, "temperature": self.temperature},
                calibration={"spread": {str(site): spread}},
            ),
            tensors={"keys": keys, "tokens": tokens},
        )

    @classmethod
    def bind(
        cls, lm: FrozenLM, states: Sequence[UserState | None], like: UserState, artifact: Artifact | None
    ) -> list[Edit]:
        """One neighbour edit."""
        (site,) = like.provenance.sites
        stores = [None if state is None else (state.tensors["keys"], state.tensors["tokens"]) for state in states]
        weights = [0.0 if state is None else float(state.provenance.settings["weight"]) for state in states]
        scales = [0.0 if state is None else _scale(state, site) for state in states]
        count, width = int(like.provenance.settings["k"]), like.tensors["keys"].shape[1]
        return [NeighbourEdit.from_rows(Site.parse(site), stores, weights, scales, count=count, width=width)]


def store_of(lm: FrozenLM, spans: Sequence[Span], site: Site) -> tuple[Float[Tensor, "token d"], Int[Tensor, " token"]]:
    """The state before each token of the spans, and the token; without those whose state is a text's very first."""
    before = [Span(span.ids, max(span.start - 1, 1), span.end - 1) for span in spans]
    if short := [i for i, span in enumerate(before) if span.start >= span.end]:
        raise SteerError(f"text {short[0]} is too short to remember: no token of it has two before it")
    keys: list[Tensor] = [torch.empty(0)] * len(spans)
    for batch in read_batches(lm, before, [site], pool=_whole):
        for i, states in zip(batch.indices, batch.pooled[site], strict=True):
            keys[i] = states[: before[i].end - before[i].start].clone()
    tokens = [token for span in before for token in span.ids[span.start + 1 : span.end + 1]]
    return torch.cat(keys), torch.tensor(tokens, dtype=torch.int32)


def _whole(
    hidden: Float[Tensor, "text pos d"], start: Int[Tensor, " text"], end: Int[Tensor, " text"]
) -> Float[Tensor, "text pos d"]:
    """Each text's span, from the first position on; what comes behind it does not count."""
    columns = torch.arange(hidden.shape[1], device=hidden.device) + start[:, None]
    index = columns.clamp(max=hidden.shape[1] - 1)[..., None].expand(-1, -1, hidden.shape[2])
    return hidden.float().gather(1, index)


def _scale(state: UserState, site: str) -> float:
    """The reciprocal of the temperature. A store of one entry has no spread, and needs none."""
    spread = state.provenance.calibration["spread"][site]
    return 1 / (state.provenance.settings["temperature"] * spread) if spread > 0 else 0.0
