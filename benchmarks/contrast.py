"""CoS: cost per token against plain generation and transformers' `guidance_scale`, and equality with the latter.

    python -P benchmarks/contrast.py                                                   # SmolLM2
    python -P benchmarks/contrast.py --shapes llama-3.1-8b --dtype bfloat16 --modes eager compiled

Four arms take turns, all through `generate`: `plain` answers the rows with their context, `both rows` plain rows for
both streams of each row, which is the least that two streams can cost, `cos`, and `guidance_scale`, which has one scale
and one unconditional prompt for all rows and runs the model twice per token. With `--shapes` weights are random and
tokens are words; the weights of a model are otherwise those that it has.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))  # `python -P` leaves it out
import harness
import latency
import source_tree

source_tree.use()

import torch  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, StoppingCriteria  # noqa: E402

import steer  # noqa: E402
from steer.embedded import resolve  # noqa: E402

CONTEXT = "I am a retired sailor and I miss the sea."
PROMPTS = ["Recommend me a hobby.", "What should I cook tonight?", "Plan my Sunday.", "How do I sleep better?"]
FILLER = "This is what I did last week, day by day, and what came of it. "
LAM = 1.5


def words(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are words; it knows those of the texts above."""
    known = dict.fromkeys(" ".join([CONTEXT, FILLER, *PROMPTS]).split())
    tokens = {word: number for number, word in enumerate(["<unk>", "<end>", *known])}
    assert len(tokens) <= vocabulary
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def load(name: str, arguments: argparse.Namespace) -> tuple[steer.FrozenLM, Any]:
    """A wrapped model, and the same one that nobody touched."""
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    if name in latency.SHAPES:
        model, bare = latency.build(name, device, dtype)
        return steer.wrap(model, words(model.config.vocab_size)), bare
    lm = steer.load(name, device=device, dtype=dtype)
    return lm, AutoModelForCausalLM.from_pretrained(resolve(name), dtype=dtype).to(device)


def prompt_of(lm: steer.FrozenLM, length: int) -> str:
    """A prompt that has about as many tokens, with all that the chat template adds."""
    text, filler = PROMPTS[0], FILLER
    while len(lm.encode(text)) < length:
        text = filler + text
    return text


def arms(
    lm: steer.FrozenLM, bare: Any, prompt: str, batch: int, tokens: int, settings: Mapping[str, Any]
) -> dict[str, Callable[[float], list[list[int]]]]:
    """What generates, given λ."""
    settings = {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": False, **settings}
    with_context, without = lm.encode(prompt, context=CONTEXT), lm.encode(prompt)

    def plain(rows: list[list[int]], lam: float) -> list[list[int]]:
        return lm.generate_tokens(rows, **settings)

    def cos(lam: float) -> list[list[int]]:
        return lm.generate_tokens([prompt] * batch, states=[steer.CoS(lam=lam).state(CONTEXT)] * batch, **settings)

    def guidance(lam: float) -> list[list[int]]:
        ids = torch.tensor([with_context] * batch, device=lm.device)
        negative = torch.tensor([without] * batch, device=lm.device)
        output = bare.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            negative_prompt_ids=negative,
            negative_prompt_attention_mask=torch.ones_like(negative),
            guidance_scale=1 + lam,
            pad_token_id=lm.pad_token_id,
            **settings,
        )
        return output[:, ids.shape[1] :].tolist()

    return {
        "plain": partial(plain, [with_context] * batch),
        "both rows": partial(plain, [with_context, without] * batch),
        "cos": cos,
        "guidance_scale": guidance,
    }


def settings_of(mode: str) -> dict[str, Any]:
    """What `generate` is told for a mode; compiled decoding has a static cache."""
    if mode == "eager":
        return {}
    from transformers import CompileConfig

    config = CompileConfig(fullgraph=True)
    config._compile_all_devices = True  # type: ignore[assignment]
    return {"cache_implementation": "static", "compile_config": config}


