"""The inverse model against CoS run anew at each λ: plain forward passes, row by row, and float64 NumPy and SciPy."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import EOS, tiny, tokenizer
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp
from scipy.stats import norm
from typer.testing import CliRunner

import steer
from steer.cli.app import app
from steer.contrast import log_likelihoods, log_probs, text_of
from steer.inverse import LambdaPosterior, infer_context, infer_lambda
from steer.view import posterior_figure

PROMPTS = ["greet me", "what of the weather?", "hm"]
CONTEXTS = ["I shout.", "I am a sailor, and old.", "no."]
RESPONSES = ["HELLO THERE!", "it is, as ever, a little grey and wet.", "?!"]
GRID = [-3.0, -1.5, -1.0, -0.2, 0.0, 0.7, 1.0, 2.5]


def rerun(model: Any, with_context: list[int], without: list[int], response: list[int], lam: float) -> np.ndarray:
    """Log-probability of each of the response's tokens under CoS at λ, from two forward passes of one row each."""
    rows = []
    for prompt in (with_context, without):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + response])).logits[0]
        rows.append(logits[len(prompt) - 1 : -1].double().numpy())
    mixed = (1 + lam) * rows[0] - lam * rows[1]
    return (mixed - logsumexp(mixed, axis=1, keepdims=True))[np.arange(len(response)), response]


def likelihood(lm: steer.FrozenLM, i: int, lam: float, opposite: str | None = None) -> float:
    with_context = lm.tokenizer(f"{CONTEXTS[i]} {PROMPTS[i]}").input_ids
    without = lm.tokenizer(PROMPTS[i] if opposite is None else f"{opposite} {PROMPTS[i]}").input_ids
    return rerun(lm.model, with_context, without, lm.tokenizer(RESPONSES[i]).input_ids, lam).sum()


@pytest.fixture(scope="module")
def double() -> Iterator[steer.FrozenLM]:
    with steer.wrap(tiny("llama", dtype=torch.float64), tokenizer()) as lm:
        yield lm


@pytest.fixture(scope="module")
def found(double: steer.FrozenLM) -> LambdaPosterior:
    return infer_lambda(double, PROMPTS, RESPONSES, CONTEXTS, grid=GRID)


def test_two_streams_give_what_cos_gives_at_each_lambda(lm: steer.FrozenLM) -> None:
    """METHODS §27, identity 4, on every architecture, in one batch and row by row."""
    found = infer_lambda(lm, PROMPTS, RESPONSES, CONTEXTS, grid=GRID)
    expected = np.array([[likelihood(lm, i, lam) for lam in GRID] for i in range(3)])
    np.testing.assert_allclose(found.log_likelihood, expected, rtol=2e-5, atol=2e-4)
    assert found.tokens.tolist() == [len(response) for response in RESPONSES]


def test_the_same_in_float64(double: steer.FrozenLM, found: LambdaPosterior) -> None:
    expected = np.array([[likelihood(double, i, lam) for lam in GRID] for i in range(3)])
    np.testing.assert_allclose(found.log_likelihood, expected, rtol=1e-11)
    posterior = np.exp(expected - logsumexp(expected, axis=1, keepdims=True))
    np.testing.assert_allclose(found.posterior, posterior, rtol=1e-9)
    np.testing.assert_allclose(found.mean, posterior @ GRID, rtol=1e-9)
    weights = np.arange(8.0)
    weighted = infer_lambda(double, PROMPTS, RESPONSES, CONTEXTS, grid=GRID, prior=weights)
    np.testing.assert_allclose(weighted.posterior, posterior * weights / (posterior @ weights)[:, None], rtol=1e-9)
    assert torch.equal(weighted.lam, found.lam)


