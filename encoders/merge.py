"""ComMer's merging: what documents were compressed to, as their number and their sum.

Zeldes et al., "ComMer", arXiv 2501.03276: each document becomes k soft tokens Z_j, and the user's are their mean,

    Z = 1/n · Σ_j Z_j

so that a document is added, and taken out again, without a look at the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from steer.errors import SteerError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Merged:
    """Any number of documents' soft tokens. `a + b` is of the documents of both; `a + b - b` is `a` again.

    Float64 holds a sum of n float32 numbers without rounding as long as none is more than 2^29 / n times another: a
    document that was taken out then leaves no trace, and the order in which they came plays no part. Beyond that both
    hold to a relative 1e-16 of the largest.

    Attributes:
        count: number of documents.
        total: their sum, float64.
    """

    count: int
    total: Float[Tensor, "slot d"]

    @classmethod
    def of(cls, documents: Float[Tensor, "document slot d"]) -> Merged:
        """Of any number of documents, none included."""
        return cls(len(documents), documents.double().sum(0))

    @property
    def mean(self) -> Float[Tensor, "slot d"]:
        """The soft tokens of all, float32; zeros where there are none."""
        return (self.total / max(self.count, 1)).float()

    def __add__(self, other: Merged) -> Merged:
        self._require_like(other)
        return Merged(self.count + other.count, self.total + other.total)

    def __sub__(self, other: Merged) -> Merged:
        """Without documents that are among these.

        Raises:
            SteerError: there are more of them.
        """
        self._require_like(other)
        if other.count > self.count:
            raise SteerError(f"{other.count} documents cannot be taken out of {self.count}")
        return Merged(self.count - other.count, self.total - other.total)

    def _require_like(self, other: Merged) -> None:
        if self.total.shape != other.total.shape:
            shapes = " and ".join(" × ".join(map(str, merged.total.shape)) for merged in (self, other))
            raise SteerError(f"documents of different shapes cannot be merged: soft tokens of {shapes}")
