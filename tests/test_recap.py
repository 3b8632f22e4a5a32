"""RECAP: its equations by hand, training in front of a frozen model, and states in banks and batches."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from letters import (
    HISTORIES,
    assert_it_learns_who_writes,
    assert_records_come_and_go,
    assert_rows_are_alone,
    trained,
    write_histories,
)
from models import tiny, tokenizer
from rows import assert_close
from test_text_encoder import make
from torch import Tensor
from torch.nn.functional import layer_norm
from typer.testing import CliRunner

import steer
from steer import KeyValueEdit, PromptKeyValues, Recap, Record
from steer.cli.app import app
from steer.likelihood import last_logits, response_losses
from steer.method import METHODS
from steer.methods.recap import PrefixEncoder
from steer.read import record_span
from steer.score import row_losses
from steer.text_encoder import TextEncoder
from steer.train import load_artifact, method_of
from steer.train.examples import Example

PROMPTS = ["greet me", "the weather, in detail?", "x", "say bye"]
LENGTHS = torch.tensor([2, 0, 1, 3])


# Keys and values that depend on the prompt.


def asking(lm: steer.FrozenLM, lengths: Tensor = LENGTHS) -> tuple[PromptKeyValues, Any]:
    """Of each prompt its own keys and values, from its text alone; and the same as a fixed edit."""
    layers, heads, key, value = lm.n_layers, *lm.key_value_shape

    def states(prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        drawn = [torch.Generator().manual_seed(sum(map(ord, text))) for text in prompts]
        keys = torch.stack([torch.randn(layers, heads, 3, key, generator=own) for own in drawn])
        return keys, torch.stack([torch.randn(layers, heads, 3, value, generator=own) for own in drawn])

    like = steer.KeyValues(torch.zeros(layers, heads, 1, key), torch.zeros(layers, heads, 1, value))
    return PromptKeyValues(states, lengths, like), lambda prompts: KeyValueEdit(*states(prompts), lengths)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bloom", "falcon"])
def test_they_are_fixed_ones_of_the_same_prompts(arch: str) -> None:
    """Generated with, several batches of a block, and scored."""
    with steer.wrap(tiny(arch), tokenizer()) as lm, torch.no_grad():
        edit, fixed = asking(lm)
        spans = [record_span(lm, Record("ann", "what came", prompt)) for prompt in PROMPTS]
        assert torch.equal(response_losses(lm, spans, [edit])[0], response_losses(lm, spans, [fixed(PROMPTS)])[0])
        alike = fixed([PROMPTS[1]] * 4)
        assert_close(row_losses(lm, spans[1], [edit], 4), row_losses(lm, spans[1], [alike], 4))
        with lm.steered(edits=[edit]) as steering:
            found = [
                lm.model.generate(**steering.prepare(prompts), **steering.generate_kwargs(), max_new_tokens=5)
                for prompts in (PROMPTS, PROMPTS[::-1])
            ]
        for own, prompts in zip(found, (PROMPTS, PROMPTS[::-1]), strict=True):
            with lm.steered(edits=[fixed(prompts)]) as steering:
                batch = steering.prepare(prompts)
                assert torch.equal(own, lm.model.generate(**batch, **steering.generate_kwargs(), max_new_tokens=5))


def test_beside_others(llama: steer.FrozenLM) -> None:
    """Chat messages, prefixes of both kinds, rows with keys and values of their own, copies, beams."""
    edit, fixed = asking(llama)
    (own,) = steer.key_values_of(llama, [torch.ones(2, llama.width)])
    soft = steer.PromptPrefix(lambda prompts: torch.ones(4, 1, llama.width), torch.ones(4).long(), llama.width)
    others = [KeyValueEdit.from_rows([None, own, None, None]), soft]
    for settings in ({"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2, "seeds": [1, 2, 3, 4]}):
        found = llama.generate_tokens(PROMPTS, edits=[edit, *others], max_new_tokens=5, **settings)
        assert found == llama.generate_tokens(PROMPTS, edits=[fixed(PROMPTS), *others], max_new_tokens=5, **settings)
    with pytest.raises(steer.SteerError, match="row 0 has two prefixes of keys and values"):
        llama.generate(PROMPTS, edits=[edit, edit])


def test_a_forward_pass_without_its_own_prompts_is_refused(llama: steer.FrozenLM) -> None:
    """Neither zeros nor another batch's keys and values."""
    edit, fixed = asking(llama)
    lengths = [len(prompt) + 3 for prompt in PROMPTS]
    with torch.no_grad(), llama.steered(edits=[fixed(PROMPTS)], prompt_lengths=lengths) as steering:
        first = steering.prepare(PROMPTS)
        expected = last_logits(llama, steering.forward_kwargs(first), 1)
    refused = pytest.raises(steer.SteerError, match=r"what depends on the prompts, .* needs prepare")
    with refused, llama.steered(edits=[edit], prompt_lengths=lengths):
        llama.model(first["input_ids"])
    with torch.no_grad(), llama.steered(edits=[edit], prompt_lengths=lengths) as steering:
        with pytest.raises(steer.SteerError, match=r"not the batch that steering\.prepare"):
            steering.forward_kwargs(first)
        steering.prepare(PROMPTS[::-1])
        with pytest.raises(steer.SteerError, match=r"not the batch that steering\.prepare"):
            steering.forward_kwargs(first)
        assert torch.equal(last_logits(llama, steering.forward_kwargs(steering.prepare(PROMPTS)), 1), expected)


