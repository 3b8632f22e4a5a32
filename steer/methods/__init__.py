"""Published methods, one file each."""

from steer.methods.caa import CAA
from steer.methods.cos import CoS
from steer.methods.given_vector import GivenVector
from steer.methods.natural_gradient import NaturalGradient
from steer.methods.perfit import PerFit
from steer.methods.prefix_tuning import PrefixTuning
from steer.methods.repe import RepEPCA
from steer.methods.style_vector import StyleVector
from steer.methods.trained_vector import TrainedVector
from steer.methods.user_llm import UserLLM

__all__ = [
    "CAA",
    "CoS",
    "GivenVector",
    "NaturalGradient",
    "PerFit",
    "PrefixTuning",
    "RepEPCA",
    "StyleVector",
    "TrainedVector",
    "UserLLM",
]
