"""Prefixes as keys and values: what the same prefix gives as soft tokens, or as the tokens of a text."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from models import BOS, WIDTH, tiny, tokenizer
from rows import MEMORY_WIDTH, Generated, Row, assert_close, cross_attention, generate
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

import steer
from steer import KeyValueEdit, KeyValues, PrefixEdit, ResidualEdit, Site
from steer.inject import Edit
from steer.likelihood import last_logits, response_losses
from steer.read import Span, record_span
from steer.score import row_losses

LAYER = cross_attention()
# As many tokens each, so that nothing stands between a prefix and its prompt, and longer than windows are.
ALIKE = [Row("a prompt of 16 t"), Row("another one of16"), Row("the third prompt"), Row("and the last one")]
MIXED = [Row("a prompt"), Row("x"), Row("another, rather longer prompt"), Row("the last")]
LENGTHS = [3, 0, 5, 1]
SETTINGS: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "chunks": {"prefill_chunk_size": 3},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "static chunks": {
        "cache_implementation": "static",
        "disable_compile": True,
        "prefill_chunk_size": 3,
        "max_cache_len": 64,
    },
}


def soft(lengths: Sequence[int] = LENGTHS, width: int = WIDTH, seed: int = 0) -> list[Tensor | None]:
    """Soft tokens, of so many a row."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, width, generator=generator) if length else None for length in lengths]


def as_soft_tokens(prefixes: Sequence[Tensor | None]) -> list[Edit]:
    return [PrefixEdit.from_rows(prefixes, WIDTH)]


def as_key_values(lm: steer.FrozenLM, prefixes: Sequence[Tensor | None]) -> KeyValueEdit:
    return KeyValueEdit.from_rows(steer.key_values_of(lm, prefixes))


def assert_same(found: Generated, expected: Generated) -> None:
    assert_close(found.logits, expected.logits)
    assert torch.equal(found.tokens, expected.tokens)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_keys_and_values_are_the_soft_tokens_they_come_from(lm: steer.FrozenLM, settings: dict[str, Any]) -> None:
    """Prefixes of different lengths and none, also where windows forget them."""
    if lm.model.config.model_type == "falcon" and {"cache_implementation", "prefill_chunk_size"} <= settings.keys():
        pytest.skip("transformers makes this cache for as many keys as there are heads, and this Falcon has one")
    expected = generate(lm, ALIKE, LAYER, edits=as_soft_tokens(soft()), **settings)
    found = generate(lm, ALIKE, LAYER, edits=[as_key_values(lm, soft())], **settings)
    assert_same(found, expected)
    plain = generate(lm, ALIKE, LAYER, edits=as_soft_tokens([None] * 4))
    assert_close(found.logits[1], plain.logits[1])
    if lm.sliding_window is None:
        assert (found.logits[[0, 2, 3]] - plain.logits[[0, 2, 3]]).abs().amax((1, 2)).min() > 0.1


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gpt_neox", "opt", "bloom", "falcon", "falcon_serial"])
@pytest.mark.parametrize("settings", [SETTINGS["dynamic"], SETTINGS["static"]], ids=["dynamic", "static"])
def test_prompts_of_different_lengths(arch: str, settings: dict[str, Any]) -> None:
    """With padding between a short prompt and its prefix; each row is what it is alone."""
    if arch == "falcon_serial" and settings:
        pytest.skip("transformers computes this Falcon's alibi from a mask that a static cache does not have")
    with steer.wrap(tiny(arch), tokenizer()) as lm:
        edit = as_key_values(lm, soft())
        found = generate(lm, MIXED, LAYER, edits=[edit], **settings)
        assert_same(found, generate(lm, MIXED, LAYER, edits=as_soft_tokens(soft()), **settings))
        for i, row in enumerate(MIXED):
            alone = generate(lm, [row], LAYER, edits=[KeyValueEdit.from_rows([edit.rows[i]], edit.rows[0])])
            assert_close(found.logits[i], alone.logits[0])


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3", "bloom", "opt"])
def test_keys_and_values_of_a_text_are_that_text(arch: str) -> None:
    """As transformers itself computes and keeps them, without anything of steer."""
    texts = ["Dear you, ", "Hi! "]
    rows = [Row(f"{text}{row.prompt}") for text, row in zip(texts, ALIKE, strict=False)]
    with steer.wrap(tiny(arch), tokenizer()) as lm:
        given = []
        for text in texts:
            cache = DynamicCache()
            with torch.no_grad():
                lm.model(torch.tensor([lm.encode(text)]), past_key_values=cache, use_cache=True)
            keys, values = (torch.cat([getattr(layer, part) for layer in cache.layers]) for part in ("keys", "values"))
            given.append(KeyValues(keys, values))
        found = generate(lm, ALIKE[:2], LAYER, edits=[KeyValueEdit.from_rows(given)])
        assert_same(found, generate(lm, rows, LAYER, edits=as_soft_tokens([None] * 2)))


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_the_bos_token_is_among_the_keys_and_values(arch: str) -> None:
    with steer.wrap(tiny(arch), tokenizer(bos=True)) as lm:
        edit = as_key_values(lm, soft())
        assert (edit.bos, edit.lengths.tolist(), edit.added.tolist()) == (True, [4, 0, 6, 2], LENGTHS)
        assert_same(generate(lm, MIXED, LAYER, edits=[edit]), generate(lm, MIXED, LAYER, edits=as_soft_tokens(soft())))
        with pytest.raises(steer.SteerError, match="begin with those of a BOS token, and its prompt has none"):
            lm.generate([[5, 6]] * 4, edits=[edit])
        with pytest.raises(steer.SteerError, match="nothing is left to be read"):
            lm.generate([[BOS]] * 4, edits=[edit])
        # Such as a prefix that was trained as keys and values, in front of BOS.
        bare = replace(edit, bos=False)
        with lm.steered(edits=[bare]) as steering:
            batch = steering.prepare(["xy"] * 4)
            lm.model.generate(**batch, **steering.generate_kwargs(), max_new_tokens=1)
        assert batch["input_ids"][2].tolist() == [lm.placeholder_id] * 6 + [BOS, *lm.tokenizer("xy").input_ids[1:]]


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 3, "cache_implementation": "static", "disable_compile": True},
        {"do_sample": True, "num_return_sequences": 3, "seeds": [1, 2, 3, 4]},
        {"do_sample": True, "seeds": [1, 2, 3, 4], "prefill_chunk_size": 4},
    ],
)
def test_beams_and_samples(llama: steer.FrozenLM, settings: dict[str, Any]) -> None:
    prompts = [row.prompt for row in MIXED]
    expected = llama.generate_tokens(prompts, edits=as_soft_tokens(soft()), max_new_tokens=6, **settings)
    found = llama.generate_tokens(prompts, edits=[as_key_values(llama, soft())], max_new_tokens=6, **settings)
    assert found == expected
    assert found != llama.generate_tokens(prompts, max_new_tokens=6, **settings)


