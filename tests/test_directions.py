"""CAA and RepE against transformers' own capture of hidden states, and NumPy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import WIDTH
from rows import assert_close
from torch import Tensor

import steer
from steer.methods.caa import as_question, choice_probabilities
from steer.methods.repe import lat_direction
from steer.read import read, response_span

LAYER = 1
SITE = steer.Site("resid_post", LAYER)

LETTERS = [
    steer.Pair("Fly or walk?\n (A) Fly\n (B) Walk", "(A)", "(B)"),
    steer.Pair("Rain?\n (A) No\n (B) Yes", "(B)", "(A)"),
    steer.Pair("Up or down or left?\n (A) Up\n (B) Down", "(B)", "(A)"),
]
# The first letters of the answers differ, as do their lengths.
TEXTS = [
    steer.Pair("say", "HELLO!", "good day"),
    steer.Pair("and now", "RAIN!!", "it is a little grey"),
    steer.Pair("bye", "BYE", "farewell, then."),
    steer.Pair("well", "OH WELL!", "very well."),
    steer.Pair("so", "SO WHAT?", "and thus"),
]


def hidden(lm: steer.FrozenLM, prompt: str, answer: str, drop: int = 0) -> Tensor:
    """After the block, at the last token of prompt and answer but `drop`."""
    ids = lm.tokenizer(prompt + answer).input_ids
    with torch.no_grad():
        states = lm.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    return states[LAYER + 1][0, len(ids) - 1 - drop]


def by_hand(lm: steer.FrozenLM, pairs: Sequence[steer.Pair], drop: int = 0) -> Tensor:
    """Differences, positive minus negative, pair by pair."""
    return torch.stack([hidden(lm, p.prompt, p.positive, drop) - hidden(lm, p.prompt, p.negative, drop) for p in pairs])


def choices(pairs: Sequence[steer.Pair], user: str = "ann") -> steer.History:
    return steer.History(
        user, tuple(steer.Record(user, p.positive, p.prompt, fields={"other": p.negative}) for p in pairs)
    )


# CAA.


def test_a_caa_vector_is_the_mean_difference_at_the_letters(lm: steer.FrozenLM) -> None:
    state = steer.CAA(layer=[0, LAYER]).fit_pairs(lm, LETTERS)
    assert_close(state.tensors[str(SITE)], by_hand(lm, LETTERS, drop=1).mean(0), 5e-5)
    assert state.provenance.sites == ("resid_post[0]", str(SITE))
    last = steer.CAA(layer=LAYER, token=-1).fit_pairs(lm, LETTERS)
    assert_close(last.tensors[str(SITE)], by_hand(lm, LETTERS).mean(0), 5e-5)


def test_choices_of_a_person_become_questions(llama: steer.FrozenLM) -> None:
    history = choices(TEXTS[:3])
    state = steer.CAA(layer=LAYER, rejected="other").fit(llama, history)
    questions = [
        steer.Pair("say\n\nChoices:\n (A) HELLO!\n (B) good day", "(A)", "(B)"),
        steer.Pair("and now\n\nChoices:\n (A) it is a little grey\n (B) RAIN!!", "(B)", "(A)"),
        steer.Pair("bye\n\nChoices:\n (A) BYE\n (B) farewell, then.", "(A)", "(B)"),
    ]
    assert [as_question(pair, i) for i, pair in enumerate(TEXTS[:3])] == questions
    assert_close(state.tensors[str(SITE)], by_hand(llama, questions, drop=1).mean(0), 1e-5)
    assert state.provenance.records == tuple(record.id for record in history)
    # Records that are such questions already stay as they are.
    assert [as_question(pair, i) for i, pair in enumerate(LETTERS)] == LETTERS
    again = steer.CAA(layer=LAYER, rejected="other").fit(llama, choices(LETTERS))
    assert_close(again.tensors[str(SITE)], by_hand(llama, LETTERS, drop=1).mean(0), 1e-5)


def test_both_answers_to_a_question_share_its_pass(llama: steer.FrozenLM) -> None:
    """And the norm that a dose is in units of is read at the answers alone, as for RepE."""
    tokens: list[int] = []
    handle = llama.attachment.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    state = steer.CAA(layer=LAYER, token=-1).fit_pairs(llama, LETTERS[:1])
    handle.remove()
    # The prompt's last token stands with each answer.
    assert sum(tokens) == len(llama.encode(LETTERS[0].prompt)) - 1 + 2 * (1 + len("(A)"))
    spans = [response_span(llama, answer, LETTERS[0].prompt) for answer in ("(A)", "(B)")]
    expected = read(llama, spans, [SITE])[SITE].norm
    assert state.provenance.calibration["reference_norm"][str(SITE)] == pytest.approx(expected)


def probabilities_by_hand(lm: steer.FrozenLM, pairs: Sequence[steer.Pair], vector: Tensor, start: int) -> Tensor:
    """Of the positive letter among the two; the vector is added by a hook, from `start` after the prompt's end on."""
    found = []
    for pair in pairs:
        head = lm.tokenizer(pair.prompt).input_ids

        def add(module: Any, args: Any, output: Any, first: int = max(len(head) + start, 0)) -> Any:
            stream = output[0] if isinstance(output, tuple) else output
            stream = torch.cat([stream[:, :first], stream[:, first:] + vector], dim=1)
            return (stream, *output[1:]) if isinstance(output, tuple) else stream

        handle = lm.attachment.blocks[LAYER].register_forward_hook(add)
        with torch.no_grad():
            logits = lm.model(torch.tensor([[*head, *lm.tokenizer("(").input_ids]])).logits[0, -1]
        handle.remove()
        two = logits[lm.tokenizer(pair.positive[1] + pair.negative[1]).input_ids]
        found.append(two.softmax(0)[0])
    return torch.stack(found)


