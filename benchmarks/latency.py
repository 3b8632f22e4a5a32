"""What personalization costs per token: decode steps, steered against plain, at the shapes of real models.

    python -P benchmarks/latency.py          # all defaults, on the GPU if there is one
    python -P benchmarks/latency.py --shapes smollm2-135m --batches 1,8 --modes eager,compiled --edits add,cos

Weights are random and made here. Of each model there are two objects that share them: one is never touched, the other
is wrapped. All variants of a case take turns, in an order drawn anew for every round, and each is compared with the
untouched model over the same rounds. README.md in this folder explains the columns.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import random
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedModel, Qwen3Config, StaticCache

sys.path.append(str(Path(__file__).resolve().parent))  # `python -P` leaves it out
import harness
import source_tree

source_tree.use()
import steer  # noqa: E402
from steer.inject import GatedCrossAttention, MemoryEdit, PrefixEdit, ResidualEdit  # noqa: E402
from steer.kernels import geometric  # noqa: E402

Edit = ResidualEdit | PrefixEdit | MemoryEdit

LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}
# Configuration, layers, width, feed-forward, heads, key-value heads, vocabulary, and what else differs.
SHAPES: dict[str, tuple[Any, ...]] = {
    "llama-3.1-8b": (
        *(LlamaConfig, 32, 4096, 14336, 32, 8, 128256),
        {"tie_word_embeddings": False, "rope_parameters": {**LLAMA3, "factor": 8.0}},
    ),
    "qwen3-4b": (Qwen3Config, 36, 2560, 9728, 32, 8, 151936, {"head_dim": 128}),
    "llama-3.2-1b": (LlamaConfig, 16, 2048, 8192, 32, 8, 128256, {"rope_parameters": {**LLAMA3, "factor": 32.0}}),
    "smollm2-135m": (LlamaConfig, 30, 576, 1536, 9, 3, 49152, {}),
    "tiny": (LlamaConfig, 2, 64, 128, 4, 2, 256, {}),
}
MODES = ("eager", "static", "compiled")
EDITS = ("add", "prefix", "memory", "cos")
LAYERS = ("middle", "all")
ROUNDING = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def build(shape: str, device: torch.device, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model with random weights, and its twin: other modules, the same tensors."""
    kind, layers, width, feed_forward, heads, kv_heads, vocabulary, more = SHAPES[shape]
    config = kind(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=feed_forward,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        **{"tie_word_embeddings": True, "max_position_embeddings": 131072} | more,
    )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    return model, copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


# What is compared.


@dataclass
class Variant:
    """One way to run the same step.

    Attributes:
        edit, layers, users: what is done, where, and for how many distinct users of the batch; 0 for a plain one.
        model: the untouched or the wrapped model.
        prompt: token ids, `[row, pos]`; CoS has twice the rows of the others, and a prefix lengthens them.
        bind: opens the steering; at strength 1, or 0.
        weights: of the rows in the mixture of CoS, whose first half are the batch's own.
    """

    edit: str
    model: nn.Module
    prompt: Tensor
    layers: str = "-"
    users: int = 0
    bind: Callable[[float], AbstractContextManager[Any]] = lambda strength: nullcontext()
    weights: Tensor | None = None

    @property
    def kind(self) -> tuple[object, ...]:
        """What needs compiled code of its own. The number of users does not."""
        return (self.model, self.edit, self.layers) if self.users else (self.model,)


