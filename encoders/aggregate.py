"""From one vector per item of a history to one vector per person. Padding plays no part, whatever stands in it.

Where a row has no item at all the result is zeros, and so are the gradients.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from steer.errors import SteerError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor


class InputAwareAttention(nn.Module):
    """A mean over items that weights each by how close it is to what is asked at present.

    Liu et al., "Persona-Plug" (PPlug), arXiv 2409.11901, §3.1 and §3.2, with x the embedding of the input, h_i that of
    item i and v_i what is to be averaged, the projected h_i in the paper:

        w = softmax_i(xᵀ h_i / τ)          P = Σ_i w_i v_i

    The paper has no temperature. Between unit vectors, which its code uses, xᵀ h_i is within [−1, 1]: at τ = 1 no item
    weighs more than e² times another, which is close to a plain mean; τ of about 0.05 tells items apart.

    Args:
        temperature: τ, more than 0.
        learned: whether τ is trained. It is kept as its logarithm, so that no step makes it negative.

    Raises:
        SteerError: a temperature that is not more than 0.
    """

    log_temperature: Tensor

    def __init__(self, temperature: float = 1.0, *, learned: bool = False) -> None:
        super().__init__()
        if not 0 < temperature < math.inf:
            raise SteerError(f"temperature={temperature} is not a positive number")
        logarithm = torch.tensor(math.log(temperature))
        if learned:
            self.log_temperature = nn.Parameter(logarithm)
        else:
            self.register_buffer("log_temperature", logarithm)

    def forward(
        self,
        query: Float[Tensor, "row k"],
        keys: Float[Tensor, "row item k"],
        values: Float[Tensor, "row item d"],
        mask: Bool[Tensor, "row item"],
    ) -> Float[Tensor, "row d"]:
        """The weighted mean of the values where `mask` is True, in their precision."""
        weights = self.weights(query, keys, mask).to(values.dtype)
        return (weights[:, None] @ blank(values, mask)).squeeze(1)

    def weights(
        self, query: Float[Tensor, "row k"], keys: Float[Tensor, "row item k"], mask: Bool[Tensor, "row item"]
    ) -> Float[Tensor, "row item"]:
        """How much each item counts, float32: they sum to 1 in a row with items, and to 0 in one without."""
        # Sharp weights are lost in half precision, which autocast would take for the product.
        with torch.autocast(query.device.type, enabled=False):
            scores = (blank(keys, mask).float() @ query.float()[:, :, None]).squeeze(2)
        scores = scores / self.log_temperature.float().exp()
        # Not −inf: a row of nothing else would be NaN.
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        return scores.softmax(dim=1) * mask


def masked_mean(values: Float[Tensor, "row item *d"], mask: Bool[Tensor, "row item"]) -> Float[Tensor, "row *d"]:
    """The mean of the values where `mask` is True, summed in float32 and given in their precision."""
    counts = mask.sum(1).clamp(min=1).view(-1, *[1] * (values.ndim - 2))
    return (blank(values, mask).sum(1, dtype=torch.float32) / counts).to(values.dtype)


def blank(values: Float[Tensor, "row item *d"], mask: Bool[Tensor, "row item"]) -> Float[Tensor, "row item *d"]:
    """Zeros where `mask` is False. Multiplying would leave NaN and infinity what they are."""
    return values.masked_fill(~mask.view(*mask.shape, *[1] * (values.ndim - 2)), 0)
