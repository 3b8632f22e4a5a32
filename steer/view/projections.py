"""Where in a text a direction shows: the projection of each token's hidden state on it."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from rich.console import Group
from rich.style import Style
from rich.text import Text

from steer.errors import SteerError
from steer.read import Span, response_span
from steer.sites import Site
from steer.view.colours import GREY, PROJECTION, WHITE, colour, colour_map, ink
from steer.view.directions import Directions, require_fit, vectors_of
from steer.view.figures import drawable, new_figure
from steer.view.page import page, text_of
from steer.view.tokens import read_tokens
from steer.view.words import printable, token_text, visible

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from steer.model import FrozenLM

Values = Literal["cosine", "projection"]

_TOKENS_ACROSS = 28


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
        parts = [Text("  ").join(Text(label, _style(back)) for label, back in self._legend(values))]
        for name, row, numbers in zip(self.names, self._colours(values), self._table(values), strict=True):
            parts.append(Text(f"\n{printable(name)}  {self._range(numbers)}", style="bold"))
            line = Text()
            for token, back in zip(self.tokens, row, strict=True):
                line.append(_on_lines(token), _style(back))
            parts.append(line)
        return Group(*parts)

    def html(self, values: Values = "cosine") -> str:
        """A page that needs nothing but itself; pointing at a token shows its numbers."""
        return page(f"Projections at {self.site}", self._fragment(values))

    def _repr_html_(self) -> str:
        return self._fragment("cosine")

    def figure(self, values: Values = "cosine") -> Any:
        """A heat map, a row a direction, of as many lines as the text needs; a matplotlib figure."""
        table, limit = self._table(values), self._limit(values)
        # Lines of like length, rather than one token left over.
        down = -(-len(self.tokens) // _TOKENS_ACROSS)
        across = -(-len(self.tokens) // down)
        starts = range(0, len(self.tokens), across)
        height = 0.3 * len(self.names) + 0.95
        figure = new_figure(11, max(2.4, 0.6 + height * len(starts)))
        lines = figure.subplots(len(starts), 1, squeeze=False)[:, 0]
        names = [drawable(printable(name)) for name in self.names]
        colours = colour_map(PROJECTION).with_extremes(bad=GREY)
        shown = table.clone()
        shown[:, : int(self.outlier)] = torch.nan
        for axes, start in zip(lines, starts, strict=True):
            part = shown[:, start : start + across]
            image = axes.imshow(part.numpy(), cmap=colours, vmin=-limit, vmax=limit, aspect="auto")
            words = [drawable(visible(token)) for token in self.tokens[start : start + across]]
            axes.set_xticks(range(len(words)), words, rotation=90, family="monospace", fontsize=9, parse_math=False)
            axes.set_yticks(range(len(names)), names, parse_math=False)
            # The last line keeps its tokens as wide as the others'.
            axes.set_xlim(-0.5, across - 0.5)
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
        lines[0].set_title(f"{values} at {self.site}", fontsize=11, loc="left")
        figure.colorbar(image, ax=lines, label=values, shrink=0.4 + 0.6 / len(starts))
        return figure

    def _table(self, values: Values) -> Float[Tensor, "direction token"]:
        if values not in get_args(Values):
            raise SteerError(f"values={values!r} is not one of {', '.join(get_args(Values))}")
        return self.cosines if values == "cosine" else self.projections

    def _limit(self, values: Values) -> float:
        return max(self._table(values)[:, int(self.outlier) :].abs().max().item(), 1e-12)

    def _colours(self, values: Values) -> list[list[str]]:
        """The background of each token, a row a direction."""
        table, grey = self._table(values) / self._limit(values), int(self.outlier)
        return [[GREY] * grey + [colour(value, PROJECTION) for value in row[grey:]] for row in table.tolist()]

    def _legend(self, values: Values) -> list[tuple[str, str]]:
        """Labels and their backgrounds."""
        limit = self._limit(values)
        ends = [(f" {share * limit:+.3g} ", colour(share, PROJECTION)) for share in (-1, 1)]
        outlier = [(" first token, left out ", GREY)] if self.outlier else []
        return [(f"{values} at {self.site}", WHITE), ends[0], (" 0 ", colour(0, PROJECTION)), ends[1], *outlier]

    def _range(self, numbers: Float[Tensor, " token"]) -> str:
        """Where the direction shows least and most, for those who see no colours."""
        inside = numbers[int(self.outlier) :]
        ends = (int(self.outlier) + int(place) for place in (inside.argmin(), inside.argmax()))
        return " … ".join(f"{numbers[end]:+.3g} {visible(self.tokens[end])}" for end in ends)

    def _fragment(self, values: Values) -> str:
        legend = " ".join(
            f'<span style="background:{back};color:{ink(back)};white-space:pre">{escape(label)}</span>'
            for label, back in self._legend(values)
        )
        parts = [f'<p style="font-size:0.9em">{legend}</p>']
        for name, row, cosines, lengths in zip(
            self.names, self._colours(values), self.cosines.tolist(), self.projections.tolist(), strict=True
        ):
            words = "".join(map(_html_token, self.tokens, row, cosines, lengths))
            parts.append(
                f'<p style="margin:0.8em 0 0.2em"><b>{escape(printable(name))}</b></p>'
                f'<p style="font-family:monospace;line-height:1.5;white-space:pre-wrap;margin:0">{words}</p>'
            )
        return f'<div style="color:#000;background:#fff;padding:0.5em">{"".join(parts)}</div>'


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


def _on_lines(token: str) -> str:
    """The token in running text: spaces as they are, other invisible characters marked, and lines that break."""
    return visible(token).replace("␣", " ").replace("↵", "↵\n")


def _html_token(token: str, back: str, cosine: float, length: float) -> str:
    title = f"cosine {cosine:.4f}, projection {length:.4g}"
    return f'<span style="background:{back};color:{ink(back)}" title="{title}">{escape(_on_lines(token))}</span>'


def _style(background: str) -> Style:
    return Style(color=ink(background), bgcolor=background)
