"""CAA: a behaviour as the mean difference between the two answers to questions with choices.

Rimsky et al., "Steering Llama 2 via Contrastive Activation Addition", ACL 2024, arXiv 2312.06681:

    v_l = 1/n · Σ_i ( h_l(x_i ⊕ y_i⁺) − h_l(x_i ⊕ y_i⁻) )                    h'_l(x)_t = h_l(x)_t + α · v_l

where x_i is a question with choices (A) and (B), y_i⁺ the letter of the choice that shows the behaviour, and h_l the
residual stream after block l at the token of the letter. The vector is added from the last token of the prompt on.

A person's choices are such questions: what they preferred, and what they preferred it to.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from steer.errors import SteerError
from steer.history import History
from steer.inject import Edit
from steer.inject.positions import Positions, require_positions
from steer.likelihood import last_logits
from steer.method import Method
from steer.methods.vectors import by_site, layer_sites, vector_edits
from steer.pairs import Pair, pairs_of
from steer.read import Span, read
from steer.sites import Site
from steer.state import Artifact, Provenance, UserState

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from steer.model import FrozenLM

_LETTER = re.compile(r"\s*\(?[A-Z]\)?\s*")


@dataclass
class CAA(Method):
    """Mean difference at the answers' letters.

    Args:
        layer: after which block, or blocks, to read and to add. The paper finds middle layers best.
        rejected: the key of a record that holds the answer which its response was preferred to.
        token: of the answer, the one to read at: of "(A)" the last but one, which is the letter.
        positions: from which position on to add.

    Raises:
        SteerError: no layer, or unknown positions.
    """

    name: ClassVar[str] = "caa"

    layer: int | Sequence[int]
    rejected: str = "rejected"
    token: int = -2
    positions: Positions = "response"

    def __post_init__(self) -> None:
        layer_sites(self.layer)
        require_positions(self.positions)

    @property
    def sites(self) -> list[Site]:
        """Where the vectors are read and added."""
        return layer_sites(self.layer)

    def fit(self, lm: FrozenLM, history: History) -> UserState:
        """Reads the vectors of a person's choices, put as questions with choices where they are not yet.

        Raises:
            SteerError: the history is empty, or a record has no prompt or no other answer.
        """
        pairs = [as_question(pair, number) for number, pair in enumerate(pairs_of(history, self.rejected))]
        return self.fit_pairs(lm, pairs, records=[record.id for record in history])

    def fit_pairs(self, lm: FrozenLM, pairs: Sequence[Pair], *, records: Sequence[str] = ()) -> UserState:
        """Reads the vectors of a behaviour.

        Args:
            lm: the model.
            pairs: questions with choices; the answers are letters, written "(A)".
            records: ids for the state's provenance.

        Raises:
            SteerError: there are no pairs, or an answer has no such token.
        """
        if not pairs:
            raise SteerError("there are no pairs to take a difference of")
        spans = [self._span(lm, pair.prompt, pair.positive) for pair in pairs]
        spans += [self._span(lm, pair.prompt, pair.negative) for pair in pairs]
        readings = read(lm, spans, self.sites, pool="last")
        differences = {site: r.pooled[: len(pairs)] - r.pooled[len(pairs) :] for site, r in readings.items()}
        return UserState(
            provenance=Provenance(
                method=self.name,
                version=self.version,
                model=lm.fingerprint,
                sites=tuple(str(site) for site in self.sites),
                records=tuple(records),
                settings={"token": self.token, "positions": self.positions},
                calibration={"reference_norm": {str(site): r.norm for site, r in readings.items()}},
            ),
            tensors=by_site({site: rows.mean(0) for site, rows in differences.items()}),
        )

    @classmethod
    def bind(
        cls, lm: FrozenLM, states: Sequence[UserState | None], like: UserState, artifact: Artifact | None
    ) -> list[Edit]:
        """One residual edit for each layer."""
        return vector_edits(states, like)

    def _span(self, lm: FrozenLM, prompt: str, answer: str) -> Span:
        """The answer after its prompt, up to the token to read at; what follows would not change it."""
        head, tail = _tokens(lm, prompt, answer)
        if not -len(tail) <= self.token < len(tail):
            raise SteerError(f"token={self.token}: the answer {answer!r} has {len(tail)} tokens")
        end = len(head) + self.token % len(tail) + 1
        return Span([*head, *tail][:end], len(head), end)


def as_question(pair: Pair, number: int = 0) -> Pair:
    """A choice between two texts as a question with choices, whose answers are letters.

    The positive one is (A) for even numbers and (B) for odd ones, so that the letters themselves cancel out. A pair
    whose answers are letters stays as it is.
    """
    if _LETTER.fullmatch(pair.positive) and _LETTER.fullmatch(pair.negative):
        return pair
    choices = [pair.positive, pair.negative]
    letters = ["(A)", "(B)"]
    if number % 2:
        choices.reverse()
        letters.reverse()
    prompt = f"{pair.prompt}\n\nChoices:\n (A) {choices[0]}\n (B) {choices[1]}"
    return Pair(prompt, *letters)


@torch.no_grad()
def choice_probabilities(
    lm: FrozenLM,
    pairs: Sequence[Pair],
    state: UserState | None = None,
    *,
    strength: float = 1.0,
    batch: int = 16,
) -> Float[Tensor, " pair"]:
    """The probability of each pair's positive answer, of the two: at the first token in which they differ.

    Args:
        lm: the model.
        pairs: such as questions with choices, whose answers are letters.
        state: a state of vectors to steer by, on all rows; None for the plain model.
        strength: raw coefficient of the vectors.
        batch: pairs in a forward pass.

    Raises:
        SteerError: the answers of a pair do not differ, or one is the beginning of the other.
    """
    forks = [_fork(lm, pair) for pair in pairs]
    found = torch.empty(len(pairs))
    order = sorted(range(len(pairs)), key=lambda i: -len(forks[i].ids))
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        chosen = [forks[i] for i in rows]
        with lm.steered(
            states=[state] * len(rows),
            strength=None if state is None else strength,
            prompt_lengths=[fork.prompt_length for fork in chosen],
        ) as steering:
            logits = last_logits(lm, steering.prepare([fork.ids for fork in chosen]), 1)[:, 0].float().cpu()
        two = logits.gather(1, torch.tensor([fork.answers for fork in chosen]))
        found[rows] = two.softmax(1)[:, 0]
    return found


@dataclass(frozen=True)
class _Fork:
    """What two answers have in common, and the first token of each that the other has not."""

    ids: list[int]
    prompt_length: int
    answers: tuple[int, int]


def _fork(lm: FrozenLM, pair: Pair) -> _Fork:
    head, positive = _tokens(lm, pair.prompt, pair.positive)
    _, negative = _tokens(lm, pair.prompt, pair.negative)
    both = zip(positive, negative, strict=False)
    same = next((i for i, (one, other) in enumerate(both) if one != other), None)
    if same is None:
        raise SteerError(f"of the answers {pair.positive!r} and {pair.negative!r} one is the beginning of the other")
    return _Fork(head + positive[:same], len(head), (positive[same], negative[same]))


def _tokens(lm: FrozenLM, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    head = lm.encode(prompt)
    assert lm.tokenizer is not None
    return head, lm.tokenizer(answer, add_special_tokens=False).input_ids
