"""Activation steering and soft prompts that make a frozen language model write like a particular person."""

from importlib.util import find_spec

if find_spec("steer.kernels") is None:
    raise ImportError(
        "this is the source folder of steer, not the package: run `python -P`, or start in another folder than the "
        "checkout's root. If steer is not installed: pip install -c constraints.txt ."
    )

from steer.architectures import Architecture, register_architecture
from steer.bank import Bank
from steer.errors import SteerError, UnknownUser
from steer.history import History, Record, read_histories
from steer.inject import (
    Condition,
    KeyValueEdit,
    KeyValues,
    LowRankEdit,
    MemoryEdit,
    NeighbourEdit,
    Place,
    PrefixEdit,
    ProjectionEdit,
    PromptKeyValues,
    PromptPrefix,
    ResidualEdit,
    StreamEdit,
)
from steer.key_values import key_values_of
from steer.method import Method, TrainableMethod, make_method
from steer.methods import (
    CAA,
    KNNLM,
    MOD,
    Amulet,
    ComMer,
    ContrastiveDecoding,
    CoS,
    CoSMany,
    CoSPair,
    CoSteer,
    DExperts,
    Drift,
    GivenVector,
    Guidance,
    NaturalGradient,
    PerFit,
    PPlug,
    PrefixTuning,
    ProxyTuning,
    Recap,
    RepEPCA,
    StyleVector,
    TrainedVector,
    UserLLM,
)
from steer.model import FrozenLM, load, uncompile, wrap
from steer.pairs import Pair, read_pairs
from steer.read import read
from steer.sites import Site
from steer.state import Artifact, Blend, Provenance, UserState
from steer.steering import Steering
from steer.text_encoder import TextEncoder

__version__ = "0.1.0"

__all__ = [
    "CAA",
    "KNNLM",
    "MOD",
    "Amulet",
    "Architecture",
    "Artifact",
    "Bank",
    "Blend",
    "CoS",
    "CoSMany",
    "CoSPair",
    "CoSteer",
    "ComMer",
    "Condition",
    "ContrastiveDecoding",
    "DExperts",
    "Drift",
    "FrozenLM",
    "GivenVector",
    "Guidance",
    "History",
    "KeyValueEdit",
    "KeyValues",
    "LowRankEdit",
    "MemoryEdit",
    "Method",
    "NaturalGradient",
    "NeighbourEdit",
    "PPlug",
    "Pair",
    "PerFit",
    "Place",
    "PrefixEdit",
    "PrefixTuning",
    "ProjectionEdit",
    "PromptKeyValues",
    "PromptPrefix",
    "Provenance",
    "ProxyTuning",
    "Recap",
    "Record",
    "RepEPCA",
    "ResidualEdit",
    "Site",
    "SteerError",
    "Steering",
    "StreamEdit",
    "StyleVector",
    "TextEncoder",
    "TrainableMethod",
    "TrainedVector",
    "UnknownUser",
    "UserLLM",
    "UserState",
    "key_values_of",
    "load",
    "make_method",
    "read",
    "read_histories",
    "read_pairs",
    "register_architecture",
    "uncompile",
    "wrap",
]
