"""Artifacts: a safetensors file for each, named by its hash."""

from __future__ import annotations

import json
import re
import zlib
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialized

from steer.bank.facts import to_json
from steer.errors import Damage
from steer.files import draft
from steer.state import Artifact, Fingerprint

_HASH = re.compile(r"[0-9a-f]{64}")


def is_hash(digest: object) -> bool:
    """Whether this may be the hash of an artifact."""
    return isinstance(digest, str) and _HASH.fullmatch(digest) is not None


def stored(folder: Path) -> list[str]:
    """Hashes of the artifacts in a folder, by the names of the files."""
    return sorted(file.stem for file in folder.glob("*.safetensors") if is_hash(file.stem))


def is_sound(file: Path, digest: str) -> bool:
    """Whether a file is there and holds the artifact of that hash."""
    try:
        load(file, digest)
    except Damage:
        return False
    return True


def save(file: Path, artifact: Artifact) -> None:
    """Raises SteerError if it cannot be written; nothing of it is left then."""
    described = {
        "method": artifact.method,
        "version": artifact.version,
        "model": artifact.model.to_json(),
        "settings": dict(artifact.settings),
    }
    text = to_json(described, f"the {artifact.method} artifact")
    # The model is no part of the hash, as one that is loaded in another dtype is the same model.
    metadata = {"artifact": text, "crc32": str(zlib.crc32(text.encode()))}
    # Clones, as safetensors refuses tensors that share storage and would have to save a view's base.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in artifact.tensors.items()}
    content = serialized(tensors, metadata)
    with draft(file) as unfinished:
        unfinished.write_bytes(content)


def load(file: Path, digest: str) -> Artifact:
    """Raises Damage if it cannot be read, or is not the artifact of that hash."""
    try:
        artifact = _read(file)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise Damage(f"{file}: damaged, the artifact cannot be read ({error})") from error
    if artifact.hash != digest:
        raise Damage(f"{file}: damaged, what it holds has the hash {artifact.hash}")
    return artifact


def _read(file: Path) -> Artifact:
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata() or {}
        text = metadata["artifact"]
        # Files of earlier versions have none.
        if metadata.get("crc32", crc := str(zlib.crc32(text.encode()))) != crc:
            raise ValueError("what describes it is not what was saved")
        described: dict[str, Any] = json.loads(text)
        # Cloned, as these are views of the mapped file.
        tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
    return Artifact(
        method=described["method"],
        version=described["version"],
        model=Fingerprint.from_json(described["model"]),
        tensors=tensors,
        settings=described["settings"],
    )