class Variants:
    """Makes the variants of one model at one batch size."""

    def __init__(self, bare: nn.Module, lm: steer.FrozenLM, batch: int, args: argparse.Namespace) -> None:
        self.bare, self.lm, self.batch, self.slots, self.layers = bare, lm, batch, args.slots, args.layers
        self.users = sorted({batch if users == "batch" else min(int(users), batch) for users in args.users})
        self.middle = lm.n_layers // 2
        self.prompt = self._tokens(args.context)

    def all(self, edits: Sequence[str]) -> list[Variant]:
        """The plain ones first; the very first one is what all are compared with."""
        plain = [
            Variant("unwrapped", self.bare, self.prompt),
            # The same once more: how far its ratio is from 1 is the noise of the measurement.
            Variant("unwrapped again", self.bare, self.prompt),
            Variant("closed", self.lm.model, self.prompt),
        ]
        return plain + [variant for edit in edits for variant in getattr(self, edit)()]

    def add(self) -> Iterator[Variant]:
        """A vector per row."""
        for layers in self.layers:
            sites = [steer.Site("resid_post", layer) for layer in range(self.lm.n_layers)]
            for users in self.users:
                # Random weights make residuals of 1 to 10 per element; this is a visible share of that.
                edits = [
                    ResidualEdit(site, 4 * self._per_row(users, self.lm.width))
                    for site in (sites if layers == "all" else sites[self.middle : self.middle + 1])
                ]
                yield self._steered("add", layers, users, edits, self.prompt)

    def prefix(self) -> Iterator[Variant]:
        """Soft tokens, which lengthen the prompt."""
        prompt = torch.cat([torch.full_like(self._tokens(self.slots), self.lm.placeholder_id), self.prompt], dim=1)
        for users in self.users:
            values = 0.02 * self._per_row(users, self.slots, self.lm.width)
            yield self._steered("prefix", "embed", users, [PrefixEdit(values, self._all_slots())], prompt)

    def memory(self) -> Iterator[Variant]:
        """Gated cross-attention at the middle layer."""
        site = steer.Site("resid_mid", self.middle)
        layer = GatedCrossAttention(self.lm.width, self.lm.width).requires_grad_(False)
        layer.to(self.lm.device, self.lm.dtype).gate.fill_(1.0)
        for users in self.users:
            values = 10 * self._per_row(users, self.slots, self.lm.width)
            edits = [MemoryEdit(site, layer, values, self._all_slots())]
            yield self._steered("memory", "middle", users, edits, self.prompt)

    def cos(self) -> Iterator[Variant]:
        """Two streams per row in one pass and the mixture of their logits: what `generate` does in a step of CoS."""
        weights = torch.ones(2 * self.batch, device=self.lm.device)

        def bind(strength: float) -> AbstractContextManager[Any]:
            weights[: self.batch], weights[self.batch :] = 1 + strength, -strength
            return nullcontext()

        prompts = torch.cat([self.prompt, self._tokens(self.prompt.shape[1])])
        yield Variant("cos", self.lm.model, prompts, "logits", self.batch, bind, weights)

    def _steered(self, edit: str, layers: str, users: int, edits: Sequence[Edit], prompt: Tensor) -> Variant:
        lengths = [prompt.shape[1]] * self.batch

        def bind(strength: float) -> AbstractContextManager[Any]:
            return self.lm.steered(edits=edits if strength else [neutral(e) for e in edits], prompt_lengths=lengths)

        return Variant(edit, self.lm.model, prompt, layers, users, bind)

    def _tokens(self, length: int) -> Tensor:
        return torch.randint(1, self.lm.model.config.vocab_size, (self.batch, length), device=self.lm.device)

    def _per_row(self, users: int, *shape: int) -> Tensor:
        """Random states, gathered by row; on the CPU, where states come from."""
        return torch.randn(users, *shape)[torch.arange(self.batch) % users]

    def _all_slots(self) -> Tensor:
        return torch.full((self.batch,), self.slots)


def neutral(edit: Edit) -> Edit:
    """The same edit at strength 0: zero vectors, or none of the soft tokens and entries."""
    if isinstance(edit, ResidualEdit):
        return edit.at_strength(torch.zeros(len(edit.vectors)))
    return replace(edit, lengths=torch.zeros_like(edit.lengths))


# How a variant runs.


