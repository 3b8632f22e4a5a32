"""The facts of a state: all that describes it but its kind and its tensors, as a line of JSON in a segment of bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from steer.bank.index import Kind
from steer.errors import SteerError
from steer.state import Provenance, UserState


@dataclass(frozen=True)
class Facts:
    """What is known of a state.

    Attributes:
        user: the id; None in banks that keep only hashes of ids.
        records: ids of the records it was fitted on.
        settings, calibration, data: as in `Provenance` and `UserState`.
    """

    user: str | None
    records: tuple[str, ...]
    settings: Mapping[str, Any]
    calibration: Mapping[str, Any]
    data: Mapping[str, Any]

    @classmethod
    def of(cls, user: str | None, state: UserState) -> Facts:
        source = state.provenance
        return cls(user, source.records, source.settings, source.calibration, state.data)

    @classmethod
    def from_bytes(cls, line: bytes) -> Facts:
        """Raises ValueError, TypeError or KeyError for what are no facts."""
        facts = json.loads(line)
        return cls(
            facts["user"], tuple(facts["records"]), dict(facts["settings"]), dict(facts["calibration"]), facts["data"]
        )

    def to_bytes(self, owner: str) -> bytes:
        """Raises SteerError, naming the owner, if a part has no JSON that reads back as the same."""
        parts = {
            "user": self.user,
            "records": self.records,
            "settings": dict(self.settings),
            "calibration": dict(self.calibration),
            "data": dict(self.data),
        }
        try:
            line = to_json(parts, owner)
        except SteerError:
            for name, part in parts.items():
                to_json(part, f"{name} of {owner}")
            raise
        return f"{line}\n".encode()

    def provenance(self, kind: Kind) -> Provenance:
        return Provenance(
            method=kind.method,
            version=kind.version,
            model=kind.model,
            sites=kind.sites,
            artifact=kind.artifact,
            records=self.records,
            settings=self.settings,
            calibration=self.calibration,
        )


def require_storable(source: Provenance) -> None:
    """Raises SteerError unless a provenance reads back as it is."""
    texts = {"method": [source.method], "artifact": [source.artifact or ""]}
    for part, values in (texts | {"sites": source.sites, "records": source.records}).items():
        for value in values:
            if not isinstance(value, str):
                raise SteerError(f"{part} has {value!r}, which is no text")
            if part != "records" and not value.isascii():
                raise SteerError(f"{part} has {value!r}, which is more than ASCII")
    if type(source.version) is not int or not 0 <= source.version < 1 << 31:
        raise SteerError(f"version {source.version!r} is no whole number of a few digits")


def to_json(value: Any, what: str) -> str:
    """JSON text that reads back as `value`, but for tuples, which become lists.

    Raises:
        SteerError: there is no such text; `what` tells the user which part it is about.
    """
    try:
        _require_text_keys(value)
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise SteerError(f"{what}: cannot be stored as JSON ({error})") from error


def _require_text_keys(value: Any) -> None:
    # json.dumps turns the key 18 into "18" without a word, and whoever then looks for 18 finds nothing.
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise TypeError(f"the key {key!r} is not text")
            _require_text_keys(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            _require_text_keys(inner)
