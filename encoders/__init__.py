"""φ: from a user's data, as hidden states or as embeddings, to a small state."""

from steer.encoders.aggregate import InputAwareAttention, masked_mean
from steer.encoders.directions import logistic_direction, principal_direction
from steer.encoders.items import ItemTransformer
from steer.encoders.merge import Merged
from steer.encoders.moments import Moments
from steer.encoders.perceiver import PerceiverResampler
from steer.encoders.pooling import last_token, mean_over_response, median_norm
from steer.encoders.project import LearnedTokens, Projector, to_norm, usual_norm
from steer.encoders.text import SentenceEncoder

__all__ = [
    "InputAwareAttention",
    "ItemTransformer",
    "LearnedTokens",
    "Merged",
    "Moments",
    "PerceiverResampler",
    "Projector",
    "SentenceEncoder",
    "last_token",
    "logistic_direction",
    "masked_mean",
    "mean_over_response",
    "median_norm",
    "principal_direction",
    "to_norm",
    "usual_norm",
]