@pytest.mark.parametrize(("positions", "start"), [("response", -1), ("generated", 0), ("all", -1000)])
def test_choices_under_steering(lm: steer.FrozenLM, positions: Any, start: int) -> None:
    plain = choice_probabilities(lm, LETTERS, batch=2)
    assert_close(plain, probabilities_by_hand(lm, LETTERS, torch.zeros(WIDTH), 0), 1e-5)
    state = steer.CAA(layer=LAYER, positions=positions).fit_pairs(lm, LETTERS)
    vector = state.tensors[str(SITE)]
    for strength in (-1.0, 3.0):
        steered = choice_probabilities(lm, LETTERS, state, strength=strength, batch=2)
        assert_close(steered, probabilities_by_hand(lm, LETTERS, strength * vector, start), 1e-4)
        assert (steered - plain).abs().max() > 1e-3
    assert torch.equal(choice_probabilities(lm, LETTERS, state, strength=0.0, batch=2), plain)


def test_pairs_from_a_file(tmp_path: Path) -> None:
    keys = "question", "answer_matching_behavior", "answer_not_matching_behavior"
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([dict(zip(keys, (p.prompt, p.positive, p.negative), strict=True)) for p in LETTERS]))
    assert steer.read_pairs(path) == LETTERS
    for text, message in {
        "[": "expected a JSON list of pairs",
        "{}": "expected a JSON list of pairs",
        "[]": "expected a JSON list of pairs",
        '[{"question": "why?"}]': "item 0 is no pair; it needs question, answer_matching",
    }.items():
        path.write_text(text)
        with pytest.raises(steer.SteerError, match=message):
            steer.read_pairs(path)
    with pytest.raises(steer.SteerError, match="No such file"):
        steer.read_pairs(tmp_path / "none.json")


# RepE.


def naive_direction(differences: np.ndarray) -> np.ndarray:
    """First eigenvector of the covariance of the differences, every other one turned round; oriented by majority."""
    shuffled = differences.astype(np.float64) * np.array([1, -1])[np.arange(len(differences)) % 2, None]
    _, vectors = np.linalg.eigh(np.cov(shuffled.T))
    direction = vectors[:, -1]
    sides = np.sign(differences @ direction)
    return direction * (1 if sides.sum() >= 0 else -1)


