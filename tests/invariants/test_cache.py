"""Decoding with a cache, with a prompt in chunks, or from the start at every step gives the same logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rows import Row, assert_close, cross_attention, edits_of, generate, random_row
from torch import Tensor

import steer

# Row 0 has all four edits, and the prompts are longer than Gemma's window.
ROWS = [random_row(1, share=1.0), Row("a plain row"), random_row(4, share=1.0), random_row(5)]
LAYER = cross_attention()


@pytest.mark.parametrize(
    "settings",
    [
        {"use_cache": False},
        {"prefill_chunk_size": 1},
        {"prefill_chunk_size": 3},
        {"cache_implementation": "static", "disable_compile": True},
        {"cache_implementation": "static", "disable_compile": True, "prefill_chunk_size": 3, "max_cache_len": 64},
    ],
    ids=lambda settings: ",".join(f"{key}={value}" for key, value in settings.items()),
)
def test_generation(lm: steer.FrozenLM, settings: dict[str, Any]) -> None:
    if lm.model.config.model_type == "falcon" and {"cache_implementation", "prefill_chunk_size"} <= settings.keys():
        pytest.skip("transformers makes this cache for as many keys as there are heads, and this Falcon has one")
    expected = generate(lm, ROWS, LAYER)
    actual = generate(lm, ROWS, LAYER, **settings)
    assert_close(actual.logits, expected.logits)
    assert torch.equal(actual.tokens, expected.tokens)


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_forward_passes_by_hand(lm: steer.FrozenLM, chunk: int) -> None:
    """Prompt and new tokens together, in chunks that do not respect where one ends and the other begins."""
    rows = [row.without_context() for row in ROWS]
    expected = generate(lm, rows, LAYER)
    lengths = [len(row.prompt) + (0 if row.prefix is None else len(row.prefix)) for row in rows]
    with lm.steered(edits=edits_of(rows, LAYER)[:-1], prompt_lengths=lengths) as steering, torch.no_grad():
        prompts = steering.prepare([row.prompt for row in rows])
        ids = torch.cat([prompts["input_ids"], expected.tokens], dim=1)
        mask = torch.cat([prompts["attention_mask"], torch.ones_like(expected.tokens)], dim=1)
        cache, logits = None, []
        for start in range(0, ids.shape[1] - 1, chunk):
            end = min(start + chunk, ids.shape[1] - 1)
            arguments: dict[str, Tensor] = {"input_ids": ids[:, start:end], "attention_mask": mask[:, :end]}
            if lm.attachment.architecture.takes_position_ids:
                arguments["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, start:end]
            output = lm.model(**arguments, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits)
    assert_close(torch.cat(logits, dim=1)[:, prompts["input_ids"].shape[1] - 1 :], expected.logits)
