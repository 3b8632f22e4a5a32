"""A batch's tensors, read at once."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch

from steer.bank.index import Address, Entry, Kind
from steer.bank.store import Store
from steer.errors import SteerError

if TYPE_CHECKING:
    from jaxtyping import Bool, Shaped, UInt8
    from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """The tensors of a batch.

    Attributes:
        tensors: by name; zeros in rows without a state.
        found: which rows have a state; on the CPU.
        packed: the memory that they were read into, which may serve the next batch.
    """

    tensors: Mapping[str, Shaped[Tensor, "row *shape"]]
    found: Bool[Tensor, " row"]
    packed: UInt8[Tensor, "row byte"]


class Gatherer:
    """Reads the states of one name for batches of users.

    Rows are read from the files straight into the memory of one tensor. Where the device is a GPU that is pinned memory
    which is kept from batch to batch, and one copy takes it to the device; nobody waits for that copy but kernels that
    are launched on the current stream afterwards, and the next batch before it fills the buffer again.
    """

    def __init__(self, store: Store, name: str, device: torch.device) -> None:
        self._store = store
        self._name = name
        self._device = device
        # Only what is pinned is shared by batches.
        self._turn: AbstractContextManager[object] = threading.Lock() if device.type == "cuda" else nullcontext()
        self._pinned = torch.empty(0, 0, dtype=torch.uint8)
        self._copied: torch.cuda.Event | None = None

    def __call__(self, addresses: Sequence[Address | None], into: Rows | None = None) -> Rows:
        """Reads the rows of these addresses, all from one moment.

        Args:
            addresses: one a row; None for a row of zeros.
            into: an earlier result that is no longer needed: its memory is written to, if it is large enough.

        Raises:
            SteerError: the states are of several kinds or shapes, there are none of this name at all, or one is
                damaged; or `into` is on another device.
        """
        if into is not None and into.packed.device != (own := torch.empty(0, device=self._device).device):
            raise SteerError(f"into is on {into.packed.device}, and these rows are to be on {own}")
        index = self._store.index
        wanted = [address for address in addresses if address is not None]
        with self._turn:
            return self._store.settled(lambda: index.find(wanted), lambda found: self._read(addresses, found, into))

    def _read(self, addresses: Sequence[Address | None], found: Mapping[Address, Entry], into: Rows | None) -> Rows:
        number = self._layout(found)
        layout = self._store.index.layout(number)
        rows, size = len(addresses), layout.nbytes
        if found:
            self._store.require_room(next(iter(found.values())).segment, layout.length)
        packed = None
        if into is not None and into.packed.shape[0] >= rows and into.packed.shape[1] == size:
            packed = into.packed[:rows]
        staged = self._staging(rows, size, packed)
        # Flat, as cutting a memoryview is much faster than indexing an array.
        memory = staged.view(-1).numpy().data
        entries, buffers, present = [], [], []
        others: dict[int, list[int]] = {}
        for row, address in enumerate(addresses):
            entry = None if address is None else found.get(address)
            present.append(entry is not None)
            if entry is None:
                staged[row] = 0
            else:
                entries.append(entry)
                buffers.append(memory[row * size : (row + 1) * size])
                if entry.layout != number:
                    others.setdefault(entry.layout, []).append(row)
        self._store.fill(entries, buffers)
        for other, some in others.items():
            staged[some] = self._store.index.layout(other).reordered(staged[some], layout)
        if self._device.type == "cpu":
            packed = staged
        elif packed is None:
            packed = staged.to(self._device, non_blocking=True)
        else:
            packed.copy_(staged, non_blocking=True)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self._device))
        return Rows(layout.unpack(packed), torch.tensor(present, dtype=torch.bool), packed)

    def _layout(self, found: Mapping[Address, Entry]) -> int:
        """The number of the rows' layout: one of those found, which may differ in the order of the tensors only."""
        index = self._store.index
        kinds = {(entry.kind, entry.layout) for entry in found.values()}
        if not kinds:
            kinds = {(few[0].kind, few[0].layout) for few in index.examples() if few[0].name == self._name}
            if not kinds:
                raise SteerError(f"{self._store.path}: nobody has a state {self._name!r}")
            kinds = {min(kinds)}
        first, *others = sorted(kinds)
        one = self._traits(*first)
        for other in (self._traits(*other) for other in others):
            if parts := [part for part in one if one[part] != other[part]]:
                there = " and ".join(", ".join(f"{part} {traits[part]}" for part in parts) for traits in (one, other))
                raise SteerError(
                    f"the states {self._name!r} of these users do not fit into one batch: there are {there}. Use "
                    "`get_many`, or gather them apart"
                )
        return first[1]

    def _traits(self, kind: int, layout: int) -> dict[str, object]:
        """In what the states of a batch have to agree."""
        traits = {field.name: getattr(self._store.index.kind(kind), field.name) for field in fields(Kind)}
        slots = sorted(self._store.index.layout(layout).slots)
        return traits | {"tensors": ", ".join(f"{slot.name} {slot.dtype} {list(slot.shape)}" for slot in slots)}

    def _staging(self, rows: int, nbytes: int, packed: UInt8[Tensor, "row byte"] | None) -> UInt8[Tensor, "row byte"]:
        if self._device.type == "cpu" and packed is not None:
            return packed
        if self._device.type != "cuda":
            return torch.empty(rows, nbytes, dtype=torch.uint8)
        if self._copied is not None:
            self._copied.synchronize()
        if self._pinned.shape[0] < rows or self._pinned.shape[1] != nbytes:
            self._pinned = torch.empty(rows, nbytes, dtype=torch.uint8, pin_memory=True)
        self._copied = torch.cuda.Event()
        return self._pinned[:rows]