def test_a_repe_vector_is_the_first_principal_component(lm: steer.FrozenLM) -> None:
    differences = by_hand(lm, TEXTS)
    expected = torch.from_numpy(naive_direction(differences.numpy())).float()
    unit = steer.RepEPCA(layer=[0, LAYER], unit=True).fit_pairs(lm, TEXTS)
    assert_close(unit.tensors[str(SITE)], expected, 1e-4)
    assert unit.tensors[str(SITE)].norm() == pytest.approx(1)
    scaled = steer.RepEPCA(layer=LAYER, rejected="other").fit(lm, choices(TEXTS))
    assert_close(scaled.tensors[str(SITE)], expected * differences.mean(0).norm(), 1e-4)
    agreement = scaled.provenance.calibration["agreement"][str(SITE)]
    assert agreement == ((differences @ expected) > 0).double().mean().item() >= 0.5


@pytest.mark.parametrize("turn", [1, -1])
def test_a_direction_that_all_pairs_share_is_found(turn: int) -> None:
    """Centring the differences as they come would remove it."""
    generator = torch.Generator().manual_seed(0)
    shared = turn * torch.nn.functional.normalize(torch.randn(30, generator=generator), dim=0)
    differences = 5 * shared + 0.3 * torch.randn(12, 30, generator=generator)
    assert lat_direction(differences).float() @ shared > 0.97
    # Nor does the first pair decide, whose side the sign of a singular vector tends to take.
    differences[0] *= -1
    assert lat_direction(differences).float() @ shared > 0.97


def test_directions_that_cannot_be(llama: steer.FrozenLM) -> None:
    with pytest.raises(steer.SteerError, match="no pairs to take a difference of"):
        steer.CAA(layer=1).fit_pairs(llama, [])
    with pytest.raises(steer.SteerError, match=r"token=-4: the answer '\(A\)' has 3 tokens"):
        steer.CAA(layer=1, token=-4).fit_pairs(llama, LETTERS)
    with pytest.raises(steer.SteerError, match="has no text in 'rejected'"):
        steer.CAA(layer=1).fit(llama, choices(TEXTS))
    with pytest.raises(steer.SteerError, match="has no prompt"):
        steer.CAA(layer=1).fit(llama, steer.History("u", (steer.Record("u", "x", fields={"rejected": "y"}),)))
    with pytest.raises(steer.SteerError, match="has no records to take choices from"):
        steer.RepEPCA(layer=1).fit(llama, steer.History("u", ()))
    with pytest.raises(steer.SteerError, match="needs two pairs at least, and there is 1"):
        steer.RepEPCA(layer=1).fit_pairs(llama, TEXTS[:1])
    with pytest.raises(steer.SteerError, match="do not differ"):
        steer.RepEPCA(layer=1).fit_pairs(llama, [steer.Pair("x", "same", "same")] * 2)
    with pytest.raises(steer.SteerError, match="one is the beginning of the other"):
        choice_probabilities(llama, [steer.Pair("x", "yes", "yes, yes")])


@pytest.mark.parametrize("name", ["caa", "repe_pca"])
def test_directions_survive_a_bank(llama: steer.FrozenLM, name: str, tmp_path: Path) -> None:
    fitting = steer.make_method(name, layer=LAYER, rejected="other")
    histories = [choices(TEXTS[:3]), choices(TEXTS[2:], "bob")]
    states = fitting.fit_many(llama, histories)
    bank = steer.Bank(tmp_path / "people.bank")
    bank.update({(h.user_id, "direction"): state for h, state in zip(histories, states, strict=True)})
    prompts, settings = ["greet me", "say bye", "x"], {"max_new_tokens": 6, "strength": 4.0}
    stored = steer.Bank(tmp_path / "people.bank")
    together = llama.generate_tokens(prompts, ["ann", None, "bob"], stored, **settings)
    assert together == llama.generate_tokens(prompts, states=[states[0], None, states[1]], **settings)
    plain = llama.generate_tokens(prompts, max_new_tokens=6)
    assert together[1] == plain[1]
    assert together[0] != plain[0]
    assert together[2] != plain[2]
