"""Each method against its formula, computed by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from models import LAYERS, VOCABULARY, WIDTH, tiny, tokenizer
from rows import Row, assert_close, cross_attention, generate
from torch import Tensor

import steer
from steer.likelihood import batches_of, negative_log_likelihood, response_gradients, response_losses
from steer.read import Pool, Span, read, record_span
from steer.score import row_losses

LAYER = 1
SITE = steer.Site("resid_post", LAYER)


def by_hand(lm: steer.FrozenLM, history: steer.History, texts: Sequence[str], pool: str) -> tuple[Tensor, Tensor]:
    """The mean of one vector per text, and each text's median norm, from transformers' own capture."""
    vectors, norms = [], []
    for record, text in zip(history, texts, strict=True):
        head = [] if record.prompt is None else lm.tokenizer(record.prompt).input_ids
        ids = head + lm.tokenizer(text).input_ids
        with torch.no_grad():
            hidden = lm.model(torch.tensor([ids]), output_hidden_states=True).hidden_states[LAYER + 1][0]
        # Without the first token of a sequence.
        own = hidden[max(len(head), 1) :]
        vectors.append(own.mean(0) if pool == "mean" else own[-1])
        norms.append(own.norm(dim=1).median())
    return torch.stack(vectors).mean(0), torch.stack(norms)


def own_texts(history: steer.History) -> list[str]:
    return [record.response for record in history]


# StyleVector.


@pytest.mark.parametrize("pool", ["mean", "last"])
def test_a_style_vector_is_the_users_mean_minus_the_neutral_one(
    lm: steer.FrozenLM, histories: list[steer.History], pool: Pool
) -> None:
    history = histories[0]
    state = steer.StyleVector(layer=[0, LAYER], neutral="field:bland", pool=pool).fit(lm, history)
    user, norms = by_hand(lm, history, own_texts(history), pool)
    neutral, _ = by_hand(lm, history, ["ok, fine"] * 3, pool)
    assert_close(state.tensors[str(SITE)], user - neutral)
    assert state.provenance.calibration["reference_norm"][str(SITE)] == pytest.approx(norms.mean().item(), rel=1e-4)
    assert state.provenance.sites == ("resid_post[0]", "resid_post[1]")
    assert state.provenance.records == tuple(record.id for record in history)
    assert state.provenance.model == lm.fingerprint


def test_records_without_prompts_leave_out_their_first_token(lm: steer.FrozenLM) -> None:
    history = steer.History("u", tuple(steer.Record("u", text, fields={"n": "plain"}) for text in ("ABC DEF", "XY")))
    state = steer.StyleVector(layer=LAYER, neutral="field:n").fit(lm, history)
    user, neutral = (by_hand(lm, history, texts, "mean")[0] for texts in (own_texts(history), ["plain"] * 2))
    assert_close(state.tensors[str(SITE)], user - neutral)


def test_neutral_model_is_the_models_own_answers(
    llama: steer.FrozenLM, histories: list[steer.History], tmp_path: Path
) -> None:
    history = histories[0]
    answers = llama.generate([r.prompt for r in history], max_new_tokens=5, do_sample=False)
    path = tmp_path / "answers.jsonl"
    path.write_text(
        "".join(json.dumps({"id": r.id, "response": a}) + "\n" for r, a in zip(history, answers, strict=True))
    )
    own = steer.StyleVector(layer=LAYER, neutral="model", neutral_tokens=5).fit(llama, history)
    read_from_file = steer.StyleVector(layer=LAYER, neutral=f"file:{path}").fit(llama, history)
    expected = by_hand(llama, history, own_texts(history), "mean")[0] - by_hand(llama, history, answers, "mean")[0]
    assert_close(own.tensors[str(SITE)], expected)
    assert_close(read_from_file.tensors[str(SITE)], expected)


def test_neutral_population_is_the_mean_over_users(llama: steer.FrozenLM, histories: list[steer.History]) -> None:
    # The second user has more records, and counts no more for it.
    histories = [steer.History("ann", histories[0].records[:1]), histories[1]]
    method = steer.StyleVector(layer=LAYER, neutral="population")
    artifact = method.train(llama, histories)
    means = [by_hand(llama, history, own_texts(history), "mean")[0] for history in histories]
    assert artifact is not None
    assert_close(artifact.tensors[str(SITE)], (means[0] + means[1]) / 2)
    for history, mean in zip(histories, means, strict=True):
        assert_close(method.fit(llama, history).tensors[str(SITE)], mean - (means[0] + means[1]) / 2)


def test_a_style_vector_leads_towards_the_user(llama: steer.FrozenLM, histories: list[steer.History]) -> None:
    """The state after steering has more of the user's direction, in proportion to the strength."""
    state = steer.StyleVector(layer=LAYER, neutral="field:bland").fit(llama, histories[0])
    direction = state.tensors[str(SITE)] / state.tensors[str(SITE)].norm()
    ids = torch.tensor([llama.encode("greet me")])
    parts = []
    for strength in (-1.0, 0.0, 1.0, 2.0):
        with torch.no_grad(), llama.steered(states=[state], strength=strength, prompt_lengths=[ids.shape[1]]):
            hidden = llama.model(ids, output_hidden_states=True).hidden_states[LAYER + 1]
        parts.append((hidden[0, -1] @ direction).item())
    steps = [after - before for before, after in pairwise(parts)]
    assert steps == pytest.approx([state.tensors[str(SITE)].norm().item()] * 3, rel=1e-3)


