"""`steer extract`: histories in, style vectors out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from steer.cli import options
from steer.errors import SteerError


def extract(
    history: Annotated[
        Path,
        typer.Argument(
            help="JSONL, a record a line: user_id, response (or text), and optionally "
            "id, time, prompt, and more keys for --instruction."
        ),
    ],
    bank: options.BankPath,
    layer: Annotated[str, typer.Option(help="After which block to read and steer: 18, or several: 12,18.")],
    model: options.Model = "smollm2-135m",
    neutral: Annotated[
        str,
        typer.Option(
            help="What a user's texts are compared with: model (its own answers to the same "
            "prompts), population (all users of the file), field:NAME (a key of the "
            "records), file:PATH (JSONL of id and response)."
        ),
    ] = "model",
    instruction: Annotated[
        str | None,
        typer.Option(
            help="Prompt for records without one, from their other keys, such as "
            "'Write a commit message titled: {title}'.",
            show_default=False,
        ),
    ] = None,
    user: Annotated[list[str] | None, typer.Option(help="Only this user; may be repeated.", show_default=False)] = None,
    holdout: Annotated[int, typer.Option(min=0, help="Leave out each user's last N records.")] = 0,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Then take the newest N of the rest.", show_default=False)
    ] = None,
    pool: Annotated[str, typer.Option(help="mean over the response, or its last token.")] = "mean",
    name: Annotated[str, typer.Option(help="Name of the states in the bank.")] = "style",
    device: options.Device = None,
    dtype: options.Dtype = None,
) -> None:
    """Read users' style vectors from what they wrote.

    Example:

        steer extract reviews.jsonl --layer 18 --neutral population --bank people.bank
    """
    from steer import Bank, History, StyleVector, read_histories

    histories = {key: whole.split(holdout, limit)[0] for key, whole in read_histories(history, instruction=instruction)}
    wanted = user or list(histories)
    if strangers := [key for key in wanted if key not in histories]:
        raise SteerError(
            f"{history} has no user {strangers[0]!r}; it has {len(histories)}, such as {next(iter(histories))!r}"
        )
    if empty := [key for key in wanted if not len(histories[key])]:
        raise SteerError(f"{empty[0]!r} has no records left after --holdout {holdout}")
    method = StyleVector(layer=options.parse_layers(layer), neutral=neutral, pool=pool)  # type: ignore[arg-type]
    lm = options.load(model, device, dtype)
    lm.declare(*method.sites)
    store = Bank(bank)
    table = Table("user", "records", "site", "‖v‖", "dose of strength 1", box=None)
    with progress_bar() as progress:
        if neutral == "population":
            everybody = [whole for whole in histories.values() if len(whole)]
            method.train(lm, progress.track(everybody, description="population"))
            if method.artifact is not None:
                store.put_artifact(method.artifact)
        for key in progress.track(wanted, description="users"):
            state = method.fit(lm, History(key, histories[key].records))
            store[key, name] = state
            for site, vector in state.tensors.items():
                norm, reference = vector.norm().item(), state.provenance.calibration["reference_norm"][site]
                table.add_row(key, str(len(histories[key])), site, f"{norm:.4g}", f"{norm / reference:.3f}")
    options.out.print(table)
    options.err.print(f"{len(wanted)} states named {name!r} in {bank}")


def progress_bar() -> Progress:
    """A bar on stderr that goes away when it is done."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, console=options.err, transient=True)
