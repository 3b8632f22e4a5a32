"""Prefixes that depend on the prompt: what a fixed prefix of the same soft tokens gives, wherever there are prompts."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from models import WIDTH, tiny, tokenizer
from rows import assert_close
from torch import Tensor

import steer
from steer.likelihood import response_losses
from steer.read import record_span
from steer.score import row_losses

PROMPTS = ["greet me", "the weather, in detail?", "x", "say bye"]
LENGTHS = torch.tensor([2, 0, 1, 3])


def soft_tokens(prompts: Sequence[str]) -> Tensor:
    """Of each prompt its own, from its text alone."""
    rows = [torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(sum(map(ord, text)))) for text in prompts]
    return torch.stack(rows)


ASKING = steer.PromptPrefix(soft_tokens, LENGTHS, WIDTH)


def fixed(prompts: Sequence[str]) -> steer.PrefixEdit:
    return steer.PrefixEdit(soft_tokens(prompts), LENGTHS)


@pytest.mark.parametrize("prompts", [PROMPTS, [[{"role": "user", "content": text}] for text in PROMPTS]])
def test_generation(prompts: Sequence[steer.model.Prompt]) -> None:
    with steer.wrap(tiny("llama"), tokenizer(chat=True)) as lm:
        settings = {"max_new_tokens": 6, "num_return_sequences": 2, "do_sample": True, "seeds": [1, 2, 3, 4]}
        found = lm.generate_tokens(prompts, edits=[ASKING], **settings)
        assert found == lm.generate_tokens(prompts, edits=[fixed(PROMPTS)], **settings)
        assert found != lm.generate_tokens(prompts, edits=[fixed(PROMPTS[::-1])], **settings)


def test_every_architecture_and_every_batch_of_a_block(lm: steer.FrozenLM) -> None:
    """One binding, several batches of prompts: each has its own soft tokens."""

    def scores(steering: steer.Steering, prompts: list[str]) -> Tensor:
        output = lm.model.generate(
            **steering.prepare(prompts),
            **steering.generate_kwargs(),
            max_new_tokens=3,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
        )
        return torch.stack(output.scores, 1)

    with lm.steered(edits=[ASKING]) as steering:
        found = [scores(steering, PROMPTS), scores(steering, PROMPTS[::-1])]
    for own, prompts in zip(found, [PROMPTS, PROMPTS[::-1]], strict=True):
        with lm.steered(edits=[fixed(prompts)]) as steering:
            assert torch.equal(own, scores(steering, prompts))


def test_in_front_of_and_behind_other_prefixes_and_with_streams(llama: steer.FrozenLM) -> None:
    other = steer.PrefixEdit.from_rows([torch.ones(1, WIDTH), None, torch.ones(2, WIDTH), None], WIDTH)
    streams = steer.StreamEdit.contrast(["I sail.", None, "I row.", "I swim."], 1.5)
    for edits, expected in [
        ([ASKING, other], [fixed(PROMPTS), other]),
        ([other, ASKING, streams], [other, fixed(PROMPTS), streams]),
    ]:
        found = llama.generate_tokens(PROMPTS, edits=edits, max_new_tokens=5)
        assert found == llama.generate_tokens(PROMPTS, edits=expected, max_new_tokens=5)


def test_likelihoods(llama: steer.FrozenLM) -> None:
    """Of texts, which have prompts of their own, and of one text under several rows."""
    spans = [record_span(llama, steer.Record("ann", "what came", prompt)) for prompt in PROMPTS]
    found, expected = (response_losses(llama, spans, [edit])[0] for edit in (ASKING, fixed(PROMPTS)))
    assert torch.equal(found, expected)
    assert_close(row_losses(llama, spans[1], [ASKING], 4), row_losses(llama, spans[1], [fixed([PROMPTS[1]] * 4)], 4))


def test_a_batch_that_is_refused_changes_nothing(llama: steer.FrozenLM) -> None:
    with llama.steered(edits=[ASKING]) as steering:
        batch = steering.prepare(PROMPTS)
        with pytest.raises(steer.SteerError, match="a prompt is empty"):
            steering.prepare(["quite", "another", "batch", ""])
        found = llama.model.generate(**batch, **steering.generate_kwargs(), max_new_tokens=5)
    with llama.steered(edits=[fixed(PROMPTS)]) as steering:
        batch = steering.prepare(PROMPTS)
        assert torch.equal(found, llama.model.generate(**batch, **steering.generate_kwargs(), max_new_tokens=5))


def test_a_forward_pass_without_its_own_prompts_is_refused(llama: steer.FrozenLM) -> None:
    """Neither zeros nor another batch's soft tokens."""
    with llama.steered(edits=[fixed(PROMPTS)], prompt_lengths=[1, 2, 3, 4]) as steering:
        ids = steering.prepare(PROMPTS)["input_ids"]
        llama.model(ids)
    refused = pytest.raises(steer.SteerError, match=r"what depends on the prompts, .* needs prepare")
    with refused, llama.steered(edits=[ASKING], prompt_lengths=[1, 2, 3, 4]):
        llama.model(ids)
    with llama.steered(edits=[ASKING], prompt_lengths=[1, 2, 3, 4]) as steering:
        first = steering.prepare(PROMPTS)
        llama.model(**steering.forward_kwargs(first))
        second = steering.prepare(PROMPTS[::-1])
        with pytest.raises(steer.SteerError, match=r"not the batch that steering\.prepare"):
            steering.forward_kwargs(first)
        llama.model(**steering.forward_kwargs(second))


def test_soft_tokens_of_another_width_are_refused(llama: steer.FrozenLM) -> None:
    narrow = steer.PromptPrefix(lambda prompts: torch.zeros(len(prompts), 3, 1), LENGTHS, WIDTH)
    with pytest.raises(steer.SteerError, match="prefixes are 1 wide"):
        llama.generate(PROMPTS, edits=[narrow])


def test_what_is_not_finite_is_refused(llama: steer.FrozenLM) -> None:
    broken = steer.PromptPrefix(lambda prompts: torch.full((len(prompts), 3, WIDTH), torch.nan), LENGTHS, WIDTH)
    with pytest.raises(steer.SteerError, match="prefixes hold values that are not finite"):
        llama.generate(PROMPTS, edits=[broken])


def test_soft_tokens_count_in_the_models_window() -> None:
    with steer.wrap(tiny("opt"), tokenizer()) as lm:
        assert lm.window == 200
        edit = steer.PrefixEdit(torch.zeros(1, 3, WIDTH), torch.tensor([3]))
        span = record_span(lm, steer.Record("ann", "a" * 10, "b" * 187))
        response_losses(lm, [span], [edit])
        span = record_span(lm, steer.Record("ann", "a" * 11, "b" * 187))
        with pytest.raises(steer.SteerError, match="row 0: with its prefix the prompt has 201 tokens and the model's"):
            response_losses(lm, [span], [edit])
