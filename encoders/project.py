"""From the width of embeddings to soft tokens, which are to have the scale of a language model's own token embeddings.

That scale is the usual norm of a row of the model's embedding table: about 3 in one model and 540 in another (T5 XXL,
for which PPlug's code has it as a constant). A soft token that is far from it is either drowned or drowns the others.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import gelu, normalize

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

# E[gelu(z)²] for z from the standard normal distribution.
_GELU_SQUARE = 0.42522
# By how much PPlug's code makes its instruction embedding smaller than the rest.
_INSTRUCTION_DIVISOR = 7.0
_SAMPLES = 8192


class Projector(nn.Module):
    """Linear(d_in → d), GELU, Linear(d → d), times a scale: one soft token per vector, as in PPlug (arXiv 2409.11901).

    PPlug's code hands it unit vectors and torch's initial weights. These are made for inputs whose entries are about 1,
    while those of a unit vector are about 1/√d_in: the first layer then gives little besides its biases, and the soft
    tokens of any two vectors have a cosine of about 0.95 (widths 768 and 576). Here unit vectors are multiplied by
    √d_in, weights are drawn so that the variance is 1 before GELU and before the last factor, which is scale/√d, and
    biases start at 0: the cosine is 0.2, and soft tokens have about the norm `scale` to begin with, whatever the
    widths. What can be learned is the same.

    Args:
        d_in: width of the input, vectors of norm 1.
        d: width of the language model's token embeddings.
        scale: their usual norm; see `usual_norm`.
        normalized: whether every soft token gets exactly the norm `scale`, in place of one that is learned.
        published: as in PPlug's code, with torch's initial weights and no factor besides `scale`.
    """

    def __init__(self, d_in: int, d: int, *, scale: float, normalized: bool = False, published: bool = False) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(d_in, d), nn.Linear(d, d)
        self.scale, self.normalized = scale, normalized
        self.gain_in, self.gain_out = (1.0, scale) if published else (math.sqrt(d_in), scale / math.sqrt(d))
        if not published:
            init_linear(self.inner)
            init_linear(self.outer, _GELU_SQUARE**-0.5)

    def forward(self, vectors: Float[Tensor, "*row d_in"]) -> Float[Tensor, "*row d"]:
        """One soft token for each vector."""
        tokens = self.outer(gelu(self.inner(vectors * self.gain_in)))
        return to_norm(tokens, self.scale) if self.normalized else tokens * self.gain_out


class LearnedTokens(nn.Module):
    """Soft tokens that all users share, each an MLP over a vector that is learned: PPlug's instruction embedding.

    The vectors start at random at a norm of about 1, where the projector is made for unit vectors. PPlug's code draws
    their entries from the standard normal distribution, and divides the result by 7.

    Args:
        count: how many soft tokens.
        d_in: width of the vectors.
        d, scale, normalized, published: as in `Projector`.
    """

    def __init__(
        self, count: int, d_in: int, d: int, *, scale: float, normalized: bool = False, published: bool = False
    ) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.randn(count, d_in) * (1.0 if published else d_in**-0.5))
        own_scale = scale / _INSTRUCTION_DIVISOR if published and not normalized else scale
        self.projector = Projector(d_in, d, scale=own_scale, normalized=normalized, published=published)

    def forward(self) -> Float[Tensor, "slot d"]:
        """The soft tokens."""
        return self.projector(self.vectors)


def to_norm(vectors: Float[Tensor, "*row d"], norm: float) -> Float[Tensor, "*row d"]:
    """The same directions at one norm, computed in float32. Zeros stay zeros."""
    return (normalize(vectors.float(), dim=-1) * norm).to(vectors.dtype)


@torch.no_grad()
def usual_norm(embed: nn.Embedding) -> float:
    """The median norm of a model's token embeddings, as its layers get them: with the factor that Gemma applies.

    The median, as tables have rows that were never trained. Of a large table it is taken over some thousand rows.
    """
    count = embed.num_embeddings
    ids = torch.arange(0, count, -(-count // _SAMPLES), device=embed.weight.device)
    return embed(ids).float().norm(dim=-1).median().item()


def init_linear(layer: nn.Linear, gain: float = 1.0) -> None:
    """Weights for which entries of variance 1 give entries of variance gain², and no biases."""
    nn.init.normal_(layer.weight, std=gain * layer.in_features**-0.5)
    nn.init.zeros_(layer.bias)
