"""Contrasted streams: the mixture is that of the papers, in one forward pass, before transformers' own processors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from models import PAD, unwrapped
from rows import assert_close, cross_attention, edits_of, random_row
from rows import generate as rows_generate
from torch import Tensor
from transformers import DynamicCache, LogitsProcessorList, RepetitionPenaltyLogitsProcessor, TopPLogitsWarper

import steer
from steer.inject import stream_rows

PROMPTS = ["a prompt", "x", "another, longer one", "the last"]
CONTEXTS: list[str | None] = ["I am a pirate.", "short", None, "I like long, long contexts, they say"]
LAMS = torch.tensor([1.5, -2.0, 0.0, 0.5])
EDIT = steer.StreamEdit.contrast(CONTEXTS, LAMS)
STEPS = 6


def generate(lm: steer.FrozenLM, edit: steer.StreamEdit = EDIT, prompts: list[str] = PROMPTS, **kwargs: Any) -> Any:
    """What transformers returns, the prompts cut off its sequences."""
    settings = {"max_new_tokens": STEPS, "do_sample": False} | kwargs
    seeds = settings.pop("seeds", None)
    with lm.steered(edits=[edit]) as steering:
        batch = steering.prepare(prompts)
        output = lm.model.generate(
            **batch,
            **steering.generate_kwargs(seeds=seeds),
            return_dict_in_generate=True,
            output_scores=True,
            **settings,
        )
    output.sequences = output.sequences[:, batch["input_ids"].shape[1] :]
    return output


def contrasted(lm: steer.FrozenLM, row: int, tokens: Tensor) -> Tensor:
    """`(1 + λ) · logits(context, prompt) − λ · logits(prompt)` at each of the tokens, from forward passes by hand."""
    context, prompt, lam = CONTEXTS[row], PROMPTS[row], LAMS[row]
    logits = []
    for text in (prompt if context is None else f"{context} {prompt}", prompt):
        ids = torch.cat([torch.tensor(lm.tokenizer(text).input_ids), tokens])
        with torch.no_grad():
            logits.append(lm.model(ids[None, :-1]).logits[0, -len(tokens) :])
    return (1 + lam) * logits[0] - lam * logits[1]


@pytest.mark.parametrize("lam", [-2.0, -0.5, 0.5, 3.0])
def test_tokens_equal_classifier_free_guidance_of_scale_1_plus_lambda(lm: steer.FrozenLM, lam: float) -> None:
    """transformers' own guidance runs the model twice per token, with one scale for the batch: a row at a time."""
    if lm.model.config.model_type == "qwen2_5_vl":
        pytest.skip("transformers' own guidance fails on this model")
    edit = steer.StreamEdit.contrast(CONTEXTS, torch.full((4,), lam))
    output = generate(lm, edit)
    for row, (prompt, context) in enumerate(zip(PROMPTS, CONTEXTS, strict=True)):
        if context is None:
            continue
        positive, negative = (lm.tokenizer(t, return_tensors="pt") for t in (f"{context} {prompt}", prompt))
        guided = lm.model.generate(
            positive.input_ids,
            attention_mask=positive.attention_mask,
            guidance_scale=1 + lam,
            negative_prompt_ids=negative.input_ids,
            negative_prompt_attention_mask=negative.attention_mask,
            max_new_tokens=STEPS,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
        )
        assert output.sequences[row].tolist() == guided.sequences[0, positive.input_ids.shape[1] :].tolist()
        for mixed, theirs in zip(output.scores, guided.scores, strict=True):
            assert_close(mixed[row].log_softmax(-1), theirs[0].log_softmax(-1))


def test_every_row_is_contrasted_by_its_own_lambda(lm: steer.FrozenLM) -> None:
    output = generate(lm)
    for row in range(4):
        assert_close(torch.stack(output.scores, 1)[row], contrasted(lm, row, output.sequences[row]))


def test_states_may_contrast_different_rows(llama: steer.FrozenLM) -> None:
    parts = [
        steer.StreamEdit.contrast([c if i in own else None for i, c in enumerate(CONTEXTS)], LAMS)
        for own in ({0, 3}, {1})
    ]
    with llama.steered(edits=parts) as steering:
        batch = steering.prepare(PROMPTS)
        tokens = llama.model.generate(**batch, **steering.generate_kwargs(), max_new_tokens=STEPS)
    assert torch.equal(tokens[:, batch["input_ids"].shape[1] :], generate(llama).sequences)


