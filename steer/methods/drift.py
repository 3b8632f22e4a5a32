"""Drift: a user's preferences as weights of attributes, each of them a system message to a small model.

Kim, M., Lee, K., Joo, Lee, H., Thonet and Jung, "Drift: Decoding-time Personalized Alignments with Implicit User
Preferences", Findings of EMNLP 2025, arXiv 2502.14289. What attribute i makes of a text, in the small model:

    r_i(x, y) = log π(y | x, s_i) − log π(y | x)

The weights, in closed form, from pairs of a chosen answer y⁺ and a rejected one y⁻, and the next token:

    d_i = Σ_pairs ( r_i(x, y⁺) − r_i(x, y⁻) )              p* = d / ‖d‖
    p(x) = softmax( h_LLM(x) + 1/β · Σ_i p_i · ( h_i(x) − h_base(x) ) )

h are logits: of the steered model, and of the small one with and without the attribute's system message.

All streams of a row are written by the steered model's chat template, also those that the small model reads; `fit`
writes by the small model's own, unless it is told of the steered one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch

from steer.companion import require_same_vocabulary
from steer.errors import SteerError
from steer.history import History
from steer.inject import Mixture, Stream
from steer.inject.streams import Touched
from steer.likelihood import response_losses
from steer.methods.contrast import Contrast, from_records, require_finite, require_positive, require_text
from steer.pairs import Pair, pairs_of
from steer.read import Span, by_length, require_room
from steer.state import UserState

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from steer.model import FrozenLM


@dataclass
class Drift(Contrast):
    """Weighs attributes by a person's choices, and decodes with the weighted sum of what they change.

    Each attribute takes one stream of the small model, and all of them together one more.

    Args:
        attributes: system messages by name, such as {"formal": "Answer formally."}.
        model: the name of the small model, one of `models` of `FrozenLM.steered`; None for the steered model itself.
        beta: β. The larger, the less is changed; the notes on the paper name no value, and this one is ours.
        base: the system message of π without an attribute; None for none.
        rejected: the key of a record that holds the answer which its response was preferred to.
        steered: as for `Contrast`.

    Raises:
        SteerError: there is no attribute, a message is empty, or β is not above 0.
    """

    name: ClassVar[str] = "drift"

    attributes: Mapping[str, str]
    model: str | None = None
    beta: float = 1.0
    base: str | None = None
    rejected: str = "rejected"
    # All of a user's choices are read.
    records: int = field(default=4, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.attributes, Mapping) and self.attributes):
            raise SteerError("Drift needs attributes: system messages by name, such as {'formal': 'Answer formally.'}")
        for name, message in self.attributes.items():
            require_text(message, f"system message {name!r}")
        self.attributes = dict(self.attributes)
        self.beta = require_positive("beta", self.beta)

    def state(self, weights: Mapping[str, float]) -> UserState:
        """The state of a user to whom the attributes matter so much; those that are not named do not.

        Raises:
            SteerError: a weight is not finite, or there is no such attribute.
        """
        if not isinstance(weights, Mapping):
            raise SteerError(f"weights go by the names of attributes, such as {{'formal': 0.8}}, got {weights!r}")
        if strangers := [name for name in weights if name not in self.attributes]:
            raise SteerError(f"there is no attribute {strangers[0]!r}; there are {', '.join(sorted(self.attributes))}")
        found = {name: require_finite(f"the weight of {name}", weight) for name, weight in weights.items()}
        return self._made({"weights": found})

    def fit(self, lm: FrozenLM, history: History, *, template_of: FrozenLM | None = None) -> UserState:
        """Weighs the attributes by a person's choices.

        Args:
            lm: the small model.
            history: records whose response was preferred to the text under the key `rejected`.
            template_of: the model that will be steered, so that the small one reads prompts here as it will there: in
                the steered model's chat template. None for the small model's own, which comes to the same where the two
                models share a template; then the large one is not needed.

        Raises:
            SteerError: the history is empty, a record has no prompt or no other answer, no attribute tells chosen
                answers from rejected ones, there is no chat template, or the models have different vocabularies.
        """
        state = self.fit_pairs(lm, pairs_of(history, self.rejected), template_of=template_of)
        return from_records(state, history.records)

    def fit_pairs(self, lm: FrozenLM, pairs: Sequence[Pair], *, template_of: FrozenLM | None = None) -> UserState:
        """The same from pairs, whose positive answers are the chosen ones."""
        if not pairs:
            raise SteerError("there are no pairs to weigh attributes by")
        if template_of is not None:
            require_same_vocabulary(template_of, lm, self.model or "small")
        answers = [(pair.prompt, answer) for pair in pairs for answer in (pair.positive, pair.negative)]
        base, *informed = (
            log_likelihoods(lm, answers, system, template_of=template_of)
            for system in (self.base, *self.attributes.values())
        )
        rewards = torch.stack(informed) - base
        difference = (rewards[:, 0::2] - rewards[:, 1::2]).sum(1)
        norm = difference.norm().item()
        if not norm > 0 or not math.isfinite(norm):
            raise SteerError("no attribute tells the chosen answers from the rejected ones, so none can be weighed")
        return self.state(dict(zip(self.attributes, (difference / norm).tolist(), strict=True)))

    @staticmethod
    def mixture(
        weights: Mapping[str, float],
        attributes: Mapping[str, str],
        model: str | None,
        beta: float,
        base: str | None = None,
        rejected: str = "rejected",
        steered: Touched = "all",
    ) -> Mixture:
        """The equation for decoding; attributes of weight 0 take no stream."""
        shares = {name: weight / beta for name, weight in weights.items() if weight}
        pushed = [Stream(share, system=attributes[name], model=model) for name, share in shares.items()]
        pulled = [Stream(-sum(shares.values()), system=base, model=model)] if pushed else []
        return Mixture((Stream(1.0), *pushed, *pulled), steered=steered)


@torch.no_grad()
def log_likelihoods(
    lm: FrozenLM,
    answers: Sequence[tuple[str, str]],
    system: str | None,
    *,
    template_of: FrozenLM | None = None,
    batch_tokens: int = 2048,
) -> Float[Tensor, " answer"]:
    """log π(y | x, system) of answers to prompts, in nats, summed over an answer's tokens.

    Raises:
        SteerError: one of the texts is longer than the model's window, or there is no tokenizer.
    """
    if lm.tokenizer is None:
        raise SteerError("this model was wrapped without a tokenizer and cannot read texts")
    writer = template_of or lm
    spans = []
    for prompt, answer in answers:
        head = writer.encode(prompt, system=system)
        ids = [*head, *lm.tokenizer(answer, add_special_tokens=False).input_ids]
        require_room(lm, len(ids), "system message, prompt and answer have")
        spans.append(Span(ids, len(head), len(ids)))
    found = torch.empty(len(spans), dtype=torch.float64)
    for batch in by_length({i: len(span.ids) for i, span in enumerate(spans)}, batch_tokens):
        found[batch] = -response_losses(lm, [spans[i] for i in batch], [])[0].double().cpu()
    return found