def test_style_vectors_that_cannot_be(llama: steer.FrozenLM, histories: list[steer.History], tmp_path: Path) -> None:
    history = histories[0]
    for neutral in ("nobody", "field", "field:", "model:x", "file"):
        with pytest.raises(steer.SteerError, match="is none of model, population, field:NAME or file:PATH"):
            steer.StyleVector(layer=1, neutral=neutral)
    fits = {
        "population": r"call train\(",
        "field:absent": "has no text in 'absent'",
        f"file:{tmp_path}/none.jsonl": "expected JSONL lines",
    }
    for neutral, message in fits.items():
        with pytest.raises(steer.SteerError, match=message):
            steer.StyleVector(layer=1, neutral=neutral).fit(llama, history)
    with pytest.raises(steer.SteerError, match="there is 1"):
        steer.StyleVector(layer=1, neutral="population").train(llama, histories[:1])
    with pytest.raises(steer.SteerError, match="has no records"):
        steer.StyleVector(layer=1).fit(llama, steer.History("ann", ()))
    with pytest.raises(steer.SteerError, match=f"the model has {LAYERS} layers"):
        steer.StyleVector(layer=LAYERS, neutral="field:bland").fit(llama, history)
    with pytest.raises(steer.SteerError, match="some records have none"):
        steer.StyleVector(layer=1).fit(llama, steer.History("u", (steer.Record("u", "text"),)))
    (tmp_path / "answers.jsonl").write_text('{"id": "1", "response": "x"}\n')
    with pytest.raises(steer.SteerError, match="has no response for record"):
        steer.StyleVector(layer=1, neutral=f"file:{tmp_path}/answers.jsonl").fit(llama, history)


# CoS.


def test_cos_makes_a_context_of_the_newest_records(llama: steer.FrozenLM, histories: list[steer.History]) -> None:
    state = steer.CoS(lam=0.7, records=2).fit(llama, histories[0])
    assert state.data["lam"] == 0.7
    assert state.data["context"].split("\n\n")[1:3] == ["RAIN! RAIN! RAIN!", "BYE BYE NOW!!"]
    assert state.provenance.records == tuple(record.id for record in histories[0].records[1:])
    assert state.provenance.model is None
    assert state.tensors == {}


def test_every_row_keeps_its_own_lambda(llama: steer.FrozenLM) -> None:
    states = [steer.CoS(lam=lam).state("I am a pirate.") for lam in (0.0, 2.0)]
    together = llama.generate_tokens(["hello"] * 3, states=[*states, None], max_new_tokens=6)
    alone = [llama.generate_tokens(["hello"], states=[state], max_new_tokens=6)[0] for state in [*states, None]]
    assert together == alone
    assert len({tuple(tokens) for tokens in alone}) == 3


