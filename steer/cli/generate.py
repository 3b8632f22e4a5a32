"""`steer generate`: one prompt, answered for many users in one batch."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from steer.cli import options
from steer.cli.contexts import contrasts, read_contexts, require_beside, require_one, stored
from steer.errors import SteerError

if TYPE_CHECKING:
    from steer import Bank
    from steer.model import FrozenLM
    from steer.state import UserState

CONTEXT_ROW = "(context)"


def generate(
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to answer.")],
    model: options.Model = "smollm2-135m",
    bank: Annotated[
        Path | None, typer.Option("--bank", "-b", help="The folder of the bank.", show_default=False)
    ] = None,
    user: Annotated[
        list[str] | None,
        typer.Option("--user", "-u", help="Whose states to use; repeat for more rows.", show_default=False),
    ] = None,
    name: Annotated[
        list[str] | None, typer.Option(help="Only states of this name; may be repeated.", show_default=False)
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(help="Coefficient of the vectors; 1 if neither it nor --dose is given.", show_default=False),
    ] = None,
    dose: Annotated[
        float | None, typer.Option(help="The same, as a share of the residual norm at the site.", show_default=False)
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(
            help="Something about the user, put in front of the prompt of every row "
            "but the plain one, and amplified by --lambda.",
            show_default=False,
        ),
    ] = None,
    lam: Annotated[
        float | None,
        typer.Option(
            "--lambda",
            help="CoS: -1 ignores the context, 0 is plain prompting with it, more amplifies it; 1 if not given.",
        ),
    ] = None,
    contexts: Annotated[
        Path | None,
        typer.Option(
            help="JSONL, a user a line: user_id, context (or what else the --method takes), and optionally "
            "hyper-parameters of their own, such as lam. All users of the file, or those named by --user.",
            show_default=False,
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="How --contexts act: cos (the default), guidance, amulet, …", show_default=False),
    ] = None,
    setting: options.Setting = None,
    beside: options.Beside = None,
    unknown_user: Annotated[str, typer.Option(help="error, or plain for rows of users without states.")] = "error",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[
        float | None, typer.Option(help="Sample instead of taking the likeliest token.", show_default=False)
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Sample from this share of the probability.", show_default=False),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Sample from this many of the likeliest tokens.", show_default=False)
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(
            min=0.0, max=1.0, help="Sample from tokens with this share of the likeliest one's.", show_default=False
        ),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(help="Makes tokens that are there already less likely; 1 is none.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(help="For sampling; row r draws from seed + r.")] = 0,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it is, without the chat template.")
    ] = False,
    stream: Annotated[
        bool, typer.Option("--stream", help="Show the one answer as it is written, without a plain one.")
    ] = False,
    as_json: options.Json = False,
    device: options.Device = None,
    dtype: options.Dtype = None,
) -> None:
    """Answer a prompt for several users at once, next to the plain answer.

    Example:

        steer generate --bank people.bank --user alice --user bob --prompt "Describe your morning." --dose 0.15
    """
    from steer import Bank

    if not prompt:
        raise SteerError("--prompt is empty")
    if user and bank is None and contexts is None:
        raise SteerError("--user needs the --bank that holds the states, or --contexts")
    if bank is not None and not user and contexts is None:
        raise SteerError(f"--bank needs one or more --user; `steer bank ls {bank}` lists them")
    if bank is None and name:
        raise SteerError("--name chooses states of a bank; give --bank and --user")
    if lam is not None and context is None:
        raise SteerError("--lambda says how much of a --context; give one, or write lam into the lines of --contexts")
    if context is not None and contexts is not None:
        raise SteerError("--context is one for all rows, --contexts one for each user; give one of them")
    if contexts is None and (method or setting):
        raise SteerError("--method and --set say how --contexts act; give such a file")
    if unknown_user not in ("error", "plain"):
        raise SteerError(f"--unknown-user {unknown_user} is neither error nor plain")
    if strength is not None and dose is not None:
        raise SteerError("--strength and --dose are two units of the same thing; give one of them")
    if repetition_penalty is not None and not repetition_penalty > 0:
        raise SteerError(f"--repetition-penalty={repetition_penalty} is not above 0; 1 is none")
    if stream and as_json:
        raise SteerError("--stream shows the answer as it is written; it does not go with --json")
    store = None if bank is None else Bank(bank, create=False)
    if strength is not None or dose is not None:
        _require_vectors(store, name)
    known = (
        {}
        if contexts is None
        else read_contexts(contexts, (method or "cos").replace("-", "_"), options.parse_settings(setting or []))
    )
    strangers = sorted(set(user or []) - set(known))
    if strangers and store is None and unknown_user == "error":
        raise SteerError(
            f"{contexts} has nothing about {strangers[0]!r}; there are {', '.join(sorted(known)[:10])}. "
            "--unknown-user plain lets such rows be plain"
        )
    people: list[str | None] = list(user or known or ([CONTEXT_ROW] if context is not None else []))
    rows = people if stream else [None, *people]
    rows = rows or [None]
    if stream and len(rows) > 1:
        raise SteerError("--stream shows one answer; name one --user")
    arguments: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "chat": False if raw else None,
        "strength": strength,
        "dose": dose,
        **_sampling(temperature, {"top_p": top_p, "top_k": top_k, "min_p": min_p}, seed, len(rows)),
    }
    if repetition_penalty is not None:
        arguments["repetition_penalty"] = repetition_penalty
    if store is not None:
        arguments |= {
            "bank": store,
            "users": [None if row == CONTEXT_ROW else row for row in rows],
            "names": name or None,
            "unknown_user": unknown_user,
        }
    if context is not None:
        known = dict.fromkeys([row for row in people if row is not None], _state(context, lam))
    option = "--contexts" if context is None else "--context"
    if known:
        arguments["states"] = [{option: known[row]} if row in known else None for row in rows]
    kept = [] if store is None else stored(store, arguments["users"], name)
    for row, own in zip(rows, kept, strict=False):
        if row is not None:
            require_one(row, option if row in known else None, own)
    others = options.parse_beside(beside or [])
    given = [known[row] for row in rows if row in known]
    require_beside(others, [*given, *(state for own in kept for state in own.values())])
    lm = options.load(model, device, dtype)
    if others:
        arguments["models"] = {name: options.load(other, device, dtype) for name, other in others.items()}
    if stream:
        _stream(lm, prompt, rows, arguments)
        return
    start = time.perf_counter()
    tokens = _generate(lm, prompt, rows, arguments)
    seconds = time.perf_counter() - start
    assert lm.tokenizer is not None
    answers = lm.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    if as_json:
        result = {
            "model": model,
            "prompt": prompt,
            "seconds": seconds,
            "rows": [
                {"user": row, "text": text, "tokens": ids} for row, text, ids in zip(rows, answers, tokens, strict=True)
            ],
        }
        print(json.dumps(result, ensure_ascii=False))
        return
    table = Table("user", "answer", show_lines=True, title=prompt)
    for row, text in zip(rows, answers, strict=True):
        table.add_row(Text("plain", style="dim") if row is None else row, text.strip())
    options.out.print(table)
    options.err.print(f"{len(rows)} rows in {seconds:.1f} s")


def _state(context: str, lam: float | None) -> UserState:
    """CoS of `--context` and `--lambda`, or SteerError with the name of the one that is wrong."""
    from steer import CoS

    if not context.strip():
        raise SteerError("--context is empty")
    try:
        return (CoS() if lam is None else CoS(lam=lam)).state(context)
    except SteerError as error:
        raise SteerError(f"--lambda: {error}") from None


def _require_vectors(bank: Bank | None, names: Sequence[str] | None) -> None:
    """Raises SteerError if there is nothing that a strength could scale."""
    kinds = [] if bank is None else [source for name, source, _ in bank.templates() if name in (names or [name])]
    if bank is None or (kinds and all(contrasts(source.method) for source in kinds)):
        raise SteerError("--strength and --dose scale the vectors of a bank, and there are none for these rows")


def _sampling(temperature: float | None, limits: dict[str, Any], seed: int, rows: int) -> dict[str, Any]:
    limits = {name: value for name, value in limits.items() if value is not None}
    if temperature is None and not limits:
        return {"do_sample": False}
    if temperature is not None and not temperature > 0:
        raise SteerError("--temperature must be above 0; leave it out for the likeliest token")
    seeds = [seed + row for row in range(rows)]
    # What is not said limits nothing, whatever the model's own settings are.
    free = {"top_p": 1.0, "top_k": 0, "min_p": None}
    return {"do_sample": True, "temperature": temperature or 1.0, **free, **limits, "seeds": seeds}


def _generate(lm: FrozenLM, prompt: str, rows: Sequence[str | None], arguments: dict[str, Any]) -> list[list[int]]:
    """The answers' tokens. Errors name the user where the library names the row."""
    try:
        return lm.generate_tokens([prompt] * len(rows), **arguments)
    except SteerError as error:
        if not (found := re.match(r"row (\d+)(?=:)", str(error))):
            raise
        user = rows[int(found[1])]
        raise SteerError(f"{'the plain row' if user is None else repr(user)}{str(error)[found.end() :]}") from None


def _stream(lm: FrozenLM, prompt: str, rows: Sequence[str | None], arguments: dict[str, Any]) -> None:
    from transformers import TextStreamer

    assert lm.tokenizer is not None
    streamer = TextStreamer(lm.tokenizer, skip_prompt=True, skip_special_tokens=True)
    _generate(lm, prompt, rows, {**arguments, "streamer": streamer})
