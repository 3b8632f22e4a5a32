"""Soft tokens in what an encoder reads: what the same embeddings give in transformers' own hands."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from models import ENCODER_DECODERS, EOS, VOCABULARY, WIDTH, tiny, tokenizer
from rows import assert_close
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import steer
from steer import Place, PrefixEdit, Site
from steer.influence import influence
from steer.inject import Edit
from steer.inverse import infer_lambda
from steer.likelihood import response_gradients, response_losses
from steer.read import record_span
from steer.score import row_losses, score

PROMPTS = ["greet me", "the weather, in detail?", "x", "say bye"]
LENGTHS = (2, 0, 3, 1)
# The decoder's part of the forward passes.
ANSWERS = torch.randint(3, VOCABULARY, (len(PROMPTS), 6), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=ENCODER_DECODERS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def lm(kind: str) -> Iterator[steer.FrozenLM]:
    with steer.wrap(tiny(kind), own_tokenizer(kind)) as lm:
        yield lm


@pytest.fixture
def t5() -> Iterator[steer.FrozenLM]:
    with steer.wrap(tiny("t5"), tokenizer(eos=True)) as lm:
        yield lm


def own_tokenizer(kind: str) -> Any:
    """T5's puts an EOS behind a text, BART's also a BOS in front of it."""
    return tokenizer(bos="bart" in kind, eos=True)


def soft_tokens(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, WIDTH, generator=generator) for length in lengths]


def embeddings(lm: steer.FrozenLM, prompt: str, soft: Tensor) -> Tensor:
    """What the encoder is to read of one row: soft tokens behind a BOS and in front of the rest."""
    ids = torch.tensor(lm.encode(prompt))
    with torch.no_grad():
        table = lm.model.get_input_embeddings()(ids)
    start = int(ids[0] == lm.tokenizer.bos_token_id)
    return torch.cat([table[:start], soft, table[start:]])


def padded(rows: Sequence[Tensor]) -> dict[str, Tensor]:
    return {
        "inputs_embeds": pad_sequence(rows, batch_first=True),
        "attention_mask": pad_sequence([torch.ones(len(row)).long() for row in rows], batch_first=True),
    }


@torch.no_grad()
def logits(lm: steer.FrozenLM, prompts: Sequence[steer.model.Prompt], edits: Sequence[Edit] = ()) -> Tensor:
    with lm.steered(states=[None] * len(prompts), edits=edits) as steering:
        return lm.model(**steering.prepare(prompts), decoder_input_ids=ANSWERS[: len(prompts)]).logits


@torch.no_grad()
def logits_by_hand(lm: steer.FrozenLM, prompts: Sequence[str], soft: Sequence[Tensor]) -> Tensor:
    rows = [embeddings(lm, prompt, own) for prompt, own in zip(prompts, soft, strict=True)]
    return lm.model(**padded(rows), decoder_input_ids=ANSWERS[: len(rows)]).logits


# What the prefix is.


def test_without_a_prefix_the_logits_are_the_models(kind: str) -> None:
    model, tokens = tiny(kind), own_tokenizer(kind)
    batch = tokens(PROMPTS, padding=True, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        plain = model(**batch, decoder_input_ids=ANSWERS).logits
    with steer.wrap(model, tokens) as lm:
        assert torch.equal(logits(lm, PROMPTS), plain)
        assert torch.equal(logits(lm, PROMPTS, [PrefixEdit.from_rows([None] * 4, WIDTH)]), plain)
        assert not torch.equal(logits(lm, PROMPTS, [PrefixEdit.from_rows(soft_tokens(), WIDTH)]), plain)


def test_a_prefix_is_what_transformers_makes_of_these_embeddings(lm: steer.FrozenLM) -> None:
    """Rows with prefixes of several lengths, one of them with none, in one batch and each alone."""
    soft = soft_tokens()
    found = logits(lm, PROMPTS, [PrefixEdit.from_rows(soft, WIDTH)])
    assert torch.equal(found, logits_by_hand(lm, PROMPTS, soft))
    for row, own in enumerate(soft):
        with lm.steered(edits=[PrefixEdit.from_rows([own], WIDTH)]) as steering, torch.no_grad():
            alone = lm.model(**steering.prepare(PROMPTS[row : row + 1]), decoder_input_ids=ANSWERS[row : row + 1])
        assert_close(alone.logits, found[row : row + 1])


def test_embeddings_of_real_tokens_are_these_tokens(lm: steer.FrozenLM) -> None:
    ids = [lm.encode(prompt) for prompt in PROMPTS]
    start = int(ids[0][0] == lm.tokenizer.bos_token_id)
    words = [lm.tokenizer(text, add_special_tokens=False).input_ids for text in ("ab", "", "xyz", "q")]
    longer = [own[:start] + word + own[start:] for own, word in zip(ids, words, strict=True)]
    with torch.no_grad():
        table = [lm.model.get_input_embeddings()(torch.tensor(word).long()) for word in words]
    assert torch.equal(logits(lm, ids, [PrefixEdit.from_rows(table, WIDTH)]), logits(lm, longer))


def test_nothing_of_the_decoder_is_touched(lm: steer.FrozenLM) -> None:
    """It embeds its tokens with the frozen table, also where that is the encoder's module."""
    decoder = lm.model.get_decoder()
    seen: list[Tensor] = []
    hook = decoder.embed_tokens.register_forward_hook(lambda module, args, output: seen.append(output))
    logits(lm, PROMPTS, [PrefixEdit.from_rows(soft_tokens(), WIDTH)])
    hook.remove()
    scale = getattr(decoder.embed_tokens, "embed_scale", 1.0)
    assert torch.equal(seen[-1], nn.functional.embedding(ANSWERS, decoder.embed_tokens.weight) * scale)


