"""Vector lens: which tokens a direction of the residual stream promotes and suppresses.

The logit lens (nostalgebraist, "interpreting GPT: the logit lens", 2020), applied to a direction instead of a state:
what the direction adds to the logits if it reaches the end of the stream as it is,

    ℓ = √d · W_U ( γ ⊙ v/‖v‖ ),    minus its mean over the vocabulary,

with the unembedding W_U and the final norm's scale γ; where that norm subtracts the mean of its input, so do we. This
is linear and follows the direct path only: what later blocks make of the direction is left out, and so is that it makes
the other parts of the stream relatively smaller by lengthening the whole. Softcaps and constant scales after the
unembedding are not applied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from rich.table import Table
from rich.text import Text
from torch.func import functional_call

from steer.errors import SteerError
from steer.sites import Site
from steer.view.colours import PROJECTION, colour, ink
from steer.view.directions import Directions, require_fit, vectors_of
from steer.view.figures import drawable, new_figure
from steer.view.page import page, text_of
from steer.view.words import printable, token_text, visible

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from steer.model import FrozenLM

_ROWS_AT_ONCE = 16384
_PANELS_ACROSS = 3


class TokenLogit(NamedTuple):
    """A token, its text with signs for what is invisible, and what a direction adds to its logit."""

    id: int
    text: str
    logit: float


@dataclass(frozen=True)
class Lens:
    """Which tokens directions promote and suppress, as `lens` gives it.

    The unit is that of a dose: a logit of 2 means that the direction, added at the end of the stream and as long as the
    stream itself is there, would raise this logit by 2 over the vocabulary's mean if the first steps were kept up.

    Attributes:
        promoted: for each direction, the tokens that it adds most to, the highest first.
        suppressed: those that it takes most from, the lowest first.
    """

    promoted: Mapping[str, Sequence[TokenLogit]]
    suppressed: Mapping[str, Sequence[TokenLogit]]

    def __str__(self) -> str:
        return text_of(self)

    def __rich__(self) -> Table:
        """Directions side by side, each with its own ranking."""
        table = Table(box=None, pad_edge=False)
        table.add_column(no_wrap=True)
        for name in self.promoted:
            table.add_column(Text(printable(name)), no_wrap=True)
            table.add_column(justify="right", no_wrap=True)
        for title, ranked in self._sides():
            for rank, row in enumerate(zip(*ranked.values(), strict=True)):
                cells = (Text(cell) for token in row for cell in (token.text, f"{token.logit:+.1f}"))
                table.add_row(title if rank == 0 else "", *cells)
        return table

    def html(self) -> str:
        """A page that needs nothing but itself."""
        return page("Which tokens a direction promotes and suppresses", self._repr_html_())

    def _repr_html_(self) -> str:
        limit = max(abs(token.logit) for _, ranked in self._sides() for row in ranked.values() for token in row)
        head = "".join(
            f'<th colspan="2" style="text-align:left">{escape(printable(name))}</th>' for name in self.promoted
        )
        body = []
        for title, ranked in self._sides():
            for rank, row in enumerate(zip(*ranked.values(), strict=True)):
                cells = "".join(_html_cells(token, limit) for token in row)
                body.append(f"<tr><th>{title if rank == 0 else ''}</th>{cells}</tr>")
        return (
            '<div style="overflow-x:auto;color:#000;background:#fff">'
            '<table style="border-collapse:separate;border-spacing:6px 1px">'
            f"<tr><th></th>{head}</tr>{''.join(body)}</table></div>"
        )

    def figure(self) -> Any:
        """The same as bars, one panel a direction; a matplotlib figure."""
        names = list(self.promoted)
        rows = max(len(self.promoted[name]) + len(self.suppressed[name]) for name in names)
        across, down = min(len(names), _PANELS_ACROSS), -(-len(names) // _PANELS_ACROSS)
        figure = new_figure(0.4 + 3 * across, 0.7 + (0.5 + 0.24 * rows) * down)
        panels = figure.subplots(down, across, squeeze=False, sharex=True).flat
        for axes in panels[len(names) :]:
            axes.set_axis_off()
        for axes, name in zip(panels, names, strict=False):
            tokens = [*self.promoted[name], *reversed(self.suppressed[name])]
            colours = [PROJECTION[-1] if token.logit > 0 else PROJECTION[0] for token in tokens]
            axes.barh(range(len(tokens)), [token.logit for token in tokens], color=colours, height=0.75)
            axes.set_yticks(range(len(tokens)), [drawable(token.text) for token in tokens], parse_math=False)
            axes.set_ylim(len(tokens) - 0.4, -0.6)
            axes.axvline(0, color="0.4", lw=0.8)
            axes.tick_params(labelbottom=True)
            axes.set_title(drawable(printable(name)), fontsize=11, parse_math=False)
        figure.supxlabel("change of the logit per dose, over the vocabulary's mean", fontsize=10)
        return figure

    def _sides(self) -> list[tuple[str, Mapping[str, Sequence[TokenLogit]]]]:
        return [("promotes", self.promoted), ("suppresses", self.suppressed)]


def lens(
    lm: FrozenLM,
    directions: Directions,
    *,
    site: Site | str | None = None,
    k: int = 10,
    common: Tensor | Literal["mean"] | None = None,
) -> Lens:
    """Which tokens directions promote and suppress at the end of the stream.

    Args:
        lm: the model.
        directions: a vector, a state, or several of either by name.
        site: which vector of a state that has several.
        k: how many tokens on either side.
        common: what is taken away from every vector first: a vector, such as the mean of a population's vectors, or
            "mean", that of the given ones. What remains is what sets one apart from the others.

    Raises:
        SteerError: the model has no tokenizer or no head for the stream, a direction is not of its stream or zero, or k
            is out of range.
    """
    where, vectors = vectors_of(directions, site)
    if where is not None and where.name in ("z", "ln_final"):
        raise SteerError(f"{where} is not part of the residual stream, whose directions are what the lens looks at")
    require_fit(lm, directions, vectors, lm.width)
    if common is not None:
        vectors = _without(vectors, common)
        require_fit(lm, {}, vectors, lm.width)
    if lm.tokenizer is None:
        raise SteerError("this model was wrapped without a tokenizer, so its tokens have no names")
    logits = direction_logits(lm, torch.stack(list(vectors.values())))
    # Some heads have rows to spare that no token belongs to.
    logits = logits[:, : len(lm.tokenizer)]
    logits = logits - logits.mean(1, keepdim=True)
    if not 1 <= k <= logits.shape[1]:
        raise SteerError(f"k={k}: there are {logits.shape[1]} tokens to choose from")
    return Lens(
        promoted={name: _top(lm, row, k, largest=True) for name, row in zip(vectors, logits, strict=True)},
        suppressed={name: _top(lm, row, k, largest=False) for name, row in zip(vectors, logits, strict=True)},
    )


def direction_logits(lm: FrozenLM, vectors: Float[Tensor, "direction d"]) -> Float[Tensor, "direction vocab"]:
    """What directions add to the logits per dose by the direct path, in float32, not centred.

    Raises:
        SteerError: the model has no head, or one that does not read the stream itself.
    """
    head: Any = lm.model.get_output_embeddings()
    if head is None or head.weight.shape[1] != lm.width:
        raise SteerError(
            "this model has no unembedding that reads the residual stream, so its directions have no tokens"
        )
    scale, centres = _final_norm(lm)
    unit = vectors.float() / vectors.float().norm(dim=1, keepdim=True)
    if centres:
        unit = unit - unit.mean(1, keepdim=True)
    read = lm.width**0.5 * (unit * scale.to(unit)).T.to(head.weight.device)
    return torch.cat([rows.float() @ read for rows in head.weight.detach().split(_ROWS_AT_ONCE)]).T.cpu()


def _final_norm(lm: FrozenLM) -> tuple[Float[Tensor, " d"], bool]:
    """The scale of the final norm, and whether it subtracts the mean.

    Both are asked of the norm itself: the scale is its weight in Llama and 1 + weight in Gemma.
    """
    path = lm.attachment.architecture.final_norm
    if path is None:
        return torch.ones(lm.width), False
    norm = lm.attachment.decoder.get_submodule(path)
    weights = {name: parameter.detach().float() for name, parameter in norm.named_parameters()}

    def output(values: Tensor) -> Tensor:
        return functional_call(norm, weights, (values,))

    ones = torch.ones(lm.width, device=next(iter(weights.values())).device)
    bias = output(torch.zeros_like(ones))
    # The mean is 0, so that a norm which subtracts it leaves it alone; the root mean square is √(d−1).
    probe = ones.clone()
    probe[0] = 1 - lm.width
    scale = (output(probe) - bias) * (lm.width - 1) ** 0.5 / probe
    return scale, torch.allclose(output(ones), bias)


def _without(vectors: Mapping[str, Tensor], common: Tensor | str) -> dict[str, Tensor]:
    if isinstance(common, str):
        if common != "mean":
            raise SteerError(f'common={common!r} is neither "mean" nor a vector')
        if len(vectors) < 2:
            raise SteerError('common="mean" compares directions with one another, and there is one; give more')
        common = torch.stack(list(vectors.values())).mean(0)
    shared = common.detach().float().cpu()
    return {name: vector - shared for name, vector in vectors.items()}


def _top(lm: FrozenLM, logits: Float[Tensor, " vocab"], k: int, *, largest: bool) -> tuple[TokenLogit, ...]:
    assert lm.tokenizer is not None
    values, ids = logits.topk(k, largest=largest)
    return tuple(
        TokenLogit(token, visible(token_text(lm.tokenizer, token)), value)
        for token, value in zip(ids.tolist(), values.tolist(), strict=True)
    )


def _html_cells(token: TokenLogit, limit: float) -> str:
    back = colour(token.logit / limit, PROJECTION)
    return (
        f'<td style="font-family:monospace;text-align:left"><bdi>{escape(token.text)}</bdi></td>'
        f'<td style="background:{back};color:{ink(back)};text-align:right;padding:0 4px">{token.logit:+.1f}</td>'
    )
