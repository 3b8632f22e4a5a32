"""Activation steering and soft prompts that make a frozen language model write like a particular person."""

from steer.architectures import Architecture, register_architecture
from steer.bank import Bank
from steer.errors import SteerError, UnknownUser
from steer.history import History, Record, read_histories
from steer.inject import Condition, LowRankEdit, MemoryEdit, PrefixEdit, ProjectionEdit, ResidualEdit, StreamEdit
from steer.method import Method
from steer.methods import CoS, PrefixTuning, StyleVector, UserLLM
from steer.model import FrozenLM, load, uncompile, wrap
from steer.read import read
from steer.sites import Site
from steer.state import Artifact, Blend, Provenance, UserState
from steer.steering import Steering

__version__ = "0.1.0"

__all__ = [
    "Architecture",
    "Artifact",
    "Bank",
    "Blend",
    "CoS",
    "Condition",
    "FrozenLM",
    "History",
    "LowRankEdit",
    "MemoryEdit",
    "Method",
    "PrefixEdit",
    "PrefixTuning",
    "ProjectionEdit",
    "Provenance",
    "Record",
    "ResidualEdit",
    "Site",
    "SteerError",
    "Steering",
    "StreamEdit",
    "StyleVector",
    "UnknownUser",
    "UserLLM",
    "UserState",
    "load",
    "read",
    "read_histories",
    "register_architecture",
    "uncompile",
    "wrap",
]
