"""The `steer` command."""

from __future__ import annotations

import sys
import traceback
from typing import NoReturn

import typer

from steer.errors import SteerError

# Some versions of typer bring click along under another name; this is its UsageError in all of them.
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]

_INTERRUPTED = 130


def main() -> None:
    """Runs the command. An error is one line on stderr, and exit status 1, or 2 if the call itself is wrong.

    `--debug`, anywhere in the call, shows the traceback too.
    """
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    try:
        # Imported late, so that a failing import is reported like any other error.
        from steer.cli.app import app

        called = [argument for argument in arguments if argument != "--debug"] or ["--help"]
        status = app(called, prog_name="steer", standalone_mode=False)
        if status == _INTERRUPTED:
            _fail("stopped", debug, status)
        sys.exit(status)
    except _UsageError as error:
        _fail(_usage(error), debug, status=2)
    except typer.Abort:
        _fail("stopped", debug, _INTERRUPTED)
    except SteerError as error:
        _fail(str(error), debug)
    except Exception as error:
        _fail(f"unexpected {type(error).__name__}: {error}", debug)


def _usage(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    command = "steer" if context is None else context.command_path
    message = getattr(error, "format_message", lambda: str(error))()
    return f"{message or 'a command is missing'} ({command} --help shows how)"


def _fail(message: str, debug: bool, status: int = 1) -> NoReturn:
    if debug:
        traceback.print_exc()
    print(f"steer: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)
