"""`steer lens`: which tokens a direction promotes and suppresses."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from steer.cli import directions, options, results
from steer.errors import SteerError


def lens(
    bank: directions.BankPath = None,
    user: directions.Users = None,
    name: directions.Name = "style",
    site: directions.SiteName = None,
    vector: directions.Vectors = None,
    k: Annotated[int, typer.Option("--top", "-k", min=1, help="How many tokens on either side.")] = 10,
    centred: Annotated[
        bool,
        typer.Option("--centred", help="First take away the mean over all users of the bank who have such a state."),
    ] = False,
    as_json: options.Json = False,
    html: directions.HtmlPath = None,
    png: directions.PngPath = None,
    model: options.Model = "smollm2-135m",
    device: options.Device = None,
    dtype: options.Dtype = None,
) -> None:
    """Show which tokens users' vectors promote and suppress, side by side.

    Example:

        steer lens --bank people.bank --user alice --user bob
    """
    from steer import Bank, view

    chosen = directions.collect(bank, user, name, vector)
    if centred and bank is None:
        raise SteerError("--centred takes away the mean over a bank; give --bank and --user")
    common = directions.population_mean(Bank(bank, create=False), name, site) if centred and bank is not None else None
    results.require_writable(html=html, png=png)
    lm = options.load(model, device, dtype)
    found = view.lens(lm, chosen, site=site, k=k, common=common)
    if as_json:
        print(json.dumps({"model": model, "directions": _plain(found)}, ensure_ascii=False))
    else:
        options.out.print(found)
    results.write(html, found.html())
    if png is not None:
        results.write(png, found.figure())


def _plain(found: Any) -> dict[str, Any]:
    return {
        name: {
            "promotes": [token._asdict() for token in found.promoted[name]],
            "suppresses": [token._asdict() for token in found.suppressed[name]],
        }
        for name in found.promoted
    }