def test_the_maximum_is_scipy_s_and_the_information_the_curvature(
    double: steer.FrozenLM, found: LambdaPosterior
) -> None:
    assert found.edge.tolist() == [0, 0, 0]
    z = norm.ppf(0.975)
    for i in range(3):
        best = minimize_scalar(lambda lam, i=i: -likelihood(double, i, lam), bounds=(-3, 2.5), options={"xatol": 1e-9})
        assert found.lam[i].item() == pytest.approx(best.x, abs=2e-6)
        below, at, above = (likelihood(double, i, found.lam[i].item() + step) for step in (-1e-3, 0, 1e-3))
        assert found.information[i].item() == pytest.approx((2 * at - below - above) / 1e-6, rel=1e-4)
        width = z / math.sqrt(found.information[i])
        assert found.low[i].item() == pytest.approx(found.lam[i].item() - width)
        assert found.high[i].item() == pytest.approx(found.lam[i].item() + width)
    half = infer_lambda(double, PROMPTS, RESPONSES, CONTEXTS, grid=GRID, level=0.5)
    np.testing.assert_allclose((half.high - half.low) / (found.high - found.low), norm.ppf(0.75) / z, rtol=1e-7)


def test_the_log_likelihood_is_concave(double: steer.FrozenLM) -> None:
    grid = np.linspace(-4, 4, 161)
    found = infer_lambda(double, PROMPTS, RESPONSES, CONTEXTS, grid=grid)
    assert (np.diff(found.log_likelihood, 2, axis=1) < 0).all()
    assert found.log_likelihood.max(1).values.tolist() == pytest.approx(
        [likelihood(double, i, grid[found.log_likelihood[i].argmax()]) for i in range(3)]
    )


def test_a_coarse_grid_gives_the_same_maximum(double: steer.FrozenLM, found: LambdaPosterior) -> None:
    for grid in ([-3.0, 2.5], [-3.0, 2.4, 2.5], [-40.0, 40.0]):
        coarse = infer_lambda(double, PROMPTS, RESPONSES, CONTEXTS, grid=grid)
        np.testing.assert_allclose(coarse.lam, found.lam, atol=1e-5)


def test_a_contrast_pair(double: steer.FrozenLM) -> None:
    opposites = ["I whisper.", "I am young.", "yes!"]
    found = infer_lambda(double, PROMPTS, RESPONSES, CONTEXTS, opposites=opposites, grid=GRID)
    expected = [[likelihood(double, i, lam, opposites[i]) for lam in GRID] for i in range(3)]
    np.testing.assert_allclose(found.log_likelihood, expected, rtol=1e-11)


def test_temperature_divides_the_scores(double: steer.FrozenLM) -> None:
    found = infer_lambda(double, PROMPTS, RESPONSES, CONTEXTS, grid=GRID, temperature=0.6)
    scaled = tiny("llama", dtype=torch.float64)
    with torch.no_grad():
        scaled.lm_head.weight.div_(0.6)
    with steer.wrap(scaled, tokenizer()) as lm:
        expected = infer_lambda(lm, PROMPTS, RESPONSES, CONTEXTS, grid=GRID)
    np.testing.assert_allclose(found.log_likelihood, expected.log_likelihood, rtol=1e-9)
    np.testing.assert_allclose(found.lam, expected.lam, atol=1e-5)


def test_a_text_alone_gives_what_it_gives_in_a_batch(lm: steer.FrozenLM) -> None:
    whole = infer_lambda(lm, PROMPTS, RESPONSES, CONTEXTS)
    for i in range(3):
        alone = infer_lambda(lm, PROMPTS[i : i + 1], RESPONSES[i : i + 1], CONTEXTS[i : i + 1])
        np.testing.assert_allclose(alone.log_likelihood[0], whole.log_likelihood[i], rtol=2e-5, atol=5e-4)
        np.testing.assert_allclose(alone.lam[0], whole.lam[i], atol=1e-3)
    done: list[int] = []
    parts = infer_lambda(lm, PROMPTS, RESPONSES, CONTEXTS, batch_tokens=1, on_progress=done.append)
    np.testing.assert_allclose(parts.log_likelihood, whole.log_likelihood, rtol=2e-5, atol=5e-4)
    assert done == [1, 2, 3]


