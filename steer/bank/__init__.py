"""The bank: many users' states in a folder on disk, keyed by (user, name)."""

from __future__ import annotations

from steer.bank.bank import Bank, Row, UserHash
from steer.bank.gather import Rows
from steer.bank.upkeep import Compaction, Fault

__all__ = ["Bank", "Compaction", "Fault", "Row", "Rows", "UserHash"]
