"""States as safetensors files: of any method, without loss.

The tensors are the state's, under its names. The file's metadata has one key, `steer`, whose JSON is

    {"version": 1, "provenance": {...}, "data": {...}}

with the fields of `Provenance`, and what the state has in `data`. `vector_files.read` reads these files, and those that
other programs have written without that key. Nobody's user id is in a file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialized

from steer.bank.facts import to_json
from steer.errors import SteerError
from steer.files import draft
from steer.state import Provenance, UserState

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1

_KEY = "steer"
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "method": str,
    "version": int,
    "model": (dict, type(None)),
    "sites": list,
    "artifact": (str, type(None)),
    "records": list,
    "settings": dict,
    "calibration": dict,
}


def write(path: str | Path, state: UserState) -> None:
    """Writes a state: all of it, or nothing. The artifact that it may name is not in the file.

    Raises:
        SteerError: what the state holds is no JSON or no dense tensor, or the file cannot be written.
    """
    path, source = Path(path), state.provenance
    content = {"version": VERSION, "provenance": source.to_json(), "data": dict(state.data)}
    described = to_json(content, f"{path}: this {source.method} state")
    try:
        # Clones, as safetensors refuses tensors that share storage and would have to save a view's base.
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.tensors.items()}
        packed = serialized(tensors, {_KEY: described})
    except (SafetensorError, ValueError, RuntimeError, KeyError) as error:
        raise SteerError(f"{path}: this {source.method} state has a tensor that is not stored ({error})") from None
    with draft(path) as unfinished:
        unfinished.write_bytes(packed)


def read(path: Path) -> UserState | dict[str, Tensor]:
    """Reads a state; of a file that holds none, the tensors.

    Raises:
        SteerError: the file is missing or damaged, of another version, or does not describe a state.
    """
    try:
        with safe_open(path, "pt") as opened:
            described = (opened.metadata() or {}).get(_KEY)
            # Cloned, as these are views of the mapped file.
            tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        raise SteerError(f"{path}: this is no readable safetensors file ({error})") from None
    return tensors if described is None else _state(path, described, tensors)


def _state(path: Path, described: str, tensors: Mapping[str, Tensor]) -> UserState:
    try:
        content = json.loads(described)
        version = content["version"]
        if version == VERSION:
            return UserState(_provenance(content["provenance"]), tensors, _checked(content["data"], "data", dict))
    except SteerError as error:
        raise SteerError(f"{path}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise SteerError(f"{path}: its metadata do not describe a state ({type(error).__name__}: {error})") from None
    raise SteerError(f"{path}: the state is of version {version!r} of the format, this library reads {VERSION}")


def _provenance(data: Mapping[str, Any]) -> Provenance:
    for name, kind in _FIELDS.items():
        _checked(data[name], name, kind)
    for name in ("sites", "records"):
        for item in data[name]:
            _checked(item, f"one of the {name}", str)
    return Provenance.from_json(data)


def _checked(value: Any, name: str, kind: type | tuple[type, ...]) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r:.40}")
    return value
