"""TransformerLens and nnsight read and write the same tensors as steer, at every site, to the same logits."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from models import ARCHITECTURES, LAYERS, WIDTH, tiny, tokenizer
from rows import assert_close, cross_attention, edits_of, random_row
from torch import Tensor
from transformers import PreTrainedModel

import steer
from steer.interop import named_parameters, pooled, unwrap
from steer.interop import nnsight as by_nnsight
from steer.interop import transformer_lens as by_lens
from steer.read import Span, read
from steer.sites import PER_BLOCK, WHOLE_MODEL, Site

# Neither may ask the hub for anything.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
bridge_builder = pytest.importorskip("transformer_lens.model_bridge.sources._bridge_builder")
nnsight = pytest.importorskip("nnsight")

TOLERANCE = 1e-5
PROMPTS = [[20, 31, 44, 58, 60], [71, 25], [33, 90, 12, 47]]
LENGTHS = [len(prompt) for prompt in PROMPTS]
STEPS = 4


def batch(side: str = "left") -> dict[str, Tensor]:
    width = max(LENGTHS)
    pad = [[0] * (width - length) for length in LENGTHS]
    join: Callable[[list[int], list[int]], list[int]] = (lambda p, x: p + x) if side == "left" else (lambda p, x: x + p)
    ids = [join(p, prompt) for p, prompt in zip(pad, PROMPTS, strict=True)]
    mask = [join(p, [1] * len(prompt)) for p, prompt in zip(pad, PROMPTS, strict=True)]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


BATCH = batch()
REAL = BATCH["attention_mask"].bool()


def bridge_of(model: PreTrainedModel) -> Any:
    """What `TransformerBridge.boot_transformers(..., hf_model=model)` makes, but without a tokenizer."""
    return bridge_builder.build_bridge_from_module(model, type(model).__name__, hf_config=model.config)


@cache
def lens(arch: str) -> tuple[Any, steer.FrozenLM]:
    bridge = bridge_of(tiny(arch))
    return bridge, steer.wrap(bridge)


@cache
def traced(arch: str) -> tuple[Any, steer.FrozenLM]:
    model = nnsight.TransformersModel(tiny(arch), tokenizer=tokenizer())
    return model, steer.wrap(model)


@cache
def plain(arch: str) -> steer.FrozenLM:
    return steer.wrap(tiny(arch), tokenizer())


@pytest.fixture(params=[*ARCHITECTURES, "gpt_neox_serial"])
def arch(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", autouse=True)
def forget_models() -> Iterator[None]:
    yield
    for models in (lens, traced, plain):
        models.cache_clear()


def sites_of(arch: str, name: str) -> list[Site]:
    if name in WHOLE_MODEL:
        return [Site(name)]
    if name == "resid_mid" and plain(arch).attachment.architecture.mid is None:
        pytest.skip("attention and feed-forward are parallel")
    return [Site(name, layer) for layer in range(LAYERS)]


def vectors_for(arch: str, site: Site, seed: int = 0) -> Tensor:
    """A vector for each row but the last, which is nobody's."""
    vectors = 2 * torch.randn(len(PROMPTS), plain(arch).width_at(site), generator=torch.Generator().manual_seed(seed))
    vectors[-1] = 0
    return vectors


# Three ways to one forward pass.


