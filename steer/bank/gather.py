"""A batch's tensors, read at once."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from steer.bank.index import Address, Entry
from steer.bank.layout import Layout
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
    """

    tensors: Mapping[str, Shaped[Tensor, "row *shape"]]
    found: Bool[Tensor, " row"]


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

    def __call__(self, addresses: Sequence[Address | None]) -> Rows:
        """Reads the rows of these addresses, all from one moment.

        Raises:
            SteerError: the states are of several kinds or shapes, there are none of this name at all, or one is
                damaged.
        """
        index = self._store.index
        wanted = [address for address in addresses if address is not None]
        with self._turn:
            return self._store.settled(lambda: index.find(wanted), lambda found: self._read(addresses, found))

    def _read(self, addresses: Sequence[Address | None], found: Mapping[Address, Entry]) -> Rows:
        layout = self._layout(found)
        staged = self._staging(len(addresses), layout.nbytes)
        entries = [None if address is None else found.get(address) for address in addresses]
        present = torch.tensor([entry is not None for entry in entries], dtype=torch.bool)
        staged[~present] = 0
        # Flat, as cutting a memoryview is much faster than indexing an array.
        memory, size = staged.view(-1).numpy().data, layout.nbytes
        self._store.fill(
            [entry for entry in entries if entry is not None],
            [memory[row * size : (row + 1) * size] for row, entry in enumerate(entries) if entry is not None],
        )
        if self._device.type != "cpu":
            staged = staged.to(self._device, non_blocking=True)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self._device))
        return Rows(layout.unpack(staged), present)

    def _layout(self, found: Mapping[Address, Entry]) -> Layout:
        index = self._store.index
        kinds = {(entry.kind, entry.layout) for entry in found.values()}
        if not kinds:
            kinds = {(few[0].kind, few[0].layout) for few in index.examples() if few[0].name == self._name}
            if not kinds:
                raise SteerError(f"{self._store.path}: nobody has a state {self._name!r}")
            kinds = {min(kinds)}
        if len(kinds) > 1:
            (one, first), (other, second), *_ = [(index.kind(kind), index.layout(layout)) for kind, layout in kinds]
            difference = f"{one} and {other}" if one != other else f"{first.slots} and {second.slots}"
            raise SteerError(
                f"the states {self._name!r} of these users do not fit into one batch: there are {difference}. Use "
                "`get_many`, or gather them apart"
            )
        return index.layout(kinds.pop()[1])

    def _staging(self, rows: int, nbytes: int) -> UInt8[Tensor, "row byte"]:
        if self._device.type != "cuda":
            return torch.empty(rows, nbytes, dtype=torch.uint8)
        if self._copied is not None:
            self._copied.synchronize()
        if self._pinned.shape[0] < rows or self._pinned.shape[1] != nbytes:
            self._pinned = torch.empty(rows, nbytes, dtype=torch.uint8, pin_memory=True)
        self._copied = torch.cuda.Event()
        return self._pinned[:rows]
