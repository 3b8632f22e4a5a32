"""States of users about whom something is known, from a file."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steer.errors import SteerError

if TYPE_CHECKING:
    from steer.methods.contrast import Contrast
    from steer.state import UserState


def read_contexts(path: Path, method: str, settings: dict[str, Any]) -> dict[str, UserState]:
    """The state of each user of a JSONL file: a line holds a `user_id` and what the method's `state` takes.

    For CoS that is a `context`. A line may also have hyper-parameters of its own, such as `lam`.

    Raises:
        SteerError: there is no such method, or a setting of it is wrong; the file is missing or empty, a user comes
            twice, or a line is not what the method takes; the message names the line.
    """
    recipe = _recipe(method)
    _, own = _takes(recipe)
    if wrong := [key for key in settings if key not in own]:
        raise SteerError(f"--set {wrong[0]}: {method} has no such hyper-parameter; it has {', '.join(sorted(own))}")
    if not path.is_file():
        raise SteerError(f"{path}: there is no such file")
    states: dict[str, UserState] = {}
    for number, line in enumerate(path.read_text("utf-8-sig").splitlines(), start=1):
        if line.strip():
            try:
                user, state = _state(json.loads(line), recipe, settings)
            except (ValueError, SteerError) as error:
                raise SteerError(f"{path}:{number}: {error}") from None
            if user in states:
                raise SteerError(f"{path}:{number}: {user!r} comes a second time")
            states[user] = state
    if not states:
        raise SteerError(f"{path}: the file holds no contexts")
    return states


def _recipe(name: str) -> type[Contrast]:
    from steer.method import METHODS
    from steer.methods.contrast import Contrast

    recipes = {key: kind for key, kind in METHODS.items() if issubclass(kind, Contrast)}
    if name not in recipes:
        known = ", ".join(sorted(key.replace("_", "-") for key in recipes))
        raise SteerError(f"--method {name.replace('_', '-')} makes no state of a context; there are {known}")
    return recipes[name]


def _takes(recipe: type[Contrast]) -> tuple[set[str], set[str]]:
    """What the recipe makes a state of, and its hyper-parameters."""
    return set(inspect.signature(recipe.state).parameters) - {"self"}, set(inspect.signature(recipe).parameters)


def _state(line: Any, recipe: type[Contrast], settings: dict[str, Any]) -> tuple[str, UserState]:
    if not isinstance(line, dict) or not isinstance(user := line.get("user_id"), str):
        raise SteerError("a line is an object with a `user_id`")
    takes, own = _takes(recipe)
    given = {key: value for key, value in line.items() if key != "user_id"}
    if wrong := sorted(given.keys() - takes - own):
        raise SteerError(
            f"{wrong[0]!r} is nothing that {recipe.name} knows; a line has {', '.join(sorted(takes))}, and may have "
            f"{', '.join(sorted(own))}"
        )
    try:
        made = recipe(**{**settings, **{key: value for key, value in given.items() if key in own}})
        return user, made.state(**{key: value for key, value in given.items() if key in takes})
    except (TypeError, AttributeError) as error:
        raise SteerError(f"{recipe.name}: {error}") from None