def test_together_with_other_edits(lm: steer.FrozenLM) -> None:
    """Vectors, memories and soft tokens act behind keys and values: a prefix cut in two is that prefix."""
    vectors = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1))
    after = [ResidualEdit(Site("resid_post", 1), vectors), ResidualEdit(Site("resid_post", 0), vectors, "generated")]
    parts = soft(), soft([1, 2, 0, 3], seed=2)
    whole = [
        torch.cat([part for part in both if part is not None]) if any(p is not None for p in both) else None
        for both in zip(*parts, strict=True)
    ]
    edit = as_key_values(lm, parts[0])
    # Soft tokens of different lengths pad prompts that are alike, and windows count what stands between.
    rows = (
        MIXED
        if lm.sliding_window is None
        else [Row(row.prompt[n:]) for row, n in zip(ALIKE, [1, 2, 0, 3], strict=True)]
    )
    expected = generate(lm, rows, LAYER, edits=[*as_soft_tokens(whole), *after])
    assert_same(generate(lm, rows, LAYER, edits=[edit, *as_soft_tokens(parts[1]), *after]), expected)
    memories = [torch.randn(2, MEMORY_WIDTH), None, torch.randn(3, MEMORY_WIDTH), None]
    remembered = [edit, steer.MemoryEdit.from_rows(Site("resid_mid", 1), LAYER, memories)]
    rows = MIXED if lm.sliding_window is None else ALIKE
    found = generate(lm, rows, LAYER, edits=remembered)
    for i, row in enumerate(rows):
        own = KeyValueEdit.from_rows([edit.rows[i]], edit.rows[0])
        memory = steer.MemoryEdit.from_rows(Site("resid_mid", 1), LAYER, [memories[i]])
        assert_close(found.logits[i], generate(lm, [row], LAYER, edits=[own, memory]).logits[0])


