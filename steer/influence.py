"""Influence of contexts on an answer: to what extent does it rely on what is known about a person?

F of CoS (He, Pandey, Schrum and Dragan, ICLR 2025, arXiv 2405.01768, Eq. 2), F(x) = lp(x | C, P) − lp(x | ∅, P), of the
tokens that stand there; and of all the tokens that could, the mean of F under the distribution with the context, which
is KL(p_C ‖ p_∅).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from steer.contrast import Response, chosen_of, influence_of, pairs, text_of
from steer.errors import SteerError
from steer.view.influence import Influence
from steer.view.words import token_text

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from steer.model import FrozenLM, Prompt


def influence(
    lm: FrozenLM,
    prompt: Prompt,
    response: Response,
    contexts: str | Sequence[str] | Mapping[str, str],
    *,
    opposite: str | None = None,
    chat: bool | None = None,
    batch_tokens: int = 2048,
) -> Influence:
    """How much each of several contexts moved each token of an answer.

    Args:
        lm: the model; it must not be steered meanwhile.
        prompt: what was answered, as for `FrozenLM.encode`.
        response: the answer, or its token ids. No end-of-text token is appended to a text.
        contexts: one, several, or several by name; each is looked at by itself.
        opposite: a context that they are compared with, in place of none.
        chat: as for `FrozenLM.encode`.
        batch_tokens: tokens, over all contexts, that one forward pass may have.

    Raises:
        SteerError: there is no context, one is empty, the response is empty, or they are longer than the model's
            window.
    """
    named = by_name(contexts)
    if lm.tokenizer is None:
        raise SteerError("this model was wrapped without a tokenizer, so its tokens have no names")
    text = text_of(lm, prompt, response, list(named.values()), opposite=opposite, chat=chat)
    shape = (len(named), len(text.response))
    change, kl, entropy = torch.empty(3, *shape)
    rank = torch.empty(shape, dtype=torch.long)
    for _, k, with_context, without in pairs(lm, [text], batch_tokens=batch_tokens):
        chosen = chosen_of(text, with_context)
        moved = influence_of(with_context, without)
        change[k] = moved.gather(1, chosen[:, None])[:, 0].cpu()
        # Below 0 only by rounding.
        kl[k] = (with_context.exp() * moved).sum(1).clamp(min=0).cpu()
        rank[k], entropy[k] = _ranks(with_context, chosen), _entropies(with_context)
        if k == 0:
            rank_without, entropy_without = _ranks(without, chosen), _entropies(without)
    tokenizer = lm.tokenizer
    return Influence(
        names=tuple(named),
        tokens=tuple(token_text(tokenizer, token) for token in text.response),
        change=change,
        kl=kl,
        rank=rank,
        rank_without=rank_without,
        entropy=entropy,
        entropy_without=entropy_without.float(),
        opposite=opposite,
    )


def by_name(contexts: str | Sequence[str] | Mapping[str, str]) -> Mapping[str, str]:
    """The contexts, each by its name or by itself. Raises SteerError if there are none, or the same twice."""
    if isinstance(contexts, str):
        contexts = [contexts]
    named = contexts if isinstance(contexts, Mapping) else {context: context for context in contexts}
    if not named or len(set(named.values())) < len(contexts):
        said = dict(contexts) if isinstance(contexts, Mapping) else list(contexts)
        raise SteerError(f"give one or more contexts, all different; got {said}")
    return named


def _ranks(log_probs: Float[Tensor, "token vocab"], chosen: Int[Tensor, " token"]) -> Int[Tensor, " token"]:
    """Of the chosen tokens: one more than are likelier."""
    return (log_probs > log_probs.gather(1, chosen[:, None])).sum(1).cpu() + 1


def _entropies(log_probs: Float[Tensor, "token vocab"]) -> Float[Tensor, " token"]:
    return torch.special.entr(log_probs.exp()).sum(1).cpu()
