"""What contexts changed at an answer's tokens: against plain forward passes, SciPy and NumPy."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import tiny, tokenizer
from scipy.special import log_softmax
from scipy.stats import entropy, rankdata
from typer.testing import CliRunner

import steer
from steer.cli.app import app
from steer.contrast import influence_of
from steer.influence import influence

PROMPT, RESPONSE = "what of the weather?", "it is, as ever, a little grey."
CONTEXTS = {"sea": "I am a sailor, and old.", "loud": "I shout.", "no": "no."}


def rows(lm: steer.FrozenLM, contexts: list[str | None]) -> np.ndarray:
    """Log-probabilities at the answer's tokens, `[context, token, vocab]`, one forward pass each."""
    answer, found = lm.tokenizer(RESPONSE).input_ids, []
    for context in contexts:
        ids = lm.tokenizer(PROMPT if context is None else f"{context} {PROMPT}").input_ids
        with torch.no_grad():
            logits = lm.model(input_ids=torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1]
        found.append(log_softmax(logits.double().numpy(), axis=1))
    return np.stack(found)


@pytest.mark.parametrize("batch_tokens", [2048, 1])
def test_each_measure_is_what_it_says(lm: steer.FrozenLM, batch_tokens: int) -> None:
    found = influence(lm, PROMPT, RESPONSE, CONTEXTS, batch_tokens=batch_tokens)
    *with_contexts, without = rows(lm, [*CONTEXTS.values(), None])
    answer = lm.tokenizer(RESPONSE).input_ids
    at = np.arange(len(answer)), answer
    assert found.names == tuple(CONTEXTS)
    assert "".join(found.tokens) == RESPONSE
    close = {"rtol": 1e-4, "atol": 2e-4}
    for i, own in enumerate(with_contexts):
        np.testing.assert_allclose(found.change[i], (own - without)[at], **close)
        np.testing.assert_allclose(found.kl[i], entropy(np.exp(own), np.exp(without), axis=1), **close)
        np.testing.assert_allclose(found.entropy[i], entropy(np.exp(own), axis=1), **close)
        # Rounding may turn neighbours round.
        for rank, table in ((found.rank[i], own), (found.rank_without, without)):
            least, most = ((table > table[at][:, None] + gap).sum(1) + 1 for gap in (1e-3, -1e-3))
            assert ((least <= rank.numpy()) & (rank.numpy() <= most)).all()
        assert found.log_ratio[i].item() == pytest.approx(own[at].sum() - without[at].sum(), rel=1e-3, abs=1e-3)
        assert found.mean_kl[i].item() == pytest.approx(found.kl[i].mean().item())
    np.testing.assert_allclose(found.entropy_without, entropy(np.exp(without), axis=1), **close)


@pytest.fixture(scope="module")
def model() -> Iterator[steer.FrozenLM]:
    with steer.wrap(tiny("llama"), tokenizer()) as lm:
        yield lm


def test_in_float64_nothing_is_lost() -> None:
    with steer.wrap(tiny("llama", dtype=torch.float64), tokenizer()) as lm:
        found = influence(lm, PROMPT, RESPONSE, CONTEXTS["sea"])
        own, without = rows(lm, [CONTEXTS["sea"], None])
    # They are handed out in float32.
    np.testing.assert_allclose(found.kl[0], entropy(np.exp(own), np.exp(without), axis=1), rtol=1e-6)
    assert found.names == (CONTEXTS["sea"],)
    at = np.arange(len(RESPONSE)), lm.tokenizer(RESPONSE).input_ids
    ranks, before = (rankdata(-table, method="min", axis=1)[at] for table in (own, without))
    assert found.rank[0].tolist() == ranks.tolist()
    assert found.rank_without.tolist() == before.tolist()
    assert found.rank_change[0].tolist() == (before - ranks).tolist()


