"""States of users about whom something is known, from a file."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steer.errors import SteerError

if TYPE_CHECKING:
    from steer.state import UserState


def read_contexts(path: Path, method: str, settings: dict[str, Any]) -> dict[str, UserState]:
    """The state of each user of a JSONL file: a line holds a `user_id` and what the method's `state` takes.

    For CoS that is a `context`. A line may also have hyper-parameters of its own, such as `lam`.

    Raises:
        SteerError: the file is missing or empty, a user comes twice, or a line is not what the method takes; the
            message names the line.
    """
    if not path.is_file():
        raise SteerError(f"{path}: there is no such file")
    states: dict[str, UserState] = {}
    for number, line in enumerate(path.read_text("utf-8-sig").splitlines(), start=1):
        if line.strip():
            try:
                user, state = _state(json.loads(line), method, settings)
            except (ValueError, SteerError) as error:
                raise SteerError(f"{path}:{number}: {error}") from None
            if user in states:
                raise SteerError(f"{path}:{number}: {user!r} comes a second time")
            states[user] = state
    if not states:
        raise SteerError(f"{path}: the file holds no contexts")
    return states


def _state(line: Any, method: str, settings: dict[str, Any]) -> tuple[str, UserState]:
    from steer.method import METHODS, make_method

    if not isinstance(line, dict) or not isinstance(user := line.get("user_id"), str):
        raise SteerError("a line is an object with a `user_id`")
    make = getattr(METHODS.get(method), "state", None)
    if make is None:
        raise SteerError(f"{method!r} is not a method that makes a state of a context")
    takes = inspect.signature(make).parameters
    given = {key: value for key, value in line.items() if key != "user_id"}
    about = {key: value for key, value in given.items() if key in takes}
    own = {key: value for key, value in given.items() if key not in takes}
    try:
        return user, make_method(method, **{**settings, **own}).state(**about)  # type: ignore[attr-defined]
    except TypeError as error:
        raise SteerError(f"{method}: {error}") from None