def logits_by_steer(lm: steer.FrozenLM, edits: Sequence[Any], call: Callable[..., Any] | None = None) -> Tensor:
    arguments = dict(BATCH)
    if lm.attachment.architecture.takes_position_ids:
        arguments["position_ids"] = (BATCH["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), lm.steered(edits=edits, prompt_lengths=LENGTHS):
        return (call or lm.model)(**arguments).logits


def logits_by_lens(arch: str, edits: Sequence[Any]) -> Tensor:
    bridge, lm = lens(arch)
    with torch.no_grad(), lm.steered(edits=edits, prompt_lengths=LENGTHS) as steering:
        return bridge.run_with_hooks(
            BATCH["input_ids"],
            attention_mask=BATCH["attention_mask"],
            fwd_hooks=by_lens.fwd_hooks(bridge, steering),
        )


def logits_by_nnsight(arch: str, edits: Sequence[Any]) -> Tensor:
    model, lm = traced(arch)
    with torch.no_grad(), lm.steered(edits=edits, prompt_lengths=LENGTHS) as steering, model.trace(dict(BATCH)):
        by_nnsight.write(model, steering)
        logits = model.output.logits.save()
    return logits


PEERS = {"transformer_lens": logits_by_lens, "nnsight": logits_by_nnsight}


@pytest.mark.parametrize("name", [*WHOLE_MODEL, *PER_BLOCK])
@pytest.mark.parametrize("peer", PEERS)
def test_writing_at_every_site(arch: str, peer: str, name: str) -> None:
    base = logits_by_steer(plain(arch), [steer.ResidualEdit(Site("embed"), torch.zeros(3, WIDTH), "all")])
    for site in sites_of(arch, name):
        for positions in ("response", "all"):
            edit = steer.ResidualEdit(site, vectors_for(arch, site), positions)
            expected = logits_by_steer(plain(arch), [edit])
            actual = PEERS[peer](arch, [edit])
            assert_close(actual[REAL], expected[REAL], TOLERANCE)
            assert (expected - base)[:2][REAL[:2]].abs().max() > 0.1
            assert_close(actual[2][REAL[2]], base[2][REAL[2]], TOLERANCE)


@pytest.mark.parametrize("peer", PEERS)
def test_all_kinds_of_edits_at_once(arch: str, peer: str) -> None:
    rows = [random_row(seed, share=1.0) for seed in range(2)] + [random_row(2, share=0.0)]
    # Soft tokens need a batch of their own, and streams are not edits at a site.
    edits = edits_of(rows, cross_attention())
    edits = [edit for edit in edits if not isinstance(edit, steer.PrefixEdit | steer.StreamEdit)]
    assert_close(PEERS[peer](arch, edits)[REAL], logits_by_steer(plain(arch), edits)[REAL], TOLERANCE)


@pytest.mark.parametrize("peer", PEERS)
def test_soft_tokens(arch: str, peer: str) -> None:
    """Whose placeholders are part of the batch."""
    edit = steer.PrefixEdit.from_rows([torch.randn(2, WIDTH), None, torch.randn(1, WIDTH)], WIDTH)
    lengths = [len(prompt) + extra for prompt, extra in zip(PROMPTS, (2, 0, 1), strict=True)]

    def run(lm: steer.FrozenLM, call: Callable[..., Tensor]) -> Tensor:
        with torch.no_grad(), lm.steered(edits=[edit], prompt_lengths=lengths) as steering:
            inputs = steering.prepare(PROMPTS)
            if lm.attachment.architecture.takes_position_ids:
                inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
            return call(steering, inputs)[inputs["attention_mask"].bool()]

    def through_lens(steering: steer.Steering, inputs: dict[str, Tensor]) -> Tensor:
        bridge, _ = lens(arch)
        return bridge.run_with_hooks(inputs.pop("input_ids"), **inputs, fwd_hooks=by_lens.fwd_hooks(bridge, steering))

    def through_nnsight(steering: steer.Steering, inputs: dict[str, Tensor]) -> Tensor:
        model, _ = traced(arch)
        with model.trace(inputs):
            by_nnsight.write(model, steering)
            logits = model.output.logits.save()
        return logits

    expected = run(plain(arch), lambda steering, inputs: plain(arch).model(**inputs).logits)
    peers = {"transformer_lens": (lens(arch)[1], through_lens), "nnsight": (traced(arch)[1], through_nnsight)}
    assert_close(run(*peers[peer]), expected, TOLERANCE)


@pytest.mark.parametrize("name", [*WHOLE_MODEL, *PER_BLOCK])
def test_steers_own_hooks_in_the_peers_models(arch: str, name: str) -> None:
    """A plain `steered` block works through `bridge(...)` and `model.trace(...)` as it is."""
    bridge, bridged = lens(arch)
    model, lm = traced(arch)
    for site in sites_of(arch, name):
        edit = steer.ResidualEdit(site, vectors_for(arch, site))
        expected = logits_by_steer(plain(arch), [edit])
        with torch.no_grad(), bridged.steered(edits=[edit], prompt_lengths=LENGTHS):
            assert_close(
                bridge(BATCH["input_ids"], attention_mask=BATCH["attention_mask"])[REAL], expected[REAL], TOLERANCE
            )
        with torch.no_grad(), lm.steered(edits=[edit], prompt_lengths=LENGTHS), model.trace(dict(BATCH)):
            logits = model.output.logits.save()
        assert_close(logits[REAL], expected[REAL], TOLERANCE)


# Reading.


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pool", ["last", "mean"])
def test_reading_every_site(arch: str, pool: Any, side: str) -> None:
    lm = plain(arch)
    names = [name for name in PER_BLOCK if name != "resid_mid" or lm.attachment.architecture.mid is not None]
    sites = [Site("embed"), Site("ln_final"), *(Site(name, layer) for name in names for layer in range(LAYERS))]
    spans = [Span(prompt, 0, len(prompt)) for prompt in PROMPTS]
    expected = {site: reading.pooled for site, reading in read(lm, spans, sites, pool=pool).items()}
    inputs = batch(side)
    mask = inputs["attention_mask"]

    bridge, bridged = lens(arch)
    with torch.no_grad():
        _, cached = bridge.run_with_cache(
            inputs["input_ids"], attention_mask=mask, names_filter=[by_lens.hook_name(bridge, site) for site in sites]
        )
    through_lens = by_lens.activations(bridge, cached, sites)

    model, traced_lm = traced(arch)
    # In OPT the feed-forward has rows and positions in one dimension, and nnsight shows them so.
    parted = [site for site in sites if arch != "opt" or site.name not in ("resid_mid", "mlp_out")]
    if side == "right" and traced_lm.attachment.architecture.takes_position_ids:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), model.trace(inputs):
        through_nnsight = by_nnsight.activations(model, traced_lm, parted).save()

    own = read(bridged, spans, sites, pool=pool)
    for found, wanted in ((through_lens, sites), (through_nnsight, parted)):
        numbers = pooled(found, spans, pool=pool, attention_mask=mask)
        assert set(numbers) == {site.canonical() for site in wanted}
        for site, vectors in numbers.items():
            assert_close(vectors, expected[site], TOLERANCE)
    for site in expected:
        assert_close(own[site].pooled, expected[site], TOLERANCE)


def test_pooling_without_a_mask_starts_at_the_first_column() -> None:
    hidden = torch.arange(24.0).view(2, 4, 3)
    spans = [Span([1, 2, 3], 0, 3), Span([4, 5], 1, 2)]
    assert torch.equal(pooled({Site("embed"): hidden}, spans)[Site("embed")], hidden[[0, 1], [2, 1]])
    means = pooled({Site("embed"): hidden}, spans, pool="mean")[Site("embed")]
    assert torch.equal(means, torch.stack([hidden[0, 1:3].mean(0), hidden[1, 1]]))
    with pytest.raises(steer.SteerError, match="cannot hold 1 spans"):
        pooled({Site("embed"): hidden}, spans[:1])
    with pytest.raises(steer.SteerError, match="that end at 5"):
        pooled({Site("embed"): hidden}, [spans[0], Span([1] * 5, 0, 5)])


# Generation.


def generated_by_steer(arch: str, edits: Sequence[Any]) -> Tensor:
    tokens = plain(arch).generate_tokens(PROMPTS, edits=edits, max_new_tokens=STEPS, do_sample=False)
    return torch.tensor(tokens)


@pytest.mark.parametrize("positions", ["response", "generated", "all"])
def test_generation(arch: str, positions: Any) -> None:
    site = Site("resid_post", 1)
    edits = [
        steer.ResidualEdit(site, vectors_for(arch, site), positions),
        steer.ResidualEdit(Site("attn_out", 0), vectors_for(arch, Site("attn_out", 0), seed=1), "generated"),
    ]
    expected = generated_by_steer(arch, edits)
    none = generated_by_steer(arch, [edits[0].at_strength(torch.zeros(3))])
    assert (expected[:2] != none[:2]).any()
    assert torch.equal(expected[2], none[2])

    bridge, lm = lens(arch)
    for cached in (True, False):
        with (
            lm.steered(edits=edits, prompt_lengths=LENGTHS) as steering,
            bridge.hooks(fwd_hooks=by_lens.fwd_hooks(bridge, steering)),
        ):
            sequences = bridge.generate(
                BATCH["input_ids"],
                attention_mask=BATCH["attention_mask"],
                max_new_tokens=STEPS,
                do_sample=False,
                stop_at_eos=False,
                use_past_kv_cache=cached,
                return_type="tokens",
                verbose=False,
            )
        assert torch.equal(sequences[:, -STEPS:], expected)

    model, lm = traced(arch)
    with (
        lm.steered(edits=edits, prompt_lengths=LENGTHS) as steering,
        model.generate(dict(BATCH), max_new_tokens=STEPS, do_sample=False, pad_token_id=0) as tracer,
    ):
        for _ in tracer.iter[:STEPS]:
            by_nnsight.write(model, steering)
        sequences = tracer.result.save()
    assert torch.equal(sequences[:, -STEPS:], expected)


def test_reading_beside_writing_in_a_trace() -> None:
    """In two blocks, as one asks for values in the order in which they are computed."""
    model, lm = traced("llama")
    edit = steer.ResidualEdit(Site("resid_post", 1), vectors_for("llama", Site("resid_post", 1)), "all")
    sites = [Site("resid_post", 2), Site("resid_pre", 0), Site("resid_post", 1)]
    with torch.no_grad(), lm.steered(edits=[edit], prompt_lengths=LENGTHS) as steering, model.trace() as tracer:
        with tracer.invoke(dict(BATCH)):
            by_nnsight.write(model, steering)
        with tracer.invoke():
            found = by_nnsight.activations(model, lm, sites).save()
    with torch.no_grad(), model.trace(dict(BATCH)):
        before = by_nnsight.activations(model, lm, sites).save()
    difference = {site: (found[site] - before[site])[REAL] for site in sites}
    assert_close(difference[Site("resid_post", 1)], edit.vectors[:, None].expand(-1, 5, -1)[REAL])
    assert difference[Site("resid_post", 2)].abs().max() > 0.1
    assert not difference[Site("resid_pre", 0)].any()


def test_what_the_peers_show_of_steers_own_hooks() -> None:
    """As docs/interop.md says: at an output the value before the edit, at an input the value after it."""
    bridge, bridged = lens("llama")
    model, lm = traced("llama")
    for name, shown in (("resid_post", 0.0), ("attn_out", 0.0), ("resid_mid", 1.0), ("z", 1.0)):
        site = Site(name, 1)
        vectors = vectors_for("llama", site)
        edit = steer.ResidualEdit(site, vectors, "all")

        def read_both(site: Site = site) -> tuple[Tensor, Tensor]:
            _, cached = bridge.run_with_cache(BATCH["input_ids"], attention_mask=BATCH["attention_mask"])
            with torch.no_grad(), model.trace(dict(BATCH)):
                found = by_nnsight.activations(model, lm, [site]).save()
            return by_lens.activations(bridge, cached, [site])[site], found[site]

        before = read_both()
        with bridged.steered(edits=[edit], prompt_lengths=LENGTHS), lm.steered(edits=[edit], prompt_lengths=LENGTHS):
            after = read_both()
        for one, other in zip(before, after, strict=True):
            assert_close((other - one)[REAL], shown * vectors[:, None].expand(-1, 5, -1)[REAL])


def test_what_was_read_before_an_edit_in_place_stays() -> None:
    model, lm = traced("llama")
    site = Site("resid_mid", 1)
    edit = steer.ResidualEdit(site, vectors_for("llama", site), "all")
    with torch.no_grad(), model.trace(dict(BATCH)):
        before = by_nnsight.activations(model, lm, [site]).save()
    with torch.no_grad(), lm.steered(edits=[edit], prompt_lengths=LENGTHS) as steering, model.trace() as tracer:
        with tracer.invoke(dict(BATCH)):
            found = by_nnsight.activations(model, lm, [site]).save()
        with tracer.invoke():
            by_nnsight.write(model, steering)
    assert torch.equal(found[site], before[site])


def test_a_cache_of_a_steered_pass() -> None:
    bridge, lm = lens("llama")
    edit = steer.ResidualEdit(Site("resid_post", 1), vectors_for("llama", Site("resid_post", 1)), "all")
    name = by_lens.hook_name(bridge, edit.site)
    arguments = {"attention_mask": BATCH["attention_mask"], "names_filter": [name]}
    _, before = bridge.run_with_cache(BATCH["input_ids"], **arguments)
    with (
        lm.steered(edits=[edit], prompt_lengths=LENGTHS) as steering,
        bridge.hooks(fwd_hooks=by_lens.fwd_hooks(bridge, steering)),
    ):
        _, after = bridge.run_with_cache(BATCH["input_ids"], **arguments)
    difference = by_lens.activations(bridge, after, [edit.site])[edit.site] - before[name]
    assert_close(difference[REAL], edit.vectors[:, None].expand(-1, 5, -1)[REAL])


# The same states, and nothing left behind.


def test_a_state_is_fitted_by_one_and_applied_by_the_others(histories: list[steer.History]) -> None:
    """Also what is read through the bridge is the same state; its fingerprint is the model's."""
    style = steer.StyleVector(layer=1, neutral="field:bland")
    state = style.fit(plain("gpt2"), histories[0])
    users = {"states": [state, None, state], "dose": 0.8, "prompt_lengths": LENGTHS}
    with torch.no_grad(), plain("gpt2").steered(**users):
        ids = {**BATCH, "position_ids": (BATCH["attention_mask"].cumsum(1) - 1).clamp(min=0)}
        expected = plain("gpt2").model(**ids).logits

    bridge, lm = lens("gpt2")
    with torch.no_grad(), lm.steered(**users) as steering:
        hooks = by_lens.fwd_hooks(bridge, steering)
        logits = bridge.run_with_hooks(BATCH["input_ids"], attention_mask=BATCH["attention_mask"], fwd_hooks=hooks)
    assert_close(logits[REAL], expected[REAL], TOLERANCE)
    model, lm = traced("gpt2")
    with torch.no_grad(), lm.steered(**users) as steering, model.trace(dict(BATCH)):
        by_nnsight.write(model, steering)
        logits = model.output.logits.save()
    assert_close(logits[REAL], expected[REAL], TOLERANCE)

    bridge = bridge_of(tiny("gpt2"))
    with steer.wrap(bridge, tokenizer()) as lm:
        again = style.fit(lm, histories[0])
    assert again.provenance.model == state.provenance.model
    assert_close(again.tensors["resid_post[1]"], state.tensors["resid_post[1]"], TOLERANCE)


def test_parameters_keep_their_names(arch: str) -> None:
    model = tiny(arch)
    own = dict(model.named_parameters())
    assert dict(named_parameters(model)).items() == own.items()
    bridge_of(model)
    found = dict(named_parameters(model))
    assert set(found) == set(own) or set(own) - set(found) == {"lm_head.weight"}
    assert all(found[name] is own[name] for name in found)


@pytest.mark.parametrize("peer", [lens, traced])
def test_the_steered_block_leaves_the_model_as_it_was(peer: Callable[[str], tuple[Any, steer.FrozenLM]]) -> None:
    other, lm = peer("llama")
    assert lm.model is unwrap(other)[0]
    ids = torch.tensor(PROMPTS[:1])
    with torch.no_grad():
        before = lm.model(ids).logits
        edit = steer.ResidualEdit(Site("attn_out", 2), torch.ones(1, WIDTH), "all")
        with lm.steered(edits=[edit]) as steering:
            if peer is lens:
                other.run_with_hooks(ids, fwd_hooks=by_lens.fwd_hooks(other, steering))
            else:
                with other.trace(ids):
                    by_nnsight.write(other, steering)
            assert torch.equal(lm.model(ids).logits, before), "steer's own hooks are at rest"
        assert torch.equal(lm.model(ids).logits, before)


def test_wrapping_takes_the_model_inside() -> None:
    model, bridged = tiny("llama"), tiny("llama")
    with steer.wrap(nnsight.TransformersModel(model, tokenizer=tokenizer())) as lm:
        assert lm.model is model
        assert lm.tokenizer is tokenizer()
    with steer.wrap(nnsight.NNsight(model), tokenizer(bos=True)) as lm:
        assert lm.model is model
        assert lm.tokenizer is tokenizer(bos=True)
    with steer.wrap(bridge_of(bridged)) as lm:
        assert lm.model is bridged
        assert lm.tokenizer is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# What cannot be right is refused.


def test_a_bridge_that_was_booted_after_wrapping() -> None:
    model = tiny("llama")
    with steer.wrap(model) as lm:
        bridge_of(model)
        with pytest.raises(steer.SteerError, match="such as TransformerLens; put these"):
            read(lm, [Span(PROMPTS[0], 0, 5)], ["attn_out[0]"])


def test_processed_weights() -> None:
    """Without processing, compatibility mode is harmless."""
    edit = steer.ResidualEdit(Site("resid_mid", 1), vectors_for("gpt2", Site("resid_mid", 1)), "all")
    bridge = bridge_of(tiny("gpt2"))
    bridge.enable_compatibility_mode(no_processing=True, disable_warnings=True)
    with torch.no_grad(), steer.wrap(bridge) as lm, lm.steered(edits=[edit], prompt_lengths=LENGTHS) as steering:
        hooks = by_lens.fwd_hooks(bridge, steering)
        logits = bridge.run_with_hooks(BATCH["input_ids"], attention_mask=BATCH["attention_mask"], fwd_hooks=hooks)
    assert_close(logits[REAL], logits_by_steer(plain("gpt2"), [edit])[REAL], TOLERANCE)

    with steer.wrap(bridge) as lm:
        bridge._weights_processed = True
        with pytest.raises(steer.SteerError, match="no_processing=True"), lm.steered(edits=[edit]) as steering:
            by_lens.fwd_hooks(bridge, steering)
    with pytest.raises(steer.SteerError, match="no_processing=True"):
        steer.wrap(bridge)


def test_a_site_that_the_peer_does_not_have() -> None:
    bridge, _ = lens("gpt_neox")
    with pytest.raises(steer.SteerError, match=r"no blocks\.1\.hook_resid_mid"):
        by_lens.hook_name(bridge, "resid_mid[1]")
    with pytest.raises(steer.SteerError, match="names_filter"):
        by_lens.activations(bridge, {}, ["embed"])


def test_a_site_without_rows_in_nnsight() -> None:
    model, lm = traced("opt")

    def trace() -> None:
        with torch.no_grad(), model.trace(dict(BATCH)):
            by_nnsight.activations(model, lm, ["mlp_out[1]"])

    with pytest.raises(steer.SteerError, match=r"mlp_out\[1\]: this model has rows and positions in one dimension"):
        trace()


def test_another_model() -> None:
    edit = steer.ResidualEdit(Site("embed"), torch.ones(1, WIDTH), "all")
    bridge, _ = lens("llama")
    model, _ = traced("llama")

    def trace(steering: steer.Steering) -> None:
        with model.trace(torch.tensor(PROMPTS[:1])):
            by_nnsight.write(model, steering)

    with plain("llama").steered(edits=[edit]) as steering:
        with pytest.raises(steer.SteerError, match="over another model"):
            by_lens.fwd_hooks(bridge, steering)
        with pytest.raises(steer.SteerError, match="over another model"):
            trace(steering)
        # Which is steered still.
        plain("llama").model(torch.tensor(PROMPTS[:1]))


def test_some_of_the_rows() -> None:
    model, lm = traced("llama")
    edit = steer.ResidualEdit(Site("embed"), torch.ones(2, WIDTH), "all")

    def two_blocks() -> None:
        with lm.steered(edits=[edit]) as steering, model.trace() as tracer:
            with tracer.invoke(torch.tensor([[5, 6]])):
                by_nnsight.write(model, steering)
            with tracer.invoke(torch.tensor([[7, 8]])):
                pass

    with pytest.raises(steer.SteerError, match="1 rows came by, and 2 are bound"):
        two_blocks()


def test_functions_that_outlive_their_block() -> None:
    bridge, lm = lens("llama")
    edit = steer.ResidualEdit(Site("embed"), torch.ones(1, WIDTH), "all")
    ids = torch.tensor(PROMPTS[:1])
    with lm.steered(edits=[edit]) as steering:
        hooks = by_lens.fwd_hooks(bridge, steering)
        bridge.run_with_hooks(ids, fwd_hooks=hooks)
    with pytest.raises(steer.SteerError, match="block that these operators belong to has ended"):
        bridge.run_with_hooks(ids, fwd_hooks=hooks)


def test_contrasted_streams() -> None:
    bridge, lm = lens("llama")
    edits: list[Any] = [
        steer.StreamEdit.contrast(["context"], torch.ones(1)),
        steer.ResidualEdit(Site("embed"), torch.ones(1, WIDTH), "all"),
    ]
    with pytest.raises(steer.SteerError, match="streams need steer's own generation"), lm.steered(edits=edits) as s:
        by_lens.fwd_hooks(bridge, s)


def test_edits_that_were_handed_over_and_never_ran() -> None:
    bridge, lm = lens("llama")
    edit = steer.ResidualEdit(Site("embed"), torch.ones(1, WIDTH), "all")

    def forget() -> None:
        with lm.steered(edits=[edit]) as steering:
            by_lens.fwd_hooks(bridge, steering)
            bridge(torch.tensor(PROMPTS[:1]))

    with pytest.raises(steer.SteerError, match="never took part"):
        forget()


def test_models_that_cannot_be_wrapped() -> None:
    with pytest.raises(steer.SteerError, match="no transformers model in this NNsight"):
        steer.wrap(nnsight.NNsight(torch.nn.Linear(2, 2)))
    with torch.device("meta"):
        empty = type(tiny("llama"))(tiny("llama").config)
    with pytest.raises(steer.SteerError, match="dispatch=True"):
        steer.wrap(nnsight.NNsight(empty))


def test_neither_is_imported_unless_asked_for() -> None:
    code = (
        "import steer, steer.cli, steer.interop.transformer_lens, steer.interop.nnsight, sys;"
        "print(*({'transformer_lens', 'nnsight'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
