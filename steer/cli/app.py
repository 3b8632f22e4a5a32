"""The commands and what they share."""

from __future__ import annotations

import typer

from steer.cli.bank import bank
from steer.cli.demo import demo
from steer.cli.extract import extract
from steer.cli.generate import generate
from steer.cli.infer import infer_lambda
from steer.cli.influence import influence
from steer.cli.lens import lens
from steer.cli.models import models
from steer.cli.score import score
from steer.cli.sweep import sweep
from steer.cli.tokens import tokens
from steer.cli.train import train

app = typer.Typer(
    help="Make a frozen language model write like a particular person.\n\n"
    "From what each user wrote, `extract` computes a small state and puts it into a bank; `generate` answers for many "
    "users at once, each row in the manner of its own. Start with `steer demo`.",
    epilog="Every command takes --debug, which shows the traceback of an error.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.command()(demo)
app.command()(extract)
app.command()(train)
app.command()(generate)
app.command()(score)
app.command()(sweep)
app.command()(infer_lambda)
app.command()(influence)
app.command()(lens)
app.command()(tokens)
app.add_typer(bank, name="bank")
app.add_typer(models, name="models")
