"""What the operators share: which batch row each row of the forward pass belongs to, and buffers that stay in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Bool, Int
    from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """The rows of a forward pass: beams, return sequences and streams make more of them than the batch has.

    Attributes:
        owners: the batch row that each row belongs to.
        prompt_lengths: real tokens of each row's prompt, or None where they are not known.
        touched: whether a row carries the edits of its batch row; None if all do.
    """

    owners: Int[Tensor, " row"]
    prompt_lengths: Int[Tensor, " row"] | None
    touched: Bool[Tensor, " row"] | None = None

    def __len__(self) -> int:
        return self.owners.shape[0]

    def spared(self, values: Tensor, neutral: float) -> Tensor:
        """Values of the rows, `[row, ...]`, with others in the rows that carry no edits."""
        if self.touched is None:
            return values
        touched = self.touched.to(values.device).view(-1, *[1] * (values.dim() - 1))
        return torch.where(touched, values, torch.full_like(values, neutral))


def refill(buffer: Tensor | None, values: Tensor) -> Tensor:
    """Writes values into the buffer if they fit, so that compiled code finds them at the same place.

    Values that are being trained are bound as they are: a copy would cut their gradient.
    """
    if values.requires_grad:
        return values
    if buffer is None or not _writable(buffer) or _layout(buffer) != _layout(values):
        return values.clone()
    return buffer.copy_(values)


def erase(buffer: Tensor | None) -> Tensor | None:
    """Overwrites a user's values with zeros; the buffer stays."""
    return buffer.zero_() if buffer is not None and _writable(buffer) else None


def _writable(buffer: Tensor) -> bool:
    return not buffer.requires_grad and (not buffer.is_inference() or torch.is_inference_mode_enabled())


def _layout(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.dtype, tensor.device
