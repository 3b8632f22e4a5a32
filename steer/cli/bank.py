"""`steer bank`: what is in a bank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from steer.cli import bank_files, options

bank = typer.Typer(help="List and show the states in a bank.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(help="The folder of the bank.", metavar="BANK")]


@bank.command("ls")
def ls(
    folder: Folder,
    user: Annotated[str | None, typer.Option(help="Only this user.", show_default=False)] = None,
    as_json: options.Json = False,
) -> None:
    """List the states in a bank, one a line."""
    from steer import Bank

    rows = list(Bank(folder, create=False).rows(user))
    if as_json:
        print(json.dumps([_plain(row) for row in rows], ensure_ascii=False))
        return
    table = Table("user", "name", "method", "sites", "records", "bytes", "model", box=None)
    for row in rows:
        sites = ", ".join(row.sites)
        table.add_row(row.user, row.name, row.method, sites, str(row.records), str(row.nbytes), row.model or "any")
    options.out.print(table)
    options.err.print(f"{len(rows)} states of {len({row.user for row in rows})} users")


@bank.command("show")
def show(
    folder: Folder,
    user: Annotated[str, typer.Argument(help="Whose state.")],
    name: Annotated[
        str | None, typer.Argument(help="Its name; all of the user's states without it.", show_default=False)
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Show one user's states: where they came from, and their numbers."""
    from steer import Bank

    store = Bank(folder, create=False)
    names = [name] if name is not None else store.names_of(user)
    states = {name: _describe(store[user, name]) for name in names or ["style"]}
    if as_json:
        print(json.dumps({"user": user, "states": states}, ensure_ascii=False))
        return
    for title, facts in states.items():
        table = Table(title=f"{user} / {title}", show_header=False, box=None, title_justify="left")
        for key, value in facts.items():
            table.add_row(key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
        options.out.print(table)


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
        "artifact": source.artifact or "none",
        "tensors": {
            name: {
                "shape": list(tensor.shape),
                "dtype": str(tensor.dtype),
                "norm": round(tensor.float().norm().item(), 4),
            }
            for name, tensor in state.tensors.items()
        },
        "data": dict(state.data),
        "records": list(source.records),
    }


bank.command("import")(bank_files.import_)
bank.command("export")(bank_files.export)