def test_contexts_that_cannot_be(llama: steer.FrozenLM) -> None:
    with pytest.raises(steer.SteerError, match="lam must be finite"):
        steer.CoS(lam=float("inf"))
    with pytest.raises(steer.SteerError, match="a context is empty"):
        steer.CoS().state(" \n")
    with pytest.raises(steer.SteerError, match="no records to make a context of"):
        steer.CoS().fit(llama, steer.History("ann", ()))


# Likelihood, and prefixes trained on it.


def test_losses_are_the_cross_entropy_of_the_responses(lm: steer.FrozenLM, histories: list[steer.History]) -> None:
    """Row by row, without padding, by transformers' own loss."""
    spans = [record_span(lm, record) for record in histories[0]] + [Span(lm.encode("whole text"), 0, 10)]
    sums, counts = response_losses(lm, spans, [steer.ResidualEdit(SITE, torch.zeros(4, WIDTH))])
    for row, span in enumerate(spans):
        ids = torch.tensor([span.ids])
        labels = ids.clone()
        labels[0, : span.start] = -100
        with torch.no_grad():
            expected = lm.model(ids, labels=labels).loss
        assert_close(sums[row] / counts[row], expected)
        assert counts[row] == span.end - max(span.start, 1)


def test_a_span_may_end_before_its_text_does(lm: steer.FrozenLM) -> None:
    """`row_losses` scores prefixes, here of no length, by `response_losses`, and anything else in a way of its own."""
    ids = lm.encode("a text that goes on and on")
    whole, vectors = Span(ids, 5, 12), torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0))
    for edits in ([steer.ResidualEdit(SITE, vectors)], [steer.PrefixEdit.from_rows([None, None], WIDTH)]):
        expected, counts = response_losses(lm, [Span(ids[:12], 5, 12), Span(ids[:4], 2, 4)], edits)
        losses, _ = response_losses(lm, [whole, Span(ids, 2, 4)], edits)
        assert counts.tolist() == [7, 2]
        assert_close(losses, expected)
    none = steer.PrefixEdit.from_rows([None], WIDTH)
    assert_close(row_losses(lm, whole, [none], 1), row_losses(lm, whole, [], 1))
    told: list[int] = []
    gradients, _ = response_gradients(lm, [whole] * 2, [SITE], batch_tokens=24, on_progress=told.append)
    assert_close(gradients[SITE], response_gradients(lm, [Span(ids[:12], 5, 12)] * 2, [SITE])[0][SITE])
    assert told == [2]


def test_losses_are_those_of_the_steered_model(lm: steer.FrozenLM, histories: list[steer.History]) -> None:
    """The vectors begin at the token that predicts the response's first, as in generation."""
    spans = [record_span(lm, record) for record in histories[0]]
    vectors = 3 * torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))
    sums, _ = response_losses(lm, spans, [steer.ResidualEdit(SITE, vectors)])
    for row, span in enumerate(spans):
        generated = generate_forced(lm, span, steer.ResidualEdit(SITE, vectors[row : row + 1]))
        expected = -generated.log_softmax(-1)[range(len(generated)), list(span.ids[span.start :])].sum()
        assert_close(sums[row], expected)


