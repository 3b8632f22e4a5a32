"""`steer extract`: histories in, a vector for each user out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from steer.cli import options
from steer.errors import SteerError

if TYPE_CHECKING:
    from steer import UserState
    from steer.method import Method

DEFAULT = "natural_gradient"
# Users who are read together, and stored at once.
_USERS = 256
# Below this share of a vector its user's own part does not show.
_FAINT = 0.2


def extract(
    history: Annotated[
        Path,
        typer.Argument(
            help="JSONL, a record a line: user_id, response (or text), and optionally "
            "id, time, prompt, and more keys for --instruction."
        ),
    ],
    bank: options.BankPath,
    layer: Annotated[
        str | None, typer.Option(help="After which block to read and steer: 18, or several: 12,18.", show_default=False)
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="natural-gradient (the default), style-vector (the default with --site, --neutral, --extractor, "
            "--pool or --paper), or another by its name, such as trained-vector.",
            show_default=False,
        ),
    ] = None,
    setting: options.Setting = None,
    site: Annotated[
        list[str] | None,
        typer.Option(
            help="Another place to read and steer, such as 'attn_out[3]'; may be repeated.", show_default=False
        ),
    ] = None,
    model: options.Model = "smollm2-135m",
    neutral: Annotated[
        str | None,
        typer.Option(
            help="Style vectors: what a user's texts are compared with: model (its own answers to the same "
            "prompts, the default), population (all users of the file), field:NAME (a key of the "
            "records), file:PATH (JSONL of id and response).",
            show_default=False,
        ),
    ] = None,
    extractor: Annotated[
        str | None,
        typer.Option(help="mean of the differences (the default), logistic regression, or pca.", show_default=False),
    ] = None,
    paper: Annotated[
        bool, typer.Option("--paper", help="As in the paper: last token, mean difference, from the first new token on.")
    ] = False,
    trained: Annotated[
        Path | None,
        typer.Option(
            help="A folder that steer train has made: its method, with what it trained, in place of --method.",
            show_default=False,
        ),
    ] = None,
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
    pool: Annotated[
        str | None, typer.Option(help="mean over the response (the default), or its last token.", show_default=False)
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the states in the bank.")] = "style",
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Keep what is read of each text in this file; the same call goes on from there after it was stopped.",
            show_default=False,
        ),
    ] = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.Json = False,
) -> None:
    """Read a vector for each user from what they wrote.

    Example:

        steer extract reviews.jsonl --bank people.bank

        steer extract reviews.jsonl --layer 18 --neutral population --bank people.bank
    """
    from steer import Bank, NaturalGradient, StyleVector, read_histories
    from steer.cache import Cache
    from steer.method import TrainableMethod
    from steer.train import load_artifact, method_of

    settings = options.parse_settings(setting or [])
    layers = {} if layer is None else {"layer": options.parse_layers(layer)}
    of_style = {"neutral": neutral, "extractor": extractor, "pool": pool, "sites": site}
    of_style = {key: value for key, value in of_style.items() if value is not None}
    if twice := [key for key in layers | of_style if key in settings]:
        raise SteerError(f"--{twice[0].removesuffix('s')} and --set {twice[0]} say the same thing; give one of them")
    artifact = None if trained is None else load_artifact(trained)
    if artifact is not None and (method is not None or paper or settings | layers | of_style):
        raise SteerError(f"--trained {trained} says which method it is, and with what hyper-parameters; leave them out")
    if artifact is not None and resume is not None:
        raise SteerError("--resume keeps readings of the model, and --trained methods make none; leave it out")
    fitting = _method(method, settings | layers, of_style, paper)
    if artifact is None and isinstance(fitting, TrainableMethod):
        raise SteerError(
            f"{fitting.name} is trained first: steer train {fitting.name} …, and give its folder as --trained"
        )
    if resume is not None and not isinstance(fitting, NaturalGradient | StyleVector):
        raise SteerError(f"--resume is for methods that read each text once; {fitting.name} goes over them many times")
    histories = {key: whole.split(holdout, limit)[0] for key, whole in read_histories(history, instruction=instruction)}
    wanted = list(dict.fromkeys(user or histories))
    if strangers := [key for key in wanted if key not in histories]:
        raise SteerError(
            f"{history} has no user {strangers[0]!r}; it has {len(histories)}, such as {next(iter(histories))!r}"
        )
    if empty := [key for key in wanted if not len(histories[key])]:
        raise SteerError(f"{empty[0]!r} has no records left after --holdout {holdout}")
    lm = options.load(model, device, dtype)
    if artifact is not None:
        fitting = method_of(lm, artifact)
    if bank.exists():
        # What is no bank is refused before the work.
        Bank(bank).close()
    cached = {} if resume is None else {"cache": Cache(resume)}
    rows: dict[str, dict[str, Any]] = {}
    with progress_bar() as progress:

        def share_of(task: TaskID, first: int, count: int) -> Callable[[float], None]:
            return lambda share: progress.update(task, completed=first + share * count)

        everybody = [known for known in histories.values() if len(known)]
        task = progress.add_task("population", total=len(everybody))
        if artifact is None:
            artifact = fitting.train(lm, everybody, share_of(task, 0, len(everybody)), **cached)
        store = Bank(bank)
        if artifact is not None:
            store.put_artifact(artifact)
        progress.remove_task(task)
        task = progress.add_task("users", total=len(wanted))
        for first in range(0, len(wanted), _USERS):
            some = wanted[first : first + _USERS]
            known = [histories[key] for key in some]
            fitted = fitting.fit_many(lm, known, share_of(task, first, len(some)), **cached)
            store.update({(key, name): state for key, state in zip(some, fitted, strict=True)})
            rows |= {key: _to_json(state) for key, state in zip(some, fitted, strict=True)}
            if isinstance(fitting, NaturalGradient):
                for key, state in zip(some, fitted, strict=True):
                    rows[key]["own_share"] = round(fitting.own_share(state), 4)
    if as_json:
        result = {"model": model, "bank": str(bank), "name": name, "method": fitting.name, "users": rows}
        print(json.dumps(result, ensure_ascii=False))
        return
    options.out.print(_table(rows))
    options.err.print(f"{len(rows)} states of {fitting.name} named {name!r} in {bank}")
    if faint := [key for key, row in rows.items() if row.get("own_share", 1.0) < _FAINT]:
        more = len(faint) - 1
        whose = f"{faint[0]} and {more} other{'s'[: more != 1]}" if more else faint[0]
        options.err.print(
            f"The vectors of {whose} are mostly what all users have in common: there was little to read of them, "
            "or the step to them is short; --method style-vector shows more of who wrote little."
        )


def _method(name: str | None, settings: dict[str, Any], of_style: dict[str, Any], paper: bool) -> Method:
    """The method that the options ask for."""
    from steer import StyleVector
    from steer.method import make_method

    default = StyleVector.name if of_style or paper else DEFAULT
    name = default if name is None else name.replace("-", "_")
    if name != StyleVector.name and (of_style or paper):
        option = "paper" if paper else next(iter(of_style)).removesuffix("s")
        raise SteerError(f"--{option} is for --method style-vector; {name} takes its own with --set")
    settings = settings | of_style
    if not paper:
        return make_method(name, **settings)
    if taken := [key for key in ("extractor", "pool", "positions") if key in settings]:
        raise SteerError(f"--paper decides on {taken[0]}; leave it out")
    return StyleVector.paper(settings.pop("layer", ()), **settings)


def _table(rows: dict[str, dict[str, Any]]) -> Table:
    """A line for each vector, or for each user where states hold none."""
    if not any(row["sites"] for row in rows.values()):
        table = Table("user", "records", "bytes", box=None)
        for key, row in rows.items():
            table.add_row(key, str(row["records"]), str(row["bytes"]))
        return table
    table = Table("user", "records", "site", "‖v‖", "dose of strength 1", box=None)
    for key, row in rows.items():
        for at, numbers in row["sites"].items():
            dose = "" if numbers["dose"] is None else f"{numbers['dose']:.3f}"
            table.add_row(key, str(row["records"]), at, f"{numbers['norm']:.4g}", dose)
    return table


def _to_json(state: UserState) -> dict[str, Any]:
    """The numbers of records and of bytes, and of each vector its norm and what dose strength 1 is."""
    calibration = state.provenance.calibration
    references = calibration.get("reference_norm", {})
    norms = {site: state.tensors[site].norm().item() for site in state.provenance.sites if site in state.tensors}
    return {
        "records": len(state.provenance.records),
        "left_out": len(calibration.get("left_out", ())),
        "bytes": sum(tensor.nbytes for tensor in state.tensors.values()),
        "sites": {
            site: {"norm": round(norm, 4), "dose": round(norm / references[site], 4) if site in references else None}
            for site, norm in norms.items()
        },
    }


def progress_bar() -> Progress:
    """A bar on stderr that goes away when it is done."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, console=options.err, transient=True)