def test_every_stream_carries_the_rows_other_edits(lm: steer.FrozenLM) -> None:
    """The context is what the streams differ in: vectors, prefix and memory steer both."""
    rows, layer = [random_row(seed, share=1.0) for seed in (1, 2)], cross_attention()
    edits = edits_of(rows, layer)
    with_context = [replace(row, prompt=f"{row.context} {row.prompt}") for row in rows]
    positive, negative = (rows_generate(lm, texts, layer, edits=edits[:-1]) for texts in (with_context, rows))
    with lm.steered(edits=edits) as steering:
        batch = steering.prepare([row.prompt for row in rows])
        settings = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
        mixed = lm.model.generate(**batch, **steering.generate_kwargs(), **settings).scores[0]
    lams = torch.tensor([[row.lam] for row in rows])
    assert_close(mixed, (1 + lams) * positive.logits[:, 0] - lams * negative.logits[:, 0])


@pytest.mark.parametrize("seeds", [None, [1, 2, 3, 4]], ids=["common randomness", "seeds"])
def test_every_stream_of_a_row_gets_the_same_sampled_token(lm: steer.FrozenLM, seeds: list[int] | None) -> None:
    fed: list[Tensor] = []
    handle = unwrapped(lm.model).register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(kwargs["input_ids"]), with_kwargs=True
    )
    torch.manual_seed(0)
    output = generate(lm, do_sample=True, temperature=5.0, seeds=seeds)
    handle.remove()
    owners = [0, 1, 2, 3, 0, 1, 3]
    assert [len(ids) for ids in fed] == [7] * STEPS
    for step, ids in enumerate(fed[1:]):
        assert ids[:, 0].tolist() == [output.sequences[owner, step].item() for owner in owners]
    assert len(set(output.sequences.flatten().tolist())) > 8


def test_processors_work_on_the_mixture(lm: steer.FrozenLM) -> None:
    """Repetition penalty is not invariant to a constant, and sees the own prompt with its context only."""
    output = generate(lm, repetition_penalty=1.8)
    penalty = RepetitionPenaltyLogitsProcessor(1.8)
    for row, (prompt, context) in enumerate(zip(PROMPTS, CONTEXTS, strict=True)):
        head = torch.tensor(lm.tokenizer(prompt if context is None else f"{context} {prompt}").input_ids)
        mixed = contrasted(lm, row, output.sequences[row])
        for step in range(STEPS):
            seen = torch.cat([head, output.sequences[row, :step], torch.tensor([PAD])])
            expected = penalty(seen[None], mixed[step : step + 1].clone())
            # The padding token is seen in some rows and not in others.
            assert_close(output.scores[step][row, 1:], expected[0, 1:])


