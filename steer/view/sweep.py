"""Heat maps of sweeps over sites and strengths."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.style import Style
from rich.table import Table
from rich.text import Text

from steer.sites import Site
from steer.view.colours import CHANGE, colour, colour_map, ink
from steer.view.figures import new_figure
from steer.view.page import page, text_of

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Sweep:
    """How users' vectors change the likelihood of what they wrote later, by site and strength; `sweep` gives it.

    All losses are in nats per token, and each user counts once. A change below zero says that the records became
    likelier.

    Attributes:
        users: whose records were scored.
        sites: where the vectors entered, one at a time.
        amounts: how much of them, in `unit`s.
        unit: "strength" or "dose".
        base: negative log-likelihood without steering.
        own: what the user's own vector adds to it.
        other: what others' vectors add to it, their mean; None if there were none to compare with.
        others: how many there were.
        tokens: how many were scored, by user.
    """

    users: tuple[str, ...]
    sites: tuple[Site, ...]
    amounts: tuple[float, ...]
    unit: str
    base: Float[Tensor, " user"]
    own: Float[Tensor, "user site amount"]
    other: Float[Tensor, "user site amount"] | None
    others: int
    tokens: tuple[int, ...]

    def maps(self) -> dict[str, Float[Tensor, "site amount"]]:
        """Means over users: own minus no steering, and, if there were others, own minus these."""
        maps = {"own − none": self.own.mean(0)}
        return maps if self.other is None else maps | {"own − others'": (self.own - self.other).mean(0)}

    def best(self) -> tuple[Site, float]:
        """Where own vectors help most, and at which amount. The best of many looks better than it is."""
        site, amount = divmod(int(self.own.mean(0).argmin()), len(self.amounts))
        return self.sites[site], self.amounts[amount]

    def to_json(self) -> dict[str, Any]:
        """As `steer sweep --json` writes it; tables have a row a site and a column an amount."""
        maps = list(self.maps().values())
        site, amount = self.best()
        return {
            "sites": [str(site) for site in self.sites],
            self.unit: list(self.amounts),
            "own_minus_base": maps[0].tolist(),
            "own_minus_other": None if self.other is None else maps[1].tolist(),
            "best": {"site": str(site), self.unit: amount},
            "others": self.others,
            "users": {
                user: {
                    "n_tokens": self.tokens[i],
                    "nll_base": self.base[i].item(),
                    "own_minus_base": self.own[i].tolist(),
                    "other_minus_base": None if self.other is None else self.other[i].tolist(),
                }
                for i, user in enumerate(self.users)
            },
        }

    def __str__(self) -> str:
        return text_of(self)

    def __rich__(self) -> Group:
        """A table for each map."""
        return Group(*(self._rich_table(title, values) for title, values in self.maps().items()), self._remark())

    def html(self) -> str:
        """A page that needs nothing but itself."""
        return page("Sites and strengths", self._repr_html_())

    def _repr_html_(self) -> str:
        tables = "".join(self._html_table(title, values) for title, values in self.maps().items())
        return f'<div style="color:#000;background:#fff;padding:0.5em">{tables}<p>{escape(self._remark())}</p></div>'

    def figure(self) -> Any:
        """The maps side by side; a matplotlib figure. The best point of the first is framed."""
        maps = self.maps()
        width = max(3.2, 1.2 + 0.62 * len(self.amounts))
        figure = new_figure(1.0 + (width + 1.2) * len(maps), 1.7 + 0.36 * len(self.sites))
        panels = figure.subplots(1, len(maps), squeeze=False, sharey=True)[0]
        for axes, (title, values) in zip(panels, maps.items(), strict=True):
            limit = _limit(values)
            image = axes.imshow(values.numpy(), cmap=colour_map(CHANGE), vmin=-limit, vmax=limit, aspect="auto")
            for (i, j), value in _cells(values):
                back = colour(value / limit, CHANGE)
                axes.text(j, i, f"{value:+.3f}", ha="center", va="center", color=ink(back), fontsize=9)
            axes.set_xticks(range(len(self.amounts)), [f"{amount:g}" for amount in self.amounts])
            axes.set_title(title, fontsize=11)
            axes.set_xlabel(self.unit)
            ends = "max" if values.max() > limit else "neither"
            figure.colorbar(image, ax=axes, extend=ends, label="nats per token (green: likelier)")
        panels[0].set_yticks(range(len(self.sites)), [str(site) for site in self.sites])
        i, j = self._best_cell()
        panels[0].add_patch(_frame(i, j))
        return figure

    def _best_cell(self) -> tuple[int, int]:
        site, amount = self.best()
        return self.sites.index(site), self.amounts.index(amount)

    def _remark(self) -> str:
        site, amount = self.best()
        others = "" if self.other is None else f", each against {self.others} other{'s'[: self.others != 1]}"
        return f"best for their own: {site} at {self.unit} {amount:g} ({len(self.users)} users{others})"

    def _rich_table(self, title: str, values: Float[Tensor, "site amount"]) -> Table:
        table = Table(title=f"{title}, nats per token", title_justify="left", box=None, pad_edge=False, padding=0)
        table.add_column(Text(f"{self.unit} "), justify="left", no_wrap=True)
        for amount in self.amounts:
            table.add_column(f"{amount:g} ", justify="right", no_wrap=True)
        limit = _limit(values)
        for site, row in zip(self.sites, values.tolist(), strict=True):
            backs = [colour(value / limit, CHANGE) for value in row]
            cells = (
                Text(f" {value:+.4f} ", Style(color=ink(back), bgcolor=back))
                for value, back in zip(row, backs, strict=True)
            )
            table.add_row(Text(f"{site} "), *cells)
        return table

    def _html_table(self, title: str, values: Float[Tensor, "site amount"]) -> str:
        limit = _limit(values)
        head = "".join(f"<th>{amount:g}</th>" for amount in self.amounts)
        body = "".join(
            f'<tr><th style="text-align:left">{site}</th>'
            + "".join(
                f'<td style="background:{back};color:{ink(back)};padding:0.2em 0.5em">{value:+.4f}</td>'
                for value, back in ((value, colour(value / limit, CHANGE)) for value in row)
            )
            + "</tr>"
            for site, row in zip(self.sites, values.tolist(), strict=True)
        )
        return (
            '<table style="border-collapse:collapse;text-align:right;margin-bottom:1.5em">'
            f'<caption style="text-align:left;font-weight:bold">{escape(title)}, nats per token</caption>'
            f'<tr><th style="text-align:left">{self.unit}</th>{head}</tr>{body}</table>'
        )


def _limit(values: Tensor) -> float:
    """Where the colours end: at the greatest gain, as what is much too strong would make all others pale."""
    gain = -values.min().item()
    return gain if gain > 0 else max(values.abs().max().item(), 1e-12)


def _cells(values: Tensor) -> list[tuple[tuple[int, int], float]]:
    return [((i, j), value) for i, row in enumerate(values.tolist()) for j, value in enumerate(row)]


def _frame(i: int, j: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, edgecolor="black", linewidth=2, clip_on=False)
