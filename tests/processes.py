"""Work in processes of its own, and a folder that is fast, for the tests of the bank."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable
from pathlib import Path

# Hundreds of commits, each of which waits for the disk several times: in memory where there is such a folder.
FAST = "/dev/shm" if Path("/dev/shm").is_dir() else None


def in_child(work: Callable[[], object]) -> int:
    """Begins some work in a forked process, and returns the number of it."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            # A deadlock is to be a failure.
            signal.alarm(20)
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return child


def succeeded(child: int) -> bool:
    """Whether the work went well; waits for its end."""
    return os.waitpid(child, 0)[1] == 0
