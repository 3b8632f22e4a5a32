"""Segments: safetensors files with the tensors of one commit, written once and never changed.

Tensors of one name, dtype and shape are stacked into a block `[rows, *shape]`. The header then has an entry for each
kind of tensor instead of each user, so that opening a segment costs the same whatever the number of users in it, and
a batch is gathered from one mapped tensor. Users appear in no segment, neither in its name nor in its header.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from steer.errors import SteerError

Key = tuple[str, str]
"""User and name of a state."""

_DTYPES = {
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


@dataclass(frozen=True)
class Slot:
    """Where a tensor lies in its segment: row `row` of the block of its name, dtype and shape."""

    dtype: str
    shape: tuple[int, ...]
    row: int

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * _DTYPES[self.dtype].itemsize

    def block(self, name: str) -> str:
        """Name of the block in the safetensors file, given the name of the tensor."""
        return _block_name(name, self.dtype, self.shape)


@dataclass(frozen=True)
class Stored:
    """Where all tensors of a state lie, and a CRC-32 over their bytes in the order of `slots`."""

    slots: Mapping[str, Slot]
    checksum: int

    def to_json(self) -> dict[str, Any]:
        slots = {name: [slot.dtype, list(slot.shape), slot.row] for name, slot in self.slots.items()}
        return {"slots": slots, "crc32": self.checksum}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Stored:
        slots = {name: Slot(dtype, tuple(shape), row) for name, (dtype, shape, row) in data["slots"].items()}
        return cls(slots, data["crc32"])


def pack(states: Mapping[Key, Mapping[str, Tensor]]) -> tuple[dict[str, Tensor], dict[Key, Stored]]:
    """Stacks the tensors of many states into blocks.

    Returns:
        The blocks of a segment, on the CPU, `[rows, *shape]` each; and where every state lies in them.

    Raises:
        SteerError: a tensor of a kind that is not stored, such as a sparse or a complex one.
    """
    blocks: dict[str, list[Tensor]] = {}
    stored = {}
    for (user, name), tensors in states.items():
        own = {label: _plain(tensor, f"{label!r} of {name!r} of {user!r}") for label, tensor in tensors.items()}
        slots = {}
        for label, tensor in own.items():
            dtype, shape = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
            block = blocks.setdefault(_block_name(label, dtype, shape), [])
            slots[label] = Slot(dtype, shape, row=len(block))
            block.append(tensor)
        stored[user, name] = Stored(slots, _checksum(own.values()))
    return {name: torch.stack(block) for name, block in blocks.items()}, stored


def read(file: Path, wanted: Mapping[Key, Stored]) -> dict[Key, dict[str, Tensor]]:
    """Reads the tensors of some states from one segment, which is opened once.

    Raises:
        SteerError: the file is missing or damaged; the message names it and the first state that cannot be read.
    """
    tensors: dict[Key, dict[str, Tensor]] = {}
    key = next(iter(wanted))
    try:
        with safe_open(file, "pt") as segment:
            blocks: dict[str, Tensor] = {}
            for key, stored in wanted.items():
                for name, slot in stored.slots.items():
                    if (block := slot.block(name)) not in blocks:
                        blocks[block] = segment.get_tensor(block)
                tensors[key] = _take(blocks, stored)
    except (OSError, SafetensorError, IndexError, ValueError) as error:
        user, name = key
        raise SteerError(f"{file}: damaged, state {name!r} of user {user!r} cannot be read ({error})") from error
    return tensors


def _block_name(name: str, dtype: str, shape: tuple[int, ...]) -> str:
    return f"{name}:{dtype}:{'x'.join(map(str, shape))}"


def _plain(tensor: Tensor, what: str) -> Tensor:
    if tensor.layout != torch.strided or tensor.dtype not in _DTYPES.values():
        found = f"{tensor.layout}, {tensor.dtype}"
        raise SteerError(f"tensor {what} is {found}: a bank stores dense tensors of real numbers")
    return tensor.detach().cpu().contiguous()


def _take(blocks: Mapping[str, Tensor], stored: Stored) -> dict[str, Tensor]:
    # A block is a mapped file: a view of it would keep the file open and fault pages in at use, so clone.
    rows = {name: blocks[slot.block(name)][slot.row].clone() for name, slot in stored.slots.items()}
    if _checksum(rows.values()) != stored.checksum:
        raise ValueError("its bytes are not those that were saved")
    return rows


def _checksum(tensors: Iterable[Tensor]) -> int:
    checksum = 0
    for tensor in tensors:
        checksum = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, checksum)
    return checksum