def test_edits_for_different_rows_are_merged(llama: steer.FrozenLM) -> None:
    whole = steer.key_values_of(llama, soft())
    parts = [KeyValueEdit.from_rows([whole[0], *[None] * 3]), KeyValueEdit.from_rows([None, *whole[1:]])]
    found = generate(llama, MIXED, LAYER, edits=parts)
    assert torch.equal(found.logits, generate(llama, MIXED, LAYER, edits=[KeyValueEdit.from_rows(whole)]).logits)
    with pytest.raises(steer.SteerError, match="row 0 has two prefixes of keys and values"):
        llama.generate(["x"] * 4, edits=[parts[0], parts[0]])


def test_a_batch_without_any_is_the_plain_one(llama: steer.FrozenLM) -> None:
    like = steer.key_values_of(llama, soft())[0]
    found = generate(llama, MIXED, LAYER, edits=[KeyValueEdit.from_rows([None] * 4, like)])
    assert torch.equal(found.logits, generate(llama, MIXED, LAYER, edits=as_soft_tokens([None] * 4)).logits)


def test_what_is_computed_does_not_depend_on_the_others(lm: steer.FrozenLM) -> None:
    together = steer.key_values_of(lm, soft(), batch_tokens=10_000)
    for own, prefix in zip(together, soft(), strict=True):
        (alone,) = steer.key_values_of(lm, [prefix])
        if own is None:
            assert alone is None
        else:
            assert alone is not None
            assert own.keys.shape[:2] == (lm.n_layers, lm.key_value_shape[0])
            assert_close(own.keys, alone.keys)
            assert_close(own.values, alone.values)


# Likelihoods.


def spans_of(lm: steer.FrozenLM) -> list[Span]:
    return [record_span(lm, steer.Record("ann", f"what came {i}", row.prompt)) for i, row in enumerate(MIXED)]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "bloom", "opt"])
def test_likelihoods(arch: str, bos: bool) -> None:
    with steer.wrap(tiny(arch), tokenizer(bos=bos)) as lm, torch.no_grad():
        edit, same = as_key_values(lm, soft()), as_soft_tokens(soft())
        spans = spans_of(lm)
        assert_close(response_losses(lm, spans, [edit])[0], response_losses(lm, spans, same)[0])
        assert_close(row_losses(lm, spans[2], [edit], 4), row_losses(lm, spans[2], same, 4))
        alone = record_span(lm, steer.Record("ann", "what came"))
        if bos:
            with pytest.raises(steer.SteerError, match="nothing is read that could predict its first token"):
                response_losses(lm, [alone] * 4, [edit])
        else:
            assert_close(response_losses(lm, [alone] * 4, [edit])[0], response_losses(lm, [alone] * 4, same)[0])


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_gradients_flow_to_keys_and_values(arch: str) -> None:
    """Against differences, in float64, and against transformers with a cache made by hand."""
    with steer.wrap(tiny(arch, dtype=torch.float64), tokenizer()) as lm:
        own = steer.key_values_of(lm, [torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(3))])[0]
        assert own is not None
        (span,) = spans_of(lm)[:1]
        keys, values = own.keys[None].clone().requires_grad_(), own.values[None].clone().requires_grad_()
        loss = response_losses(lm, [span], [KeyValueEdit(keys, values, torch.tensor([3]))])[0].sum()
        gradients = torch.autograd.grad(loss, [keys, values])

        def by_hand(keys: Tensor, values: Tensor) -> Tensor:
            cache = DynamicCache()
            for layer in range(lm.n_layers):
                cache.update(keys[:, layer], values[:, layer], layer)
            logits = lm.model(torch.tensor([span.ids]), past_key_values=cache).logits[0]
            targets = torch.tensor(span.ids[span.start :])
            return cross_entropy(logits[span.start - 1 : -1], targets, reduction="sum")

        expected = torch.autograd.grad(by_hand(keys, values), [keys, values])
        for found, other in zip(gradients, expected, strict=True):
            assert found.abs().max() > 1e-3
            assert_close(found, other, 1e-5)