class Clock(StoppingCriteria):
    """Notes when each token is there, and stops nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: list[float] = []

    def start(self) -> None:
        self.times = []
        self._note()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self._note()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def _note(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.times.append(time.perf_counter())


def measure(
    lm: steer.FrozenLM, bare: Any, mode: str, length: int, batch: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """One case: seconds up to the first token, which is the prompt's pass, and of the tokens behind it."""
    clock, tokens = Clock(lm.device), arguments.tokens
    settings = settings_of(mode) | {"stopping_criteria": [clock]}
    run = arms(lm, bare, prompt_of(lm, length), batch, 1 + tokens, settings)
    first: dict[str, list[float]] = {arm: [] for arm in ARMS}
    rest: dict[str, list[float]] = {arm: [] for arm in ARMS}

    def timed(arm: str) -> None:
        clock.start()
        run[arm](LAM)
        first[arm].append(clock.times[1] - clock.times[0])
        rest[arm].append((clock.times[-1] - clock.times[1]) / tokens)

    whole = harness.in_turn({arm: partial(timed, arm) for arm in ARMS}, arguments.rounds)
    # As `in_turn` leaves out the first round.
    first, rest = ({arm: seconds[1:] for arm, seconds in part.items()} for part in (first, rest))
    return {
        "mode": mode,
        "prompt tokens": len(lm.encode(prompt_of(lm, length))),
        "batch": batch,
        "tokens": tokens,
        "prompt ms": {arm: 1000 * statistics.median(first[arm]) for arm in ARMS},
        "ms per token": {arm: 1000 * statistics.median(rest[arm]) for arm in ARMS},
        "prompt, over plain": {arm: harness.ratio(first[arm], first["plain"]) for arm in ARMS[1:]},
        "token, over plain": {arm: harness.ratio(rest[arm], rest["plain"]) for arm in ARMS[1:]},
        "token, cos over both rows": harness.ratio(rest["cos"], rest["both rows"]),
        "whole, over plain": {arm: harness.ratio(whole[arm], whole["plain"]) for arm in ARMS[1:]},
        "seconds": {"prompt": first, "token": rest, "whole": whole},
    }


ARMS = ("plain", "both rows", "cos", "guidance_scale")


def equal(lm: steer.FrozenLM, bare: Any, arguments: argparse.Namespace) -> dict[str, int]:
    """How many greedy generations have the same tokens as those of `guidance_scale`."""
    same = [
        generate["cos"](lam) == generate["guidance_scale"](lam)
        for prompt in PROMPTS
        for lam in (-1.5, -0.5, 0.5, 1.5)
        for generate in [arms(lm, bare, prompt, 1, 1 + arguments.tokens, {})]
    ]
    return {"generations": len(same), "equal to guidance_scale": sum(same)}


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    cases = []
    for name in arguments.shapes or [arguments.model]:
        lm, bare = load(name, arguments)
        compared = equal(lm, bare, arguments)
        print(name, compared, flush=True)
        for mode in arguments.modes:
            for length in arguments.prompts:
                for batch in arguments.batches:
                    case = {"model": name, **compared, **measure(lm, bare, mode, length, batch, arguments)}
                    cases.append(case)
                    print({key: value for key, value in case.items() if key != "seconds"}, flush=True)
                    harness.write(arguments.json, {"dtype": arguments.dtype, "cases": cases})
        lm.close()
        del lm, bare
        torch.cuda.empty_cache()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--shapes", nargs="+", choices=latency.SHAPES, help="random weights, in place of a model")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prompts", type=int, nargs="+", default=[64, 512], help="tokens")
    parser.add_argument("--modes", nargs="+", choices=["eager", "compiled"], default=["eager"])
    parser.add_argument("--tokens", type=int, default=32, help="after the first")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, default=harness.RESULTS / "contrast-cpu.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
