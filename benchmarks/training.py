"""A step of training weights that users share, beside the plain frozen forward and backward pass.

    python -P benchmarks/training.py
    python -P benchmarks/training.py --model smollm2-360m --dtype bfloat16 --batch 64

Three arms take turns over the same texts, in one forward pass: transformers alone without gradients; transformers alone
with soft tokens in `inputs_embeds`, which alone require a gradient; and a whole step of `train_shared`, with the
examples, the module, its optimizer and the Trainer. All of them make logits at the responses only. Memory is what the
process, or the GPU, has more at the highest point of an arm than before it.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))  # `python -P` leaves it out
import harness
import source_tree

source_tree.use()

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402

import steer  # noqa: E402
from steer.read import Span  # noqa: E402
from steer.train import Example, Examples  # noqa: E402
from steer.train.trainer import train_shared  # noqa: E402

FEATURES = 384
FORWARD, BACKWARD, STEP = "forward", "forward and backward", "training step"


class Projector(nn.Module):
    """PPlug's shape: the mean of a history's vectors through an MLP, as one soft token, and another for all users."""

    soft_tokens = 2

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.own = nn.Sequential(nn.Linear(FEATURES, width), nn.GELU(), nn.Linear(width, width), nn.LayerNorm(width))
        self.common = nn.Parameter(scale * torch.randn(width))
        nn.init.constant_(self.own[3].weight, scale)

    def edits(self, examples: Sequence[Example]) -> list[steer.PrefixEdit]:
        vectors = torch.ones(len(examples), FEATURES, device=self.common.device)
        tokens = torch.stack([self.common.expand(len(examples), -1), self.own(vectors)], dim=1)
        return [steer.PrefixEdit(tokens, torch.full((len(examples),), 2))]


class Plain:
    """The same work in transformers alone."""

    def __init__(self, lm: steer.FrozenLM, spans: Sequence[Span]) -> None:
        width = max(span.end for span in spans)
        self.model, self.kept = lm.model, width - min(span.start for span in spans) + 1
        ids = torch.tensor([[0] * (width - span.end) + list(span.ids[: span.end]) for span in spans])
        self.mask = torch.tensor([[0] * (width - span.end) + [1] * (span.end + 2) for span in spans]).to(lm.device)
        targets = [[-100] * (width - span.end + span.start) + list(span.ids[span.start : span.end]) for span in spans]
        self.targets = torch.tensor(targets)[:, -(self.kept - 1) :].to(lm.device)
        with torch.no_grad():
            self.embedded = lm.model.get_input_embeddings()(ids.to(lm.device))
        self.soft = torch.zeros(len(spans), 2, lm.width, device=lm.device, dtype=lm.dtype)

    def run(self, backward: bool) -> None:
        soft = self.soft.clone().requires_grad_(backward)
        with torch.set_grad_enabled(backward):
            logits = self.model(
                inputs_embeds=torch.cat([soft, self.embedded], dim=1),
                attention_mask=self.mask,
                position_ids=(self.mask.cumsum(1) - 1).clamp(min=0),
                logits_to_keep=self.kept,
                use_cache=False,
            ).logits[:, :-1]
            loss = cross_entropy(logits.float().transpose(1, 2), self.targets, ignore_index=-100)
        if backward:
            loss.backward()


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    lm = steer.load(arguments.model, dtype=getattr(torch, arguments.dtype))
    text = [5 + i for i in range(arguments.tokens)]
    span = Span(text, arguments.tokens // 4, arguments.tokens)
    record = steer.Record("a", "b")
    histories = [steer.History("a", (record,))]
    examples = Examples(histories, {(0, 0): span}, [(0, 0, 0)] * arguments.batch)
    plain = Plain(lm, [span] * arguments.batch)
    scale = lm.model.get_input_embeddings().weight.float().square().mean().sqrt().item()
    seconds: dict[str, list[float]] = {FORWARD: [], BACKWARD: [], STEP: []}
    memory: dict[str, list[float]] = {name: [] for name in seconds}
    meter = Meter(lm.device)

    def take_turns(_: float) -> None:
        took, grew = meter.stop()
        if meter.rounds:
            seconds[STEP].append(took)
            memory[STEP].append(grew)
        for name, backward in ((FORWARD, False), (BACKWARD, True)):
            took, grew = meter.of(lambda backward=backward: plain.run(backward))
            if meter.rounds:
                seconds[name].append(took)
                memory[name].append(grew)
        meter.rounds += 1
        print(f"\rround {meter.rounds} of {arguments.rounds + 1}", end="", file=sys.stderr, flush=True)
        meter.start()

    with tempfile.TemporaryDirectory() as folder:
        meter.start()
        train_shared(
            lm,
            Projector(lm.width, scale),
            examples,
            out=Path(folder) / "run",
            steps=arguments.rounds + 1,
            batch=arguments.batch,
            batch_tokens=arguments.batch * (arguments.tokens + 2),
            save_every=arguments.rounds + 1,
            log_every=arguments.rounds + 1,
            on_progress=take_turns,
        )
    print(file=sys.stderr)
    result = {
        "model": arguments.model,
        "dtype": arguments.dtype,
        "batch": arguments.batch,
        "tokens": arguments.tokens,
        "ms": {name: round(1000 * statistics.median(values), 2) for name, values in seconds.items()},
        "MB": {name: round(statistics.median(values) / 1e6, 1) for name, values in memory.items()},
        "step over forward": harness.ratio(seconds[STEP], seconds[FORWARD]),
        "step over forward and backward": harness.ratio(seconds[STEP], seconds[BACKWARD]),
        "forward and backward over forward": harness.ratio(seconds[BACKWARD], seconds[FORWARD]),
    }
    print(result)
    if arguments.name:
        harness.save(arguments.name, result)


class Meter:
    """Time, and memory at its highest above what there was before."""

    def __init__(self, device: torch.device) -> None:
        self.cuda, self.rounds = device.type == "cuda", 0

    def of(self, run: Callable[[], Any]) -> tuple[float, float]:
        self.start()
        run()
        return self.stop()

    def start(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            # What was freed goes back, and the kernel's mark of the highest is reset.
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            self._before = _resident("VmRSS")
        self._began = time.perf_counter()

    def stop(self) -> tuple[float, float]:
        if self.cuda:
            torch.cuda.synchronize()
        took = time.perf_counter() - self._began
        highest = torch.cuda.max_memory_allocated() if self.cuda else _resident("VmHWM")
        return took, float(highest - self._before)


def _resident(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(what))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", help="write results/NAME.json, such as training-cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
