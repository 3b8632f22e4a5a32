"""CoS against transformers' own guidance through whole greedy generations, up to the model's own end of text."""

from __future__ import annotations

import pytest
import torch
from models import tiny, tokenizer
from torch import Tensor

import steer

# A row without a context is plain, and short and long prompts are padded.
CONTEXTS = [
    "I am a retired sailor, and I miss the sea.",
    None,
    "I am five.",
    "I answer to nobody; I live alone, I read.",
]
PROMPTS = ["Recommend me a hobby.", "What is rain?", "Say hello.", "What should I cook tonight? I have an hour."]
LAMS = [-0.5, 1.0, 1.0, 3.0]


def contrasted(lm: steer.FrozenLM, tokens: int) -> tuple[list[list[int]], Tensor]:
    """Tokens of all rows, from one batch, and the two largest scores at each step `[batch, step, 2]`."""
    states = [None if c is None else steer.CoS(lam=lam).state(c) for c, lam in zip(CONTEXTS, LAMS, strict=True)]
    with lm.steered(states=states) as steering:
        batch = steering.prepare(PROMPTS)
        output = lm.model.generate(
            **batch,
            **steering.generate_kwargs(),
            max_new_tokens=tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
        )
    scores = torch.stack(output.scores, 1).topk(2).values
    return output.sequences[:, batch["input_ids"].shape[1] :].tolist(), scores


def guided(lm: steer.FrozenLM, row: int, tokens: int) -> list[int]:
    """The same of one row by transformers, which has one scale and runs the model twice per token."""
    prompt, context = PROMPTS[row], CONTEXTS[row]
    ids = torch.tensor([lm.encode(prompt, context=context)])
    arguments = {"max_new_tokens": tokens, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    if context is not None:
        negative = torch.tensor([lm.encode(prompt)])
        arguments |= {
            "guidance_scale": 1 + LAMS[row],
            "negative_prompt_ids": negative,
            "negative_prompt_attention_mask": torch.ones_like(negative),
        }
    return lm.model.generate(ids, **arguments)[0, ids.shape[1] :].tolist()


def without_padding(lm: steer.FrozenLM, tokens: list[int]) -> list[int]:
    """Up to the first token that ends a text, which ends the row; what follows is padding."""
    ends = lm.model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    stop = next((place + 1 for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:stop]


NAMES = ["llama", "mistral", "qwen3", "gemma2", "gemma3", "gpt2", "gpt_neox", "opt", "bloom", "mixtral"]
# transformers' own forward of these gives NaN for padded rows in float64, or has no float64.
FLOAT32_ALONE = {"gemma2", "bloom", "mixtral"}
CASES = [(name, torch.float32) for name in NAMES]
CASES += [(name, torch.float64) for name in NAMES if name not in FLOAT32_ALONE]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_random_models(name: str, dtype: torch.dtype) -> None:
    with steer.wrap(tiny(name, dtype=dtype), tokenizer(chat=True)) as lm:
        tokens, _ = contrasted(lm, 48)
        for row in range(len(PROMPTS)):
            assert without_padding(lm, tokens[row]) == without_padding(lm, guided(lm, row, 48))


@pytest.mark.full
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
def test_embedded_models(name: str) -> None:
    """Rows of a batch are summed in another order than rows alone: where the two part, both tokens were as likely."""
    with steer.load(name, dtype=torch.float32) as lm:
        tokens, scores = contrasted(lm, 128)
        for row in range(len(PROMPTS)):
            ours, theirs = without_padding(lm, tokens[row]), without_padding(lm, guided(lm, row, 128))
            if ours != theirs:
                place = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
                best, second = scores[row, place].tolist()
                assert best - second < 1e-3, f"row {row} parts at token {place}"
