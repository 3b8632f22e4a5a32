"""Published methods, one file each."""

from steer.methods.amulet import Amulet
from steer.methods.caa import CAA
from steer.methods.commer import ComMer
from steer.methods.contrastive_decoding import ContrastiveDecoding
from steer.methods.cos import CoS, CoSMany, CoSPair
from steer.methods.costeer import CoSteer
from steer.methods.dexperts import DExperts
from steer.methods.drift import Drift
from steer.methods.given_vector import GivenVector
from steer.methods.guidance import Guidance
from steer.methods.knn_lm import KNNLM
from steer.methods.mod import MOD
from steer.methods.natural_gradient import NaturalGradient
from steer.methods.perfit import PerFit
from steer.methods.pplug import PPlug
from steer.methods.prefix_tuning import PrefixTuning
from steer.methods.proxy_tuning import ProxyTuning
from steer.methods.recap import Recap
from steer.methods.repe import RepEPCA
from steer.methods.style_vector import StyleVector
from steer.methods.trained_vector import TrainedVector
from steer.methods.user_llm import UserLLM

__all__ = [
    "CAA",
    "KNNLM",
    "MOD",
    "Amulet",
    "CoS",
    "CoSMany",
    "CoSPair",
    "CoSteer",
    "ComMer",
    "ContrastiveDecoding",
    "DExperts",
    "Drift",
    "GivenVector",
    "Guidance",
    "NaturalGradient",
    "PPlug",
    "PerFit",
    "PrefixTuning",
    "ProxyTuning",
    "Recap",
    "RepEPCA",
    "StyleVector",
    "TrainedVector",
    "UserLLM",
]
