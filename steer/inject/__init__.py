"""The ways into the model: residual stream, prefixes, memory, contrasted streams, and neighbours of stored states."""

from steer.inject.condition import Condition, Decision
from steer.inject.key_values import KeyValueEdit, KeyValues, PromptKeyValues
from steer.inject.memory import GatedCrossAttention, MemoryEdit
from steer.inject.neighbours import NeighbourEdit
from steer.inject.prefix import Place, PrefixEdit, PromptPrefix
from steer.inject.residual import LowRankEdit, ProjectionEdit, ResidualEdit, SiteEdit
from steer.inject.streams import Mixture, Stream, StreamEdit

Edit = SiteEdit | PrefixEdit | PromptPrefix | KeyValueEdit | PromptKeyValues | MemoryEdit | StreamEdit | NeighbourEdit

__all__ = [
    "Condition",
    "Decision",
    "Edit",
    "GatedCrossAttention",
    "KeyValueEdit",
    "KeyValues",
    "LowRankEdit",
    "MemoryEdit",
    "Mixture",
    "NeighbourEdit",
    "Place",
    "PrefixEdit",
    "ProjectionEdit",
    "PromptKeyValues",
    "PromptPrefix",
    "ResidualEdit",
    "SiteEdit",
    "Stream",
    "StreamEdit",
]