# What the rows have in front, and at two places in their prompts; the second has these the other way round.
FRONT, NAME, TASTE = ["", "Dear ", "Hi "], ["Ann", "", "Bo"], ["tea", "long walks", ""]
PLACED = [
    ["I am ", Place("name"), " and like ", Place("taste")],
    [Place("taste"), Place("name"), "?"],
    ["So. ", Place("name"), Place("taste"), "!"],
]


def test_tokens_at_places_are_a_text_with_these_tokens(lm: steer.FrozenLM) -> None:
    """What the tokenizer puts behind a text stays there. Batches of one block have places of their own."""

    def embedded(texts: Sequence[str], place: str | None) -> PrefixEdit:
        words = [lm.tokenizer(text, add_special_tokens=False).input_ids for text in texts]
        with torch.no_grad():
            rows = [lm.model.get_input_embeddings()(torch.tensor(word).long()) for word in words]
        return PrefixEdit.from_rows(rows, WIDTH, place)

    def answers(batch: dict[str, Tensor], **kwargs: Any) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            logits = lm.model(**batch, decoder_input_ids=ANSWERS[:3]).logits
        return logits, lm.model.generate(**batch, **kwargs, max_new_tokens=5, num_beams=2, do_sample=False)

    batches = [PLACED, [PLACED[1], PLACED[0], PLACED[2]]]
    with lm.steered(edits=[embedded(TASTE, "taste"), embedded(NAME, "name"), embedded(FRONT, None)]) as steering:
        found = [answers(steering.prepare(batch), **steering.generate_kwargs()) for batch in batches]
    for batch, (logits, tokens) in zip(batches, found, strict=True):
        texts = [
            front + "".join({Place("name"): name, Place("taste"): taste}.get(piece, piece) for piece in prompt)
            for front, name, taste, prompt in zip(FRONT, NAME, TASTE, batch, strict=True)
        ]
        expected = answers(lm.tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False))
        assert torch.equal(logits, expected[0])
        assert torch.equal(tokens, expected[1])


# Generation.


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False},
        {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
        {"do_sample": True, "num_return_sequences": 2},
        {"do_sample": False, "cache_implementation": "static"},
        {"do_sample": False, "use_cache": False},
    ],
    ids=["greedy", "beams", "samples", "static", "uncached"],
)
def test_generation_is_that_from_these_embeddings(lm: steer.FrozenLM, settings: dict[str, Any]) -> None:
    soft = soft_tokens()
    # As a static cache, on some devices, would compile.
    settings = settings | {"max_new_tokens": 5, "disable_compile": True}
    torch.manual_seed(0)
    found = lm.generate_tokens(PROMPTS, edits=[PrefixEdit.from_rows(soft, WIDTH)], **settings)
    rows = [embeddings(lm, prompt, own) for prompt, own in zip(PROMPTS, soft, strict=True)]
    torch.manual_seed(0)
    assert found == lm.model.generate(**padded(rows), **settings)[:, 1:].tolist()
    assert found != lm.generate_tokens(PROMPTS, **settings)