def forward(model: nn.Module, tokens: Tensor, positions: Tensor, cache: Any, weights: Tensor | None) -> Tensor:
    """Next-token logits; those of CoS are mixed."""
    output = model(input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
    logits = output.logits[:, -1]
    if weights is None:
        return logits
    batch = logits.shape[0] // 2
    return geometric(logits, weights, torch.arange(2 * batch, device=logits.device) % batch, batch)


class Runner:
    """Runs prefills and decode steps in one mode. Variants whose prompts have one shape share a cache."""

    def __init__(self, mode: str, config: Any, batch: int, steps: int, device: torch.device) -> None:
        self.mode, self.config, self.device = mode, config, device
        self.tokens = [torch.randint(1, config.vocab_size, (batch, 1), device=device) for _ in range(steps)]
        self.lanes: dict[torch.Size, tuple[Any, list[tuple[Tensor, Tensor]]]] = {}
        self.compiled: dict[tuple[object, ...], Callable[..., Tensor]] = {}

    def prefill(self, variant: Variant) -> Tensor:
        """Never compiled, as in `generate`."""
        cache, _ = self._lane(variant.prompt)
        rewind(cache, 0)
        positions = torch.arange(variant.prompt.shape[1], device=self.device).expand(variant.prompt.shape)
        return forward(variant.model, variant.prompt, positions, cache, variant.weights)

    def decode(self, variant: Variant, steps: int | None = None, *, eager: bool = False) -> Tensor:
        """The same steps each time: same tokens, same positions, same lengths of the cache."""
        cache, inputs = self._lane(variant.prompt)
        step = forward if eager or self.mode != "compiled" else self._compiled(variant.kind)
        rewind(cache, variant.prompt.shape[1])
        for tokens, positions in inputs[:steps]:
            torch.compiler.cudagraph_mark_step_begin()
            logits = step(variant.model, tokens, positions, cache, variant.weights)
        return logits

    def _compiled(self, kind: tuple[object, ...]) -> Callable[..., Tensor]:
        if kind not in self.compiled:
            # Dynamo finds compiled code by code object, and does not guard hooks: the wrapped model would be served
            # with what was compiled for its twin. So each kind has a code object of its own.
            own = FunctionType(forward.__code__.replace(), globals())
            how = "reduce-overhead" if self.device.type == "cuda" else "default"
            self.compiled[kind] = torch.compile(own, fullgraph=True, dynamic=False, mode=how)
        return self.compiled[kind]

    def _lane(self, prompt: Tensor) -> tuple[Any, list[tuple[Tensor, Tensor]]]:
        if prompt.shape not in self.lanes:
            rows, length = prompt.shape
            # The streams of a row share its next token.
            tokens = [own.repeat(rows // len(own), 1) for own in self.tokens]
            inputs = [(ids, torch.full_like(ids, length + i)) for i, ids in enumerate(tokens)]
            static = partial(StaticCache, max_cache_len=length + len(inputs))
            self.lanes[prompt.shape] = (DynamicCache if self.mode == "eager" else static)(config=self.config), inputs
        return self.lanes[prompt.shape]


def rewind(cache: Any, length: int) -> None:
    """Makes a cache forget all tokens after the first `length`. A static one stays where it is in memory."""
    for layer in cache.layers:
        if isinstance(cache, StaticCache):
            layer.cumulative_length.fill_(length)
        elif layer.is_initialized:
            layer.crop(length - layer.get_seq_length())


# Whether the right thing runs: nothing is worse than to measure a step that does nothing.


@dataclass
class Check:
    """Relative differences of logits, `‖a − b‖ / ‖b‖`, after a prefill and one step.

    Attributes:
        change: from the untouched model; there must be one if, and only if, something is steered.
        neutral: the same at strength 0; rounding, and not even that where shapes are equal and nothing is compiled.
        compiled: the compiled step from the eager one.
    """

    change: float
    neutral: float
    compiled: float
    ok: bool


def check(runner: Runner, variant: Variant, bare: nn.Module) -> Check:
    """Compares a variant with the untouched model on the same tokens."""
    own = len(variant.prompt) // (1 if variant.weights is None else 2)
    untouched = logits_of(runner, Variant("", bare, variant.prompt[:own]), eager=True)
    eager = logits_of(runner, variant, eager=True)
    change = _relative(eager, untouched)
    unsteered = _relative(logits_of(runner, variant, strength=0.0), untouched)
    compiled = 0.0 if runner.mode != "compiled" else _relative(logits_of(runner, variant), eager)
    rounding = ROUNDING[untouched.dtype]
    allowed = 0.0 if runner.mode != "compiled" and variant.weights is None else rounding
    moved = change > 2 * rounding if variant.users else change == 0
    return Check(change, unsteered, compiled, ok=moved and unsteered <= allowed and compiled <= rounding)


def logits_of(runner: Runner, variant: Variant, strength: float = 1.0, *, eager: bool = False) -> Tensor:
    """Logits after a prefill and one step."""
    with variant.bind(strength):
        runner.prefill(variant)
        return runner.decode(variant, 1, eager=eager).clone()


def _relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


# How it is timed.


@dataclass
class Samples:
    """Milliseconds of one variant, one entry a round: by the device's clock, by the host's, and to bind the users."""

    device: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    bind: list[float] = field(default_factory=list)
    peak: int = 0


def sample(variant: Variant, work: Callable[[Variant], Any], into: Samples, device: torch.device) -> None:
    """Times `work` once. On a CPU the host's clock is the device's."""
    cuda = device.type == "cuda"
    synchronize: Callable[[], None] = torch.cuda.synchronize if cuda else lambda: None
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2)) if cuda else (None, None)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    synchronize()
    opened = time.perf_counter()
    with variant.bind(1.0):
        synchronize()
        began = time.perf_counter()
        if start:
            start.record()
        work(variant)
        if end:
            end.record()
        synchronize()
        ended = time.perf_counter()
    into.bind.append(1e3 * (began - opened))
    into.wall.append(1e3 * (ended - began))
    into.device.append(start.elapsed_time(end) if start and end else into.wall[-1])
    into.peak = max(into.peak, torch.cuda.max_memory_allocated() if cuda else 0)


def take_turns(
    variants: Sequence[Variant], work: Callable[[Variant], Any], device: torch.device, seconds: float, at_least: int
) -> list[Samples]:
    """Runs rounds in which each variant has one turn, until the time is over."""
    samples, order, until = [Samples() for _ in variants], list(range(len(variants))), time.perf_counter() + seconds
    gc.collect()
    gc.disable()
    try:
        while len(samples[0].wall) < at_least or time.perf_counter() < until:
            random.shuffle(order)
            for i in order:
                sample(variants[i], work, samples[i], device)
    finally:
        gc.enable()
    return samples


def spread(values: Sequence[float], per: int = 1) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = torch.tensor(values).div(per).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    return {"median": median, "q1": low, "q3": high}


def ratio(values: Sequence[float], base: Sequence[float], resamples: int = 2000) -> dict[str, float]:
    """Ratio of the medians, with a 95 % bootstrap interval over whole rounds, as a round's values belong together."""
    a, b = torch.tensor(values), torch.tensor(base)
    rounds = torch.randint(len(a), (resamples, len(a)), generator=torch.Generator().manual_seed(0))
    ratios = a[rounds].quantile(0.5, dim=1) / b[rounds].quantile(0.5, dim=1)
    low, high = ratios.quantile(torch.tensor([0.025, 0.975])).tolist()
    return {"value": float(a.quantile(0.5) / b.quantile(0.5)), "low": low, "high": high}


# Cases and the report.


def run_case(
    bare: nn.Module, lm: steer.FrozenLM, mode: str, batch: int, args: argparse.Namespace, until: float
) -> dict[str, Any]:
    """Measures all variants of one model at one batch size in one mode."""
    began = time.perf_counter()
    torch._dynamo.utils.counters.clear()
    runner = Runner(mode, lm.model.config, batch, args.steps, lm.device)
    variants = Variants(bare, lm, batch, args).all(args.edits)
    checks = [check(runner, variant, bare) for variant in variants]
    for variant in 2 * variants:  # to warm up; CUDA graphs are recorded in the second step
        with variant.bind(1.0):
            runner.decode(variant, 4)
    graphs = graph_counts()
    seconds = min(args.seconds, until - time.perf_counter())
    prefills = take_turns(variants, runner.prefill, lm.device, seconds / 4, at_least=2)
    steps = take_turns(variants, runner.decode, lm.device, seconds, at_least=7)
    graphs |= {
        "expected": len({variant.kind for variant in variants}),
        "while_timing": graph_counts()["graphs"] - graphs["graphs"],
    }
    return {
        "mode": mode,
        "batch": batch,
        "seconds": time.perf_counter() - began,
        "rounds": len(steps[0].wall),
        "prefill_rounds": len(prefills[0].wall),
        "compilation": graphs if mode == "compiled" else None,
        "variants": [
            {
                "edit": variant.edit,
                "layers": variant.layers,
                "users": variant.users,
                "rows": variant.prompt.shape[0],
                "prompt": variant.prompt.shape[1],
                "step_ms": spread(step.device, args.steps),
                "step_wall_ms": spread(step.wall, args.steps),
                "step_ratio": ratio(step.device, steps[0].device),
                "prefill_ms": spread(prefill.device),
                "prefill_ratio": ratio(prefill.device, prefills[0].device),
                "bind_ms": spread(step.bind),
                "peak_bytes": {"prefill": prefill.peak, "step": step.peak},
                "check": asdict(checked),
            }
            for variant, checked, prefill, step in zip(variants, checks, prefills, steps, strict=True)
        ],
    }


def graph_counts() -> dict[str, int]:
    """What was compiled so far: more graphs than there are kinds of steps means recompilation."""
    counters = torch._dynamo.utils.counters
    return {
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": sum(counters["graph_break"].values()),
        "cudagraph_skips": counters["inductor"]["cudagraph_skips"],
    }


def run_shape(shape: str, args: argparse.Namespace, until: float) -> Iterator[dict[str, Any]]:
    """All cases of one model. One that fails, or does not fit in memory, does not stop the others."""
    case: dict[str, Any] = {"shape": shape}
    print(f"\n{shape}: ", end="", flush=True)
    if time.perf_counter() > until:
        yield case | {"left_out": "no time"}
        return
    try:
        bare, model = build(shape, args.device, args.dtype)
    except torch.OutOfMemoryError:
        yield case | {"left_out": "no memory"}
        return
    with steer.wrap(model) as lm:
        if "memory" in args.edits:
            lm.declare(steer.Site("resid_mid", lm.n_layers // 2))
        for mode, batch in product(args.modes, args.batches):
            case = {"shape": shape, "mode": mode, "batch": batch}
            print(f"\n{shape}, {mode}, batch {batch}: ", end="", flush=True)
            try:
                if time.perf_counter() > until:
                    case["left_out"] = "no time"
                else:
                    case |= run_case(bare, lm, mode, batch, args, until)
            except torch.OutOfMemoryError:
                case["left_out"] = "no memory"
            except Exception as error:
                traceback.print_exc()
                case["left_out"] = f"failed: {error!r}"
            yield case
            free()


def free() -> None:
    """Gives back what a case or a model held, compiled code included."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def print_case(case: dict[str, Any]) -> None:
    if "left_out" in case:
        print(case["left_out"], flush=True)
        return
    compiled = ", ".join(f"{count} {what}" for what, count in (case["compilation"] or {}).items())
    print(f"{case['rounds']} rounds, {case['seconds']:.0f} s in all{compiled and '; '}{compiled}")
    print(
        f"{'edit':<16}{'at':<8}{'users':>5}{'ms/step':>10}{'wall':>10}{'ratio':>8}{'95 %':>14}{'prefill':>11}"
        f"{'ratio':>8}{'bind':>8}{'GiB':>7}  check: change, neutral, compiled"
    )
    for v in case["variants"]:
        step, check = v["step_ratio"], v["check"]
        interval = f"{step['low']:.3f}–{step['high']:.3f}"
        errors = " ".join(f"{check[name]:.0e}" for name in ("change", "neutral", "compiled"))
        print(
            f"{v['edit']:<16}{v['layers']:<8}{v['users'] or '-':>5}{v['step_ms']['median']:>10.3f}"
            f"{v['step_wall_ms']['median']:>10.3f}{step['value']:>8.3f}{interval:>14}{v['prefill_ms']['median']:>11.2f}"
            f"{v['prefill_ratio']['value']:>8.3f}{v['bind_ms']['median']:>8.2f}{v['peak_bytes']['step'] / 2**30:>7.2f}"
            f"  {'ok' if check['ok'] else 'WRONG'}: {errors}",
            flush=True,
        )


def write(report: dict[str, Any], path: Path) -> None:
    """Replaces the file at once, so that a run which is cut off leaves the cases before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(draft, path)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    words = partial(str.split, sep=",")

    def add(flag: str, default: str | None, kind: Callable[[str], Any], text: str) -> None:
        text = text if default is None else f"{text} (default: {default})"
        parser.add_argument(flag, default=default, type=kind, help=text)

    add("--shapes", ",".join(list(SHAPES)[:4]) if cuda else "smollm2-135m", words, f"of {', '.join(SHAPES)}")
    add("--batches", "1,8,64,256" if cuda else "1,8,64", lambda text: [int(n) for n in text.split(",")], "rows")
    add("--users", "1,batch", words, "distinct users in a batch: numbers, or `batch` for one a row")
    add("--layers", "middle,all", words, "where vectors are added, of middle, all")
    add("--modes", "eager,compiled" if cuda else "eager", words, "of eager (dynamic cache), static (cache), compiled")
    add("--edits", "add", words, f"of {', '.join(EDITS)}")
    add("--context", "128" if cuda else "16", int, "tokens of the prompt")
    add("--slots", "64", int, "soft tokens of a prefix, entries of a memory")
    add("--steps", "16" if cuda else "4", int, "decode steps that are timed at a stretch")
    add("--seconds", "10", float, "for the timed steps of a case; prefills get a quarter of it")
    add("--budget", "3600", float, "seconds after which no further case is started")
    add("--device", "cuda" if cuda else "cpu", torch.device, "where to run")
    add("--dtype", "bfloat16" if cuda else "float32", partial(getattr, torch), "of the weights")
    add("--threads", None, int, "of the CPU, if not torch's own choice")
    add("--out", None, Path, "file to write, if not benchmarks/results/latency-DEVICE-DATE.json")
    args = parser.parse_args()
    for given, known in (args.shapes, SHAPES), (args.modes, MODES), (args.edits, EDITS), (args.layers, LAYERS):
        if unknown := set(given) - set(known):
            parser.error(f"{', '.join(sorted(unknown))} is none of {', '.join(known)}")
    return args


@torch.no_grad()
def main() -> None:
    """Runs what the command line asks for; the exit status is 1 if a step failed, or was not what it should be."""
    args = parse()
    until = time.perf_counter() + args.budget
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    random.seed(0)
    settings = {name: getattr(args, name) for name in ("context", "slots", "steps")}
    report = {
        **harness.environment(),
        "cuda": torch.version.cuda,
        "dtype": str(args.dtype).removeprefix("torch."),
        **settings,
        "cases": [],
    }
    slug = re.sub(r"[^a-z0-9]+", "-", report["device"].lower()).strip("-")
    path = args.out or harness.RESULTS / f"latency-{slug}-{report['date']}.json"
    print(f"{report['device']}, torch {report['torch']}, transformers {report['transformers']}, {report['dtype']}")
    for shape in args.shapes:
        for case in run_shape(shape, args, until):
            report["cases"].append(case)
            write(report, path)
            print_case(case)
        free()
    print(f"\nwrote {path}")
    failed = any(case.get("left_out", "").startswith("failed") for case in report["cases"])
    wrong = any(not v["check"]["ok"] for case in report["cases"] for v in case.get("variants", []))
    sys.exit(failed or wrong)


if __name__ == "__main__":
    main()