def test_with_a_chat_template_the_context_stands_in_the_user_s_turn() -> None:
    chats = tokenizer(chat=True)
    with steer.wrap(tiny("llama", dtype=torch.float64), chats) as lm:
        found = infer_lambda(lm, ["greet me"], ["HELLO"], ["I shout."], grid=GRID)
        rows = [chats(f"[user] {text}\n[assistant] ").input_ids for text in ("I shout. greet me", "greet me")]
        expected = [rerun(lm.model, *rows, chats("HELLO").input_ids, lam).sum() for lam in GRID]
    np.testing.assert_allclose(found.log_likelihood[0], expected, rtol=1e-11)


def test_an_end_of_text_token_counts_where_it_is_given(double: steer.FrozenLM) -> None:
    ids = double.tokenizer("HELLO").input_ids
    rows = [double.tokenizer(text).input_ids for text in ("I shout. greet me", "greet me")]
    for response, tokens in (("HELLO", ids), (ids, ids), ([*ids, EOS], [*ids, EOS])):
        found = infer_lambda(double, ["greet me"], [response], ["I shout."], grid=GRID)
        assert found.tokens.tolist() == [len(tokens)]
        expected = rerun(double.model, *rows, tokens, 0.7).sum()
        assert found.log_likelihood[0, GRID.index(0.7)].item() == pytest.approx(expected, rel=1e-11)


def sample(lm: steer.FrozenLM, streams: Sequence[list[int]], lam: float, texts: int, tokens: int) -> list[list[int]]:
    """Texts sampled with CoS at λ, each stream with a cache of its own."""
    generator = torch.Generator().manual_seed(5)
    inputs, caches, out = [torch.tensor([ids] * texts) for ids in streams], [None, None], []
    for _ in range(tokens):
        logits = []
        for k, ids in enumerate(inputs):
            with torch.no_grad():
                output = lm.model(input_ids=ids, past_key_values=caches[k], use_cache=True)
            caches[k] = output.past_key_values
            logits.append(output.logits[:, -1])
        mixed = (1 + lam) * logits[0] - lam * logits[1]
        out.append(torch.multinomial(mixed.softmax(-1), 1, generator=generator))
        inputs = [out[-1], out[-1]]
    return torch.cat(out, 1).tolist()


@pytest.mark.parametrize("lam", [-0.6, 0.8])
def test_lambda_is_recovered_and_the_interval_holds_it_as_often_as_it_says(llama: steer.FrozenLM, lam: float) -> None:
    texts, tokens = 200, 40
    prompt, context = "tell me of the weather", "I am a sailor."
    streams = [llama.tokenizer(text).input_ids for text in (f"{context} {prompt}", prompt)]
    responses = sample(llama, streams, lam, texts, tokens)
    found = infer_lambda(llama, [prompt] * texts, responses, [context] * texts, grid=[-4.0, 4.0])
    inside = ((found.low <= lam) & (lam <= found.high)).double().mean().item()
    # Of 200 draws at 95 %, all but one in a thousand times.
    assert 0.895 <= inside <= 0.995
    half = infer_lambda(llama, [prompt] * texts, responses, [context] * texts, grid=[-4.0, 4.0], level=0.5)
    assert 0.38 <= ((half.low <= lam) & (lam <= half.high)).double().mean().item() <= 0.62
    # All texts together, and the spread that the information predicts.
    together = (found.information * found.lam).sum() / found.information.sum()
    assert together.item() == pytest.approx(lam, abs=4 / math.sqrt(found.information.sum()))
    spread = ((found.lam - lam) * found.information.sqrt()).std().item()
    assert 0.8 < spread < 1.25


