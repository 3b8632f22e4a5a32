"""Directions that tell two sets of hidden states apart, as unit vectors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def logistic_direction(own: Float[Tensor, "row d"], other: Float[Tensor, "other d"]) -> Float[Tensor, " d"]:
    """The normal of the plane by which logistic regression separates them, towards `own`, float64.

    With an intercept, both sides weighted equally, and an L2 penalty (C = 1): without one, states that can be separated
    at all, as these usually can, have no best plane. Needs scikit-learn.
    """
    from sklearn.linear_model import LogisticRegression

    rows = torch.cat([own, other]).double()
    labels = [1] * len(own) + [0] * len(other)
    # Solved to the end: what little the default tolerance leaves depends on rounding.
    model = LogisticRegression(class_weight="balanced", tol=1e-8, max_iter=10_000)
    fitted = model.fit(rows.numpy(), labels)
    normal = torch.from_numpy(fitted.coef_[0])
    return normal / normal.norm()


def principal_direction(differences: Float[Tensor, "row d"]) -> Float[Tensor, " d"]:
    """The direction along which differences are largest, from an uncentred SVD, float64.

    Its sign, which the decomposition leaves open, is such that the mean difference points along it.
    """
    differences = differences.double()
    axis = torch.linalg.svd(differences, full_matrices=False).Vh[0]
    return -axis if axis @ differences.mean(0) < 0 else axis