def test_rows_are_generated_as_if_they_were_alone(lm: steer.FrozenLM) -> None:
    soft = soft_tokens()
    for settings in ({}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2, "seeds": [3, 4, 5, 6]}):
        copies = settings.get("num_return_sequences", 1)
        found = lm.generate_tokens(PROMPTS, edits=[PrefixEdit.from_rows(soft, WIDTH)], max_new_tokens=6, **settings)
        for row, own in enumerate(soft):
            seeds = {"seeds": settings["seeds"][row : row + 1]} if "seeds" in settings else {}
            alone = lm.generate_tokens(
                PROMPTS[row : row + 1], edits=[PrefixEdit.from_rows([own], WIDTH)], max_new_tokens=6, **settings | seeds
            )
            assert alone == found[row * copies : (row + 1) * copies]


def test_answers_end_before_the_token_that_ends_them(t5: steer.FrozenLM) -> None:
    edits = [PrefixEdit.from_rows(soft_tokens(), WIDTH)]
    whole = t5.generate_tokens(PROMPTS, edits=edits, max_new_tokens=8)
    end = whole[0][3]
    expected = [row[: row.index(end)] if end in row else row for row in whole]
    assert t5.generate_tokens(PROMPTS, edits=edits, max_new_tokens=8, eos_token_id=end) == expected
    assert t5.generate(PROMPTS, edits=edits, max_new_tokens=8) == t5.tokenizer.batch_decode(
        whole, skip_special_tokens=True
    )


def test_prefixes_that_depend_on_the_prompt(t5: steer.FrozenLM) -> None:
    """Also of several batches in one block, each with its own soft tokens."""

    def of(prompts: Sequence[str]) -> Tensor:
        return torch.stack([soft_tokens([3], seed=sum(map(ord, text)))[0] for text in prompts])

    asking = steer.PromptPrefix(of, torch.tensor(LENGTHS), WIDTH)
    with t5.steered(edits=[asking]) as steering:
        for prompts in (PROMPTS, PROMPTS[::-1]):
            # The beams that transformers makes of an encoder's rows need nothing from steer.
            for kwargs in (steering.generate_kwargs(), {"num_beams": 2}):
                settings = {"max_new_tokens": 4, "do_sample": False} | kwargs
                found = t5.model.generate(**steering.prepare(prompts), **settings)
                fixed = zip(of(prompts), LENGTHS, strict=True)
                rows = [embeddings(t5, text, own[:n]) for text, (own, n) in zip(prompts, fixed, strict=True)]
                settings.pop("custom_generate", None)
                # Embeddings given by hand pass by the hooks.
                expected = t5.model.generate(**padded(rows), **settings)
                assert torch.equal(found, expected)


# Likelihood.


def spans_of(lm: steer.FrozenLM) -> list[steer.read.Span]:
    answers = ["hello!", "rain and more rain", "y", "bye now"]
    return [record_span(lm, steer.Record("ann", a, p)) for a, p in zip(answers, [*PROMPTS[:3], None], strict=True)]


def test_likelihoods_are_transformers_losses(lm: steer.FrozenLM) -> None:
    """A response is what a target is in training: with an EOS that counts. Without a prompt the encoder reads none."""
    spans, soft = spans_of(lm), soft_tokens()
    sums, counts = response_losses(lm, spans, [PrefixEdit.from_rows(soft, WIDTH)])
    for row, (span, prompt) in enumerate(zip(spans, [*PROMPTS[:3], ""], strict=True)):
        labels = torch.tensor([lm.tokenizer(["hello!", "rain and more rain", "y", "bye now"][row]).input_ids])
        assert labels[0, -1] == EOS
        assert int(counts[row]) == labels.shape[1] == span.end - span.start
        ids = torch.tensor(lm.tokenizer(prompt).input_ids)
        with torch.no_grad():
            table = lm.model.get_input_embeddings()(ids)
            start = int(ids[0] == lm.tokenizer.bos_token_id)
            read = torch.cat([table[:start], soft[row], table[start:]])[None]
            loss = lm.model(inputs_embeds=read, labels=labels).loss
        assert_close(sums[row], loss * labels.shape[1])
        assert_close(row_losses(lm, span, [PrefixEdit.from_rows([soft[row]] * 3, WIDTH)], 3), sums[row].expand(3))
        assert_close(row_losses(lm, span, [], 2), response_losses(lm, [span] * 2, [])[0])


