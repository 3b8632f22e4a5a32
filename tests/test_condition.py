"""Conditions: each row's prompt decides whether the row's edit acts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from models import WIDTH, tiny, tokenizer
from rows import assert_close
from torch import Tensor

import steer
from steer import Condition, ResidualEdit
from steer.inject import Decision, Edit
from steer.read import Span, read

READ, SITE = steer.Site("resid_post", 0), steer.Site("resid_post", 1)
PROMPTS = ["a prompt", "xyz", "another, longer one", "pq"]
LENGTHS = [len(prompt) for prompt in PROMPTS]
VECTORS = 3 * torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(0))
# The last row has no condition.
DIRECTIONS = (
    torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0, 2.0, 1.0, 0.0])[:, None]
)


def similarities(lm: steer.FrozenLM, prompts: Sequence[str] = PROMPTS, directions: Tensor = DIRECTIONS) -> Tensor:
    """By hand, from hidden states that are read prompt by prompt."""
    spans = [Span(lm.encode(prompt), 1, len(prompt)) for prompt in prompts]
    h = read(lm, spans, [READ], pool="mean")[READ].pooled.double()
    c = directions.double()
    projected = torch.tanh((h * c).sum(1, keepdim=True) / c.square().sum(1, keepdim=True).clamp(min=1e-9) * c)
    norms = h.norm(dim=1) * projected.norm(dim=1)
    return torch.where(norms > 0, (h * projected).sum(1) / norms.clamp(min=1e-9), 0.0)


def edit(lm: steer.FrozenLM, **changes: Any) -> ResidualEdit:
    """Rows 0 and 3 act: row 0 as its threshold lies below, row 3 as it has no condition; rows 1 and 2 do not."""
    thresholds = similarities(lm).float() + torch.tensor([-0.01, 0.01, 0.01, 0.01])
    return ResidualEdit(SITE, VECTORS, condition=Condition(READ, DIRECTIONS, thresholds, **changes))


ACTS = torch.tensor([True, False, False, True])


def logits(lm: steer.FrozenLM, edits: Sequence[Edit], **settings: Any) -> tuple[Tensor, tuple[Decision, ...]]:
    """Of the new tokens, with what was decided."""
    settings = {"max_new_tokens": 4, "do_sample": False, "output_logits": True} | settings
    with lm.steered(edits=edits) as steering:
        settings |= {**steering.prepare(PROMPTS), **steering.generate_kwargs(), "return_dict_in_generate": True}
        output = lm.model.generate(**settings)
    return torch.stack(output.logits or output.scores, dim=1), steering.decisions


def test_prompts_decide(lm: steer.FrozenLM) -> None:
    conditional = edit(lm)
    expected = replace(conditional, vectors=VECTORS * ACTS[:, None], condition=None)
    actual, (decision,) = logits(lm, [conditional])
    assert torch.equal(actual, logits(lm, [expected])[0])
    assert decision.acts.tolist() == ACTS.tolist()
    assert_close(decision.similarities.double(), similarities(lm), 1e-5)
    assert decision.condition is conditional.condition
    below, (opposite,) = logits(lm, [edit(lm, acts="below")])
    assert opposite.acts.tolist() == [False, True, True, True]
    assert (below[:3, 0] != actual[:3, 0]).any(-1).all()
    assert_close(below[3], actual[3], 1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_cache": False},
        {"prefill_chunk_size": 1},
        {"prefill_chunk_size": 3},
        {"cache_implementation": "static", "disable_compile": True, "prefill_chunk_size": 3, "max_cache_len": 64},
    ],
    ids=lambda settings: ",".join(f"{key}={value}" for key, value in settings.items()),
)
def test_decisions_do_not_depend_on_the_cache_or_on_chunks(lm: steer.FrozenLM, settings: dict[str, Any]) -> None:
    if lm.model.config.model_type == "falcon" and {"cache_implementation", "prefill_chunk_size"} <= settings.keys():
        pytest.skip("transformers makes this cache for as many keys as there are heads, and this Falcon has one")
    expected, (before,) = logits(lm, [edit(lm)])
    actual, (decision,) = logits(lm, [edit(lm)], **settings)
    assert_close(actual, expected)
    assert decision.acts.tolist() == before.acts.tolist() == ACTS.tolist()
    assert_close(decision.similarities, before.similarities, 1e-5)


def test_beams_return_sequences_and_seeds(llama: steer.FrozenLM) -> None:
    conditional = edit(llama)
    expected = replace(conditional, vectors=VECTORS * ACTS[:, None], condition=None)
    for settings in (
        {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
        {"num_return_sequences": 3, "do_sample": True, "seeds": [1, 2, 3, 4]},
    ):
        arguments = {"prompts": PROMPTS, "max_new_tokens": 5, **settings}
        tokens = llama.generate_tokens(edits=[conditional], **arguments)
        assert tokens == llama.generate_tokens(edits=[expected], **arguments)
        assert tokens != llama.generate_tokens(edits=[replace(conditional, condition=None)], **arguments)


def test_a_contrasted_stream_follows_the_decision_of_its_owner(llama: steer.FrozenLM) -> None:
    """The row's own prompt has the context in front; left to itself, the stream would decide otherwise."""
    contexts = ["I am.", None, "who knows", "yes"]
    own = similarities(llama, [p if c is None else f"{c} {p}" for p, c in zip(PROMPTS, contexts, strict=True)])
    thresholds = (own + similarities(llama)) / 2 + torch.tensor([0.0, 0.01, 0.0, 0.0])
    acts = (own > thresholds) | (DIRECTIONS == 0).all(1)
    assert (own - thresholds)[[0, 2]].abs().min() > 1e-4
    conditional = ResidualEdit(SITE, VECTORS, condition=Condition(READ, DIRECTIONS, thresholds.float()))
    contrast = steer.StreamEdit.contrast(contexts, torch.tensor([1.0, 0.0, 2.0, 1.0]))
    expected = replace(conditional, vectors=VECTORS * acts[:, None], condition=None)
    # Scores, as logits are the own stream's.
    settings = {"output_logits": False, "output_scores": True}
    actual, (decision,) = logits(llama, [conditional, contrast], **settings)
    assert decision.acts.tolist() == acts.tolist()
    assert torch.equal(actual, logits(llama, [expected, contrast], **settings)[0])


