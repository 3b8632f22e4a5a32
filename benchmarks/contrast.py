"""CoS: cost per token against plain generation and transformers' `guidance_scale`, and equality with the latter.

    python -P benchmarks/contrast.py

`guidance_scale` has one scale and one unconditional prompt length for all rows, so its arm repeats one prompt.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))  # `python -P` leaves it out
import harness
import source_tree

source_tree.use()

import torch  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

import steer  # noqa: E402
from steer.embedded import resolve  # noqa: E402

CONTEXT = "I am a retired sailor and I miss the sea."
PROMPTS = ["Recommend me a hobby.", "What should I cook tonight?", "Plan my Sunday.", "How do I sleep better?"]


def main() -> None:
    arguments = parse()
    lm = steer.load(arguments.model, dtype=torch.float32)
    bare = AutoModelForCausalLM.from_pretrained(resolve(arguments.model), dtype=torch.float32).to(lm.device)
    length = {"min_new_tokens": arguments.tokens, "max_new_tokens": arguments.tokens, "do_sample": False}
    cases = []
    for batch in arguments.batches:
        prompt = PROMPTS[0]

        def plain(batch: int = batch, prompt: str = prompt) -> list[list[int]]:
            ids = lm.encode(prompt, context=CONTEXT)
            return lm.generate_tokens([ids] * batch, **length)

        def cos(batch: int = batch, prompt: str = prompt, lam: float = 1.5) -> list[list[int]]:
            return lm.generate_tokens([prompt] * batch, states=[steer.CoS(lam=lam).state(CONTEXT)] * batch, **length)

        def guidance(batch: int = batch, prompt: str = prompt, lam: float = 1.5) -> list[list[int]]:
            ids = torch.tensor([lm.encode(prompt, context=CONTEXT)] * batch, device=bare.device)
            negative = torch.tensor([lm.encode(prompt)] * batch, device=bare.device)
            output = bare.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                negative_prompt_ids=negative,
                negative_prompt_attention_mask=torch.ones_like(negative),
                guidance_scale=1 + lam,
                pad_token_id=lm.pad_token_id,
                **length,
            )
            return output[:, ids.shape[1] :].tolist()

        same = [
            cos(batch, prompt, lam) == guidance(batch, prompt, lam)
            for prompt in PROMPTS
            for lam in (-1.5, -0.5, 0.5, 1.5)
        ]
        seconds = harness.in_turn({"plain": plain, "cos": cos, "guidance_scale": guidance}, arguments.rounds)
        case = {
            "batch": batch,
            "tokens": arguments.tokens,
            "generations": len(same),
            "equal to guidance_scale": sum(same),
            "ms per token": {arm: 1000 * statistics.median(s) / arguments.tokens for arm, s in seconds.items()},
            "cos / plain": harness.ratio(seconds["cos"], seconds["plain"]),
            "guidance_scale / plain": harness.ratio(seconds["guidance_scale"], seconds["plain"]),
            "seconds": seconds,
        }
        print({key: value for key, value in case.items() if key != "seconds"}, flush=True)
        cases.append(case)
    harness.save(arguments.name, {"cases": cases})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--name", default="contrast-cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
