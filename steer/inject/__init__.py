"""The ways into the model: residual stream, prefix, memory, contrasted streams, and neighbours of stored states."""

from steer.inject.condition import Condition, Decision
from steer.inject.memory import GatedCrossAttention, MemoryEdit
from steer.inject.neighbours import NeighbourEdit
from steer.inject.prefix import PrefixEdit, PromptPrefix
from steer.inject.residual import LowRankEdit, ProjectionEdit, ResidualEdit, SiteEdit
from steer.inject.streams import Mixture, Stream, StreamEdit

Edit = SiteEdit | PrefixEdit | PromptPrefix | MemoryEdit | StreamEdit | NeighbourEdit

__all__ = [
    "Condition",
    "Decision",
    "Edit",
    "GatedCrossAttention",
    "LowRankEdit",
    "MemoryEdit",
    "Mixture",
    "NeighbourEdit",
    "PrefixEdit",
    "ProjectionEdit",
    "PromptPrefix",
    "ResidualEdit",
    "SiteEdit",
    "Stream",
    "StreamEdit",
]