@pytest.mark.parametrize("side", [-1, 1])
def test_a_text_that_gets_ever_likelier_is_at_the_end_of_the_grid(double: steer.FrozenLM, side: int) -> None:
    """Each of its tokens is the one that the context favours most, or least, so that no finite λ is the likeliest."""
    streams = [double.tokenizer(text).input_ids for text in ("I shout. greet me", "greet me")]
    response: list[int] = []
    for _ in range(6):
        with torch.no_grad():
            rows = [double.model(input_ids=torch.tensor([ids + response])).logits[0, -1] for ids in streams]
        response.append(int((side * (rows[0] - rows[1])).argmax()))
    found = infer_lambda(double, ["greet me"], [response], ["I shout."], grid=GRID)
    end = GRID[-1] if side > 0 else GRID[0]
    assert (found.edge.item(), found.lam.item()) == (side, end)
    outer, inner = (found.high, found.low) if side > 0 else (found.low, found.high)
    assert outer.item() == side * math.inf
    # From the end inwards, the second-order expansion falls by z²/2.
    at, near, far = (rerun(double.model, *streams, response, end - side * step).sum() for step in (0, 1e-3, 2e-3))
    curvature = (2 * near - at - far) / 1e-6
    slope = (at - near) / 1e-3 - curvature * 5e-4
    width = abs(end - inner.item())
    assert slope * width + curvature * width**2 / 2 == pytest.approx(norm.ppf(0.975) ** 2 / 2, rel=1e-2)


def test_a_text_that_the_context_makes_certain_is_not_one_that_it_does_not_change() -> None:
    """At the end of the grid the likeliest token has all the probability, so that the information vanishes there."""
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(200)
    with steer.wrap(model, tokenizer()) as lm:
        logits = [
            lm.model(input_ids=torch.tensor([lm.tokenizer(text).input_ids])).logits[0, -1].detach()
            for text in ("I shout. greet me", "greet me")
        ]
        token = int((logits[0] - logits[1]).argmax())
        found = infer_lambda(lm, ["greet me"], [[token]], ["I shout."], grid=GRID)
    assert found.information.item() < 1e-15
    assert found.log_likelihood[0, 0].item() < -100
    assert (found.informative, found.edge.item(), found.lam.item()) == ([True], 1, GRID[-1])


def barely_attending(share: float) -> Any:
    """Without attention a token sees nothing but itself."""
    model = tiny("llama")
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.mul_(share)
    return model


def test_a_context_that_changes_little_is_informative() -> None:
    with steer.wrap(barely_attending(1e-5), tokenizer()) as lm:
        found = infer_lambda(lm, PROMPTS, RESPONSES, CONTEXTS, grid=GRID)
    assert found.informative == [True] * 3
    # Per token, F is about a thousandth of a nat, and hundreds of times what rounding makes.
    assert ((found.information / found.tokens).sqrt() < 0.0013).all()


def test_a_context_that_changes_nothing_is_said() -> None:
    with (
        steer.wrap(barely_attending(0.0), tokenizer()) as lm,
        pytest.warns(UserWarning, match="changes nothing in 3 of 3 texts"),
    ):
        found = infer_lambda(lm, PROMPTS, RESPONSES, CONTEXTS, grid=GRID)
    assert found.lam.isnan().all()
    assert found.informative == [False] * 3
    assert found.low.tolist() == [-math.inf] * 3
    assert found.high.tolist() == [math.inf] * 3
    assert found.edge.tolist() == [0] * 3
    np.testing.assert_allclose(found.posterior, 1 / len(GRID), atol=1e-4)
    plain = found.to_json()["texts"][0]
    assert [plain[name] for name in ("lam", "low", "high")] == [None, None, None]


@pytest.mark.parametrize("batch_tokens", [2048, 100, 1])
@pytest.mark.parametrize("lam", [-0.5, 0.0, 1.3])
def test_the_posterior_over_contexts(double: steer.FrozenLM, lam: float, batch_tokens: int) -> None:
    candidates = {"loud": "I shout.", "sea": "I am a sailor, and old.", "none": None, "no": "no."}
    done: list[int] = []
    found = infer_context(
        double, PROMPTS, RESPONSES, candidates, lam=lam, batch_tokens=batch_tokens, on_progress=done.append
    )
    expected = np.empty((3, 4))
    for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        for k, context in enumerate(candidates.values()):
            text = prompt if context is None else f"{context} {prompt}"
            ids = [double.tokenizer(part).input_ids for part in (text, prompt, response)]
            expected[i, k] = rerun(double.model, *ids, lam).sum()
    np.testing.assert_allclose(found.log_likelihood, expected, rtol=1e-10)
    posterior = np.exp(expected - logsumexp(expected, axis=1, keepdims=True))
    np.testing.assert_allclose(found.posterior, posterior, rtol=1e-7)
    assert found.best == [list(candidates)[k] for k in expected.argmax(1)]
    assert found.tokens.tolist() == [len(response) for response in RESPONSES]
    assert done == [1, 2, 3]