def test_sampling_warps_the_mixture_once(lm: steer.FrozenLM, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Tensor] = []
    multinomial = torch.multinomial

    def spy(probabilities: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if probabilities.shape[0] == 4:
            drawn.append(probabilities)
        return multinomial(probabilities, *args, **kwargs)

    monkeypatch.setattr(stream_rows.torch, "multinomial", spy)
    output = generate(lm, do_sample=True, temperature=2.0, top_p=0.8, top_k=0)
    assert len(drawn) == STEPS
    warp = LogitsProcessorList([TopPLogitsWarper(0.8)])
    for row in range(4):
        expected = warp(None, contrasted(lm, row, output.sequences[row]) / 2.0).softmax(-1)
        actual = torch.stack(drawn, 1)[row]
        assert_close(actual, expected)
        assert not actual.isnan().any()
        assert (actual == 0).any()


def test_tokens_that_the_model_rules_out_do_not_become_nan(lm: steer.FrozenLM) -> None:
    def rule_out(module: Any, args: Any, output: Any) -> None:
        output.logits[..., 5:50] = float("-inf")
        # And one of them in the streams without context only.
        output.logits[4:, :, 60] = float("-inf")

    handle = unwrapped(lm.model).register_forward_hook(rule_out)
    outputs = [generate(lm), generate(lm, do_sample=True, seeds=[1, 2, 3, 4]), generate(lm, do_sample=True)]
    handle.remove()
    for output in outputs:
        assert not ((output.sequences >= 5) & (output.sequences < 50)).any()
        assert not torch.stack(output.scores).isnan().any()
    # Where λ is negative these streams count, and rule it out; elsewhere they are contrasted with, and cannot.
    ruled_out = torch.stack(outputs[0].scores)[..., 60].isneginf()
    contrasted = torch.tensor([context is not None for context in CONTEXTS])
    assert torch.equal(ruled_out, ((LAMS < 0) & contrasted).expand_as(ruled_out))


def test_return_sequences_of_contrasted_rows(lm: steer.FrozenLM) -> None:
    settings: dict[str, Any] = {"do_sample": True, "temperature": 5.0, "num_return_sequences": 3}
    together = generate(lm, seeds=[1, 2, 3, 4], **settings).sequences.unflatten(0, (4, 3))
    assert len({tuple(row.tolist()) for row in together.flatten(0, 1)}) == 12
    for row in range(4):
        one = steer.StreamEdit.contrast(CONTEXTS[row : row + 1], LAMS[row : row + 1])
        alone = generate(lm, one, PROMPTS[row : row + 1], seeds=[row + 1], **settings).sequences
        assert torch.equal(together[row], alone)


def test_rows_that_end_early(lm: steer.FrozenLM) -> None:
    free = generate(lm).sequences
    end = int(free[0, 2])
    ended = generate(lm, eos_token_id=end, pad_token_id=PAD).sequences
    for row in range(4):
        expected = free[row].tolist()
        cut = expected.index(end) + 1 if end in expected else len(expected)
        padded = expected[:cut] + [PAD] * (len(expected) - cut)
        assert ended[row].tolist() == padded[: ended.shape[1]]


class Recorder:
    """A streamer that keeps what it is shown."""

    def __init__(self) -> None:
        self.shown: list[list[int]] = []

    def put(self, value: Tensor) -> None:
        self.shown.append(value.flatten().tolist())

    def end(self) -> None:
        self.shown.append([])


def test_a_streamer_is_shown_the_prompt_and_the_rows_own_tokens(llama: steer.FrozenLM) -> None:
    cos = steer.CoS(lam=1.5).state("I am a pirate.")
    for state, prompt in [(cos, "I am a pirate. a prompt"), (None, "a prompt")]:
        streamer = Recorder()
        tokens = llama.generate_tokens(["a prompt"], states=[state], streamer=streamer, max_new_tokens=STEPS)
        assert streamer.shown == [llama.tokenizer(prompt).input_ids, *([token] for token in tokens[0]), []]


def test_one_number_is_for_all_rows() -> None:
    expected = steer.StreamEdit.contrast(["x", None, "y"], lam=[1.5, 1.5, 1.5])
    for lam in (1.5, torch.tensor(1.5)):
        assert steer.StreamEdit.contrast(["x", None, "y"], lam=lam) == expected


def test_what_cannot_be_contrasted_is_refused(llama: steer.FrozenLM) -> None:
    with pytest.raises(steer.SteerError, match="beams cannot be contrasted"):
        generate(llama, num_beams=2)
    with pytest.raises(steer.SteerError, match="cache of your own"):
        generate(llama, past_key_values=DynamicCache())
    with pytest.raises(steer.SteerError, match=r"steering\.prepare"), llama.steered(edits=[EDIT]) as steering:
        llama.model.generate(torch.full((4, 3), 7), **steering.generate_kwargs(), max_new_tokens=2)
    with (
        pytest.raises(steer.SteerError, match="two states contrast streams in row 0"),
        llama.steered(edits=[EDIT, EDIT]),
    ):
        pass
    with pytest.raises(steer.SteerError, match="λ must be finite"):
        steer.StreamEdit.contrast(["x"], torch.tensor([float("nan")]))
    with pytest.raises(steer.SteerError, match="below 1e"):
        steer.StreamEdit.contrast(["x"], 1e39)
    with pytest.raises(steer.SteerError, match="a context is empty"):
        steer.StreamEdit.contrast([" "], torch.tensor([1.0]))
    with (
        pytest.raises(steer.SteerError, match="4 contexts and 2 λ"),
        llama.steered(edits=[steer.StreamEdit.contrast(CONTEXTS, LAMS[:2])]),
    ):
        pass


def test_what_generate_returns_has_the_rows_of_the_batch(lm: steer.FrozenLM) -> None:
    output = generate(lm, output_hidden_states=True)
    assert all(hidden.shape[0] == 4 for step in output.hidden_states for hidden in step)
    assert output.past_key_values is None
