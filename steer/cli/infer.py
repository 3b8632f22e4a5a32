"""`steer infer-lambda`: how strongly did a context act when texts were written?"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from steer.cli import directions, options, results
from steer.cli.extract import progress_bar
from steer.cli.lines import meant, read_lines
from steer.errors import SteerError

if TYPE_CHECKING:
    from steer.inverse import LambdaPosterior

_SHOWN = 60
_KEYS = ("prompt", "response", "text", "context", "opposite")
# What a line of a history may have besides, and nobody asks for here.
_PASSED_OVER = ("id", "user_id", "time")


@dataclass(frozen=True)
class _Line:
    prompt: str
    response: str
    context: str
    opposite: str | None = None


def infer_lambda(
    file: Annotated[
        Path | None,
        typer.Argument(
            help="JSONL, a text a line: prompt, response (or text), context, and optionally opposite.",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="What was answered, for lines without.", show_default=False)
    ] = None,
    response: Annotated[
        str | None, typer.Option("--response", "-r", help="The text, in place of a file.", show_default=False)
    ] = None,
    context: Annotated[
        str | None, typer.Option("--context", "-c", help="The context, for lines without.", show_default=False)
    ] = None,
    opposite: Annotated[
        str | None,
        typer.Option(help="Compare with this context, in place of none, for lines without.", show_default=False),
    ] = None,
    grid: Annotated[str, typer.Option(help="λ to compare: from:to:step, or a list. Its ends bound the answer.")] = (
        "-4:4:0.2"
    ),
    level: Annotated[float, typer.Option(help="Of the interval.")] = 0.95,
    temperature: Annotated[float, typer.Option(help="At which the texts were sampled.")] = 1.0,
    raw: options.Raw = False,
    as_json: options.Json = False,
    png: directions.PngPath = None,
    model: options.Model = "smollm2-135m",
    device: options.Device = None,
    dtype: options.Dtype = None,
) -> None:
    """Infer λ of CoS from texts: how strongly a context acted when they were written.

    Example:

        steer infer-lambda --prompt "What shall I cook?" --context "I am a vegetarian." --response "A lentil curry."
    """
    from steer import inverse

    if (file is None) == (response is None):
        raise SteerError("give either a file of texts, or one text with --response")
    given = {"prompt": prompt, "response": response, "context": context, "opposite": opposite}
    lines = [_line(given, {}, "this call")] if file is None else _read(file, given)
    lams = options.parse_grid("--grid", grid)
    inverse.require_settings(lams, level, temperature)
    results.require_writable(png=png)
    lm = options.load(model, device, dtype)
    with progress_bar() as progress, warnings.catch_warnings():
        # The table and the JSON say it of each text.
        warnings.filterwarnings("ignore", "the context changes nothing")
        task = progress.add_task("texts", total=len(lines))
        found = inverse.infer_lambda(
            lm,
            [line.prompt for line in lines],
            [line.response for line in lines],
            [line.context for line in lines],
            opposites=[line.opposite for line in lines],
            grid=lams,
            level=level,
            temperature=temperature,
            chat=False if raw else None,
            on_progress=lambda done: progress.update(task, completed=done),
        )
    if as_json:
        print(json.dumps({"model": model, **found.to_json()}, ensure_ascii=False))
    else:
        options.out.print(_table(lines, found))
    if png is not None:
        from steer.view import posterior_figure

        results.write(png, posterior_figure(found))


def _read(file: Path, given: dict[str, str | None]) -> list[_Line]:
    """Raises SteerError if the file is missing or holds no texts, or a line is none; the message names the line."""
    lines = []
    for where, entry in read_lines(file, "`prompt`, `response` and `context`"):
        if wrong := [key for key in entry if key not in _KEYS + _PASSED_OVER]:
            raise SteerError(
                f"{where}: {wrong[0]!r} is no key of a line{meant(wrong[0], _KEYS)}; it has prompt, response (or text) "
                "and context, and may have opposite"
            )
        lines.append(_line(given, {"response": entry.get("text")} | entry, where))
    if not lines:
        raise SteerError(f"{file}: the file holds no texts")
    return lines


def _line(given: dict[str, str | None], entry: dict[str, object], where: str) -> _Line:
    from steer.contrast import require_contexts

    own = {name: value if entry.get(name) is None else entry[name] for name, value in given.items()}
    if wrong := [name for name, value in own.items() if not isinstance(value, str | None)]:
        raise SteerError(f"{where}: `{wrong[0]}` must be text")
    for name, value in own.items():
        if value is None and name != "opposite":
            remedy = "write it into the line" if name == "response" and entry else f"--{name} gives one"
            raise SteerError(f"{where}: there is no {name}; {remedy}")
        if isinstance(value, str) and not value.strip():
            raise SteerError(f"--{name} is empty" if entry.get(name) is None else f"{where}: `{name}` is empty")
    line = _Line(**own)  # type: ignore[arg-type]
    try:
        require_contexts([line.context], line.opposite)
    except SteerError as error:
        raise SteerError(f"{where}: {error}") from None
    return line


def _table(lines: list[_Line], found: LambdaPosterior) -> Table:
    table = Table("text", "tokens", "λ", f"{found.level:.0%} interval", "", box=None)
    for i, line in enumerate(lines):
        text = " ".join(line.response.split())
        shown = Text(text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…")
        tokens = str(found.tokens[i].item())
        if not found.informative[i]:
            table.add_row(shown, tokens, "", "", "the context changes nothing")
            continue
        edge = {-1: "at the lower end of the grid", 0: "", 1: "at the upper end of the grid"}[int(found.edge[i])]
        table.add_row(shown, tokens, f"{found.lam[i]:+.2f}", f"[{found.low[i]:+.2f}, {found.high[i]:+.2f}]", edge)
    return table
