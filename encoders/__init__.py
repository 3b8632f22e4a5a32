"""φ: from hidden states of a user's data to a small state."""

from steer.encoders.directions import logistic_direction, principal_direction
from steer.encoders.moments import Moments
from steer.encoders.pooling import last_token, mean_over_response, median_norm

__all__ = [
    "Moments",
    "last_token",
    "logistic_direction",
    "mean_over_response",
    "median_norm",
    "principal_direction",
]