def generate_forced(lm: steer.FrozenLM, span: Span, edit: steer.ResidualEdit) -> Tensor:
    """Raw logits of generation that is made to say the span's text."""
    target = list(span.ids[span.start :])

    def force(input_ids: Tensor, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, float("-inf"))
        forced[:, target[input_ids.shape[1] - span.start]] = 0
        return forced

    with lm.steered(edits=[edit]) as steering:
        output = lm.model.generate(
            **steering.prepare([list(span.ids[: span.start])]),
            **steering.generate_kwargs(),
            logits_processor=[force],
            max_new_tokens=len(target),
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    assert output.sequences[0, span.start :].tolist() == target
    return torch.cat(output.logits)


def test_a_prefix_of_real_tokens_is_these_tokens(lm: steer.FrozenLM) -> None:
    tokens = [lm.tokenizer("Dear").input_ids, lm.tokenizer("Hi").input_ids, []]
    embed = lm.model.get_input_embeddings()
    prefixes = [embed(torch.tensor(ids)) if ids else None for ids in tokens]
    prompts = ["a prompt", "a longer prompt", "short"]
    rows = [Row(prompt) for prompt in prompts]
    soft = generate(lm, rows, cross_attention(), edits=[steer.PrefixEdit.from_rows(prefixes, WIDTH)])
    hard = generate(
        lm,
        [Row(f"{head}{prompt}") for head, prompt in zip(["Dear", "Hi", ""], prompts, strict=True)],
        cross_attention(),
        edits=[steer.ResidualEdit(SITE, torch.zeros(3, WIDTH))],
    )
    assert_close(soft.logits, hard.logits)
    assert torch.equal(soft.tokens, hard.tokens)


def test_a_prefix_of_real_tokens_after_a_bos() -> None:
    with steer.wrap(tiny("gpt2"), tokenizer(bos=True)) as lm:
        prefix = lm.model.get_input_embeddings()(torch.tensor(tokenizer()("Dear ").input_ids))
        soft = generate(lm, [Row("you")], cross_attention(), edits=[steer.PrefixEdit.from_rows([prefix], WIDTH)])
        hard = generate(lm, [Row("Dear you")], cross_attention())
    assert_close(soft.logits, hard.logits)


def test_two_prefixes_stand_one_after_the_other(llama: steer.FrozenLM) -> None:
    one, two = torch.randn(2, WIDTH), torch.randn(3, WIDTH)
    edits = [steer.PrefixEdit.from_rows([one, None], WIDTH), steer.PrefixEdit.from_rows([two, two], WIDTH)]
    both = steer.PrefixEdit.from_rows([torch.cat([one, two]), two], WIDTH)
    rows = [Row("hello"), Row("you")]
    assert torch.equal(
        generate(llama, rows, cross_attention(), edits=edits).logits,
        generate(llama, rows, cross_attention(), edits=[both]).logits,
    )


def test_prefix_tuning_lowers_the_loss_on_what_the_user_wrote(
    lm: steer.FrozenLM, histories: list[steer.History]
) -> None:
    losses: list[float] = []
    method = steer.PrefixTuning(length=3, steps=15, learning_rate=0.2)
    state = method.fit(lm, histories[0], on_step=lambda step, loss: losses.append(loss))
    spans = [record_span(lm, record) for record in histories[0]]
    edits = steer.PrefixTuning.bind(lm, [state] * 3, state, None)
    with torch.no_grad():
        plain = negative_log_likelihood(lm, spans, [steer.ResidualEdit(SITE, torch.zeros(3, WIDTH))])
        tuned = negative_log_likelihood(lm, spans, edits)
    assert tuned < losses[0] - 0.2
    assert tuned < plain
    assert state.tensors["prefix"].shape == (3, WIDTH)
    assert not state.tensors["prefix"].requires_grad
    # The same seed gives the same prefix.
    again = method.fit(lm, histories[0])
    assert torch.equal(again.tensors["prefix"], state.tensors["prefix"])


def test_prefixes_begin_at_a_common_one(llama: steer.FrozenLM, histories: list[steer.History]) -> None:
    settings: dict[str, Any] = {"length": 3, "shared_steps": 15, "learning_rate": 0.2, "batch": 4}
    method, losses = steer.PrefixTuning(**settings, steps=0), []
    artifact = method.train(llama, histories, on_step=lambda step, loss: losses.append(loss))
    assert artifact is not None
    assert losses[-1] < losses[0] - 0.2
    common = artifact.tensors["prefix"]
    # Without a step, and for who wrote nothing whatever the steps, the common prefix is the user's.
    for made, history in ((method, histories[0]), (steer.PrefixTuning(**settings), steer.History("nobody", ()))):
        made.use(llama, artifact)
        state = made.fit(llama, history)
        assert torch.equal(state.tensors["prefix"], common)
        assert state.provenance.artifact == artifact.hash
    own = steer.PrefixTuning(**settings, steps=1)
    own.use(llama, artifact)
    silent, wrote = own.fit_many(llama, [steer.History("nobody", ()), histories[0]])
    assert torch.equal(silent.tensors["prefix"], common)
    # One step of Adam moves each number by the learning rate.
    moved = (wrote.tensors["prefix"] - common).abs()
    rows = torch.stack([llama.model.get_input_embeddings().weight[i] for i in _drawn(llama, 3)])
    assert_close(moved, torch.full_like(moved, 0.2 * float(rows.square().mean().sqrt())), 1e-3)
    with pytest.raises(steer.SteerError, match="the common prefix comes first: call train"):
        steer.PrefixTuning(**settings).fit(llama, histories[0])
    with pytest.raises(steer.SteerError, match="no records to train the common prefix on"):
        steer.PrefixTuning(**settings).train(llama, [])
    longer = steer.PrefixTuning(**settings | {"length": 4})
    longer.use(llama, artifact)
    with pytest.raises(steer.SteerError, match="has 3 soft tokens; give length=3, or train it again"):
        longer.fit(llama, histories[0])


def _drawn(lm: steer.FrozenLM, count: int) -> list[int]:
    table = lm.model.get_input_embeddings()
    return torch.randint(table.num_embeddings, (count,), generator=torch.Generator().manual_seed(0)).tolist()


def test_a_prefix_is_kept_where_held_out_texts_liked_it_best(
    llama: steer.FrozenLM, histories: list[steer.History]
) -> None:
    settings: dict[str, Any] = {"length": 2, "shared_steps": 30, "steps": 10}
    artifact = steer.PrefixTuning(**settings, learning_rate=0.2).train(llama, histories)
    assert artifact is not None
    steps = {}
    for holdout in (0.0, 0.5):
        wild = steer.PrefixTuning(**settings, learning_rate=100.0, holdout=holdout)
        wild.use(llama, artifact)
        state = wild.fit(llama, histories[0])
        steps[holdout] = state.provenance.calibration["step"]
        assert torch.equal(state.tensors["prefix"], artifact.tensors["prefix"]) == (not steps[holdout])
    assert steps == {0.0: 10, 0.5: 0}


def test_prefixes_that_cannot_be(llama: steer.FrozenLM, histories: list[steer.History]) -> None:
    with pytest.raises(steer.SteerError, match="has no records to train a prefix on"):
        steer.PrefixTuning().fit(llama, steer.History("ann", ()))
    empty = steer.History("ann", (steer.Record("ann", "x"),))
    with pytest.raises(steer.SteerError, match="of 'ann': a text is too short to read"):
        steer.PrefixTuning().fit(llama, empty)


def test_batches_take_every_item_once_per_round() -> None:
    batches = list(batches_of(range(5), 2, 10, torch.Generator().manual_seed(0)))
    assert [len(batch) for batch in batches] == [2] * 10
    order = [item for batch in batches for item in batch]
    assert all(sorted(order[i : i + 5]) == list(range(5)) for i in range(0, 20, 5))
    small = list(batches_of(range(3), 8, 4, torch.Generator().manual_seed(0)))
    assert [sorted(batch) for batch in small] == [[0, 1, 2]] * 4


# User-LLM.


def test_a_memory_edit_is_gated_cross_attention(lm: steer.FrozenLM) -> None:
    """`h + tanh(gate) · XAttn(LN(h), memory)`, head by head, for memories of different lengths and for none."""
    layer, paths = cross_attention(gate=0.7), lm.attachment.architecture
    generator = torch.Generator().manual_seed(0)
    memories = [torch.randn(5, 20, generator=generator), None, torch.randn(1, 20, generator=generator)]
    ids = torch.randint(5, VOCABULARY, (3, 6), generator=generator)
    seen: list[Tensor] = []

    def keep(hidden: Tensor | tuple[Tensor, ...]) -> None:
        # Some blocks return a tuple, and OPT's second norm reads rows and positions as one dimension.
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        seen.append(hidden.clone().view(3, 6, WIDTH))

    # The residual stream after the edit: what the second norm reads, or what a parallel block returns.
    block = lm.attachment.blocks[LAYER]
    if paths.mid is None:
        block.register_forward_hook(lambda module, args, output: keep(output))
    else:
        block.get_submodule(paths.mid).register_forward_pre_hook(lambda module, args: keep(args[0]))
    lm.declare(lm.memory_site(steer.Site("resid_mid", LAYER)))
    for held in ([None] * 3, memories):
        edit = steer.MemoryEdit.from_rows(steer.Site("resid_mid", LAYER), layer, held)
        with torch.no_grad(), lm.steered(edits=[edit]):
            lm.model(ids)
    plain, steered = seen
    assert torch.equal(steered[1], plain[1])
    for row in (0, 2):
        memory = memories[row]
        assert memory is not None
        parts = []
        for query, key, value in zip(
            *(linear.weight.chunk(4) for linear in (layer.query, layer.key, layer.value)), strict=True
        ):
            scores = (layer.norm(plain[row]) @ query.T) @ (memory @ key.T).T / query.shape[0] ** 0.5
            parts.append(scores.softmax(-1) @ (memory @ value.T))
        added = torch.tanh(torch.tensor(0.7)) * torch.cat(parts, -1) @ layer.out.weight.T
        assert_close(steered[row], plain[row] + added)
        assert added.abs().max() > 0.1


def user_llm(**kwargs: object) -> steer.UserLLM:
    settings = {"layer": [0, 1], "read_layer": 1, "heads": 4, "steps": 10, "learning_rate": 0.05, "batch": 4} | kwargs
    return steer.UserLLM(**settings)  # type: ignore[arg-type]


def test_user_llm_opens_its_gates_and_lowers_the_loss(lm: steer.FrozenLM, histories: list[steer.History]) -> None:
    losses: list[float] = []
    method = user_llm(batch=6, steps=8)
    artifact = method.train(lm, histories, on_step=lambda step, loss: losses.append(loss))
    gates = [tensor for key, tensor in artifact.tensors.items() if key.endswith(".gate")]
    assert len(gates) == 2
    assert all(gate.abs() > 0.01 for gate in gates)
    assert losses[-1] < losses[0] - 0.1
    # Before the first step the gates are shut: the loss is that of the frozen model.
    spans = [record_span(lm, record) for history in histories for record in history]
    with torch.no_grad():
        plain = negative_log_likelihood(lm, spans, [steer.ResidualEdit(SITE, torch.zeros(6, WIDTH))])
    assert losses[0] == pytest.approx(plain.item(), rel=1e-4)


def test_a_record_is_predicted_from_the_users_other_records(
    llama: steer.FrozenLM, histories: list[steer.History], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Span, Tensor]] = []

    def spy(lm: steer.FrozenLM, spans: Sequence[Span], edits: Sequence[steer.MemoryEdit]) -> Tensor:
        seen.extend((span, edits[0].memory[row, : edits[0].lengths[row]]) for row, span in enumerate(spans))
        return negative_log_likelihood(lm, spans, edits)

    monkeypatch.setattr(steer.methods.user_llm, "negative_log_likelihood", spy)
    method = user_llm(steps=1, batch=6)
    method.train(llama, histories)
    assert len(seen) == 6
    for history in histories:
        memory = method.fit(llama, history).tensors["memory"]
        for i, record in enumerate(history):
            span = record_span(llama, record)
            given = next(held for other, held in seen if other.ids == span.ids)
            assert torch.equal(given, torch.cat([memory[:i], memory[i + 1 :]]))


