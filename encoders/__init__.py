"""φ: from hidden states of a user's data to a small state."""

from steer.encoders.pooling import last_token, mean_over_response, token_norms

__all__ = ["last_token", "mean_over_response", "token_norms"]
