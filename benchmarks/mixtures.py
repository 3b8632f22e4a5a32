"""The two mixtures of logits against the bandwidth of a copy.

    python -P benchmarks/mixtures.py

The copy moves the bytes that a mixture must move at least: all logits once, and the results in float32. Arms take
turns; inputs are those of the call before, so that what fits into a cache comes from there, in the copy, too.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))  # `python -P` leaves it out
import harness
import source_tree

source_tree.use()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from steer.kernels import arithmetic, geometric  # noqa: E402

STREAMS = 2
# What one timing of a short arm takes in all, and how many calls that may be.
SECONDS, CALLS = 0.003, 200


def main() -> None:
    arguments = parse()
    # The C library returns freed memory to the system at once until it has seen a large tensor come and go.
    torch.empty(2**24, dtype=torch.uint8)
    device = torch.device(arguments.device)
    cases: list[dict[str, Any]] = []
    for dtype in arguments.dtypes:
        for vocab in arguments.vocabularies:
            for batch in arguments.batches:
                arms = arms_of(batch, vocab, getattr(torch, dtype), device)
                measured = measure(arms, device, arguments.rounds)
                cases.append({"dtype": dtype, "vocab": vocab, "batch": batch, **measured})
                show(cases)
                harness.save(arguments.name or f"mixtures-{device.type}", {"streams": STREAMS, "cases": cases})


def arms_of(batch: int, vocab: int, dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """The copy first. Compiled mixtures are compared with the eager ones."""
    rows = STREAMS * batch
    logits = (4 * torch.randn(rows, vocab, device=device)).to(dtype)
    owners = torch.arange(rows, device=device) % batch
    contrast = torch.where(torch.arange(rows, device=device) < batch, 1.5, -0.5)
    shares, ones = torch.full((rows,), 1 / STREAMS, device=device), torch.ones(batch, device=device)
    source = torch.ones(floor_of(batch, vocab, dtype) // 8, device=device)
    target = torch.empty_like(source)
    torch.compiler.reset()
    arms: dict[str, Callable[[], Tensor]] = {"copy": lambda: target.copy_(source)}
    for name, mix, inputs in (
        ("geometric", geometric, (logits, contrast, owners, batch)),
        ("arithmetic", arithmetic, (logits, shares, owners, batch, ones, ones)),
    ):
        compiled = torch.compile(mix, fullgraph=True, dynamic=False)
        torch.testing.assert_close(compiled(*inputs), mix(*inputs), rtol=1e-4, atol=1e-4)
        arms[name] = lambda mix=mix, inputs=inputs: mix(*inputs)
        arms[f"{name} compiled"] = lambda mix=compiled, inputs=inputs: mix(*inputs)
    return arms


def floor_of(batch: int, vocab: int, dtype: torch.dtype) -> int:
    """Bytes of the logits and of the results."""
    return batch * vocab * (STREAMS * dtype.itemsize + torch.float32.itemsize)


def measure(arms: dict[str, Callable[[], Tensor]], device: torch.device, rounds: int) -> dict[str, Any]:
    """Microseconds of a call, and ratios to the copy, round by round.

    One thread of a CPU is timed by what it worked, so that others on the machine count less.
    """
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in arms}

    def timed(name: str, calls: int) -> None:
        start = clock()
        call(arms[name], calls, device)
        seconds[name].append((clock() - start) / calls)

    harness.in_turn({name: partial(timed, name, enough(run, device)) for name, run in arms.items()}, rounds)
    seconds = {name: all_rounds[1:] for name, all_rounds in seconds.items()}
    return {
        "clock": "processor time" if alone else "wall time",
        "us": {name: 1e6 * statistics.median(s) for name, s in seconds.items()},
        "ratio to copy": {name: harness.ratio(s, seconds["copy"]) for name, s in seconds.items() if name != "copy"},
    }


def call(run: Callable[[], Tensor], calls: int, device: torch.device) -> None:
    """Several times in a row, and once waits for the device."""
    for _ in range(calls):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def enough(run: Callable[[], Tensor], device: torch.device) -> int:
    """How many calls the clock can measure."""
    call(run, 2, device)
    start = time.perf_counter()
    call(run, 2, device)
    return min(CALLS, max(1, round(2 * SECONDS / (time.perf_counter() - start))))


def show(cases: list[dict[str, Any]]) -> None:
    """The latest case, under a heading if it is the first."""
    case, ratios = cases[-1], cases[-1]["ratio to copy"]
    if len(cases) == 1:
        print(f"{'dtype':9}{'vocab':>8}{'batch':>6}{'copy us':>10}{'GB/s':>7}", *(f"{n:>20}" for n in ratios))
    floor = floor_of(case["batch"], case["vocab"], getattr(torch, case["dtype"]))
    copy = f"{case['us']['copy']:10.1f}{floor / case['us']['copy'] / 1e3:7.1f}"
    figures = (f"{case['us'][name]:11.1f}us{ratio['median']:6.1f}x" for name, ratio in ratios.items())
    print(f"{case['dtype']:9}{case['vocab']:8}{case['batch']:6}{copy}", *figures, flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32_000, 49_152, 128_256, 151_936, 256_000])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--name", help="of the result; mixtures-DEVICE if not given")
    return parser.parse_args()


if __name__ == "__main__":
    main()
