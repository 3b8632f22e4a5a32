"""The four ways into the model: residual stream, prefix, memory, and contrasted streams."""

from steer.inject.memory import GatedCrossAttention, MemoryEdit
from steer.inject.prefix import PrefixEdit
from steer.inject.residual import ResidualEdit
from steer.inject.streams import StreamEdit

Edit = ResidualEdit | PrefixEdit | MemoryEdit | StreamEdit

__all__ = ["Edit", "GatedCrossAttention", "MemoryEdit", "PrefixEdit", "ResidualEdit", "StreamEdit"]
