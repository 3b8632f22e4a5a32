"""A transformer over the items of a history: as many soft tokens as there are items."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from steer.encoders.aggregate import blank
from steer.encoders.blocks import Block
from steer.encoders.project import init_linear
from steer.errors import SteerError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

# Of the position embeddings, beside items of a standard deviation of 1: at first it counts what an item is, and little
# where it stands.
_POSITION_STD = 0.1


class ItemTransformer(nn.Module):
    """Each item attends to the others, or to those before it, and becomes one soft token.

    Doddapaneni et al., "User Embedding Model for Personalized Language Prompting" (UEM), arXiv 2401.04858: three layers
    of 12 heads and width 768, with MLPs of 2048, and then a linear map to the language model's width. User-LLM (Ning et
    al., arXiv 2402.13598) has a causal one, whose tokens stay as they are when items are added behind them.

    Items are numbered from 0 by their order among those where the mask is True, so that padding, on either side, plays
    no part. What stands at padding in the result is zeros; a row without items has nothing else. Soft tokens have about
    the norm `scale` to begin with.

    Args:
        d_in: width of the items; of concatenated embeddings, as UEM and REGEN have them, their sum.
        d: width of the language model's token embeddings.
        scale: their usual norm; see `usual_norm`.
        causal: whether an item sees only itself and those before it.
        max_items: how many items a history may have.
        width, heads, hidden, blocks: of the transformer; `hidden` is the width of the MLPs' middle.

    Raises:
        SteerError: the heads do not divide the width.
    """

    def __init__(
        self,
        d_in: int,
        d: int,
        *,
        scale: float,
        causal: bool = False,
        max_items: int = 512,
        width: int = 768,
        heads: int = 12,
        hidden: int = 2048,
        blocks: int = 3,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.inputs, self.input_norm = nn.Linear(d_in, width), nn.LayerNorm(width)
        self.positions = nn.Embedding(max_items, width)
        self.blocks = nn.ModuleList(Block(width, heads=heads, hidden=hidden, depth=blocks) for _ in range(blocks))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, d)
        self.gain = scale / d**0.5
        nn.init.normal_(self.positions.weight, std=_POSITION_STD)
        for layer in (self.inputs, self.out):
            init_linear(layer)

    def forward(
        self, items: Float[Tensor, "row item d_in"], mask: Bool[Tensor, "row item"]
    ) -> Float[Tensor, "row item d"]:
        """The soft tokens of each row's items, those where `mask` is True, oldest first; zeros elsewhere.

        Raises:
            SteerError: there is room for more than `max_items` items in a row.
        """
        count = items.shape[1]
        if count > self.positions.num_embeddings:
            raise SteerError(
                f"{count} items in a row, and this encoder has positions for {self.positions.num_embeddings}; "
                "give the last ones only"
            )
        places = (mask.cumsum(1) - 1).clamp(min=0)
        x = self.input_norm(self.inputs(blank(items, mask))) + self.positions(places)
        # Everyone sees oneself, padding too: attention to nothing would be NaN.
        visible = mask[:, None] | torch.eye(count, dtype=torch.bool, device=mask.device)
        if self.causal:
            visible = visible.tril()
        for block in self.blocks:
            x = block(x, visible)
        return blank(self.out(self.norm(x)) * self.gain, mask)
