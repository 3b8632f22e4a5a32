"""Options that several commands share, and how they are checked."""

from __future__ import annotations

import ast
import json
import logging
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from steer.errors import SteerError

if TYPE_CHECKING:
    from steer.model import FrozenLM

# Results go to stdout, everything about how it goes to stderr.
# Texts and names are shown as they are: brackets in them are no markup.
out = Console(markup=False, emoji=False, highlight=False)
err = Console(stderr=True, markup=False, emoji=False, highlight=False)
# For what is no terminal: nothing is folded.
_pipe = Console(markup=False, emoji=False, highlight=False, width=1 << 20)

Model = Annotated[
    str,
    typer.Option("--model", "-m", help="A short name (see `steer models`), a folder, or a hub id.", show_default=True),
]
BankPath = Annotated[Path, typer.Option("--bank", "-b", help="The folder of the bank.")]
Device = Annotated[str | None, typer.Option(help="cuda, cpu, …; a GPU if there is one.", show_default=False)]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16; as the weights are stored.", show_default=False)
]
Instruction = Annotated[
    str | None,
    typer.Option(
        help="Prompt for records without one, from their other keys, such as 'Write a commit message titled: {title}'.",
        show_default=False,
    ),
]
Beside = Annotated[
    list[str] | None,
    typer.Option(
        help="Another model that states need, by its name there, such as small=smollm2-135m; may be repeated.",
        show_default=False,
    ),
]
Setting = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="A hyper-parameter of the method: --set NAME=VALUE. May be repeated.", show_default=False
    ),
]
Raw = Annotated[bool, typer.Option("--raw", help="Prompts are texts as they are, without the chat template.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def load(model: str, device: str | None, dtype: str | None) -> FrozenLM:
    """Loads a model, quietly but for its own progress."""
    import torch
    from transformers.utils import logging as transformers_logging

    import steer

    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype is not None and dtype not in dtypes:
        raise SteerError(f"--dtype {dtype} is not one of {', '.join(dtypes)}")
    with err.status(f"loading {model}"):
        return steer.load(model, device=device, dtype=None if dtype is None else dtypes[dtype])


def parse_beside(pairs: list[str]) -> dict[str, str]:
    """Reads `small=smollm2-135m` and so on: models by these names."""
    models: dict[str, str] = {}
    for pair in pairs:
        name, equals, model = pair.partition("=")
        if not (name and equals and model):
            raise SteerError(f"--beside {pair} is not a name and a model, such as small=smollm2-135m")
        models[name] = model
    return models


def parse_settings(pairs: list[str]) -> dict[str, Any]:
    """Reads `step=10` and so on; what is JSON or Python, such as `8,23`, is read as that, anything else is text."""
    settings: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key.isidentifier() or not equals:
            raise SteerError(f"--set {pair} is not a hyper-parameter and its value, such as step=10")
        settings[key] = _value_of(value)
    return settings


def _value_of(text: str) -> Any:
    # The last one for nan and inf.
    for read in (json.loads, ast.literal_eval, float):
        # A JSONDecodeError is a ValueError.
        with suppress(ValueError, SyntaxError):
            return read(text)
    return text


def parse_layers(text: str) -> list[int]:
    """Reads `18` or `12,18`."""
    try:
        layers = [int(part) for part in text.split(",")]
    except ValueError:
        raise SteerError(f"--layer {text} is not a list of numbers such as 18 or 12,18") from None
    if min(layers) < 0 or len(set(layers)) < len(layers):
        raise SteerError(f"--layer {text}: layers count from 0 and are named once")
    return layers


def parse_grid(option: str, text: str) -> list[float]:
    """Reads `-1,0,2`, or `-4:4:0.5`, which is from, to and the step between."""
    try:
        if ":" not in text:
            return [float(part) for part in text.split(",")]
        low, high, step = (float(part) for part in text.split(":"))
        steps = int((high - low) / step + 1e-9)
    except (ValueError, ZeroDivisionError, OverflowError):
        raise SteerError(f"{option} {text} is no list such as -1,0,2 and no range such as -4:4:0.5") from None
    if high < low or step < 0:
        raise SteerError(f"{option} {text} runs from high to low; write the lower end first, and a step above 0")
    # By counting: sums of steps would be rounded more and more.
    return [low + i * step for i in range(steps + 1)]


def parse_numbers(option: str, text: str) -> list[float]:
    """Reads `0.5` or `0.25,0.5,1`."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise SteerError(f"{option} {text} is not a list of numbers such as 0.5 or 0.25,0.5,1") from None


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> None:
    """Prints a table with all that is in its cells: folded in a terminal, in lines of any length elsewhere."""
    table = Table(title=title and printable(title), show_header=any(columns), box=None, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(printable, row))
    (out if out.file.isatty() else _pipe).print(table)


def printable(text: str) -> str:
    """The text with escapes for what is not printable, as ids may hold commands to a terminal, or turn lines round."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)