def test_gradients_reach_the_prefix_and_nothing_else(lm: steer.FrozenLM) -> None:
    spans, soft = spans_of(lm)[:3], [own.requires_grad_() for own in soft_tokens((2, 1, 3))]
    losses, _ = response_losses(lm, spans, [PrefixEdit.from_rows(soft, WIDTH)])
    found = torch.autograd.grad(losses.sum(), soft)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in lm.model.parameters())
    for span, prompt, own, gradient in zip(spans, PROMPTS[:3], soft, found, strict=True):
        labels = torch.tensor([span.ids[span.start :]])
        loss = lm.model(inputs_embeds=embeddings(lm, prompt, own)[None], labels=labels).loss * labels.shape[1]
        assert_close(gradient, torch.autograd.grad(loss, own)[0])


def test_long_records_are_cut_on_both_sides(t5: steer.FrozenLM) -> None:
    """What is left of a prompt ends as it did; a response that goes on does not end."""
    span = record_span(t5, steer.Record("ann", "b" * 30, "a" * 30 + "z"), max_tokens=12)
    z, b = (t5.tokenizer(letter).input_ids[0] for letter in "zb")
    assert span.start == 6
    assert span.ids[4:6] == [z, EOS]
    assert span.ids[span.start :] == [b] * 6


def test_an_encoder_must_have_something_to_read(histories: list[steer.History]) -> None:
    without = steer.History("ann", tuple(replace(record, prompt=None) for record in histories[0]))
    with steer.wrap(tiny("t5"), tokenizer()) as lm, pytest.raises(steer.SteerError, match="'ann': there is no prompt"):
        steer.PrefixTuning().fit(lm, without)


def test_prefix_tuning(t5: steer.FrozenLM, histories: list[steer.History]) -> None:
    before, fingerprint = [p.clone() for p in t5.model.parameters()], t5.fingerprint
    losses: list[float] = []
    method = steer.PrefixTuning(length=3, steps=15, learning_rate=0.2)
    states = [method.fit(t5, history, on_step=lambda step, loss: losses.append(loss)) for history in histories]
    assert losses[14] < losses[0]
    assert losses[29] < losses[15]
    assert all(map(torch.equal, t5.model.parameters(), before))
    assert t5.fingerprint == fingerprint
    together = method.fit_many(t5, histories)
    for state, other in zip(states, together, strict=True):
        assert_close(other.tensors["prefix"], state.tensors["prefix"], 1e-3)
    # They answer for their users, and `score` takes them.
    prompts = [record.prompt for record in histories[0]]
    edits = PrefixEdit.from_rows([states[0].tensors["prefix"], None, states[1].tensors["prefix"]], WIDTH)
    bound = t5.generate_tokens(prompts, states=[states[0], None, states[1]], max_new_tokens=6)
    assert bound == t5.generate_tokens(prompts, edits=[edits], max_new_tokens=6)
    held_out = [
        steer.History(h.user_id, tuple(steer.Record(h.user_id, r.response + "!", r.prompt) for r in h))
        for h in histories
    ]
    scores = score(t5, held_out, dict(zip(("ann", "bob"), states, strict=True)))
    for found, state, history in zip(scores.users, states, held_out, strict=True):
        spans = [record_span(t5, record) for record in history]
        edit = PrefixEdit.from_rows([state.tensors["prefix"]] * len(spans), WIDTH)
        sums, counts = response_losses(t5, spans, [edit])
        assert found.own == pytest.approx(float(sums.sum() / counts.sum()), rel=1e-4)
        assert found.tokens == int(counts.sum())
        assert found.own < found.base


# The model.


def test_the_fingerprint_sees_the_decoder(t5: steer.FrozenLM) -> None:
    other = tiny("t5")
    with torch.no_grad():
        for parameter in other.decoder.block.parameters():
            parameter.mul_(2)
    with steer.wrap(other, tokenizer(eos=True)) as changed, steer.wrap(tiny("t5")) as same:
        assert changed.fingerprint != t5.fingerprint == same.fingerprint


def test_closing_leaves_the_model_as_it_was(kind: str) -> None:
    model = tiny(kind)
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_state_dict_hooks")

    def manners() -> list[Any]:
        found = [[len(getattr(module, kind)) for kind in hooks] for module in model.modules()]
        return [found, [p.requires_grad for p in model.parameters()], list(model.state_dict())]

    before = manners()
    for _ in range(2):
        with steer.wrap(model, own_tokenizer(kind)) as lm:
            logits(lm, PROMPTS, [PrefixEdit.from_rows(soft_tokens(), WIDTH)])
            assert manners() != before
        assert manners() == before