def test_a_memory_is_one_scaled_mean_per_record(llama: steer.FrozenLM, histories: list[steer.History]) -> None:
    method = user_llm()
    artifact = method.train(llama, histories)
    state = method.fit(llama, histories[0])
    spans = [Span(ids := llama.tokenizer(text).input_ids, 0, len(ids)) for text in own_texts(histories[0])]
    reading = read(llama, spans, [SITE], pool="mean")[SITE]
    assert_close(state.tensors["memory"], reading.pooled / reading.norm * WIDTH**0.5)
    assert state.provenance.artifact == artifact.hash
    assert state.provenance.sites == ("resid_mid[0]", "resid_mid[1]")


def test_user_llm_survives_a_bank(lm: steer.FrozenLM, histories: list[steer.History], tmp_path: Path) -> None:
    method = user_llm()
    artifact = method.train(lm, histories)
    states = [method.fit(lm, history) for history in histories]
    prompts, settings = ["greet me", "say bye"], {"max_new_tokens": 6}
    direct = lm.generate_tokens(prompts, states=states, artifacts=[artifact], **settings)
    assert direct != lm.generate_tokens(prompts, **settings)
    bank = steer.Bank(tmp_path / "people.bank")
    bank.put_artifact(artifact)
    for history, state in zip(histories, states, strict=True):
        bank[history.user_id, "memory"] = state
    stored = steer.Bank(tmp_path / "people.bank")
    assert lm.generate_tokens(prompts, users=["ann", "bob"], bank=stored, **settings) == direct
    # Padding of the memories to one length has no effect, nor have others' memories.
    assert lm.generate_tokens(prompts[1:], users=["bob"], bank=stored, **settings) == direct[1:]
    assert lm.generate_tokens(prompts, users=[None, "bob"], bank=stored, **settings)[1] == direct[1]


