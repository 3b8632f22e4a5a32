"""The block of which the transformers over items are made."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from steer.encoders.project import init_linear
from steer.errors import SteerError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor


class Block(nn.Module):
    """`h = x + Attn(LN(x), [context; LN(x)])`, then `h + MLP(LN(h))`: attention to a context and to oneself.

    Without a context it is the pre-norm block of a transformer's encoder, as in `nn.TransformerEncoderLayer`.

    Args:
        width: of `x` and of the context.
        heads: attention heads, which divide the width.
        hidden: width of the MLP's middle.
        depth: number of blocks that follow on each other. What a block adds is smaller by √(2 · depth) to begin with,
            so that the sum of them all has the variance of what came in.

    Raises:
        SteerError: the heads do not divide the width.
    """

    def __init__(self, width: int, *, heads: int, hidden: int, depth: int) -> None:
        super().__init__()
        if width % heads:
            raise SteerError(f"a width of {width} cannot be divided among {heads} heads; give heads that divide it")
        self.heads = heads
        self.norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        for layer in (self.query, self.key_value, self.up):
            init_linear(layer)
        for layer in (self.out, self.down):
            init_linear(layer, (2 * depth) ** -0.5)

    def forward(
        self,
        x: Float[Tensor, "row pos d"],
        visible: Bool[Tensor, "row query key"],
        context: Float[Tensor, "row item d"] | None = None,
    ) -> Float[Tensor, "row pos d"]:
        """One step. Keys are the context's items and then the positions of x; each query must see one at least.

        Args:
            x: what changes.
            visible: which keys each position sees; `query` may be 1, for all positions.
            context: normalized vectors that are only looked at.
        """
        normed = self.norm(x)
        seen = normed if context is None else torch.cat([context, normed], dim=1)
        keys, values = self.key_value(seen).chunk(2, dim=-1)
        attended = scaled_dot_product_attention(
            self._split(self.query(normed)), self._split(keys), self._split(values), attn_mask=visible[:, None]
        )
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(gelu(self.up(self.mlp_norm(x))))

    def _split(self, x: Float[Tensor, "row pos d"]) -> Float[Tensor, "row head pos k"]:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
