"""`steer tokens`: where in a text a direction shows."""

from __future__ import annotations

import json
from typing import Annotated, get_args

import typer

from steer.cli import directions, options, results
from steer.errors import SteerError


def tokens(
    text: Annotated[str, typer.Argument(help="The text to look at.")],
    bank: directions.BankPath = None,
    user: directions.Users = None,
    name: directions.Name = "style",
    site: directions.SiteName = None,
    vector: directions.Vectors = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="What the text answers; read, not shown.", show_default=False)
    ] = None,
    values: Annotated[
        str, typer.Option(help="Colour by cosine, or by projection, in the units of the residual stream.")
    ] = "cosine",
    as_json: options.Json = False,
    html: directions.HtmlPath = None,
    png: directions.PngPath = None,
    model: options.Model = "smollm2-135m",
    device: options.Device = None,
    dtype: options.Dtype = None,
) -> None:
    """Show how much each token of a text points the way of users' vectors.

    Example:

        steer tokens "Splendid! We sang at the sea." --bank people.bank --user alice --user bob
    """
    from steer import view

    if values not in get_args(view.Values):
        raise SteerError(f"--values {values} is not one of {', '.join(get_args(view.Values))}")
    shown: view.Values = values  # type: ignore[assignment]
    chosen = directions.collect(bank, user, name, vector)
    results.require_writable(html=html, png=png)
    lm = options.load(model, device, dtype)
    found = view.projections(lm, text, chosen, site, prompt=prompt)
    if as_json:
        rows = zip(found.names, found.cosines.tolist(), found.projections.tolist(), strict=True)
        result = {
            "model": model,
            "site": str(found.site),
            "tokens": found.tokens,
            "first_is_outlier": found.outlier,
            "directions": {name: {"cosine": cosines, "projection": lengths} for name, cosines, lengths in rows},
        }
        print(json.dumps(result, ensure_ascii=False))
    else:
        options.out.print(found.lines(shown))
    results.write(html, found.html(shown))
    if png is not None:
        results.write(png, found.figure(shown))
