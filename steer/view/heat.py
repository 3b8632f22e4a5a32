"""Numbers over the tokens of a text: as coloured text in the terminal and in HTML, and as a heat map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Group
from rich.style import Style
from rich.text import Text

from steer.view.colours import GREY, PROJECTION, WHITE, colour, colour_map, ink
from steer.view.figures import drawable, new_figure
from steer.view.words import printable, visible

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

_TOKENS_ACROSS = 28
_NAME = 60


@dataclass(frozen=True, eq=False)
class Heat:
    """What to draw: a number for each token of a text, in as many rows as there are names.

    Attributes:
        title: what the numbers are.
        unit: beside the scale of colours.
        names: of the rows.
        tokens: their texts, spaces and line ends included.
        table: the numbers; white is 0.
        hints: what pointing at a token shows, row by row.
        notes: beside each name, such as for those who see no colours.
        signed: whether numbers may be below 0.
        outlier: whether the first token is drawn grey, and plays no part in the scale of the colours.
    """

    title: str
    unit: str
    names: Sequence[str]
    tokens: Sequence[str]
    table: Float[Tensor, "name token"]
    hints: Sequence[Sequence[str]]
    notes: Sequence[str]
    signed: bool = True
    outlier: bool = False

    def lines(self) -> Group:
        """The text once for each name, with a coloured background, for the terminal."""
        parts = [Text("  ").join(Text(label, _style(back)) for label, back in self._legend())]
        for name, note, row in zip(self.names, self.notes, self._colours(), strict=True):
            parts.append(Text(f"\n{_short(name)}  {note}", style="bold"))
            line = Text()
            for token, back in zip(self.tokens, row, strict=True):
                line.append(_on_lines(token), _style(back))
            parts.append(line)
        return Group(*parts)

    def html(self) -> str:
        """The same as HTML, to stand on a page."""
        legend = " ".join(
            f'<span style="background:{back};color:{ink(back)};white-space:pre">{escape(label)}</span>'
            for label, back in self._legend()
        )
        parts = [f'<p style="font-size:0.9em">{legend}</p>']
        for name, note, row, hints in zip(self.names, self.notes, self._colours(), self.hints, strict=True):
            words = "".join(map(_html_token, self.tokens, row, hints))
            parts.append(
                f'<p style="margin:0.8em 0 0.2em"><b>{escape(_short(name))}</b> {escape(note)}</p>'
                f'<p style="font-family:monospace;line-height:1.5;white-space:pre-wrap;margin:0">{words}</p>'
            )
        return f'<div style="color:#000;background:#fff;padding:0.5em">{"".join(parts)}</div>'

    def figure(self) -> Any:
        """A heat map, a row a name, of as many lines as the text needs; a matplotlib figure."""
        limit = self._limit()
        # Lines of like length, rather than one token left over.
        down = -(-len(self.tokens) // _TOKENS_ACROSS)
        across = -(-len(self.tokens) // down)
        starts = range(0, len(self.tokens), across)
        height = 0.3 * len(self.names) + 0.95
        figure = new_figure(11, max(2.4, 0.6 + height * len(starts)))
        lines = figure.subplots(len(starts), 1, squeeze=False)[:, 0]
        names = [drawable(_short(name)) for name in self.names]
        ramp = PROJECTION if self.signed else PROJECTION[len(PROJECTION) // 2 :]
        colours = colour_map(ramp).with_extremes(bad=GREY)
        shown = self.table.clone()
        shown[:, : int(self.outlier)] = torch.nan
        for axes, start in zip(lines, starts, strict=True):
            part = shown[:, start : start + across]
            image = axes.imshow(
                part.numpy(), cmap=colours, vmin=-limit if self.signed else 0, vmax=limit, aspect="auto"
            )
            words = [drawable(visible(token)) for token in self.tokens[start : start + across]]
            axes.set_xticks(range(len(words)), words, rotation=90, family="monospace", fontsize=9, parse_math=False)
            axes.set_yticks(range(len(names)), names, parse_math=False)
            # The last line keeps its tokens as wide as the others'.
            axes.set_xlim(-0.5, across - 0.5)
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
        lines[0].set_title(self.title, fontsize=11, loc="left")
        figure.colorbar(image, ax=lines, label=self.unit, shrink=0.4 + 0.6 / len(starts))
        return figure

    def _limit(self) -> float:
        return max(self.table[:, int(self.outlier) :].abs().max().item(), 1e-12)

    def _colours(self) -> list[list[str]]:
        """The background of each token, row by row."""
        table, grey = self.table / self._limit(), int(self.outlier)
        return [[GREY] * grey + [colour(value, PROJECTION) for value in row[grey:]] for row in table.tolist()]

    def _legend(self) -> list[tuple[str, str]]:
        """Labels and their backgrounds."""
        limit = self._limit()
        low, high = ((f" {share * limit:+.3g} ", colour(share, PROJECTION)) for share in (-1, 1))
        middle, outlier = (" 0 ", colour(0, PROJECTION)), (" first token, left out ", GREY)
        return [
            (self.title, WHITE),
            *([low] if self.signed else []),
            middle,
            high,
            *([outlier] if self.outlier else []),
        ]


def extremes(numbers: Float[Tensor, " token"], tokens: Sequence[str], outlier: bool = False) -> str:
    """Where the numbers are lowest and highest, for those who see no colours."""
    first = int(outlier)
    ends = (first + int(place) for place in (numbers[first:].argmin(), numbers[first:].argmax()))
    return " … ".join(f"{numbers[end]:+.3g} {visible(tokens[end])}" for end in ends)


def _short(name: str) -> str:
    return printable(name if len(name) <= _NAME else f"{name[: _NAME - 1]}…")


def _on_lines(token: str) -> str:
    """The token in running text: spaces as they are, other invisible characters marked, and lines that break."""
    return visible(token).replace("␣", " ").replace("↵", "↵\n")


def _html_token(token: str, back: str, hint: str) -> str:
    return f'<span style="background:{back};color:{ink(back)}" title="{escape(hint)}">{escape(_on_lines(token))}</span>'


def _style(background: str) -> Style:
    return Style(color=ink(background), bgcolor=background)
