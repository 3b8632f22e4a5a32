"""PPlug: its equations by hand, training in front of a frozen model, and states in banks and batches."""

from __future__ import annotations

import json
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
from torch.nn.functional import gelu
from typer.testing import CliRunner

import steer
from steer import PPlug
from steer.cli.app import app
from steer.likelihood import response_losses
from steer.method import METHODS
from steer.read import record_span
from steer.text_encoder import TextEncoder
from steer.train import load_artifact, method_of
from steer.train.examples import Example

PERSONAS = ["attention", "mean", "perceiver", "items"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make(tmp_path_factory.mktemp("encoder")))


def pplug(lm: steer.FrozenLM, encoder: str, folder: Path, **settings: Any) -> PPlug:
    return trained(lm, PPlug(encoder=encoder, **settings), folder)


@pytest.mark.parametrize("centred", [False, True])
def test_soft_tokens_are_the_papers(llama: steer.FrozenLM, encoder: str, centred: bool) -> None:
    """Weights, sum, projector and scale in float64 NumPy, and the order [I; P]."""
    method = PPlug(encoder=encoder, temperature=0.3, centred=centred)
    torch.manual_seed(0)
    plug = method.module(llama, HISTORIES).eval()
    examples = [
        Example(whole.first(n), whole.records[n], record_span(llama, whole.records[n]))
        for whole, n in zip(HISTORIES, (1, 3, 2, 5), strict=True)
    ]
    (edit,) = plug.edits(examples)
    assert edit.lengths.tolist() == [2, 2, 2, 2]
    frozen, state = TextEncoder(encoder), {k: v.double().numpy() for k, v in plug.state_dict().items()}

    def project(name: str, rows: np.ndarray) -> np.ndarray:
        inner = rows * plug.projector.gain_in @ state[f"{name}.inner.weight"].T + state[f"{name}.inner.bias"]
        hidden = gelu(torch.from_numpy(inner)).numpy()
        return (hidden @ state[f"{name}.outer.weight"].T + state[f"{name}.outer.bias"]) * plug.projector.gain_out

    everything = frozen.encode([method.text_of(record) for whole in HISTORIES for record in whole])
    origin = everything.double().numpy().mean(0) if centred else 0.0
    instruction = project("instruction.projector", state["instruction.vectors"])
    for row, example in enumerate(examples):
        items = frozen.encode([f"{r.response}\n\n{r.prompt}" for r in example.history]).double().numpy()
        query = frozen.encode([example.record.prompt]).double().numpy()[0]
        weights = np.exp(items @ query / 0.3)
        persona = (weights / weights.sum()) @ project("projector", items - origin)
        expected = np.concatenate([instruction, persona[None]])
        np.testing.assert_allclose(edit.embeddings[row].detach().numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("persona", PERSONAS)
@pytest.mark.parametrize("query", ["trained", "frozen"])
def test_states_give_what_was_trained(
    llama: steer.FrozenLM, encoder: str, tmp_path: Path, persona: Any, query: Any
) -> None:
    """A stored state in a batch gives the loss that its history gave in training."""
    if query == "frozen" and persona != "attention":
        pytest.skip("only attention has a query")
    method = pplug(llama, encoder, tmp_path, persona=persona, query=query, slots=3)
    assert method.artifact is not None
    before = {name: tensor.clone() for name, tensor in llama.model.state_dict().items()}
    with steer.Bank(tmp_path / "people.bank") as bank:
        bank.put_artifact(method.artifact)
        known = [h.first(len(h) - 1) for h in HISTORIES]
        bank.update({(h.user_id, "pplug"): method.fit(llama, h) for h in known})
        states = [bank[h.user_id, "pplug"] for h in known]
        spans = [record_span(llama, h.records[-1]) for h in HISTORIES]
        bound = METHODS["pplug"].bind(llama, [*states], states[0], method.artifact)
        found, _ = response_losses(llama, spans, bound)
        from steer.methods.pplug import _plug

        plug = _plug(bank.artifact(method.artifact.hash), llama.width, llama.device)
        examples = [Example(h, whole.records[-1], span) for h, whole, span in zip(known, HISTORIES, spans, strict=True)]
        expected, _ = response_losses(llama, spans, plug.edits(examples))
        assert_close(found, expected)
        together = assert_rows_are_alone(llama, bank)
        assert together[0] != together[1]
    assert all(torch.equal(before[name], tensor) for name, tensor in llama.model.state_dict().items())
    assert all(parameter.grad is None for parameter in llama.model.parameters())


def test_it_learns_who_writes(llama: steer.FrozenLM, encoder: str, tmp_path: Path) -> None:
    assert_it_learns_who_writes(llama, PPlug(encoder=encoder), tmp_path, learning_rate=3e-3)


def test_autoencoding_has_the_record_itself(llama: steer.FrozenLM, encoder: str) -> None:
    """As the only text of a share of the examples in training, and of none elsewhere."""
    plug = PPlug(encoder=encoder, autoencoding=0.5).module(llama, HISTORIES)
    whole, frozen = HISTORIES[0], TextEncoder(encoder)
    example = Example(whole.first(3), whole.records[3], record_span(llama, whole.records[3]))
    texts = frozen.encode([f"{r.response}\n\n{r.prompt}" for r in whole.records[:4]])
    torch.manual_seed(0)
    rows = plug.train().histories([example] * 400)
    own = [row for row in rows if len(row) == 1]
    assert 150 < len(own) < 250
    assert all(torch.allclose(row, texts[3:], atol=1e-6) for row in own)
    assert all(torch.allclose(row, texts[:3], atol=1e-6) for row in rows if len(row) != 1)
    assert all(torch.allclose(row, texts[:3], atol=1e-6) for row in plug.eval().histories([example] * 40))


def test_nobody_and_records_that_come_and_go(llama: steer.FrozenLM, encoder: str, tmp_path: Path) -> None:
    method = pplug(llama, encoder, tmp_path)
    other = pplug(llama, encoder, tmp_path / "other", text="response")
    whole, nobody, mean = assert_records_come_and_go(llama, method, other)
    with pytest.raises(steer.SteerError, match="trained with text='response', this has 'both'"):
        PPlug(encoder=encoder).use(llama, other.artifact)  # type: ignore[arg-type]
    assert whole.tensors["items"].shape == (6, 24)
    assert whole.nbytes == 6 * 24 * 4
    # A user without records is one whose only text is the mean.
    artifacts = [method.artifact]
    assert llama.generate(["x"], states=[nobody], artifacts=artifacts, max_new_tokens=6) == llama.generate(
        ["x"], states=[mean], artifacts=artifacts, max_new_tokens=6
    )


def test_what_cannot_be_is_refused(llama: steer.FrozenLM, encoder: str, tmp_path: Path) -> None:
    with pytest.raises(steer.SteerError, match="persona='soul' is not one of attention, mean"):
        PPlug(persona="soul")  # type: ignore[arg-type]
    with pytest.raises(steer.SteerError, match="autoencoding=2 is not a share"):
        PPlug(autoencoding=2)
    with pytest.raises(steer.SteerError, match="slots=0"):
        PPlug(slots=0)
    with pytest.raises(steer.SteerError, match="the shared weights come first"):
        PPlug(encoder=encoder).fit(llama, HISTORIES[0])
    with pytest.raises(steer.SteerError, match="no records to train on"):
        PPlug(encoder=encoder).module(llama, [])
    method = pplug(llama, encoder, tmp_path)
    other = PPlug(encoder=str(make(tmp_path, seed=1)))
    other.use(llama, method.artifact)  # type: ignore[arg-type]
    with pytest.raises(steer.SteerError, match="were trained with the encoder"):
        other.fit(llama, HISTORIES[0])
    with (
        steer.wrap(tiny("llama", seed=9), tokenizer()) as stranger,
        pytest.raises(steer.SteerError, match="this model"),
    ):
        method.fit(stranger, HISTORIES[0])


def test_from_the_command_line(
    llama: steer.FrozenLM, encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained, fitted and used by the three commands, as in Python."""
    monkeypatch.setattr("steer.cli.options.load", lambda *_: llama)
    file, out, bank = tmp_path / "texts.jsonl", tmp_path / "out", tmp_path / "people.bank"
    write_histories(file)

    def run(*arguments: object) -> Any:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    made = run("train", "pplug", file, "--out", out, "--set", f"encoder={encoder}", "--steps", 2, "--strangers", 0)
    assert made.exit_code == 0, made.exception
    extracted = run("extract", file, "--trained", out, "--bank", bank, "--name", "plug")
    assert extracted.exit_code == 0, extracted.exception
    answered = run(
        "generate", "--bank", bank, "--user", "ann", "--prompt", "question 1", "--json", "--max-new-tokens", 5
    )
    assert answered.exit_code == 0, answered.exception
    method = method_of(llama, load_artifact(out))
    expected = llama.generate_tokens(
        ["question 1"], states=[method.fit(llama, HISTORIES[0])], artifacts=[method.artifact], max_new_tokens=5
    )
    assert json.loads(answered.stdout)["rows"][1]["tokens"] == expected[0]
    refused = run("extract", file, "--method", "pplug", "--bank", bank)
    assert "pplug is trained first: steer train pplug" in str(refused.exception)
    refused = run("extract", file, "--trained", out, "--layer", 1, "--bank", bank)
    assert "says which method it is" in str(refused.exception)


def test_in_front_of_an_encoder(encoder: str, tmp_path: Path) -> None:
    """A state gives the loss that its history gave in training, in T5 too."""
    with steer.wrap(tiny("t5"), tokenizer(eos=True)) as t5:
        method = pplug(t5, encoder, tmp_path)
        whole = HISTORIES[0]
        span = record_span(t5, whole.records[3])
        state = method.fit(t5, whole.first(3))
        module = method.module(t5, HISTORIES)
        module.load_state_dict(dict(method.artifact.tensors))
        expected, _ = response_losses(
            t5, [span], module.eval().edits([Example(whole.first(3), whole.records[3], span)])
        )
        bound = PPlug.bind(t5, [state, None], state, method.artifact)
        found, _ = response_losses(t5, [span, span], bound)
        plain, _ = response_losses(t5, [span], [])
        assert_close(found, torch.cat([expected, plain]).detach())
        assert not torch.allclose(found[0], plain[0])
