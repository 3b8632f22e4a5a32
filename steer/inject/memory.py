"""Memory edits: layers attend to a memory of the row's user, through gated cross-attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from steer.errors import SteerError
from steer.inject.rows import Rows, erase, refill
from steer.kernels import attend
from steer.sites import Site

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor


class GatedCrossAttention(nn.Module):
    """`h + tanh(gate) * XAttn(LN(h), memory, memory)`, with the gate at zero to begin with.

    Flamingo's layer, as User-LLM places it between self-attention and feed-forward (METHODS §4). While the gate is
    zero the model is the frozen one, bit for bit.

    Args:
        width: of the residual stream.
        memory_width: of the memory's entries.
        heads: attention heads.
        head_width: width of a head; `width // heads` if None.
    """

    def __init__(self, width: int, memory_width: int, *, heads: int = 8, head_width: int | None = None) -> None:
        super().__init__()
        head_width = head_width or width // heads
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, heads * head_width, bias=False)
        self.key = nn.Linear(memory_width, heads * head_width, bias=False)
        self.value = nn.Linear(memory_width, heads * head_width, bias=False)
        self.out = nn.Linear(heads * head_width, width, bias=False)
        self.gate = nn.Parameter(torch.zeros(()))

    def project(
        self, memory: Float[Tensor, "row slot m"]
    ) -> tuple[Float[Tensor, "row head slot k"], Float[Tensor, "row head slot k"]]:
        """Keys and values of a memory: they do not change while the model generates."""
        return self._split(self.key(memory)), self._split(self.value(memory))

    def forward(
        self,
        hidden: Float[Tensor, "row pos d"],
        keys: Float[Tensor, "row head slot k"],
        values: Float[Tensor, "row head slot k"],
        visible: Bool[Tensor, "row slot"],
    ) -> Float[Tensor, "row pos d"]:
        """What is to be added to `hidden`."""
        attended = attend(self._split(self.query(self.norm(hidden))), keys, values, visible)
        return torch.tanh(self.gate) * self.out(attended.transpose(1, 2).flatten(2))

    def _split(self, x: Float[Tensor, "row pos hk"]) -> Float[Tensor, "row head pos k"]:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


@dataclass(frozen=True)
class MemoryEdit:
    """Lets row b attend to `memory[b, :lengths[b]]` at a site, through a layer that all users share.

    A row of length 0 attends to nothing and stays as it is, bit for bit.
    """

    site: Site
    layer: GatedCrossAttention
    memory: Float[Tensor, "batch slot m"]
    lengths: Int[Tensor, " batch"]

    def __post_init__(self) -> None:
        if self.memory.shape[2] != self.layer.key.in_features:
            raise SteerError(
                f"the memory's entries are {self.memory.shape[2]} wide, the cross-attention layer at {self.site} "
                f"expects {self.layer.key.in_features}"
            )

    @classmethod
    def from_rows(
        cls, site: Site, layer: GatedCrossAttention, memories: Sequence[Float[Tensor, "_ m"] | None]
    ) -> MemoryEdit:
        """Pads memories of different lengths; None is a row without one."""
        width = layer.key.in_features
        rows = [torch.zeros(0, width) if memory is None else memory.float() for memory in memories]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        # Sizes of 0 and 1 are special cases to the compiler; `load` adds a slot to this one.
        padded = padded if padded.shape[1] else padded.new_zeros(len(rows), 1, width)
        return cls(site, layer, padded, torch.tensor([len(row) for row in rows]))


class AttendToMemory:
    """A memory edit at work at its site."""

    def __init__(self) -> None:
        self.layer: GatedCrossAttention | None = None
        self.keys: Float[Tensor, "row head slot k"] | None = None
        self.values: Float[Tensor, "row head slot k"] | None = None
        self.visible: Bool[Tensor, "row slot"] | None = None
        self.fired = False

    def load(self, edit: MemoryEdit, rows: Rows, device: torch.device) -> None:
        """Gathers the rows' memories and projects them once."""
        self.layer = edit.layer.to(device)
        weight = edit.layer.key.weight
        owners = rows.owners.to(device)
        # One slot of zeros in front, which only rows without a memory see: softmax over nothing would be NaN.
        memory = nn.functional.pad(edit.memory.to(device, weight.dtype)[owners], (0, 0, 1, 0))
        lengths = rows.spared(edit.lengths.to(device)[owners], 0)[:, None]
        slots = torch.arange(memory.shape[1], device=device)[None]
        visible = torch.where(lengths == 0, slots == 0, (slots > 0) & (slots <= lengths))
        keys, values = self.layer.project(memory)
        self.keys, self.values = refill(self.keys, keys), refill(self.values, values)
        self.visible = refill(self.visible, visible)

    def begin(self) -> None:
        """Lets torch.compile meet the memory before a hook does.

        What it first meets in a hook of a module of torch.nn, such as GPT-2's norms, it takes for a part of that
        module, with sizes that never change: it would compile anew for every number of slots.
        """

    def __call__(self, hidden: Float[Tensor, "row pos d"]) -> Float[Tensor, "row pos d"]:
        self.fired = True
        assert self.layer is not None and self.keys is not None and self.values is not None
        delta = self.layer(hidden.to(self.keys.dtype), self.keys, self.values, self.visible)
        return hidden + delta.to(hidden.dtype)

    def clear(self) -> None:
        """Erases the users' keys and values."""
        self.layer = None
        self.keys = erase(self.keys)
        self.values = erase(self.values)
