"""Options of the commands that look at directions: where these come from, and where the pictures go."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steer.errors import SteerError

if TYPE_CHECKING:
    from torch import Tensor

    from steer.bank import Bank
    from steer.state import UserState

BankPath = Annotated[
    Path | None, typer.Option("--bank", "-b", help="The bank whose users' vectors to look at.", show_default=False)
]
Users = Annotated[
    list[str] | None, typer.Option("--user", "-u", help="Whose vector; repeat to compare.", show_default=False)
]
Name = Annotated[str, typer.Option(help="Name of the states in the bank.")]
Vectors = Annotated[
    list[Path] | None,
    typer.Option("--vector", help="A safetensors file of vectors; may be repeated.", show_default=False),
]
SiteName = Annotated[
    str | None,
    typer.Option(help="Such as resid_post[14]; needed where the states have several.", show_default=False),
]
HtmlPath = Annotated[Path | None, typer.Option("--html", help="Write a page here.", show_default=False)]
PngPath = Annotated[Path | None, typer.Option("--png", help="Write a picture here.", show_default=False)]

_USERS_AT_ONCE = 256


def collect(
    bank: Path | None, users: list[str] | None, name: str, vectors: list[Path] | None
) -> dict[str, UserState | Tensor]:
    """The directions that the options name.

    Raises:
        SteerError: they name none, or two of the same name; or a file cannot be read.
    """
    from steer import Bank

    if (bank is None) != (not users):
        raise SteerError("--bank and --user belong together: whose vectors, and where they are")
    found: list[tuple[str, Any]] = []
    if bank is not None and users:
        store = Bank(bank, create=False)
        found += [(user, store[user, name]) for user in users]
    for path in vectors or []:
        found += _vectors_in(path)
    if not found:
        raise SteerError("there is nothing to look at: give --bank and --user, or --vector")
    directions = dict(found)
    if len(directions) < len(found):
        names = [key for key, _ in found]
        raise SteerError(f"two directions are named {next(key for key in names if names.count(key) > 1)!r}")
    return directions


def population_mean(store: Bank, name: str, site: str | None) -> Tensor:
    """The mean of the vectors that a bank's users have under a name."""
    import torch

    from steer.view.directions import vectors_of

    users = [user for user, own in store if own == name]
    total, start = torch.zeros(()), 0
    for start in range(0, len(users), _USERS_AT_ONCE):
        part = users[start : start + _USERS_AT_ONCE]
        states = {
            user: state for user, state in zip(part, store.get_many(part, name), strict=True) if state is not None
        }
        total = total + torch.stack(list(vectors_of(states, site)[1].values())).double().sum(0)
    return total / len(users)


def _vectors_in(path: Path) -> Iterable[tuple[str, Tensor]]:
    """All vectors of a file by their names; the only one by the file's."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise SteerError(f"{path}: no safetensors file that could be read ({error})") from None
    vectors = [(key, tensor) for key, tensor in sorted(tensors.items()) if tensor.dim() == 1]
    if not vectors:
        raise SteerError(f"{path} holds no vectors; it has {', '.join(tensors) or 'nothing'}")
    return vectors if len(vectors) > 1 else [(path.stem, vectors[0][1])]
