"""The one exception that users of the package are meant to catch."""

from __future__ import annotations


class SteerError(ValueError):
    """Bad input or a forbidden use; the message says what was wrong and what to do."""


class Damage(SteerError):
    """What was stored cannot be read back, or not as it was."""


class UnknownUser(SteerError, KeyError):
    """A user has no state in the bank."""

    # KeyError would print the message with quotes around it.
    __str__ = ValueError.__str__
