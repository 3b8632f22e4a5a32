"""Mean and covariance of vectors that come in parts, in float64.

Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979. With
δ = m_b − m_a, n = n_a + n_b and S = Σ (x − m)(x − m)ᵀ:

    m = m_a + δ · n_b / n                S = S_a + S_b + δ δᵀ · n_a n_b / n
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Moments:
    """What is kept of any number of vectors. `a + b` is of the vectors of both; `a + b - b` is `a` again.

    Attributes:
        count: number of vectors.
        mean: over them, float64.
        scatter: sum of the outer products of their deviations from the mean, float64; None if it was not asked for.
    """

    count: int
    mean: Float[Tensor, " d"]
    scatter: Float[Tensor, "d d"] | None = None

    @classmethod
    def of(cls, rows: Float[Tensor, "row d"], *, covariance: bool = False) -> Moments:
        """Of at least one row."""
        rows = rows.double()
        mean = rows.mean(0)
        return cls(len(rows), mean, (rows - mean).T @ (rows - mean) if covariance else None)

    @property
    def covariance(self) -> Float[Tensor, "d d"]:
        """Divided by `count − 1`. It has to be asked for in `of`."""
        assert self.scatter is not None, "Moments.of(rows, covariance=True)"
        return self.scatter / (self.count - 1)

    def __add__(self, other: Moments) -> Moments:
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        if self.scatter is None or other.scatter is None:
            return Moments(count, mean)
        between = delta.outer(delta) * (self.count * other.count / count)
        return Moments(count, mean, self.scatter + other.scatter + between)

    def __sub__(self, other: Moments) -> Moments:
        """Without vectors that are among these; at least one must remain."""
        count = self.count - other.count
        mean = self.mean + (self.mean - other.mean) * (other.count / count)
        if self.scatter is None or other.scatter is None:
            return Moments(count, mean)
        delta = other.mean - mean
        between = delta.outer(delta) * (count * other.count / self.count)
        return Moments(count, mean, self.scatter - other.scatter - between)
