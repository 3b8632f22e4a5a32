"""What is stored: a user's state, what a method shares between users, and where both came from."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from steer.errors import SteerError


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """Identifies a model by its architecture and by sampled weights, whatever its dtype and device.

    Weights are compared as bfloat16 bit patterns. A model that was stored in float32 and loaded in float16 was rounded
    twice, which moves about one sample in sixteen by a unit in the last place; fine-tuning moves far more. Hence two
    fingerprints are equal when their configurations are and at least 85 % of their samples.
    """

    name: str
    config: str
    weights: tuple[int, ...]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Fingerprint):
            return NotImplemented
        if self.config != other.config or len(self.weights) != len(other.weights):
            return False
        same = sum(a == b for a, b in zip(self.weights, other.weights, strict=True))
        return same >= 0.85 * len(self.weights)

    # Equality tolerates rounding of the weights, so they must not enter the hash.
    def __hash__(self) -> int:
        return hash(self.config)

    def __str__(self) -> str:
        digest = hashlib.sha256(repr((self.config, self.weights)).encode()).hexdigest()
        return f"{self.name} ({digest[:10]})"

    def to_json(self) -> dict[str, Any]:
        packed = b"".join(word.to_bytes(2, "big") for word in self.weights)
        return {"name": self.name, "config": self.config, "weights": packed.hex()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Fingerprint:
        packed = bytes.fromhex(data["weights"])
        words = tuple(int.from_bytes(packed[i : i + 2], "big") for i in range(0, len(packed), 2))
        return cls(data["name"], data["config"], words)


@dataclass(frozen=True)
class Provenance:
    """Where a state came from.

    Attributes:
        method, version: the method that fitted the state, and the version of its stored form.
        model: the model it was read from; None for states that fit every model, such as a context.
        sites: the sites it was read at and enters at.
        artifact: hash of the shared artifact it needs, if any.
        records: ids of the records it was fitted on.
        settings: hyper-parameters of the method.
        calibration: numbers measured while fitting, such as `{"reference_norm": {"resid_post[18]": 201.3}}`.
    """

    method: str
    version: int
    model: Fingerprint | None = None
    sites: tuple[str, ...] = ()
    artifact: str | None = None
    records: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        # `asdict` would also descend into the fingerprint.
        data = asdict(self)
        data["model"] = None if self.model is None else self.model.to_json()
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Provenance:
        model = data["model"]
        return cls(
            method=data["method"],
            version=data["version"],
            model=None if model is None else Fingerprint.from_json(model),
            sites=tuple(data["sites"]),
            artifact=data["artifact"],
            records=tuple(data["records"]),
            settings=data["settings"],
            calibration=data["calibration"],
        )


@dataclass(frozen=True, eq=False)
class UserState:
    """What is stored for one user: named tensors, JSON data (a context is text), and provenance.

    States can be weighted and added up for one row: `0.8 * alice + 0.3 * formal` is a `Blend`.

    Raises:
        SteerError: a tensor holds values that are not finite.
    """

    provenance: Provenance
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.require_finite()

    def require_finite(self) -> None:
        """Raises SteerError if a tensor holds values that are not finite, as one may that was written to since."""
        _require_finite(self.tensors, f"a {self.provenance.method} state")

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def __mul__(self, weight: float) -> Blend:
        return Blend.of(self) * weight

    __rmul__ = __mul__

    def __add__(self, other: UserState | Blend) -> Blend:
        return Blend.of(self) + other


@dataclass(frozen=True, eq=False)
class Blend:
    """Several states for one row, each with a coefficient on top of its own strength.

    Attributes:
        parts: the coefficients and the states.

    Raises:
        SteerError: a coefficient is not finite.
    """

    parts: tuple[tuple[float, UserState], ...]

    def __post_init__(self) -> None:
        if not all(math.isfinite(weight) for weight, _ in self.parts):
            raise SteerError(f"coefficients of states must be finite, got {[weight for weight, _ in self.parts]}")

    @classmethod
    def of(cls, states: UserState | Blend) -> Blend:
        """A single state is a blend of one part, at coefficient 1."""
        return states if isinstance(states, Blend) else cls(((1.0, states),))

    def __mul__(self, weight: float) -> Blend:
        if not isinstance(weight, Real):
            return NotImplemented
        return Blend(tuple((float(weight) * own, state) for own, state in self.parts))

    __rmul__ = __mul__

    def __add__(self, other: UserState | Blend) -> Blend:
        if not isinstance(other, UserState | Blend):
            return NotImplemented
        return Blend(self.parts + Blend.of(other).parts)


@dataclass(frozen=True, eq=False)
class Artifact:
    """What a method shares between users (trained layers, a population mean), named by its hash.

    Raises:
        SteerError: a tensor holds values that are not finite.
    """

    method: str
    version: int
    model: Fingerprint
    tensors: Mapping[str, Tensor]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require_finite(self.tensors, f"a {self.method} artifact")

    # Once: it runs over megabytes, and states are compared with it one by one.
    @cached_property
    def hash(self) -> str:
        """SHA-256 over method, settings and tensors, as 64 hexadecimal digits."""
        digest = hashlib.sha256(json.dumps([self.method, self.version, dict(self.settings)], sort_keys=True).encode())
        for name in sorted(self.tensors):
            tensor = self.tensors[name].detach().cpu().contiguous()
            digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
            digest.update(tensor.view(torch.uint8).numpy().tobytes() if tensor.dim() else repr(tensor.item()).encode())
        return digest.hexdigest()


def _require_finite(tensors: Mapping[str, Tensor], owner: str) -> None:
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise SteerError(f"{owner}: {name!r} is on the meta device and has no values; load the model's weights")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise SteerError(f"{owner} has values that are not finite in {name!r}; check the texts it was fitted on")
