"""What the benchmarks share: arms measured in turn, and a result that says where it was measured."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def in_turn(arms: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each arm in each round, A B C A B C …, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for round_ in range(rounds + 1):
        for name, run in arms.items():
            start = time.perf_counter()
            run()
            if round_:
                seconds[name].append(time.perf_counter() - start)
        print(f"\rround {round_} of {rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return seconds


def ratio(a: list[float], b: list[float]) -> dict[str, float]:
    """Median and quartiles of a/b, round by round."""
    ratios = [x / y for x, y in zip(a, b, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return {"median": statistics.median(ratios), "q1": low, "q3": high}


def environment() -> dict[str, Any]:
    """Device, versions and commit."""
    import torch
    import transformers

    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {os.cpu_count()} cores, {_processor()}",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": _commit(),
        "command": " ".join(sys.argv),
        "date": time.strftime("%Y-%m-%d"),
    }


def save(name: str, result: Mapping[str, Any]) -> Path:
    """Writes `results/NAME.json` at once or not at all."""
    RESULTS.mkdir(exist_ok=True)
    return write(RESULTS / f"{name}.json", result)


def write(target: Path, result: Mapping[str, Any]) -> Path:
    """Writes a result to a file at once or not at all."""
    draft = target.with_suffix(".tmp")
    draft.write_text(json.dumps({**environment(), **result}, indent=1) + "\n")
    os.replace(draft, target)
    print(f"wrote {target}", file=sys.stderr)
    return target


def _commit() -> str:
    """Of the checkout, with a + if files differ from it; "unknown" where there is no git."""
    git = ["git", "-C", str(ROOT)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip() + ("+" if changed.stdout.strip() else "")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