def test_others_than_were_announced_are_refused(llama: steer.FrozenLM) -> None:
    edit, _ = asking(llama)
    keys, values = edit.key_values(PROMPTS)
    for message, wrong in {
        "keys are 5 wide": (keys[..., :5], values),
        "2 layers with 2 heads; this model has 3 layers": (keys[:, 1:], values[:, 1:]),
        "keys: 1 rows for a batch of 4": (keys[:1], values[:1]),
        "values hold values that are not finite": (keys, values * torch.nan),
    }.items():
        broken = PromptKeyValues(lambda prompts, wrong=wrong: wrong, LENGTHS, edit.like)  # type: ignore[misc]
        with pytest.raises(steer.SteerError, match=message):
            llama.generate(PROMPTS, edits=[broken])
    with (
        steer.wrap(tiny("t5"), tokenizer(eos=True)) as t5,
        pytest.raises(steer.SteerError, match="PromptKeyValues: an"),
    ):
        t5.generate(PROMPTS, edits=[edit])


# The method.


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make(tmp_path_factory.mktemp("encoder")))


def recap(lm: steer.FrozenLM, encoder: str, folder: Path, **settings: Any) -> Recap:
    return trained(lm, Recap(encoder=encoder, **{"slots": 3, "retrieved": 2} | settings), folder)


def examples_of(lm: steer.FrozenLM, known: Sequence[int] = (1, 3, 2, 5)) -> list[Example]:
    return [
        Example(whole.first(n), whole.records[n], record_span(lm, whole.records[n]))
        for whole, n in zip(HISTORIES, known, strict=True)
    ]


def random_weights(module: PrefixEncoder) -> PrefixEncoder:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return module


