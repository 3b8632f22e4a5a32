"""How much contexts moved the tokens of an answer: the numbers, and pictures of them."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from steer.errors import SteerError
from steer.view.heat import Heat, extremes
from steer.view.page import page, text_of

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from rich.console import Group
    from torch import Tensor

Measure = Literal["change", "kl", "rank"]
_TITLES: dict[Measure, str] = {
    "change": "log p with the context − {other}, nats",
    "kl": "KL(with the context ‖ {other}), nats",
    "rank": "rank {other} over rank with the context, log2",
}
_UNITS: dict[Measure, str] = {"change": "nats", "kl": "nats", "rank": "doublings"}


@dataclass(frozen=True, eq=False)
class Influence:
    """What contexts changed at each token of an answer, given the tokens before it; in float32, on the CPU.

    Attributes:
        names: of the contexts.
        tokens: the answer's, as texts, spaces and line ends included.
        change: F of CoS at the token that stands there: by how much the context raises its log-probability, in nats.
        kl: of the whole distribution with the context from that without, KL(p_C ‖ p_∅), in nats: how much the context
            changed what could have been said, whatever was. Tokens that either rules out (−inf) do not count.
        rank: of the token with each context; 1 is the likeliest.
        rank_without: without a context.
        entropy: of the distribution with each context, in nats.
        entropy_without: of that without.
        opposite: the context that stands in the place of none in all that is called "without" here; None for none.
    """

    names: tuple[str, ...]
    tokens: tuple[str, ...]
    change: Float[Tensor, "context token"]
    kl: Float[Tensor, "context token"]
    rank: Int[Tensor, "context token"]
    rank_without: Int[Tensor, " token"]
    entropy: Float[Tensor, "context token"]
    entropy_without: Float[Tensor, " token"]
    opposite: str | None = None

    @property
    def rank_change(self) -> Int[Tensor, "context token"]:
        """By how many places the context moves the token up: its rank without minus that with it."""
        return self.rank_without - self.rank

    @property
    def log_ratio(self) -> Float[Tensor, " context"]:
        """How much the answer relies on each context: log p(answer | C, P) − log p(answer | P), in nats.

        Above 0 the answer is likelier with the context. It is the sum of `change`.
        """
        return self.change.sum(1)

    @property
    def mean_kl(self) -> Float[Tensor, " context"]:
        """How much each context has to say on this answer, in nats per token: the mean of `kl`."""
        return self.kl.mean(1)

    def __repr__(self) -> str:
        totals = "; ".join(f"{reprlib.repr(name)}: {self._total(i)}" for i, name in enumerate(self.names))
        return f"Influence({len(self.tokens)} tokens; {totals})"

    def __str__(self) -> str:
        return text_of(self)

    def __rich__(self) -> Group:
        return self.lines()

    def lines(self, values: Measure = "change") -> Group:
        """The answer once for each context, with a coloured background, for the terminal; print it with rich."""
        return self._heat(values).lines()

    def html(self, values: Measure = "change") -> str:
        """A page that needs nothing but itself; pointing at a token shows its numbers."""
        return page("Influence of the context", self._heat(values).html())

    def _repr_html_(self) -> str:
        return self._heat("change").html()

    def figure(self, values: Measure = "change") -> Any:
        """A heat map, a row a context, of as many lines as the answer needs; a matplotlib figure."""
        return self._heat(values).figure()

    def to_json(self) -> dict[str, Any]:
        """As `steer influence --json` prints it."""
        by_token = {name: getattr(self, name).tolist() for name in ("change", "kl", "rank", "entropy")}
        totals = {name: getattr(self, name).tolist() for name in ("log_ratio", "mean_kl")}
        return {
            "opposite": self.opposite,
            "tokens": list(self.tokens),
            "rank_without": self.rank_without.tolist(),
            "entropy_without": self.entropy_without.tolist(),
            "contexts": {
                name: {key: values[i] for key, values in (totals | by_token).items()}
                for i, name in enumerate(self.names)
            },
        }

    def _heat(self, values: Measure) -> Heat:
        if values not in get_args(Measure):
            raise SteerError(f"values={values!r} is not one of {', '.join(get_args(Measure))}")
        table = self._log_ranks() if values == "rank" else getattr(self, values)
        return Heat(
            title=_TITLES[values].format(other=self._other),
            unit=_UNITS[values],
            names=self.names,
            tokens=self.tokens,
            table=table,
            hints=[self._hints(i) for i in range(len(self.names))],
            notes=[f"{self._total(i)}; {extremes(row, self.tokens)}" for i, row in enumerate(table)],
            signed=values != "kl",
        )

    @property
    def _other(self) -> str:
        return "without" if self.opposite is None else "with its opposite"

    def _log_ranks(self) -> Float[Tensor, "context token"]:
        """From rank 8 to rank 1 is as far as from 800 to 100."""
        return torch.log2(self.rank_without / self.rank)

    def _total(self, context: int) -> str:
        return f"{self.log_ratio[context]:+.2f} nats in all, KL {self.mean_kl[context]:.3f} nats per token"

    def _hints(self, context: int) -> Sequence[str]:
        rows = (self.change[context], self.kl[context], self.rank_without, self.rank[context])
        return [
            f"{change:+.3f} nats, KL {kl:.3f} nats, rank {before} {self._other}, {after} with the context"
            for change, kl, before, after in zip(*(row.tolist() for row in rows), strict=True)
        ]
