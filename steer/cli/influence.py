"""`steer influence`: to what extent does an answer rely on a context?"""

from __future__ import annotations

import json
from typing import Annotated, get_args

import typer

from steer.cli import directions, options, results
from steer.errors import SteerError


def influence(
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What was answered.")],
    response: Annotated[str, typer.Option("--response", "-r", help="The answer to look at.")],
    context: Annotated[
        list[str],
        typer.Option("--context", "-c", help="Something about a person; repeat to compare, each is looked at alone."),
    ],
    opposite: Annotated[
        str | None, typer.Option(help="Compare with this context, in place of none.", show_default=False)
    ] = None,
    values: Annotated[
        str, typer.Option(help="Colour by the change of log p, by kl, or by rank: log2 of how far a token moved up.")
    ] = "change",
    raw: options.Raw = False,
    as_json: options.Json = False,
    html: directions.HtmlPath = None,
    png: directions.PngPath = None,
    model: options.Model = "smollm2-135m",
    device: options.Device = None,
    dtype: options.Dtype = None,
) -> None:
    """Show how much contexts moved each token of an answer.

    Example:

        steer influence --prompt "What shall I cook?" --context "I am a vegetarian." --response "Try a lentil curry."
    """
    from steer import view
    from steer.contrast import require_contexts
    from steer.influence import by_name
    from steer.influence import influence as influence_of

    if values not in get_args(view.Measure):
        raise SteerError(f"--values {values} is not one of {', '.join(get_args(view.Measure))}")
    shown: view.Measure = values  # type: ignore[assignment]
    require_contexts(list(by_name(context).values()), opposite)
    if not response:
        raise SteerError("--response is empty: it has no token to look at")
    results.require_writable(html=html, png=png)
    lm = options.load(model, device, dtype)
    found = influence_of(lm, prompt, response, context, opposite=opposite, chat=False if raw else None)
    if as_json:
        print(json.dumps({"model": model, **found.to_json()}, ensure_ascii=False))
    else:
        options.out.print(found.lines(shown))
    results.write(html, found.html(shown))
    if png is not None:
        results.write(png, found.figure(shown))