@pytest.mark.parametrize("retriever", ["similar", "newest"])
def test_keys_and_values_by_hand(llama: steer.FrozenLM, encoder: str, retriever: Any) -> None:
    """Retrieval, two attentions, gate and tanh, row by row; and where each head's part is added."""
    module = random_weights(Recap(encoder=encoder, slots=3, retriever=retriever, retrieved=2).module(llama, HISTORIES))
    examples, frozen = examples_of(llama), TextEncoder(encoder)
    (edit,) = module.edits(examples)
    assert edit.lengths.tolist() == [4] * 4
    own = {name: value.double() for name, value in module.state_dict().items()}

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ own[f"{name}.weight"].T + own[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        return layer_norm(x, x.shape[-1:], own[f"{name}.weight"], own[f"{name}.bias"])

    def attend(name: str, slots: Tensor, items: Tensor) -> Tensor:
        normed = norm(f"{name}.norm", slots)
        keys, values = linear(
            f"{name}.key_value", torch.cat([norm("input_norm", linear("inputs", items)), normed])
        ).chunk(2, -1)
        heads = [part.unflatten(-1, (8, -1)) for part in (linear(f"{name}.query", normed), keys, values)]
        weights = (torch.einsum("qhk,shk->hqs", heads[0], heads[1]) / heads[0].shape[-1] ** 0.5).softmax(-1)
        slots = slots + linear(f"{name}.out", torch.einsum("hqs,shk->qhk", weights, heads[2]).flatten(1))
        return slots + linear(
            f"{name}.down", torch.nn.functional.gelu(linear(f"{name}.up", norm(f"{name}.mlp_norm", slots)))
        )

    for row, example in enumerate(examples):
        texts = frozen.encode([f"{r.response}\n\n{r.prompt}" for r in example.history]).double()
        query = frozen.encode([example.record.prompt or ""]).double()
        nearest = (texts @ query[0]).argsort(descending=True)[:2]
        asked = attend("to_prompt", own["slots"], query)
        found = attend("to_texts", asked, texts[nearest] if retriever == "similar" else texts[-2:])
        gate = linear("gate", torch.cat([found, asked], 1)).sigmoid()
        hidden = linear("inner", norm("norm", gate * found + (1 - gate) * asked)).tanh()
        for name, states in (("keys", edit.keys), ("values", edit.values)):
            begun, made = own[f"own_{name}"], linear(name, hidden).unflatten(1, (3, 2, 16))
            for layer in range(3):
                for head in range(2):
                    usual = begun[layer, head, 1:]
                    unit = (usual - usual.mean(0)).square().mean().sqrt()
                    expected = begun[layer, head, :4].clone()
                    expected[1:] += unit * made[:, layer, head]
                    np.testing.assert_allclose(
                        states[row, layer, head].detach().numpy(), expected.numpy(), rtol=1e-4, atol=1e-4
                    )


@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen2", "falcon"])
@pytest.mark.parametrize("bos", [False, True])
def test_it_begins_with_the_models_own(arch: str, bos: bool, encoder: str) -> None:
    """Keys and values of some tokens as the model computes them, in front of the prompt, whatever was asked."""
    with steer.wrap(tiny(arch), tokenizer(bos=bos)) as lm:
        module = Recap(encoder=encoder, slots=3).module(lm, HISTORIES)
        (edit,) = module.edits(examples_of(lm))
        assert torch.equal(edit.keys, module.begun.keys.expand_as(edit.keys))
        assert len(module.begun) == 4
        if bos:
            (other,) = steer.key_values_of(lm, [torch.ones(1, lm.width)])
            assert_close(module.begun.keys[:, :, :1], other.keys[:, :, :1])
        losses, _ = response_losses(lm, [example.span for example in examples_of(lm)], [edit])
        losses.sum().backward()
        assert all(parameter.grad is None for parameter in lm.model.parameters())
        for layer in (module.keys, module.values):
            assert layer.weight.grad.abs().max() > 0


def test_states_give_what_was_trained(llama: steer.FrozenLM, encoder: str, tmp_path: Path) -> None:
    """A stored state in a batch gives the loss that its history gave in training; alone, with others, and cached."""
    method = recap(llama, encoder, tmp_path)
    assert method.artifact is not None
    before = {name: tensor.clone() for name, tensor in llama.model.state_dict().items()}
    with steer.Bank(tmp_path / "people.bank") as bank:
        bank.put_artifact(method.artifact)
        known = [h.first(len(h) - 1) for h in HISTORIES]
        bank.update({(h.user_id, "recap"): method.fit(llama, h) for h in known})
        states = [bank[h.user_id, "recap"] for h in known]
        assert states[0].provenance.sites == ()
        spans = [record_span(llama, h.records[-1]) for h in HISTORIES]
        artifact = bank.artifact(method.artifact.hash)
        found, _ = response_losses(llama, spans, METHODS["recap"].bind(llama, [*states], states[0], artifact))
        module = method.module(llama, HISTORIES)
        module.load_state_dict(dict(artifact.tensors))
        examples = [Example(h, whole.records[-1], span) for h, whole, span in zip(known, HISTORIES, spans, strict=True)]
        expected, _ = response_losses(llama, spans, module.eval().edits(examples))
        assert_close(found, expected.detach())
        for state, span, loss in zip(states, spans, found, strict=True):
            assert_close(response_losses(llama, [span], Recap.bind(llama, [state], state, artifact))[0], loss[None])
        plain = [assert_rows_are_alone(llama, bank)[1]]
        assert llama.generate_tokens(["question 5"], [None], bank, max_new_tokens=5) == plain
        # What is decoded with a cache is what one forward pass gives.
        edits = Recap.bind(llama, [states[0]], states[0], artifact)
        with torch.no_grad(), llama.steered(edits=edits) as steering:
            batch = steering.prepare(["question 5"])
            output = llama.model.generate(
                **batch,
                **steering.generate_kwargs(),
                max_new_tokens=5,
                output_logits=True,
                return_dict_in_generate=True,
            )
        ids = output.sequences[0, 4:].tolist()
        fixed = edits[0].of(["question 5"])
        with torch.no_grad(), llama.steered(edits=[fixed], prompt_lengths=[14]) as steering:
            whole = last_logits(llama, steering.forward_kwargs(steering.prepare([ids])), 6)
        assert_close(torch.stack(output.logits, 1), whole[:, :-1])
    assert all(torch.equal(before[name], tensor) for name, tensor in llama.model.state_dict().items())
    assert all(parameter.grad is None for parameter in llama.model.parameters())


def test_it_learns_who_writes(llama: steer.FrozenLM, encoder: str, tmp_path: Path) -> None:
    method = Recap(encoder=encoder, slots=4)
    states = assert_it_learns_who_writes(llama, method, tmp_path, learning_rate=1e-2)
    # And what is asked counts, besides who asks.
    state = states["ann"]
    (edit,) = Recap.bind(llama, [state, None, state], state, method.artifact)
    keys, _ = edit.key_values(["question 5", "question 5", "something else"])
    assert edit.lengths.tolist() == [5, 0, 5]
    assert (keys[0] - keys[2]).abs().max() > 1e-3
    assert torch.equal(keys[1], torch.zeros_like(keys[1]))


def test_nobody_and_records_that_come_and_go(llama: steer.FrozenLM, encoder: str, tmp_path: Path) -> None:
    method = recap(llama, encoder, tmp_path)
    other = recap(llama, encoder, tmp_path / "other", text="response")
    whole, nobody, mean = assert_records_come_and_go(llama, method, other)
    # A user without records is one whose only text is the mean.
    rows = [nobody, mean, whole]
    (edit,) = Recap.bind(llama, rows, nobody, method.artifact)
    keys, _ = edit.key_values(["x"] * 3)
    assert torch.equal(keys[0], keys[1])
    assert not torch.allclose(keys[0], keys[2])


def test_what_cannot_be_is_refused(llama: steer.FrozenLM, encoder: str, tmp_path: Path) -> None:
    with pytest.raises(steer.SteerError, match="retriever='best' is not one of similar, newest"):
        Recap(retriever="best")  # type: ignore[arg-type]
    with pytest.raises(steer.SteerError, match="slots=0"):
        Recap(slots=0)
    with pytest.raises(steer.SteerError, match="the shared weights come first"):
        Recap(encoder=encoder).fit(llama, HISTORIES[0])
    with pytest.raises(steer.SteerError, match="no records to train on"):
        Recap(encoder=encoder).module(llama, [])
    method = recap(llama, encoder, tmp_path)
    with pytest.raises(steer.SteerError, match="trained with slots=3, this has 30"):
        Recap(encoder=encoder).use(llama, method.artifact)  # type: ignore[arg-type]
    with (
        steer.wrap(tiny("llama", seed=9), tokenizer()) as stranger,
        pytest.raises(steer.SteerError, match="this model"),
    ):
        method.fit(stranger, HISTORIES[0])
    with (
        steer.wrap(tiny("t5"), tokenizer(eos=True)) as t5,
        pytest.raises(steer.SteerError, match="keys and values: an"),
    ):
        Recap(encoder=encoder).module(t5, HISTORIES)


def test_from_the_command_line(
    llama: steer.FrozenLM, encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained, fitted, used and scored by the four commands, as in Python."""
    monkeypatch.setattr("steer.cli.options.load", lambda *_: llama)
    file, out, bank = tmp_path / "texts.jsonl", tmp_path / "out", tmp_path / "people.bank"
    write_histories(file)

    def run(*arguments: object) -> Any:
        made = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert made.exit_code == 0, made.exception
        return made

    chosen = ["--set", f"encoder={encoder}", "--set", "slots=3"]
    run("train", "recap", file, "--out", out, *chosen, "--steps", 2, "--strangers", 0, "--learning-rate", 0.1)
    run("extract", file, "--trained", out, "--bank", bank, "--name", "own", "--holdout", 2)
    answered = run(
        "generate", "--bank", bank, "--user", "ann", "--prompt", "question 1", "--json", "--max-new-tokens", 5
    )
    method = method_of(llama, load_artifact(out))
    state = method.fit(llama, HISTORIES[0].first(4))
    expected = llama.generate_tokens(["question 1"], states=[state], artifacts=[method.artifact], max_new_tokens=5)
    assert json.loads(answered.stdout)["rows"][1]["tokens"] == expected[0]
    run("score", file, "--bank", bank, "--holdout", 2, "--json", tmp_path / "scores.json")
    totals = json.loads((tmp_path / "scores.json").read_text())["totals"]
    assert totals["users"] == 4
    assert totals["own_minus_base"]["mean"] != 0