def test_candidates_have_priors_and_may_be_contrasted_with_an_opposite(double: steer.FrozenLM) -> None:
    flat = infer_context(double, PROMPTS, RESPONSES, CONTEXTS, lam=0.5, opposite="I whisper.")
    assert flat.labels == tuple(CONTEXTS)
    np.testing.assert_allclose(
        flat.log_likelihood.diagonal(), [likelihood(double, i, 0.5, "I whisper.") for i in range(3)], rtol=1e-10
    )
    weights = np.array([1.0, 0.0, 3.0])
    weighted = infer_context(double, PROMPTS, RESPONSES, CONTEXTS, lam=0.5, opposite="I whisper.", prior=weights)
    expected = flat.posterior.numpy() * weights
    np.testing.assert_allclose(weighted.posterior, expected / expected.sum(1, keepdims=True), rtol=1e-9)
    with pytest.raises(steer.SteerError, match="its own opposite"):
        infer_context(double, PROMPTS, RESPONSES, CONTEXTS, opposite=CONTEXTS[1])


def test_log_likelihoods_of_any_texts(double: steer.FrozenLM) -> None:
    texts = [text_of(double, PROMPTS[i], RESPONSES[i], [CONTEXTS[i]]) for i in range(3)]
    sums, counts = log_likelihoods(double, texts, [2.0, -0.3])
    expected = [[likelihood(double, i, lam) for lam in (2.0, -0.3)] for i in range(3)]
    np.testing.assert_allclose(sums, expected, rtol=1e-11)
    assert counts.tolist() == [len(response) for response in RESPONSES]
    with pytest.raises(steer.SteerError, match="text 1 has 3 contexts"):
        log_likelihoods(double, [texts[0], text_of(double, PROMPTS[1], RESPONSES[1], CONTEXTS)], [1.0])


def test_streams_come_one_text_at_a_time_in_float32(lm: steer.FrozenLM) -> None:
    texts = [text_of(lm, PROMPTS[i], RESPONSES[i], CONTEXTS) for i in range(3)]
    seen = {}
    for i, streams in log_probs(lm, texts, batch_tokens=64):
        assert streams.shape == (4, len(RESPONSES[i]), lm.model.config.get_text_config().vocab_size)
        assert streams.dtype == torch.float32
        np.testing.assert_allclose(streams.exp().sum(-1), 1, rtol=1e-4)
        seen[i] = streams
    assert sorted(seen) == [0, 1, 2]


def test_no_forward_pass_has_more_tokens_than_it_may(lm: steer.FrozenLM) -> None:
    """With padding, and texts of many short streams beside texts of one long stream."""
    many = [text_of(lm, "why?", "so", list("abcdefgh")) for _ in range(3)]
    texts = [*many, text_of(lm, "why? " * 12, "so", ["a"])]
    read: list[int] = []
    handle = lm.attachment.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(next(iter([*args, kwargs.get("input_ids")])).numel()), with_kwargs=True
    )
    budget = 2 * max(len(text.streams) * text.longest for text in texts)
    assert {i for i, _ in log_probs(lm, texts, batch_tokens=budget)} == set(range(4))
    handle.remove()
    assert max(read) <= budget
    assert len(read) < 4


