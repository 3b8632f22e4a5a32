"""`steer sweep`: at which layer and strength do vectors help most?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from steer.cli import directions, options
from steer.cli.extract import progress_bar
from steer.errors import SteerError


def sweep(
    history: Annotated[Path, typer.Argument(help="JSONL of records, as for `steer extract`.")],
    layers: Annotated[str, typer.Option(help="After which blocks to read and steer, one at a time: 4,8,12.")],
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
        str, typer.Option(help="What a user's texts are compared with, as for `steer extract`.")
    ] = "population",
    pool: Annotated[str, typer.Option(help="mean over the response, or its last token.")] = "mean",
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
    """Fit style vectors on early records, and score later ones at every layer and strength.

    Example:

        steer sweep commits.jsonl --layers 8,14,20 --strengths 0.25,0.5,1 --others 4 --png sweep.png
    """
    from steer import History, StyleVector, read_histories
    from steer.sweep import sweep as run

    if (strengths is None) == (doses is None):
        raise SteerError("give either --strengths or --doses to compare")
    method = StyleVector(layer=options.parse_layers(layers), neutral=neutral, pool=pool)  # type: ignore[arg-type]
    known: list[History] = []
    later: list[History] = []
    for _, whole in read_histories(history, instruction=instruction):
        early, held_out = whole.split(holdout, fit_limit)
        if len(early):
            known.append(early)
            later.append(held_out.first(limit))
    if not known:
        raise SteerError(f"nobody in {history} has records left to fit on after --holdout {holdout}")
    lm = options.load(model, device, dtype)
    lm.declare(*method.sites)
    with progress_bar() as progress:
        if neutral == "population":
            method.train(lm, progress.track(known, description="population"))
        states = {one.user_id: method.fit(lm, one) for one in progress.track(known, description="fitting")}
        task = progress.add_task("scoring", total=sum(map(len, later)))
        found = run(
            lm,
            later,
            states,
            strengths=None if strengths is None else options.parse_numbers("--strengths", strengths),
            doses=None if doses is None else options.parse_numbers("--doses", doses),
            others=others,
            seed=seed,
            on_progress=lambda done: progress.update(task, completed=done),
        )
    options.out.print(found)
    if json_file is not None:
        directions.write(json_file, json.dumps(found.to_json(), indent=1, ensure_ascii=False) + "\n")
    directions.write(html, found.html())
    if png is not None:
        directions.write(png, found.figure())
