"""Other libraries' views of a model: TransformerLens and nnsight, each in a module of its own.

Neither library is imported here; both are known by what their objects look like.
"""

from steer.interop.peers import named_parameters, unwrap
from steer.interop.pooling import pooled

__all__ = ["named_parameters", "pooled", "unwrap"]