def test_an_opposite_takes_the_place_of_no_context(model: steer.FrozenLM) -> None:
    found = influence(model, PROMPT, RESPONSE, list(CONTEXTS.values())[:2], opposite="no.")
    sea, loud, no = rows(model, list(CONTEXTS.values()))
    at = np.arange(len(RESPONSE)), model.tokenizer(RESPONSE).input_ids
    np.testing.assert_allclose(found.change, [(own - no)[at] for own in (sea, loud)], rtol=1e-4, atol=1e-4)
    same = influence(model, PROMPT, model.tokenizer(RESPONSE).input_ids, CONTEXTS["sea"], opposite="no.")
    torch.testing.assert_close(same.change[0], found.change[0])


def test_tokens_that_are_ruled_out_do_not_count() -> None:
    out = -math.inf
    moved = influence_of(torch.tensor([0.0, out, -1.0, out]), torch.tensor([-2.0, -1.0, out, out]))
    assert moved.tolist() == [2.0, 0.0, 0.0, 0.0]


def test_a_context_that_changes_nothing_has_no_influence() -> None:
    """Without attention a token sees nothing but itself."""
    model = tiny("llama")
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
    with steer.wrap(model, tokenizer()) as lm:
        found = influence(lm, PROMPT, RESPONSE, CONTEXTS)
    assert found.change.abs().max() < 1e-5
    assert found.kl.max() < 1e-5
    assert (found.kl >= 0).all()
    assert not found.rank_change.any()
    assert "nats in all" in str(found)
    found.figure()


def test_bad_input_is_told_before_anything_runs(model: steer.FrozenLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.model, "forward", None)
    for contexts, arguments, said in (
        ([], {}, "one or more contexts"),
        (["a", "a"], {}, "all different"),
        ({"one": "a", "other": "a"}, {}, "all different; got {'one': 'a', 'other': 'a'}"),
        ({"one": 5}, {}, "a context must be text, got 5"),
        (["a"], {"response": [5, 100]}, "the token 100; .* from 0 to 99"),
        ([" "], {}, "a context is empty"),
        (["a"], {"response": ""}, "a response is empty"),
        (["a"], {"opposite": "a"}, "its own opposite"),
        (["a" * 3000], {}, "the model's window is 2048"),
    ):
        with pytest.raises(steer.SteerError, match=said):
            influence(model, **{"prompt": PROMPT, "response": RESPONSE, "contexts": contexts} | arguments)
    with steer.wrap(tiny("llama")) as lm, pytest.raises(steer.SteerError, match="without a tokenizer"):
        influence(lm, [5, 6], [7], "a")


# Views.


def test_a_view_shows_the_numbers_and_the_totals(model: steer.FrozenLM) -> None:
    found = influence(model, PROMPT, RESPONSE, CONTEXTS)
    assert f"{found.log_ratio[1]:+.2f} nats in all" in str(found)
    page = found.html()
    assert f"rank {found.rank_without[3]} without, {found.rank[2, 3]} with the context" in page
    largest = found.change.abs().max()
    assert f"{largest:+.3g}" in page
    assert f"{-largest:+.3g}" in page
    # A divergence has no other side.
    assert f"{found.kl.max():+.3g}" in found.html("kl")
    assert f"{-found.kl.max():+.3g}" not in found.html("kl")
    doublings = torch.log2(found.rank_without / found.rank)
    assert f"{doublings.abs().max():+.3g}" in found.html("rank")
    assert found._repr_html_() in page
    with pytest.raises(steer.SteerError, match="not one of change, kl, rank"):
        found.html("cosine")  # type: ignore[arg-type]


def test_an_opposite_is_named(model: steer.FrozenLM) -> None:
    found = influence(model, PROMPT, RESPONSE, "I shout.", opposite="I whisper.")
    assert found.to_json()["opposite"] == "I whisper."
    for values, title in (
        ("change", "log p with the context − with its opposite, nats"),
        ("kl", "KL(with the context ‖ with its opposite), nats"),
        ("rank", "rank with its opposite over rank with the context, log2"),
    ):
        page = found.html(values)
        assert title in page
        assert "without" not in page


