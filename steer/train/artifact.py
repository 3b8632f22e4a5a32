"""From histories to an artifact in a folder: a method's module is made, trained and stored."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from steer.bank import artifacts
from steer.errors import Damage, SteerError
from steer.files import draft
from steer.method import METHODS, TrainableMethod, make_method
from steer.train.examples import split_examples

if TYPE_CHECKING:
    from steer.history import History
    from steer.method import Method
    from steer.model import FrozenLM
    from steer.state import Artifact
    from steer.train.trainer import Trained

_TENSORS, _FACTS = "artifact.safetensors", "artifact.json"


def train_method(
    lm: FrozenLM,
    method: Method,
    histories: Sequence[History],
    *,
    out: str | Path,
    earlier: int = 1,
    last: int | None = None,
    copies: int = 0,
    later: float = 0.1,
    strangers: float = 0.1,
    max_tokens: int = 1024,
    seed: int = 0,
    **settings: Any,
) -> tuple[Artifact, Trained]:
    """Trains what a method shares between users, and uses it: `method.fit` can follow.

    Writes the artifact into `out`, where `load_artifact` finds it, beside what `train_shared` writes there.

    Args:
        lm: the model; no gradient is computed for its parameters.
        method: a trainable one.
        histories: of the users.
        out: a folder; new or empty, unless `resume=True`.
        earlier, last, copies, later, strangers, max_tokens: as in `split_examples`.
        seed: of the initial weights, the split and the order of the examples.
        settings: as in `train_shared`.

    Raises:
        SteerError: the method has nothing to train, or as `split_examples` and `train_shared` raise it.
    """
    # Late: the Trainer takes seconds to import.
    from steer.train.trainer import train_shared

    method = require_trainable(method)
    split = split_examples(
        lm,
        histories,
        earlier=earlier,
        last=last,
        copies=copies,
        later=later,
        strangers=strangers,
        max_tokens=max_tokens,
        seed=seed,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = method.module(lm, split.known)
    # Through JSON, as that is what a resumed run is compared with.
    settled = json.loads(json.dumps(asdict(cast(Any, method)), default=str))
    about = {"method": method.name, "version": method.version, "settings": settled}
    trained = train_shared(lm, module, split.train, split.validation, out=out, seed=seed, about=about, **settings)
    artifact = method.artifact_of(lm, module)
    save_artifact(out, artifact)
    method.use(lm, artifact)
    return artifact, trained


def method_of(lm: FrozenLM, artifact: Artifact) -> Method:
    """The method that an artifact belongs to, with its hyper-parameters, ready to `fit`.

    Raises:
        SteerError: the method is not loaded, or the artifact is of another version or model.
    """
    if artifact.method not in METHODS:
        raise SteerError(
            f"the artifact is of {artifact.method!r}, which is not loaded; import the module that defines it"
        )
    known = inspect.signature(METHODS[artifact.method]).parameters
    method = make_method(artifact.method, **{key: own for key, own in artifact.settings.items() if key in known})
    method.use(lm, artifact)
    return method


def require_trainable(method: Method) -> TrainableMethod:
    """The method. Raises SteerError if it has no module to train."""
    if not isinstance(method, TrainableMethod):
        known = ", ".join(sorted(name for name, other in METHODS.items() if issubclass(other, TrainableMethod)))
        raise SteerError(f"{method.name} has no module to train; methods that have: {known or 'none'}")
    return method


def save_artifact(folder: str | Path, artifact: Artifact) -> None:
    """Writes `artifact.safetensors`, and what it is to `artifact.json`, each at once or not at all."""
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    artifacts.save(folder / _TENSORS, artifact)
    facts = {
        "hash": artifact.hash,
        "method": artifact.method,
        "version": artifact.version,
        "model": str(artifact.model),
        "settings": dict(artifact.settings),
        "tensors": {name: list(tensor.shape) for name, tensor in artifact.tensors.items()},
    }
    with draft(folder / _FACTS) as unfinished:
        unfinished.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")


def load_artifact(folder: str | Path) -> Artifact:
    """What `save_artifact` has written: for `method.use(lm, artifact)` or `bank.put_artifact(artifact)`.

    Raises:
        SteerError: there is none, or it is damaged.
    """
    folder = Path(folder)
    try:
        digest = json.loads((folder / _FACTS).read_text())["hash"]
    except FileNotFoundError:
        raise SteerError(f"{folder}: there is no {_FACTS}; was training finished?") from None
    except (ValueError, KeyError, TypeError) as error:
        raise Damage(f"{folder / _FACTS}: damaged, it cannot be read ({error})") from error
    return artifacts.load(folder / _TENSORS, digest)