def test_one_optimizer_step_after_another(llama: steer.FrozenLM) -> None:
    """Rows of different lengths are trained; a step does not touch the gradient of the last."""
    rows = [row for row in steer.key_values_of(llama, soft()) if row is not None]
    parameters = [KeyValues(row.keys.clone().requires_grad_(), row.values.clone().requires_grad_()) for row in rows]
    optimizer = torch.optim.Adam([part for row in parameters for part in (row.keys, row.values)], lr=0.05)
    spans, losses = spans_of(llama)[:3], []
    for _ in range(6):
        optimizer.zero_grad()
        loss = response_losses(llama, spans, [KeyValueEdit.from_rows(parameters)])[0].sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_bare_forward_passes(llama: steer.FrozenLM) -> None:
    edit = as_key_values(llama, soft())
    prompts = [row.prompt for row in MIXED]
    with torch.no_grad(), llama.steered(edits=[edit], prompt_lengths=[11, 1, 34, 9]) as steering:
        found = last_logits(llama, steering.forward_kwargs(steering.prepare(prompts)), 1)
    assert_close(found[:, 0], generate(llama, MIXED, LAYER, edits=as_soft_tokens(soft())).logits[:, 0])
    with (
        pytest.raises(steer.SteerError, match="the prefix of keys and values never took part"),
        llama.steered(edits=[edit], prompt_lengths=[11, 1, 34, 9]) as steering,
    ):
        llama.model(**steering.prepare(prompts))


# What is said, and what is refused.


def test_windows_that_forget_the_prefix_are_announced_and_padding_in_them_is_refused() -> None:
    with steer.wrap(tiny("gemma3"), tokenizer()) as lm:
        edit = as_key_values(lm, soft())
        with pytest.warns(UserWarning, match="no further back than 8 tokens"):
            generate(lm, ALIKE, LAYER, edits=[edit])
        with pytest.raises(steer.SteerError, match="would count the padding between a row's keys and values"):
            generate(lm, MIXED, LAYER, edits=[edit])
        with pytest.raises(steer.SteerError, match="would count the padding between a row's keys and values"):
            response_losses(lm, spans_of(lm), [edit])
        # What is shorter than the window is right with padding as well.
        short = as_key_values(lm, soft([2, 1]))
        rows = [Row("abc"), Row("d")]
        assert_same(
            generate(lm, rows, LAYER, edits=[short], max_new_tokens=3),
            generate(lm, rows, LAYER, edits=as_soft_tokens(soft([2, 1])), max_new_tokens=3),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            generate(lm, MIXED, LAYER, edits=[KeyValueEdit.from_rows([None] * 4, edit.rows[0])])


def test_what_makes_no_sense(llama: steer.FrozenLM) -> None:
    edit = as_key_values(llama, soft())
    one = edit.rows[0]
    assert one is not None

    def refused(message: str, *edits: Edit, **settings: Any) -> None:
        with pytest.raises(steer.SteerError, match=message):
            llama.generate([row.prompt for row in MIXED], edits=edits, **settings)

    refused(
        "2 layers with 2 heads; this model has 3 layers",
        replace(edit, keys=edit.keys[:, 1:], values=edit.values[:, 1:]),
    )
    refused("keys are 5 wide", replace(edit, keys=edit.keys[..., :5]))
    refused("keys: 2 rows for a batch of 4", as_soft_tokens(soft())[0], as_key_values(llama, soft([1, 2])))
    refused("values hold values that are not finite", replace(edit, values=edit.values * torch.nan))
    refused("read from their first token on", edit, steer.StreamEdit.contrast(["a", None, "b", "c"], 1.0))
    condition = steer.Condition(Site("resid_post", 0), torch.ones(4, WIDTH), torch.zeros(4))
    conditioned = ResidualEdit(Site("resid_post", 1), torch.ones(4, WIDTH), condition=condition)
    refused("decided from all of the prompt", edit, conditioned)
    refused("leave out use_cache=False", edit, use_cache=False)
    refused("leave out use_cache=False and your own", edit, past_key_values=DynamicCache())
    with pytest.raises(steer.SteerError, match="give like"):
        KeyValueEdit.from_rows([None, None])
    with pytest.raises(steer.SteerError, match="differ in their number of slots only"):
        KeyValueEdit.from_rows([one, replace(one, bos=True)])
    with pytest.raises(steer.SteerError, match="with the same layers, heads and slots"):
        KeyValues(one.keys, one.values[:, :, 1:])
    with pytest.raises(steer.SteerError, match="9 keys and values in room for 5"):
        replace(edit, lengths=torch.tensor([9, 0, 0, 0]))
    with pytest.raises(steer.SteerError, match="stand in a cache"), llama.steered(edits=[edit]) as steering:
        steering.hand_over()
