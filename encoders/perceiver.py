"""Perceiver resampler: histories of any length become the same number of soft tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from steer.encoders.aggregate import blank
from steer.encoders.blocks import Block
from steer.encoders.project import init_linear

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor


class PerceiverResampler(nn.Module):
    """Learned latents attend to the items of a history, and become its soft tokens.

    Alayrac et al., "Flamingo", arXiv 2204.14198, §3.1.1; PERSOMA (Hebert et al., arXiv 2408.00960) and User-LLM (Ning
    et al., arXiv 2402.13598) compress histories so. In each block the latents attend to the items and to themselves:

        Z ← Z + Attn(LN(Z), [LN(E X); LN(Z)])        Z ← Z + MLP(LN(Z))

    The order of the items plays no part, nor does padding. A row without items gets what the latents make of
    themselves: soft tokens for nobody in particular, which are trained where such rows are trained on.

    Latents are drawn from the standard normal distribution, so that they differ, at the scale of normalized items. Soft
    tokens have about the norm `scale` to begin with.

    Args:
        d_in: width of the items; of concatenated embeddings, as REGEN has them, their sum.
        d: width of the language model's token embeddings.
        scale: their usual norm; see `usual_norm`.
        slots: how many soft tokens.
        width: of the latents.
        heads, hidden: attention heads, and width of the MLPs' middle; 4 · `width` if None.
        blocks: how many.

    Raises:
        SteerError: the heads do not divide the width.
    """

    def __init__(
        self,
        d_in: int,
        d: int,
        *,
        scale: float,
        slots: int = 8,
        width: int = 512,
        heads: int = 8,
        hidden: int | None = None,
        blocks: int = 2,
    ) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(slots, width))
        self.inputs, self.input_norm = nn.Linear(d_in, width), nn.LayerNorm(width)
        self.blocks = nn.ModuleList(
            Block(width, heads=heads, hidden=hidden or 4 * width, depth=blocks) for _ in range(blocks)
        )
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, d)
        self.gain = scale / d**0.5
        for layer in (self.inputs, self.out):
            init_linear(layer)

    def forward(
        self, items: Float[Tensor, "row item d_in"], mask: Bool[Tensor, "row item"]
    ) -> Float[Tensor, "row slot d"]:
        """The soft tokens of each row's items, those where `mask` is True."""
        latents = self.latents.expand(len(items), -1, -1)
        context = self.input_norm(self.inputs(blank(items, mask)))
        visible = torch.cat([mask, mask.new_ones(latents.shape[:2])], dim=1)[:, None]
        for block in self.blocks:
            latents = block(latents, visible, context)
        return self.out(self.norm(latents)) * self.gain