def test_half_precision_is_worked_on_in_float32() -> None:
    with steer.wrap(tiny("llama", dtype=torch.bfloat16), tokenizer()) as lm:
        found = infer_lambda(lm, PROMPTS, RESPONSES, CONTEXTS, grid=GRID)
        expected = [[likelihood(lm, i, lam) for lam in GRID] for i in range(3)]
    np.testing.assert_allclose(found.log_likelihood, expected, rtol=0.05)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"grid": []}, "λ must be finite"),
        ({"grid": [0.0, math.nan]}, "λ must be finite"),
        ({"grid": [0.0, math.inf]}, "λ must be finite"),
        ({"grid": ["1"]}, "λ must be finite, and at least one, got \\['1'\\]"),
        ({"grid": None}, "λ must be finite, and at least one, got None"),
        ({"grid": [1.0]}, "two or more λ in rising order"),
        ({"grid": [1.0, 0.0]}, "two or more λ in rising order"),
        ({"grid": [1.0, 1.0]}, "two or more λ in rising order"),
        ({"grid": [0.0, 1.0], "prior": [1.0]}, "a weight for each λ of the grid: 2, not 1"),
        ({"grid": [0.0, 1.0], "prior": [-1.0, 1.0]}, "none is below 0"),
        ({"grid": [0.0, 1.0], "prior": [0.0, 0.0]}, "one is above"),
        ({"grid": [0.0, 1.0], "prior": ["a", "b"]}, "a prior's weights are numbers"),
        ({"level": 1.0}, "level=1.0 is not between"),
        ({"level": "a"}, "level=a is not between"),
        ({"temperature": "a"}, "temperature=a is not above 0"),
        ({"temperature": 0.0}, "temperature=0.0 is not above 0"),
        ({"prompts": "hi"}, "`prompts` holds one entry a text"),
        ({"contexts": "hi"}, "`contexts` holds one entry a text"),
        ({"contexts": ["a", "b"]}, "1 prompts, 1 responses, 2 contexts"),
        ({"opposites": ["a", "b"]}, "1 contexts, 2 opposites"),
        ({"prompts": [], "responses": [], "contexts": []}, "no text to infer"),
        ({"contexts": [" "]}, "a context is empty"),
        ({"opposites": [""]}, "a context is empty"),
        ({"opposites": ["I shout."]}, "its own opposite"),
        ({"responses": [""]}, "a response is empty"),
        ({"responses": [[]]}, "a response is empty"),
        ({"responses": [[5, 100]]}, "a response has the token 100; this model's are whole numbers from 0 to 99"),
        ({"responses": [[5, -1]]}, "a response has the token -1"),
        ({"responses": [[5, 1.0]]}, "a response has the token 1.0"),
        ({"responses": [["HELLO"]]}, "a response has the token 'HELLO'"),
        ({"contexts": [5]}, "a context must be text, got 5"),
        ({"prompts": [""]}, "a prompt is empty"),
        ({"prompts": [[5, 6]]}, "a context needs a prompt of text"),
        ({"contexts": ["x" * 200]}, "214 tokens and the model's window is 200"),
    ],
)
def test_bad_input_is_told_before_anything_runs(
    changed: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with steer.wrap(tiny("opt"), tokenizer()) as lm:
        monkeypatch.setattr(lm.model, "forward", None)
        arguments = {"prompts": ["greet me"], "responses": ["HELLO"], "contexts": ["I shout."]} | changed
        with pytest.raises(steer.SteerError, match=said):
            infer_lambda(lm, **arguments)


def test_token_ids_of_any_kind_are_the_same(llama: steer.FrozenLM) -> None:
    # The last token that the model has is one.
    ids = [*llama.tokenizer("HELLO").input_ids, 99]
    given = [ids, tuple(ids), torch.tensor(ids), np.array(ids)]
    found = infer_lambda(llama, ["greet me"] * 4, given, ["I shout."] * 4)  # type: ignore[arg-type]
    assert (found.log_likelihood == found.log_likelihood[0]).all()


def test_bad_candidates_are_told_before_anything_runs(llama: steer.FrozenLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama.model, "forward", None)
    for candidates, arguments, said in (
        (["a"], {}, "two or more contexts"),
        (["a", "a"], {}, "two or more contexts"),
        (["a", " "], {}, "a context is empty"),
        (["a", "b"], {"lam": -1.0}, "λ = −1 is the prompt without any context"),
        (["a", "b"], {"lam": math.nan}, "λ must be finite"),
        (["a", "b"], {"prior": [1.0, 1.0, 1.0]}, "a weight for each context: 2, not 3"),
        (["a", "b"], {"temperature": -1.0}, "is not above 0"),
    ):
        with pytest.raises(steer.SteerError, match=said):
            infer_context(llama, ["greet me"], ["HELLO"], candidates, **arguments)


def test_a_model_without_a_tokenizer_reads_no_texts() -> None:
    with steer.wrap(tiny("llama")) as lm, pytest.raises(steer.SteerError, match="without a tokenizer"):
        infer_lambda(lm, ["greet me"], ["HELLO"], ["I shout."])


def test_its_repr_has_the_first_texts_and_no_tensors(double: steer.FrozenLM) -> None:
    found = infer_lambda(double, PROMPTS * 2, RESPONSES * 2, CONTEXTS * 2, grid=GRID)
    one = f"{found.lam[0]:+.2f} [{found.low[0]:+.2f}, {found.high[0]:+.2f}], "
    shown = repr(found)
    assert shown.startswith(f"LambdaPosterior(6 texts, λ with its 95% interval: {one}")
    assert shown.endswith("], …)")
    assert shown.count(one) == 2
    assert "tensor" not in shown
    assert "…" not in repr(infer_lambda(double, PROMPTS[:1], RESPONSES[:1], CONTEXTS[:1], grid=GRID))


# The command.


def call(*arguments: object) -> Any:
    done = CliRunner().invoke(app, ["infer-lambda", *map(str, arguments)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


@pytest.fixture
def texts(double: steer.FrozenLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of texts, of which the first has no context and the second an opposite; the command has a tiny model."""
    monkeypatch.setattr("steer.cli.options.load", lambda *_: double)
    lines: list[dict[str, str]] = [
        {"prompt": p, "response": r, "context": c} for p, r, c in zip(PROMPTS, RESPONSES, CONTEXTS, strict=True)
    ]
    del lines[0]["context"]
    lines[1] |= {"opposite": "no.", "text": "nobody reads this"}
    lines[2]["text"] = lines[2].pop("response")
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n", encoding="utf-8")
    return file


def test_steer_infer_lambda_of_a_file(texts: Path, double: steer.FrozenLM) -> None:
    printed = json.loads(call(texts, "--context", CONTEXTS[0], "--grid", "-2:2:0.5", "--level", 0.9, "--json").stdout)
    grid = [-2 + 0.5 * i for i in range(9)]
    expected = infer_lambda(
        double, PROMPTS, RESPONSES, CONTEXTS, opposites=[None, "no.", None], grid=grid, level=0.9
    ).to_json()
    assert printed == {"model": "smollm2-135m", **expected}
    png = texts.parent / "posterior.png"
    shown = call(texts, "--context", CONTEXTS[0], "--grid=-2,2", "--png", png).stdout
    assert all(response in shown for response in RESPONSES)
    assert "95% interval" in shown
    assert "at the " in shown or "[" in shown
    assert png.read_bytes().startswith(b"\x89PNG")


def test_steer_infer_lambda_of_one_text(texts: Path, double: steer.FrozenLM) -> None:
    asked = ["--prompt", PROMPTS[0], "--context", CONTEXTS[0], "--response", RESPONSES[0], "--temperature", 0.8]
    result = json.loads(call(*asked, "--json", "--raw").stdout)
    (printed,) = result["texts"]
    assert result["temperature"] == 0.8
    found = infer_lambda(double, PROMPTS[:1], RESPONSES[:1], CONTEXTS[:1], temperature=0.8)
    assert printed["lam"] == found.lam.item()
    assert f"{found.lam.item():+.2f}" in call(*asked).stdout


def test_steer_infer_lambda_says_what_is_wrong(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Before a model is loaded.
    monkeypatch.setattr("steer.cli.options.load", None)

    def file(content: bytes) -> Path:
        path = texts.parent / f"{len(list(texts.parent.iterdir()))}bad.jsonl"
        path.write_bytes(content)
        return path

    for arguments, said in (
        ([texts], "texts.jsonl:1: there is no context"),
        ([], "either a file of texts, or one text"),
        ([texts, "--response", "x"], "either a file of texts, or one text"),
        (["--response", "x", "--context", "y"], "there is no prompt"),
        ([texts.parent / "none"], "there is no such file"),
        ([file(b"\n")], "holds no texts"),
        ([file(b'{"prompt": "a", "text": "b", "context": 3}')], "bad.jsonl:1: `context` must be text"),
        ([file(b"[]")], "bad.jsonl:1: expected an object"),
        ([file(b"\n{")], "bad.jsonl:2: not JSON"),
        ([file(b"\xff")], "bad.jsonl:1: not JSON"),
        ([texts, "-c", "a", "--grid", "1:0:0.1"], "--grid 1:0:0.1 runs from high to low"),
        ([texts, "-c", "a", "--grid", "1:0:-0.1"], "--grid 1:0:-0.1 runs from high to low"),
        ([texts, "-c", "a", "--grid", "0:1:-0.1"], "--grid 0:1:-0.1 runs from high to low"),
        ([texts, "-c", "a", "--grid", "0:1:0"], "no list such as"),
        ([texts, "-c", "a", "--grid", "0:1"], "no list such as"),
        ([texts, "-c", "a", "--grid", "a,b"], "no list such as"),
        ([texts, "-c", "a", "--grid", "0,nan"], "λ must be finite"),
        ([texts, "-c", "a", "--grid", "1,0"], "in rising order"),
        ([texts, "-c", "a", "--level", 2], "level=2.0 is not between"),
        ([texts, "-c", "a", "--temperature", 0], "temperature=0.0 is not above 0"),
        ([texts, "-c", " "], "^--context is empty$"),
        ([texts, "-c", "a", "--opposite", ""], "^--opposite is empty$"),
        ([texts, "-c", "a", "--opposite", "a"], "texts.jsonl:1: 'a' is its own opposite"),
        (["-p", "x", "-c", "a", "-r", ""], "^--response is empty$"),
        ([file(b'{"prompt": "a", "response": "", "context": "b"}')], "bad.jsonl:1: `response` is empty$"),
        ([file(b'{"prompt": "a", "text": "b", "context": " "}')], "bad.jsonl:1: `context` is empty$"),
        ([file(b'{"prompt": "a", "context": "b"}')], "bad.jsonl:1: there is no response; write it into the line$"),
        ([file(b'{"response": "a", "context": "b"}')], "bad.jsonl:1: there is no prompt; --prompt gives one$"),
        (
            [file(b'{"prompt": "a", "text": "b", "context": "c", "oposite": "d"}')],
            "bad.jsonl:1: 'oposite' is no key of a line, but 'opposite' is; it has prompt, response",
        ),
        ([file(b'{"prompt": "a", "text": "b", "context": "c", "zzz": 1}')], "'zzz' is no key of a line; it has"),
        ([texts.parent], "is a folder; give a file"),
        ([texts, "-c", "a", "--png", texts.parent / "x.xyz"], "x.xyz has the ending of no picture; there are .*png"),
        ([texts, "-c", "a", "--png", texts.parent / "none" / "x.png"], "cannot be written"),
    ):
        with pytest.raises(steer.SteerError, match=said):
            call(*arguments)


def test_a_text_whose_lambda_cannot_be_told_has_a_row_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = tiny("llama")
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
    with steer.wrap(model, tokenizer()) as lm:
        monkeypatch.setattr("steer.cli.options.load", lambda *_: lm)
        shown = call("--prompt", "a", "--context", "b", "--response", "c").stdout
        assert "changes nothing" in " ".join(shown.split())
        with pytest.warns(UserWarning, match="changes nothing"):
            found = infer_lambda(lm, ["a"], ["c"], ["b"])
    pytest.importorskip("matplotlib")
    posterior_figure(found).savefig(tmp_path / "posterior.png")
