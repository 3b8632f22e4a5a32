"""How the tensors of a state lie in a segment: one after another, in their bytes.

States whose tensors agree in names, dtypes and shapes share a layout, which the index keeps once.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from steer.errors import Damage, SteerError

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}
BYTES = "uint8"


class Slot(NamedTuple):
    """One tensor of a state."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Layout:
    """The tensors of a state, in order."""

    slots: tuple[Slot, ...]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Layout:
        """Raises SteerError, naming the tensor, for one that is sparse or complex."""
        for name, tensor in tensors.items():
            if not isinstance(name, str):
                raise SteerError(f"tensor {name!r} is named by no text")
            if tensor.layout != torch.strided or _name(tensor.dtype) not in DTYPES:
                found = f"{tensor.layout}, {tensor.dtype}"
                raise SteerError(f"tensor {name!r} is {found}: a bank stores dense tensors of real numbers")
        return _layout(tuple(Slot(name, _name(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()))

    @classmethod
    def from_json(cls, text: str) -> Layout:
        """Raises Damage for what is no layout."""
        try:
            slots = tuple(Slot(name, dtype, tuple(shape)) for name, dtype, shape in json.loads(text))
            if len({slot.name for slot in slots}) == len(slots) and all(
                isinstance(slot.name, str)
                and slot.dtype in DTYPES
                and all(isinstance(size, int) and size >= 0 for size in slot.shape)
                for slot in slots
            ):
                return cls(slots)
        except (TypeError, ValueError):
            pass
        raise Damage(f"damaged: {text!r} is not the layout of a state")

    def to_json(self) -> str:
        return json.dumps(self.slots)

    @cached_property
    def dtype(self) -> str:
        """Of the segments that hold such states: that of the tensors, or bytes where they differ in theirs."""
        dtypes = {slot.dtype for slot in self.slots}
        return dtypes.pop() if len(dtypes) == 1 else BYTES

    @cached_property
    def nbytes(self) -> int:
        """Bytes of a state."""
        return sum(slot.nbytes for slot in self.slots)

    @cached_property
    def length(self) -> int:
        """Elements that a state takes in a segment."""
        return self.nbytes // DTYPES[self.dtype].itemsize

    @cached_property
    def checksum(self) -> int:
        """CRC-32 of the layout."""
        return zlib.crc32(self.to_json().encode())

    def pack(self, tensors: Mapping[str, Tensor]) -> bytes:
        """The bytes of a state."""
        return b"".join(_bytes(tensors[slot.name]) for slot in self.slots)

    def unpack(self, packed: Tensor) -> dict[str, Tensor]:
        """The tensors of states, given their bytes `[*rows, nbytes]`.

        Returns:
            Tensors `[*rows, *shape]`; they share the memory of `packed` where they begin at whole elements.
        """
        tensors, at = {}, 0
        for slot in self.slots:
            part, dtype = packed[..., at : at + slot.nbytes], DTYPES[slot.dtype]
            if not slot.nbytes:
                tensors[slot.name] = torch.empty((*packed.shape[:-1], *slot.shape), dtype=dtype, device=packed.device)
                continue
            if any(begin % dtype.itemsize for begin in (part.storage_offset(), *part.stride()[:-1])):
                part = part.clone(memory_format=torch.contiguous_format)
            at += slot.nbytes
            tensors[slot.name] = part.view(dtype).reshape((*packed.shape[:-1], *slot.shape))
        return tensors

    def reordered(self, packed: Tensor, other: Layout) -> Tensor:
        """The bytes `[*rows, nbytes]` of states of this layout in another one, of the same tensors."""
        parts = packed.split([slot.nbytes for slot in self.slots], dim=-1)
        by_name = {slot.name: part for slot, part in zip(self.slots, parts, strict=True)}
        return torch.cat([by_name[slot.name] for slot in other.slots], dim=-1)


@lru_cache(maxsize=1024)
def _layout(slots: tuple[Slot, ...]) -> Layout:
    # One object for all alike, which works out its JSON and its checksum once.
    return Layout(slots)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bytes(tensor: Tensor) -> bytes:
    plain = tensor.detach().resolve_neg().cpu().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().tobytes()
