"""`steer score`: do states make likelier what their users wrote later?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from steer.cli import options, results
from steer.cli.contexts import require_beside
from steer.cli.extract import progress_bar
from steer.errors import SteerError

if TYPE_CHECKING:
    from steer import Bank
    from steer.score import Scores


def score(
    history: Annotated[Path, typer.Argument(help="JSONL of records, the file that the states were fitted on.")],
    bank: options.BankPath,
    model: options.Model = "smollm2-135m",
    name: Annotated[
        str | None, typer.Option(help="Name of the states; not needed if all have the same.", show_default=False)
    ] = None,
    holdout: Annotated[
        int, typer.Option(min=1, help="Score each user's last N records, left out by extract --holdout N.")
    ] = 10,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Of these, the first N after those fitted on.", show_default=False)
    ] = None,
    others: Annotated[int, typer.Option(min=0, help="Compare with the states of this many others.")] = 8,
    strength: Annotated[
        float | None,
        typer.Option(help="Coefficient of the vectors; 1 if neither it nor --dose is given.", show_default=False),
    ] = None,
    dose: Annotated[
        float | None, typer.Option(help="The same, as a share of the residual norm at the site.", show_default=False)
    ] = None,
    instruction: options.Instruction = None,
    beside: options.Beside = None,
    seed: Annotated[int, typer.Option(help="Of the draw of others.")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write users and totals here as JSON.", show_default=False)
    ] = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
) -> None:
    """Measure how likely each user's later records are without steering, under their own state, and under others'.

    Example:

        steer extract commits.jsonl --layer 14 --holdout 10 --bank people.bank

        steer score commits.jsonl --holdout 10 --bank people.bank --json scores.json
    """
    from steer import Bank, read_histories
    from steer.score import score as score_states

    results.require_writable(json_file)
    store = Bank(bank, create=False)
    name = _only_name(store) if name is None else name
    held_out = {
        user: whole.split(holdout)[1].first(limit) for user, whole in read_histories(history, instruction=instruction)
    }
    users = [user for user in held_out if (user, name) in store]
    if not users:
        raise SteerError(f"none of the {len(held_out)} users of {history} has a state named {name!r} in {bank}")
    states = dict(zip(users, store.get_many(users, name), strict=True))
    shared = {state.provenance.artifact for state in states.values() if state is not None} - {None}
    companions = options.parse_beside(beside or [])
    require_beside(companions, [state for state in states.values() if state is not None])
    tell_if_few(others, len(users))
    lm = options.load(model, device, dtype)
    with progress_bar() as progress:
        task = progress.add_task("records", total=sum(len(held_out[user]) for user in users))
        scores = score_states(
            lm,
            [held_out[user] for user in users],
            {user: state for user, state in states.items() if state is not None},
            others=others,
            strength=strength,
            dose=dose,
            artifacts={key: store.artifact(key) for key in shared if key is not None},
            models={name: options.load(other, device, dtype) for name, other in companions.items()},
            seed=seed,
            on_progress=lambda done: progress.update(task, completed=done),
        )
    options.out.print(_table(scores))
    if strangers := len(held_out) - len(users):
        options.err.print(f"{strangers} users of {history} have no state named {name!r} and were left out")
    results.write(json_file, scores.to_json())


def tell_if_few(others: int, users: int) -> None:
    """Says so where there are fewer others to compare with than were asked for."""
    if users <= others:
        options.err.print(f"others to compare with: {users - 1} and not {others}, as there are no more")


def _only_name(store: Bank) -> str:
    names = store.names()
    if len(names) != 1:
        raise SteerError(f"the bank holds states named {', '.join(names) or 'nothing'}; say which with --name")
    return names[0]


def _table(scores: Scores) -> Table:
    totals = scores.totals()
    table = Table("", "", box=None, show_header=False)
    table.add_row("users, tokens", f"{totals['users']}, {totals['tokens']}")
    for key, label in (
        ("own_minus_base", "own state − none"),
        ("other_minus_base", "others' states − none"),
        ("own_minus_other", "own − others'"),
    ):
        if key in totals:
            value = totals[key]
            table.add_row(label, f"{value['mean']:+.4f} [{value['low']:+.4f}, {value['high']:+.4f}] nats per token")
    for key, label in (
        ("better_than_base", "better than none"),
        ("own_beats_others", "own better than others' mean"),
        ("top1", "own best of all"),
    ):
        if key in totals:
            table.add_row(label, f"{totals[key]:.0%} of users")
    return table