def test_load(t5: steer.FrozenLM, tmp_path: Any) -> None:
    t5.model.save_pretrained(tmp_path)
    t5.tokenizer.save_pretrained(tmp_path)
    with steer.load(str(tmp_path)) as loaded:
        assert loaded.fingerprint == t5.fingerprint
        assert loaded.generate(PROMPTS, max_new_tokens=4) == t5.generate(PROMPTS, max_new_tokens=4)


# What such a model cannot do.


def test_everything_else_is_refused_before_any_forward_pass(
    t5: steer.FrozenLM, llama: steer.FrozenLM, histories: list[steer.History]
) -> None:
    passes: list[None] = []
    for module in (t5.model.encoder, t5.model.decoder):
        module.register_forward_pre_hook(lambda module, args: passes.append(None))
    site, vectors = Site("resid_post", 1), torch.ones(1, WIDTH)
    history, span = histories[0], record_span(t5, histories[0].records[0])
    layer = steer.inject.GatedCrossAttention(WIDTH, 8, heads=4)

    def generate(*edits: Edit) -> Callable[[], object]:
        return lambda: t5.generate(PROMPTS[:1], edits=list(edits))

    refused: list[Callable[[], object]] = [
        generate(steer.ResidualEdit(site, vectors)),
        generate(steer.ResidualEdit(Site("embed"), vectors, "all")),
        generate(steer.MemoryEdit.from_rows(site, layer, [torch.ones(2, 8)])),
        generate(steer.StreamEdit.contrast(["I sail."], 1.5), PrefixEdit.from_rows([vectors], WIDTH)),
        generate(steer.KeyValueEdit.from_rows([steer.KeyValues(torch.ones(3, 4, 2, 12), torch.ones(3, 4, 2, 12))])),
        lambda: steer.key_values_of(t5, [vectors]),
        lambda: t5.key_value_shape,
        lambda: t5.declare("attn_out[0]"),
        lambda: steer.wrap(tiny("t5"), sites=["resid_post[0]"]),
        lambda: steer.read(t5, [span], [site]),
        lambda: response_gradients(t5, [span], [site]),
        lambda: row_losses(t5, span, [steer.StreamEdit.contrast(["I sail."], 1.5)], 1),
        lambda: influence(t5, "greet me", "hello", ["I sail."]),
        lambda: infer_lambda(t5, ["greet me"], ["hello"], ["I sail."]),
        lambda: steer.StyleVector(layer=1).fit(t5, history),
        lambda: steer.TrainedVector(layer=1).fit(t5, history),
        lambda: t5.generate(PROMPTS[:1], states=[steer.CoS(records=1).fit(t5, history)]),
    ]
    for attempt in refused:
        with pytest.raises(steer.SteerError, match="soft tokens in what its encoder reads"):
            attempt()
    assert not passes
    expert = steer.ProxyTuning("tuned", "untuned").state()
    with pytest.raises(steer.SteerError, match="the model 'tuned' has an encoder"):
        llama.generate(PROMPTS[:1], states=[expert], models={"tuned": t5, "untuned": t5})


def test_a_batch_that_was_not_prepared_is_refused(t5: steer.FrozenLM) -> None:
    edit = PrefixEdit.from_rows(soft_tokens(), WIDTH)
    batch = t5.tokenizer(PROMPTS, padding=True, return_tensors="pt", return_token_type_ids=False)
    with t5.steered(edits=[edit]) as steering:
        with pytest.raises(steer.SteerError, match=r"make the batch with steering\.prepare"):
            t5.model.generate(**batch, **steering.generate_kwargs())
        prepared = steering.prepare(PROMPTS)
        other = prepared | {"input_ids": prepared["input_ids"] + 1}
        with pytest.raises(steer.SteerError, match=r"make the batch with steering\.prepare"):
            t5.model.generate(**other, **steering.generate_kwargs(), max_new_tokens=2)
        t5.model.generate(**prepared, **steering.generate_kwargs(), max_new_tokens=2)


def test_what_is_only_half_such_a_model_is_no_such_model() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    alone = AutoModelForCausalLM.from_config(AutoConfig.for_model("bart", d_model=16, decoder_layers=1, vocab_size=20))
    with pytest.raises(steer.SteerError, match="no description of the architecture 'bart'"):
        steer.wrap(alone)
