"""States of users about whom something is known, from a file."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from steer.cli import options
from steer.cli.lines import meant, read_lines
from steer.errors import SteerError

if TYPE_CHECKING:
    from steer import Bank
    from steer.methods.contrast import Contrast
    from steer.state import UserState

# Values of hyper-parameters that must be given; all others of these are names of models.
_EXAMPLES = {"attributes": '{"formal": "Answer formally."}'}


def read_contexts(path: Path, method: str, settings: dict[str, Any]) -> dict[str, UserState]:
    """The state of each user of a JSONL file: a line holds a `user_id` and what the method's `state` takes.

    For CoS that is a `context`. A line may also have hyper-parameters of its own, such as `lam`.

    Raises:
        SteerError: there is no such method, or a setting of it is wrong; the file is missing or empty, a user comes
            twice, or a line is not what the method takes; the message names the line.
    """
    recipe = _recipe(method)
    _require_settings(recipe, settings)
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


def _called(recipe: type[Contrast]) -> str:
    """Its name, as one types it."""
    return recipe.name.replace("_", "-")


def _takes(recipe: type[Contrast]) -> tuple[dict[str, bool], dict[str, bool]]:
    """What the recipe makes a state of, and its hyper-parameters but for those of `fit`; whether each must be given."""
    made_of, own = (
        {name: parameter.default is parameter.empty for name, parameter in inspect.signature(call).parameters.items()}
        for call in (recipe.state, recipe)
    )
    del made_of["self"]
    return made_of, {name: needed for name, needed in own.items() if name not in ("records", "rejected")}


def _require_settings(recipe: type[Contrast], settings: dict[str, Any]) -> None:
    """Raises SteerError if the recipe has no such hyper-parameters, whatever the lines of the file add to them."""
    _, own = _takes(recipe)
    if wrong := [key for key in settings if key not in own]:
        raise SteerError(
            f"--set {wrong[0]}: {_called(recipe)} has no such hyper-parameter{meant(wrong[0], own)}; it has "
            f"{', '.join(own)}"
        )
    others = options.parse_settings([_example(key) for key, needed in own.items() if needed])
    try:
        _made(recipe, others | settings)
    except SteerError as error:
        raise SteerError(f"--set: {error}") from None


def _state(line: dict[str, Any], recipe: type[Contrast], settings: dict[str, Any]) -> tuple[str, UserState]:
    user = line.get("user_id")
    if not isinstance(user, str | int) or isinstance(user, bool) or str(user) == "":
        raise SteerError("a line is an object with a `user_id` that is text, or a whole number")
    made_of, own = _takes(recipe)
    texts = {key: value for key, value in line.items() if key in made_of}
    values = settings | {key: value for key, value in line.items() if key in own}
    if wrong := [key for key in line if key not in {"user_id"} | made_of.keys() | own.keys()]:
        raise SteerError(
            f"{wrong[0]!r} is nothing that {_called(recipe)} knows{meant(wrong[0], {**made_of, **own})}; "
            f"{_keys(made_of, own)}"
        )
    if lacking := [f"`{key}`" for key, needed in made_of.items() if needed and key not in texts]:
        raise SteerError(f"{_called(recipe)} needs {' and '.join(lacking)}; {_keys(made_of, own)}")
    if lacking := [key for key, needed in own.items() if needed and key not in values]:
        raise SteerError(f"{_called(recipe)} needs {' and '.join(lacking)}: {_remedy(lacking)}")
    return str(user), _made(recipe, values, texts)


def _made(recipe: type[Contrast], values: dict[str, Any], texts: dict[str, Any] | None = None) -> Any:
    """The recipe with these hyper-parameters; with texts, the state that it makes of them."""
    try:
        made = recipe(**values)
        return made if texts is None else made.state(**texts)
    except (TypeError, AttributeError) as error:
        raise SteerError(f"{_called(recipe)}: a value is of the wrong kind ({error})") from None


def _keys(made_of: dict[str, bool], own: dict[str, bool]) -> str:
    """What a line has, as a message says it; hyper-parameters may stand there, or be given for all."""
    has = [key for key, needed in made_of.items() if needed]
    may = ", ".join([*(key for key, needed in made_of.items() if not needed), *own])
    return f"a line has {', '.join(has)}, and may have {may}" if has else f"a line may have {may}"


def _remedy(lacking: Sequence[str]) -> str:
    sets = " ".join(f"--set {shlex.quote(_example(key))}" for key in lacking)
    models = len([key for key in lacking if key not in _EXAMPLES])
    return f"{sets}{', and --beside NAME=MODEL' if models else ''}{' for each' if models > 1 else ''}"


def _example(key: str) -> str:
    return f"{key}={_EXAMPLES.get(key, 'NAME')}"


def contrasts(method: str) -> bool:
    """Whether the states of a method contrast streams."""
    return method in _recipes()


def stored(bank: Bank, users: Sequence[str | None], names: Sequence[str] | None) -> list[dict[str, UserState]]:
    """For each user, the states of the bank that contrast streams, by name: of all names, or of these."""
    found: list[dict[str, UserState]] = [{} for _ in users]
    kept = {name for name, source, _ in bank.templates() if contrasts(source.method)}
    for name in sorted(kept & set(names) if names else kept):
        for own, state in zip(found, bank.get_many(users, name), strict=True):
            if state is not None and contrasts(state.provenance.method):
                own[name] = state
    return found


def require_one(user: str, option: str | None, own: Mapping[str, UserState]) -> None:
    """Raises SteerError if several of a row's states contrast streams: of the bank, or one from an option."""
    names = [repr(name) for name in own]
    if option is not None and names:
        raise SteerError(
            f"{user!r} has a context from {option} and the state {names[0]} of the bank, which both contrast streams; "
            "leave one out"
        )
    if len(names) > 1:
        raise SteerError(f"the states {' and '.join(names)} of {user!r} contrast streams; choose one with --name")


def models_of(state: UserState) -> list[str]:
    """Names of the other models that a state needs beside the steered one."""
    from steer.method import method_of

    if not contrasts(state.provenance.method):
        return []
    streams = cast("type[Contrast]", method_of(state)).mixture_of(state).streams
    return list(dict.fromkeys(stream.model for stream in streams if stream.model is not None))


def require_beside(others: Mapping[str, str], states: Iterable[UserState]) -> None:
    """Raises SteerError unless the models of `--beside` are those that the states need."""
    mentioned = list(dict.fromkeys(name for state in states for name in models_of(state)))
    if unused := sorted(others.keys() - set(mentioned)):
        known = f"they name {', '.join(mentioned)}" if mentioned else "they name none"
        raise SteerError(f"--beside {unused[0]}={others[unused[0]]}: no state of these rows needs it; {known}")
    if missing := [name for name in mentioned if name not in others]:
        added = " ".join(f"--beside {name}=MODEL" for name in missing)
        raise SteerError(f"no --beside for {' and '.join(map(repr, missing))}; add {added}")
