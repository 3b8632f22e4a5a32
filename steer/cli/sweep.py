"""`steer sweep`: at which layer and strength do vectors help most?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress

from steer.cli import directions, options, results
from steer.cli.extract import progress_bar
from steer.cli.score import tell_if_few
from steer.errors import SteerError

if TYPE_CHECKING:
    from steer import FrozenLM, History
    from steer.method import Method
    from steer.view import Sweep


def sweep(
    history: Annotated[Path, typer.Argument(help="JSONL of records, as for `steer extract`.")],
    layers: Annotated[str, typer.Option(help="After which blocks to read and steer, one at a time: 4,8,12.")],
    method: Annotated[
        str, typer.Option(help="What to fit: style-vector, or another by its name, such as natural-gradient.")
    ] = "style-vector",
    setting: options.Setting = None,
    model: options.Model = "smollm2-135m",
    strengths: Annotated[
        str | None, typer.Option(help="Coefficients of the vectors: 0.25,0.5,1,2.", show_default=False)
    ] = None,
    doses: Annotated[
        str | None, typer.Option(help="The same, as shares of the residual norm at the site.", show_default=False)
    ] = None,
    holdout: Annotated[int, typer.Option(min=1, help="Fit on all but each user's last N records.")] = 10,
    fit_limit: Annotated[
        int | None, typer.Option(min=1, help="Of those before, fit on the newest N.", show_default=False)
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Of those held out, score the first N.", show_default=False)
    ] = None,
    others: Annotated[int, typer.Option(min=0, help="Compare with the vectors of this many others.")] = 0,
    neutral: Annotated[
        str | None,
        typer.Option(
            help="Style vectors: what a user's texts are compared with, as for `steer extract` (default: population).",
            show_default=False,
        ),
    ] = None,
    pool: Annotated[
        str | None,
        typer.Option(
            help="Style vectors: mean over the response (the default), or its last token.", show_default=False
        ),
    ] = None,
    instruction: options.Instruction = None,
    seed: Annotated[int, typer.Option(help="Of the draw of others.")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all numbers here as JSON.", show_default=False)
    ] = None,
    html: directions.HtmlPath = None,
    png: directions.PngPath = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
) -> None:
    """Fit vectors on early records, and score later ones at every layer and strength.

    Example:

        steer sweep commits.jsonl --layers 8,14,20 --strengths 0.25,0.5,1 --others 4 --png sweep.png
    """
    from steer import read_histories

    if (strengths is None) == (doses is None):
        raise SteerError("give either --strengths or --doses to compare")
    unit = "strengths" if doses is None else "doses"
    amounts = options.parse_numbers(f"--{unit}", strengths or doses or "")
    if not all(map(math.isfinite, amounts)):
        raise SteerError(f"--{unit} must be finite, got {amounts}")
    at = options.parse_layers(layers)
    methods = _methods(method, at, options.parse_settings(setting or []), {"neutral": neutral, "pool": pool})
    results.require_writable(json_file, html=html, png=png)
    known: list[History] = []
    later: list[History] = []
    for _, whole in read_histories(history, instruction=instruction):
        early, held_out = whole.split(holdout, fit_limit)
        if len(early):
            known.append(early)
            later.append(held_out.first(limit))
    if not known:
        raise SteerError(f"nobody in {history} has records left to fit on after --holdout {holdout}")
    tell_if_few(others, len(known))
    lm = options.load(model, device, dtype)
    lm.declare(*(f"resid_post[{layer}]" for layer in at))
    asked = {unit: amounts, "others": others, "seed": seed}
    with progress_bar() as progress:
        parts = [
            _sweep(lm, one, known, later, progress, asked) for one in progress.track(methods, description="sweeping")
        ]
    found = _joined(parts)
    options.out.print(found)
    results.write(json_file, found.to_json())
    results.write(html, found.html())
    if png is not None:
        results.write(png, found.figure())


def _methods(
    name: str, layers: list[int], settings: Mapping[str, Any], style: Mapping[str, str | None]
) -> list[Method]:
    """What to fit for each layer as if there were no other; style vectors are read at all of them at once."""
    from steer.method import make_method

    style = {key: value for key, value in style.items() if value is not None}
    if "layer" in settings:
        raise SteerError("--layers says at which layers; leave layer out of --set")
    if name == "style-vector":
        return [make_method("style_vector", **{"neutral": "population", **settings, **style, "layer": layers})]
    if style:
        raise SteerError(f"--{next(iter(style))} is for --method style-vector; {name} takes its own with --set")
    return [make_method(name.replace("-", "_"), **settings, layer=layer) for layer in layers]


def _sweep(
    lm: FrozenLM,
    method: Method,
    known: Sequence[History],
    later: Sequence[History],
    progress: Progress,
    asked: Mapping[str, Any],
) -> Sweep:
    """Fits one method, and scores what it fitted."""
    from steer.sweep import sweep

    task = progress.add_task("population", total=len(known))

    def told(share: float) -> None:
        progress.update(task, completed=share * len(known))

    artifact = method.train(lm, known, told)
    progress.reset(task, description="fitting")
    states = method.fit_many(lm, known, told)
    progress.reset(task, description="scoring", total=sum(map(len, later)))
    found = sweep(
        lm,
        later,
        {history.user_id: state for history, state in zip(known, states, strict=True)},
        artifacts={} if artifact is None else {artifact.hash: artifact},
        on_progress=lambda done: progress.update(task, completed=done),
        **asked,
    )
    progress.remove_task(task)
    return found


def _joined(parts: Sequence[Sweep]) -> Sweep:
    """Sweeps of the same records over different sites as one."""
    import torch

    others = [part.other for part in parts if part.other is not None]
    return replace(
        parts[0],
        sites=tuple(site for part in parts for site in part.sites),
        own=torch.cat([part.own for part in parts], 1),
        other=torch.cat(others, 1) if others else None,
    )