def test_memories_that_cannot_be(llama: steer.FrozenLM, histories: list[steer.History]) -> None:
    with pytest.raises(steer.SteerError, match=r"call train\("):
        user_llm().fit(llama, histories[0])
    alone = [steer.History(h.user_id, h.records[:1]) for h in histories]
    with pytest.raises(steer.SteerError, match="at least two records"):
        user_llm().train(llama, alone)
    method = user_llm(steps=1)
    method.train(llama, histories)
    with pytest.raises(steer.SteerError, match="has no records to remember"):
        method.fit(llama, steer.History("ann", ()))
    state = method.fit(llama, histories[0])
    with pytest.raises(steer.SteerError, match="needs the artifact"):
        llama.generate(["x"], states=[state])
    with pytest.raises(steer.SteerError, match=r"entries are 7 wide, .* expects 20"):
        steer.MemoryEdit.from_rows(SITE, cross_attention(), [torch.ones(2, 7)])


# Reading.


def test_reading_does_not_depend_on_the_batches(lm: steer.FrozenLM) -> None:
    generator = torch.Generator().manual_seed(0)
    spans = []
    for length in (3, 17, 8, 2, 11):
        ids = torch.randint(5, VOCABULARY, (length,), generator=generator).tolist()
        spans.append(Span(ids, length // 2, length))
    for pool in ("last", "mean"):
        readings = [read(lm, spans, [SITE, "embed"], pool=pool, batch_tokens=size) for size in (1, 20, 4096)]
        for other in readings[1:]:
            for site, reading in readings[0].items():
                assert_close(other[site].pooled, reading.pooled)
                assert other[site].norm == pytest.approx(reading.norm, rel=1e-4)


def test_an_artifact_serves_users_who_come_later(
    llama: steer.FrozenLM, histories: list[steer.History], tmp_path: Path
) -> None:
    bank = steer.Bank(tmp_path / "bank")
    settings: dict[str, Any] = {"layer": 1, "neutral": "population"}
    first, later = steer.StyleVector(**settings), steer.StyleVector(**settings)
    trained = first.train(llama, histories)
    assert trained is not None
    later.use(llama, bank.artifact(bank.put_artifact(trained)))
    for name, tensor in first.fit(llama, histories[0]).tensors.items():
        # `train` has read all users in common batches.
        assert_close(tensor, later.fit(llama, histories[0]).tensors[name])
    with pytest.raises(steer.SteerError, match="is of style_vector"):
        steer.UserLLM(layer=1, read_layer=0).use(llama, trained)
    with steer.wrap(tiny("gpt2"), tokenizer()) as other, pytest.raises(steer.SteerError, match="was made with"):
        later.use(other, trained)


def test_layers_of_an_artifact_in_a_bank_are_made_once(
    llama: steer.FrozenLM, histories: list[steer.History], tmp_path: Path
) -> None:
    bank, method = steer.Bank(tmp_path / "bank"), steer.UserLLM(layer=1, read_layer=0, heads=2, steps=1)
    bank.put_artifact(method.train(llama, histories))
    bank["ann", "memory"] = method.fit(llama, histories[0])
    layers = []
    for _ in range(2):
        with llama.steered(bank, ["ann"]) as steering:
            layers.append(steering.plan.memory[0].layer)
            llama.model(torch.tensor([[5, 6, 7]]))
    assert layers[0] is layers[1]
