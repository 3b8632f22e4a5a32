"""`steer bank`: what is in a bank, and looking after it."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from steer.cli import bank_files, options
from steer.errors import SteerError
from steer.files import is_free

bank = typer.Typer(help="Look into a bank, and look after it.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(help="The folder of the bank.", metavar="BANK")]
Conflict = Annotated[
    str,
    typer.Option(
        help="Where both have a state: error (and nothing of that bank is merged), keep the one there, or replace it."
    ),
]


_COLUMNS = ("user", "name", "method", "sites", "records", "bytes", "model")
_PAGE = 1000


@bank.command("ls")
def ls(
    folder: Folder,
    user: Annotated[str | None, typer.Option(help="Only this user.", show_default=False)] = None,
    name: Annotated[str | None, typer.Option(help="Only states of this name.", show_default=False)] = None,
    by_hash: bank_files.ByHash = False,
    as_json: options.Json = False,
) -> None:
    """List the states in a bank, one a line."""
    from steer import Bank

    user = None if user is None else bank_files.user_id(user, by_hash)
    damages: list[SteerError] = []
    found = bank_files.sound(Bank(folder, create=False).rows(user), damages)
    rows = (_plain(row) for row in found if name in (None, row.name))
    if as_json:
        print(json.dumps(list(rows), ensure_ascii=False))
    else:
        count, users = 0, set[str]()
        # By pages, so that a bank of millions begins to appear at once.
        while page := list(islice(rows, _PAGE)):
            options.print_table(_COLUMNS, ([_cell(row[column]) for column in _COLUMNS] for row in page))
            count, users = count + len(page), users | {row["user"] for row in page}
        options.err.print(f"{count} states of {len(users)} users")
    if damages:
        raise damages[0]


@bank.command("show")
def show(
    folder: Folder,
    user: Annotated[str, typer.Argument(help="Whose state.")],
    name: Annotated[
        str | None, typer.Argument(help="Its name; all of the user's states without it.", show_default=False)
    ] = None,
    by_hash: bank_files.ByHash = False,
    as_json: options.Json = False,
) -> None:
    """Show one user's states: where they came from, and their numbers."""
    from steer import Bank

    store, user = Bank(folder, create=False), bank_files.user_id(user, by_hash)
    names = [name] if name is not None else store.names_of(user)
    states = {name: _describe(store[user, name]) for name in names or ["style"]}
    if as_json:
        print(json.dumps({"user": user, "states": states}, ensure_ascii=False))
        return
    for title, facts in states.items():
        rows = (
            (key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
            for key, value in facts.items()
        )
        options.print_table(("", ""), rows, title=f"{user} / {title}")


@bank.command("rm")
def rm(
    folder: Folder,
    users: Annotated[list[str], typer.Argument(help="Whose states.", metavar="USER...")],
    name: Annotated[
        str | None, typer.Option(help="Only the state of this name; all of a user's without it.", show_default=False)
    ] = None,
    by_hash: bank_files.ByHash = False,
    as_json: options.Json = False,
) -> None:
    """Delete states, and erase their bytes from the files of the bank.

    Nothing is deleted if one of the users has no such state.
    """
    from steer import Bank

    store = Bank(folder, create=False)
    wanted = [bank_files.user_id(user, by_hash) for user in dict.fromkeys(users)]
    names = {user: store.names_of(user) if name is None else [name] for user in wanted}
    for user in wanted:
        if not names[user]:
            raise SteerError(f"{folder}: {user!r} has no states; nothing was deleted")
    keys = [(user, own) for user in wanted for own in names[user]]
    store.delete(keys)
    if as_json:
        print(json.dumps({"deleted": [{"user": user, "name": own} for user, own in keys]}, ensure_ascii=False))
    else:
        options.err.print(f"deleted {len(keys)} states of {len(wanted)} users")


@bank.command("merge")
def merge(
    folder: Folder,
    others: Annotated[list[Path], typer.Argument(help="The banks to copy from.", metavar="OTHER...")],
    conflict: Conflict = "error",
    skip_damaged: Annotated[
        bool, typer.Option("--skip-damaged", help="Leave out states that cannot be read, and say which.")
    ] = False,
    hashed: bank_files.Hashed = False,
    as_json: options.Json = False,
) -> None:
    """Copy the states of other banks into a bank, which is made if there is none; they stay as they are.

    With --skip-damaged it saves what can be saved of a damaged bank.
    """
    from steer import Bank
    from steer.bank import writing

    if conflict not in (choices := get_args(writing.Conflict)):
        raise SteerError(f"--conflict {conflict} is not one of {', '.join(choices)}")
    on_damage = (lambda damage: options.err.print(f"left out: {damage}", soft_wrap=True)) if skip_damaged else None
    sources = [(str(other), Bank(other, create=False)) for other in others]
    copied: Counter[str] = Counter()
    if is_free(folder):
        name, source = sources.pop(0)
        with _progress(f"copying {name}") as advance:
            copied[name] = len(source.copy(folder, hashed=hashed, on_progress=advance, on_damage=on_damage))
    store = Bank(folder, create=False, hashed=hashed or None)
    for name, source in sources:
        with _progress(f"merging {name}") as advance:
            copied[name] += store.merge(
                source,
                conflict=conflict,  # type: ignore[arg-type]
                on_progress=advance,
                on_damage=on_damage,
            )
    if as_json:
        print(json.dumps({"copied": copied, "states": len(store)}, ensure_ascii=False))
    else:
        options.err.print(f"copied {sum(copied.values())} states; {folder} has {len(store)} now")


@bank.command("verify")
def verify(folder: Folder, as_json: options.Json = False) -> None:
    """Read every byte of a bank and compare it with its checksums; what is wrong is listed, and the status is 1."""
    from steer import Bank

    store = Bank(folder, create=False)
    with _progress("verifying") as advance:
        faults = store.verify(advance)
    if as_json:
        rows = [
            {key: None if value is None else str(value) for key, value in asdict(fault).items()} for fault in faults
        ]
        print(json.dumps({"states": len(store), "faults": rows}, ensure_ascii=False))
    else:
        for fault in faults:
            options.out.print(str(fault), soft_wrap=True)
    if faults:
        raise SteerError(f"{folder}: {len(faults)} faults")
    options.err.print(f"{len(store)} states are sound")


@bank.command("compact")
def compact(folder: Folder, as_json: options.Json = False) -> None:
    """Pack the files of a bank, and give the space of what was deleted back to the disk."""
    from steer import Bank

    store = Bank(folder, create=False)
    with _progress("compacting") as advance:
        done = store.compact(advance)
    if as_json:
        print(json.dumps(asdict(done)))
        return
    sizes = f"{_size(done.nbytes_before)} to {_size(done.nbytes_after)}"
    options.err.print(f"{done.segments_before} segments to {done.segments_after}, {sizes}")


@bank.command("migrate")
def migrate(
    folder: Folder,
    new: Annotated[Path, typer.Argument(help="The folder of the new bank.", metavar="NEW")],
    hashed: bank_files.Hashed = False,
    as_json: options.Json = False,
) -> None:
    """Make a bank of the present format from one of version 1, which stays as it is."""
    from steer.bank.migrate import migrate as migrated

    with _progress("migrating") as advance:
        count = len(migrated(folder, new, hashed=hashed, on_progress=advance))
    _say_moved(count, new, as_json)


@bank.command("push")
def push(
    folder: Folder,
    target: Annotated[str, typer.Argument(help="hf://OWNER/NAME, or a folder that does not exist yet.")],
    public: Annotated[bool, typer.Option("--public", help="Make a new repository that everybody can read.")] = False,
    as_json: options.Json = False,
) -> None:
    """Put a packed copy of a bank into a repository of the Hugging Face Hub, private unless you say otherwise."""
    from steer import Bank
    from steer.bank import hub

    store = Bank(folder, create=False)
    with _progress("copying") as advance:
        hub.push(store, target, private=not public, on_progress=advance)
    _say_moved(len(store), target, as_json)


@bank.command("pull")
def pull(
    source: Annotated[str, typer.Argument(help="hf://OWNER/NAME, or the folder of a bank.")],
    folder: Annotated[Path, typer.Argument(help="Where to put it; nothing may be there.", metavar="BANK")],
    as_json: options.Json = False,
) -> None:
    """Fetch a bank from the Hugging Face Hub, and verify it."""
    from steer.bank import hub

    with _progress("verifying") as advance:
        count = len(hub.pull(source, folder, on_progress=advance))
    _say_moved(count, folder, as_json)


bank.command("import")(bank_files.import_)
bank.command("export")(bank_files.export)


@contextmanager
def _progress(what: str) -> Iterator[Callable[[float], None]]:
    """A bar on stderr that goes away when it is done; takes the share of the work."""
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    with Progress(*columns, console=options.err, transient=True) as progress:
        task = progress.add_task(what, total=1.0)
        yield lambda share: progress.update(task, completed=share)


def _say_moved(states: int, target: Path | str, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"states": states, "to": str(target)}, ensure_ascii=False))
    else:
        options.err.print(f"{states} states in {target}", soft_wrap=True)


def _cell(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else "any" if value is None else str(value)


def _size(nbytes: int) -> str:
    for unit in ("bytes", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000  # type: ignore[assignment]
    return f"{nbytes:.3g} GB"


def _plain(row: Any) -> dict[str, Any]:
    return {
        "user": row.user,
        "name": row.name,
        "method": row.method,
        "model": row.model,
        "sites": list(row.sites),
        "records": row.records,
        "bytes": row.nbytes,
    }


def _describe(state: Any) -> dict[str, Any]:
    source = state.provenance
    return {
        "method": f"{source.method}, version {source.version}",
        "model": "any" if source.model is None else str(source.model),
        "sites": list(source.sites),
        "settings": dict(source.settings),
        "calibration": dict(source.calibration),
        "artifact": source.artifact or "none needed",
        "tensors": {
            name: {
                "shape": list(tensor.shape),
                "dtype": str(tensor.dtype),
                # Of vectors whose square is more than a float, too.
                "norm": round(math.hypot(*tensor.double().flatten().tolist()), 4),
            }
            for name, tensor in state.tensors.items()
        },
        "data": dict(state.data),
        "records": list(source.records),
    }
