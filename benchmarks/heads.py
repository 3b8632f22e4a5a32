"""Reading what the streams of a row have in common once: from how many spared tokens on does it pay?

    python -P benchmarks/heads.py                                             # SmolLM2
    python -P benchmarks/heads.py --shapes llama-3.1-8b --dtype bfloat16

A row's streams begin alike, for so many tokens, and end in as many of their own. Both ways take turns: every row reads
all of it, or the beginnings are read once, in a forward pass more, and copied. What is timed is the prompt's pass with
one new token.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))  # `python -P` leaves it out
import contrast
import harness
import latency
import source_tree

source_tree.use()

import torch  # noqa: E402

import steer  # noqa: E402
from steer import decoding  # noqa: E402
from steer.inject import Mixture, Stream  # noqa: E402

OWN = 16


def measure(lm: steer.FrozenLM, batch: int, common: int, rounds: int) -> dict[str, Any]:
    """One case: two streams a row, whose prompts share their first tokens."""
    word = lm.encode(contrast.FILLER, chat=False)[1]
    beginning = lm.tokenizer.decode([word] * common)  # type: ignore[union-attr]
    tails = [lm.tokenizer.decode([word + 1 + i] * OWN) for i in range(2)]  # type: ignore[union-attr]
    mixture = Mixture((Stream(2.0, f"{beginning} {tails[0]}"), Stream(-1.0, f"{beginning} {tails[1]}")))
    edit = steer.StreamEdit([mixture] * batch)

    def run(least: int) -> None:
        decoding._SPARED_TOKENS = least  # type: ignore[misc]
        lm.generate_tokens(["a"] * batch, edits=[edit], max_new_tokens=1, do_sample=False)
        if lm.device.type == "cuda":
            torch.cuda.synchronize()

    seconds = harness.in_turn({"apart": lambda: run(10**9), "once": lambda: run(0)}, rounds)
    return {
        "batch": batch,
        "common tokens": common,
        # Of 2 rows for each of the batch, each but one in a group.
        "spared tokens": batch * common,
        "ms": {name: 1000 * statistics.median(values) for name, values in seconds.items()},
        "once over apart": harness.ratio(seconds["once"], seconds["apart"]),
    }


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    cases = []
    for name in arguments.shapes or [arguments.model]:
        lm, _ = contrast.load(name, arguments)
        for batch in arguments.batches:
            for common in arguments.common:
                cases.append({"model": name, **measure(lm, batch, common, arguments.rounds)})
                print(cases[-1], flush=True)
        lm.close()
    harness.save(arguments.name or f"heads-{arguments.device}", {"dtype": arguments.dtype, "cases": cases})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--shapes", nargs="+", choices=latency.SHAPES, help="random weights, in place of a model")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--common", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256], help="tokens")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--name", help="of the result; heads-DEVICE if not given")
    return parser.parse_args()


if __name__ == "__main__":
    main()
