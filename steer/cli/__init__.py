"""The `steer` command."""

from __future__ import annotations

import sys
import traceback

from steer.errors import SteerError


def main() -> None:
    """Runs the command; errors become one line on stderr and exit status 1, `--debug` adds the traceback."""
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    try:
        # Imported late, so that a failing import is reported like any other error.
        from steer.cli.app import app

        app(args=[argument for argument in arguments if argument != "--debug"], prog_name="steer")
    except Exception as error:
        if debug:
            traceback.print_exc()
        # Messages may have several lines; the first says what was wrong, and an expected error keeps the rest.
        message = str(error) if isinstance(error, SteerError) else f"unexpected {type(error).__name__}: {error}"
        print(f"steer: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(1)
