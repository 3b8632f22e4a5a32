"""Banks of version 1 of the format, made into new ones.

Version 1 kept everything but tensors in the index, user ids as they were, and one segment for each commit:

    entries(user, name, kind, segment, records, settings, calibration, data, tensors)

where `tensors` is the JSON of `{"slots": {NAME: [DTYPE, SHAPE, ROW]}, "crc32": …}`, and ROW the row of a block
`NAME:DTYPE:SHAPE`, `[rows, *shape]`, in the segment.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from steer.bank import folder
from steer.bank.bank import Bank, Key
from steer.errors import SteerError
from steer.files import draft_folder
from steer.state import Fingerprint, Provenance, UserState

_ENTRIES = """
SELECT user, entries.name, method, version, fingerprint, sites, artifact,
       records, settings, calibration, data, tensors, file
FROM entries
JOIN kinds ON kinds.id = entries.kind
LEFT JOIN models ON models.id = kinds.model
LEFT JOIN segments ON segments.id = entries.segment
ORDER BY entries.id
"""
_TOGETHER = 1000


def migrate(
    old: str | Path, new: str | Path, *, hashed: bool = False, on_progress: Callable[[float], None] | None = None
) -> Bank:
    """Makes a bank of the present version from one of version 1, which stays as it is.

    Args:
        old: the folder of the bank of version 1.
        new: a folder that does not exist yet; it is there when everything is in it.
        hashed: keep salted hashes of user ids in place of the ids.
        on_progress: told what share of the states is done.

    Raises:
        SteerError: `old` is no bank of version 1, or damaged, or `new` exists.
    """
    old, new = Path(old).resolve(), Path(new).resolve()
    folder.read_manifest(old, version=1)
    with draft_folder(new) as draft, Bank(draft, hashed=hashed) as bank:
        for file in sorted((old / folder.ARTIFACTS).glob("*.safetensors")):
            shutil.copyfile(file, draft / folder.ARTIFACTS / file.name)
            bank.artifact(file.stem)
        states: dict[Key, UserState] = {}
        try:
            for share, key, state in _states(old):
                states[key] = state
                if len(states) == _TOGETHER:
                    bank.update(states)
                    states.clear()
                    if on_progress is not None:
                        on_progress(share)
        except (sqlite3.Error, SafetensorError, OSError, ValueError, TypeError, KeyError, IndexError) as error:
            raise SteerError(f"{old}: damaged, it cannot be read whole ({error}); nothing was written") from error
        bank.update(states)
    return Bank(new, create=False)


def _states(old: Path) -> Iterator[tuple[float, Key, UserState]]:
    with closing(sqlite3.connect(f"{(old / folder.INDEX).as_uri()}?mode=ro", uri=True)) as db:
        total = max(db.execute("SELECT COUNT(*) FROM entries").fetchone()[0], 1)
        for number, (user, name, method, version, fingerprint, sites, artifact, *rest) in enumerate(
            db.execute(_ENTRIES), start=1
        ):
            *columns, file = rest
            records, settings, calibration, data, stored = (json.loads(column) for column in columns)
            source = Provenance(
                method=method,
                version=version,
                model=None if fingerprint is None else Fingerprint.from_json(json.loads(fingerprint)),
                sites=tuple(json.loads(sites)),
                artifact=artifact,
                records=tuple(records),
                settings=settings,
                calibration=calibration,
            )
            tensors = {} if file is None else _tensors(old / folder.SEGMENTS / Path(file).name, stored)
            yield number / total, (user, name), UserState(source, tensors, data)


def _tensors(file: Path, stored: Any) -> dict[str, Tensor]:
    tensors, checksum = {}, 0
    with safe_open(file, "pt") as segment:
        for name, (dtype, shape, row) in stored["slots"].items():
            tensor = segment.get_slice(f"{name}:{dtype}:{'x'.join(map(str, shape))}")[row].clone()
            checksum = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, checksum)
            tensors[name] = tensor
    if checksum != stored["crc32"]:
        raise ValueError(f"{file.name} does not hold what was saved")
    return tensors
