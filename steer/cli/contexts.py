"""States of users about whom something is known, from a file."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steer.cli.lines import read_lines
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
    states: dict[str, UserState] = {}
    for where, line in read_lines(path, "a `user_id`"):
        try:
            user, state = _state(line, recipe, settings)
        except SteerError as error:
            raise SteerError(f"{where}: {error}") from None
        if user in states:
            raise SteerError(f"{where}: {user!r} comes a second time")
        states[user] = state
    if not states:
        raise SteerError(f"{path}: the file holds no contexts")
    return states


def _recipes() -> dict[str, type[Contrast]]:
    from steer.method import METHODS
    from steer.methods.contrast import Contrast

    return {key: kind for key, kind in METHODS.items() if issubclass(kind, Contrast)}


def _recipe(name: str) -> type[Contrast]:
    recipes = _recipes()
    if name not in recipes:
        known = ", ".join(sorted(key.replace("_", "-") for key in recipes))
        raise SteerError(f"--method {name.replace('_', '-')} makes no state of a context; there are {known}")
    return recipes[name]


def _takes(recipe: type[Contrast]) -> tuple[set[str], set[str]]:
    """What the recipe makes a state of, and its hyper-parameters, without those of `fit` alone."""
    own = set(inspect.signature(recipe).parameters) - {"records", "rejected"}
    return set(inspect.signature(recipe.state).parameters) - {"self"}, own


def contrasts(method: str) -> bool:
    """Whether the states of a method contrast streams."""
    return method in _recipes()


def models_of(state: UserState) -> set[str]:
    """Names of the other models that a state that contrasts needs beside the steered one."""
    from steer.inject import StreamEdit

    return StreamEdit([_recipes()[state.provenance.method].mixture_of(state)]).models


def require_mentioned(others: Mapping[str, str], states: Iterable[UserState]) -> None:
    """Raises SteerError for a model of `--beside` that would be loaded for nothing."""
    mentioned = set().union(*(models_of(state) for state in states if contrasts(state.provenance.method)))
    if unused := sorted(others.keys() - mentioned):
        known = f"they name {', '.join(sorted(mentioned))}" if mentioned else "they name none"
        raise SteerError(f"--beside {unused[0]}={others[unused[0]]}: no state of these rows needs it; {known}")


def _state(line: dict[str, Any], recipe: type[Contrast], settings: dict[str, Any]) -> tuple[str, UserState]:
    if not isinstance(user := line.get("user_id"), str) or not user:
        raise SteerError("a line is an object with a `user_id` that is text")
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