def test_names_and_answers_are_shown_as_text(model: steer.FrozenLM, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    nasty = '<b title="x">$a_1$\x1b[31m\u202e'
    found = influence(model, PROMPT, '<i>"$x$\n', {nasty: "I shout.", "n" * 300: "no."})
    for shown in (str(found), found.html()):
        assert "\x1b" not in shown
        assert "\u202e" not in shown
        assert "n" * 61 not in shown
    assert "<b title" not in found.html()
    assert "<i>" not in found.html()
    for values in ("change", "kl", "rank"):
        found.figure(values).savefig(tmp_path / "influence.png")


def test_its_repr_has_the_totals_and_no_tensors(model: steer.FrozenLM) -> None:
    found = influence(model, PROMPT, RESPONSE, CONTEXTS | {"n" * 300: "no."})
    shown = repr(found)
    assert shown.startswith(f"Influence({len(found.tokens)} tokens; 'sea': {found.log_ratio[0]:+.2f} nats in all, KL ")
    assert f"'loud': {found.log_ratio[1]:+.2f} nats" in shown
    assert "tensor" not in shown
    assert len(shown) < 300


def test_json_has_all_the_numbers(model: steer.FrozenLM) -> None:
    found = influence(model, PROMPT, RESPONSE, CONTEXTS)
    plain: dict[str, Any] = json.loads(json.dumps(found.to_json()))
    assert plain["tokens"] == list(found.tokens)
    assert plain["rank_without"] == found.rank_without.tolist()
    sea = plain["contexts"]["sea"]
    assert sea["change"] == pytest.approx(found.change[0].tolist())
    assert sea["log_ratio"] == pytest.approx(sum(sea["change"]), rel=1e-4)
    assert sea.keys() == {"log_ratio", "mean_kl", "change", "kl", "rank", "entropy"}


def test_steer_influence(model: steer.FrozenLM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("steer.cli.options.load", lambda *_: model)

    def call(*arguments: object) -> Any:
        asked = ["influence", "--prompt", PROMPT, "--response", RESPONSE, *map(str, arguments)]
        done = CliRunner().invoke(app, asked)
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return done

    contexts = [CONTEXTS["sea"], CONTEXTS["loud"]]
    named = ["--context", contexts[0], "--context", contexts[1]]
    found = influence(model, PROMPT, RESPONSE, contexts)
    assert json.loads(call(*named, "--json").stdout) == {"model": "smollm2-135m", **found.to_json()}
    opposed = json.loads(call(*named, "--json", "--opposite", "no.", "--raw").stdout)
    assert opposed["rank_without"] == influence(model, PROMPT, RESPONSE, contexts, opposite="no.").rank_without.tolist()
    page, png = tmp_path / "influence.html", tmp_path / "influence.png"
    shown = call(*named, "--values", "kl", "--html", page, "--png", png).stdout
    assert RESPONSE in shown
    assert page.read_text(encoding="utf-8") == found.html("kl")
    assert png.read_bytes().startswith(b"\x89PNG")
    # Before a model is loaded.
    monkeypatch.setattr("steer.cli.options.load", None)
    for wrong, said in (
        (["--values", "cosine"], "not one of change, kl, rank"),
        (["--png", tmp_path], "be written"),
        (["--png", tmp_path / "a.xyz"], r"a\.xyz has the ending of no picture; there are .*\.png"),
        (["--png", tmp_path / "a"], "the ending of no picture"),
        (["--html", tmp_path / "a.png"], r"a\.png has not the ending of a page, \.html"),
        (["--context", " "], "a context is empty$"),
        (["--context", contexts[0]], "all different"),
        (["--opposite", contexts[0]], "its own opposite"),
        (["--response", ""], "--response is empty"),
    ):
        with pytest.raises(steer.SteerError, match=said):
            call(*named, *wrong)