def batch(lm: steer.FrozenLM, side: str, pads: str = "clamped", prompts: Sequence[str] = PROMPTS) -> dict[str, Tensor]:
    """Padded prompts, with the position ids that padding gets from one or the other."""
    tokens = lm.tokenizer(list(prompts), padding=True, padding_side=side, return_tensors="pt")
    mask = tokens["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    if pads != "clamped":
        positions = positions.masked_fill(mask == 0, int(pads))
    return {"input_ids": tokens["input_ids"], "attention_mask": mask, "position_ids": positions}


@pytest.mark.parametrize("pads", ["clamped", "0", "1"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("chunk", [1, 2, 5, 100])
def test_padding_is_no_part_of_the_prompt(llama: steer.FrozenLM, side: str, pads: str, chunk: int) -> None:
    arguments, expected = batch(llama, side, pads), similarities(llama)
    # The padding that is read is no other's business: it has large states.
    with llama.steered(edits=[edit(llama)], prompt_lengths=LENGTHS) as steering, torch.no_grad():
        for _ in range(2):
            cache = None
            for start in range(0, arguments["input_ids"].shape[1], chunk):
                end = start + chunk
                output = llama.model(
                    input_ids=arguments["input_ids"][:, start:end],
                    attention_mask=arguments["attention_mask"][:, :end],
                    position_ids=arguments["position_ids"][:, start:end],
                    past_key_values=cache,
                    use_cache=True,
                )
                cache = output.past_key_values
            (decision,) = steering.decisions
            assert_close(decision.similarities.double(), expected, 1e-5)
            assert decision.acts.tolist() == ACTS.tolist()


def test_a_second_forward_pass_decides_anew(llama: steer.FrozenLM) -> None:
    """On one binding, with other prompts of the same lengths; a pass after the prompt changes nothing."""
    others = ["q" * length for length in LENGTHS]
    expected = [similarities(llama, prompts) for prompts in (PROMPTS, others)]
    assert (expected[0] - expected[1])[:3].abs().min() > 1e-3
    with llama.steered(edits=[edit(llama)], prompt_lengths=LENGTHS) as steering, torch.no_grad():
        for turn in (0, 1, 0):
            cache = llama.model(**batch(llama, "left", prompts=(PROMPTS, others)[turn])).past_key_values
            assert_close(steering.decisions[0].similarities.double(), expected[turn], 1e-5)
            new = torch.tensor(LENGTHS)[:, None]
            mask = torch.cat([batch(llama, "left")["attention_mask"], torch.ones_like(new)], dim=1)
            llama.model(torch.full_like(new, 9), attention_mask=mask, position_ids=new, past_key_values=cache)
            assert_close(steering.decisions[0].similarities.double(), expected[turn], 1e-5)


def test_of_a_conversation_that_continues_a_cache_the_new_tokens_decide(llama: steer.FrozenLM) -> None:
    prompt, condition = PROMPTS[2], Condition(READ, DIRECTIONS[:1], torch.zeros(1))
    ids = llama.tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        h = llama.model(ids, output_hidden_states=True).hidden_states[1][0, 8:].mean(0)
        cache = llama.model(ids[:, :8]).past_key_values
        edit = ResidualEdit(SITE, VECTORS[:1], condition=condition)
        with llama.steered(edits=[edit], prompt_lengths=[len(prompt)]) as steering:
            llama.model(ids[:, 8:], attention_mask=torch.ones_like(ids), past_key_values=cache)
    squashed = torch.tanh((h @ DIRECTIONS[0]) / DIRECTIONS[0].square().sum() * DIRECTIONS[0])
    assert_close(steering.decisions[0].similarities, torch.cosine_similarity(h, squashed, dim=0)[None], 1e-5)


def test_several_conditions_and_none(llama: steer.FrozenLM) -> None:
    """Each with a decision of its own; edits that carry the same one share it."""
    first, second = edit(llama), edit(llama, acts="below")
    site = steer.Site("resid_post", 2)
    edits = [first, steer.ProjectionEdit(site, VECTORS, condition=second.condition), replace(first, site=site)]
    edits.append(ResidualEdit(SITE, VECTORS.flip(0)))
    actual, decisions = logits(llama, edits)
    assert [decision.acts.tolist() for decision in decisions] == [ACTS.tolist(), [False, True, True, True]]
    expected = [
        replace(first, vectors=VECTORS * ACTS[:, None], condition=None),
        steer.ProjectionEdit(site, VECTORS * decisions[1].acts[:, None]),
        replace(first, site=site, vectors=VECTORS * ACTS[:, None], condition=None),
        edits[-1],
    ]
    assert_close(actual, logits(llama, expected)[0], 1e-5)


def test_conditions_see_edits_at_earlier_sites_and_none_at_their_own(llama: steer.FrozenLM) -> None:
    plain = similarities(llama)
    conditional = edit(llama)
    assert conditional.condition is not None
    here = replace(conditional, site=READ)
    shift = 3 * VECTORS.flip(0)
    with torch.no_grad():
        for site, same in ((READ, True), (steer.Site("embed"), False)):
            early = ResidualEdit(site, shift, "all")
            with llama.steered(edits=[early, here], prompt_lengths=LENGTHS) as steering:
                llama.model(**batch(llama, "left"))
            moved = (steering.decisions[0].similarities - plain).abs()[:3]
            assert (moved < 1e-5).all() if same else (moved > 1e-3).all()


def test_a_prompt_of_one_token_is_similar_to_nothing(llama: steer.FrozenLM) -> None:
    condition = Condition(READ, DIRECTIONS[:2], torch.tensor([-0.1, 0.1]))
    with llama.steered(edits=[ResidualEdit(SITE, VECTORS[:2], condition=condition)], prompt_lengths=[1, 1]) as steering:
        llama.model(torch.tensor([[5], [6]]))
    assert steering.decisions[0].similarities.tolist() == [0, 0]
    assert steering.decisions[0].acts.tolist() == [True, False]


def test_inference_mode_inside_a_block(llama: steer.FrozenLM) -> None:
    edits = [edit(llama)]
    with llama.steered(edits=edits, prompt_lengths=LENGTHS) as steering:
        with torch.inference_mode():
            llama.model.generate(
                **steering.prepare(PROMPTS), **steering.generate_kwargs(), max_new_tokens=2, num_beams=2
            )
        llama.model(**batch(llama, "left"))
        assert steering.decisions[0].acts.tolist() == ACTS.tolist()
    with torch.inference_mode():
        assert logits(llama, edits)[1][0].acts.tolist() == ACTS.tolist()
    assert logits(llama, edits)[1][0].acts.tolist() == ACTS.tolist()


def test_nothing_of_a_condition_is_left(llama: steer.FrozenLM) -> None:
    logits(llama, [edit(llama)])
    (decide,) = llama.operators.deciding.values()
    for name in ("directions", "thresholds", "sums", "similarities", "acts"):
        assert not getattr(decide, name).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    with steer.wrap(tiny("llama"), tokenizer()) as lm:
        expected = similarities(lm)
    with steer.wrap(tiny("llama", dtype=dtype), tokenizer()) as lm:
        condition = Condition(READ, DIRECTIONS, torch.zeros(4))
        actual, (decision,) = logits(lm, [ResidualEdit(SITE, VECTORS, condition=condition)])
    assert_close(decision.similarities.double(), expected, 4 * torch.finfo(dtype).eps)
    assert actual.isfinite().all()


def test_conditions_that_make_no_sense(llama: steer.FrozenLM) -> None:
    condition = Condition(READ, DIRECTIONS, torch.zeros(4))
    for where in ("all", "prompt", torch.ones(4, 3, dtype=torch.bool)):
        with pytest.raises(steer.SteerError, match="decided at the end of the prompt"):
            ResidualEdit(SITE, VECTORS, where, condition=condition)
    for site in ("embed", "attn_out[0]", "resid_pre[0]"):
        with pytest.raises(steer.SteerError, match=r"a condition at resid_post\[0\] is decided after"):
            ResidualEdit(steer.Site.parse(site), VECTORS, condition=condition)
    # Its canonical name is the condition's own site.
    ResidualEdit(steer.Site("resid_pre", 1), VECTORS, condition=condition)
    with pytest.raises(steer.SteerError, match=r"\[3\] thresholds for 4 directions"):
        Condition(READ, DIRECTIONS, torch.zeros(3))
    with pytest.raises(steer.SteerError, match="thresholds must be finite"):
        Condition(READ, DIRECTIONS, torch.full((4,), torch.nan))
    with pytest.raises(steer.SteerError, match="acts='over' is not one of above, below"):
        Condition(READ, DIRECTIONS, torch.zeros(4), "over")  # type: ignore[arg-type]
    narrow = Condition(READ, torch.ones(4, 5), torch.zeros(4))
    with pytest.raises(steer.SteerError, match=r"conditions at resid_post\[0\] are 5 wide"):
        logits(llama, [ResidualEdit(SITE, VECTORS, condition=narrow)])
    with pytest.raises(steer.SteerError, match="prompt_lengths"), llama.steered(edits=[edit(llama)]):
        llama.model(torch.full((4, 3), 7))
