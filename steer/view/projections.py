"""Where in a text a direction shows: the projection of each token's hidden state on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from rich.console import Group

from steer.errors import SteerError
from steer.read import Span, response_span
from steer.sites import Site
from steer.view.directions import Directions, require_fit, vectors_of
from steer.view.heat import Heat, extremes
from steer.view.page import page, text_of
from steer.view.tokens import read_tokens
from steer.view.words import token_text

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from steer.model import FrozenLM

Values = Literal["cosine", "projection"]


@dataclass(frozen=True, eq=False)
class TokenMap:
    """What directions have in common with a text's hidden states, token by token.

    Attributes:
        site: where they were read.
        names: of the directions.
        tokens: their texts, spaces and line ends included.
        cosines: of the angle between each token's hidden state and each direction.
        projections: length of each hidden state along each direction, in the units of the residual stream.
        outlier: the first token shown is the first of its sequence, whose norm is a massive outlier. It is drawn grey
            and plays no part in the scale of the colours.
    """

    site: Site
    names: tuple[str, ...]
    tokens: tuple[str, ...]
    cosines: Float[Tensor, "direction token"]
    projections: Float[Tensor, "direction token"]
    outlier: bool

    def __str__(self) -> str:
        return text_of(self)

    def __rich__(self) -> Group:
        return self.lines()

    def lines(self, values: Values = "cosine") -> Group:
        """The text once for each direction, with a coloured background, for the terminal; print it with rich."""
        return self._heat(values).lines()

    def html(self, values: Values = "cosine") -> str:
        """A page that needs nothing but itself; pointing at a token shows its numbers."""
        return page(f"Projections at {self.site}", self._heat(values).html())

    def _repr_html_(self) -> str:
        return self._heat("cosine").html()

    def figure(self, values: Values = "cosine") -> Any:
        """A heat map, a row a direction, of as many lines as the text needs; a matplotlib figure."""
        return self._heat(values).figure()

    def _heat(self, values: Values) -> Heat:
        if values not in get_args(Values):
            raise SteerError(f"values={values!r} is not one of {', '.join(get_args(Values))}")
        table = self.cosines if values == "cosine" else self.projections
        numbers = zip(self.cosines.tolist(), self.projections.tolist(), strict=True)
        return Heat(
            title=f"{values} at {self.site}",
            unit=values,
            names=self.names,
            tokens=self.tokens,
            table=table,
            hints=[
                [f"cosine {cosine:.4f}, projection {length:.4g}" for cosine, length in zip(*row, strict=True)]
                for row in numbers
            ],
            notes=[extremes(row, self.tokens, self.outlier) for row in table],
            outlier=self.outlier,
        )


def projections(
    lm: FrozenLM,
    text: str | Span,
    directions: Directions,
    site: Site | str | None = None,
    *,
    prompt: str | None = None,
) -> TokenMap:
    """Projects the hidden state of each of a text's tokens on directions.

    Args:
        lm: the model; it must not be steered meanwhile.
        text: a text, or a span, of which only the part `[start, end)` is shown.
        directions: a vector, a state, or several of either by name. Their lengths play no part.
        site: where to read; that of the states if None.
        prompt: what the text answers; it is read and not shown.

    Raises:
        SteerError: no site is known, the text is too short, or a direction does not fit the site.
    """
    where, vectors = vectors_of(directions, site)
    if where is None:
        raise SteerError("say at which site to read: plain vectors have none")
    require_fit(lm, directions, vectors, lm.width_at(where))
    if lm.tokenizer is None:
        raise SteerError("this model was wrapped without a tokenizer, so its tokens have no names")
    if isinstance(text, Span) and prompt is not None:
        raise SteerError("a span has its prompt in it already; give a text, or no prompt")
    span = text if isinstance(text, Span) else response_span(lm, text, prompt)
    hidden = read_tokens(lm, span.ids[: span.end], [where])[where][span.start :]
    units = torch.stack([vector / vector.norm() for vector in vectors.values()])
    lengths = units @ hidden.T
    tokenizer = lm.tokenizer
    return TokenMap(
        site=where,
        names=tuple(vectors),
        tokens=tuple(token_text(tokenizer, token) for token in span.ids[span.start : span.end]),
        cosines=lengths / hidden.norm(dim=1),
        projections=lengths,
        outlier=span.start == 0,
    )
