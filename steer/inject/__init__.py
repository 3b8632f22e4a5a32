"""The four ways into the model: residual stream, prefix, memory, and contrasted streams."""

from steer.inject.condition import Condition, Decision
from steer.inject.memory import GatedCrossAttention, MemoryEdit
from steer.inject.prefix import PrefixEdit
from steer.inject.residual import LowRankEdit, ProjectionEdit, ResidualEdit, SiteEdit
from steer.inject.streams import Mixture, Stream, StreamEdit

Edit = SiteEdit | PrefixEdit | MemoryEdit | StreamEdit

__all__ = [
    "Condition",
    "Decision",
    "Edit",
    "GatedCrossAttention",
    "LowRankEdit",
    "MemoryEdit",
    "Mixture",
    "PrefixEdit",
    "ProjectionEdit",
    "ResidualEdit",
    "SiteEdit",
    "Stream",
    "StreamEdit",
]
