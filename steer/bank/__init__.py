"""The bank: many users' states in a folder on disk, keyed by (user, name)."""

from __future__ import annotations

from steer.bank.bank import Bank, Row

__all__ = ["Bank", "Row"]
