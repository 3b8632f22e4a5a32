"""Looking at vectors: what is shown is what the model's own weights and logits say, whatever the tokens are."""

from __future__ import annotations

import json
import warnings
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import VARIANTS, tiny, tokenizer
from rich.console import Console
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import steer
from steer.cli.app import app
from steer.read import Span, response_span
from steer.view import lens, projections, read_tokens
from steer.view.colours import CHANGE, PROJECTION, colour, ink
from steer.view.lens import direction_logits
from steer.view.words import token_text, visible

NASTY = "<b>$x_1$</b> & \x1b[31m\u202e\n日"


@pytest.fixture(params=VARIANTS)
def lm(request: pytest.FixtureRequest) -> Any:
    with steer.wrap(tiny(request.param), tokenizer()) as lm:
        yield lm


# Variants of OPT whose stream ends in a block's own norm, or goes through a projection.
NO_FINAL_NORM = ("opt_post_norm", "opt_narrow")
NORMED = [name for name in VARIANTS if name not in NO_FINAL_NORM]


def drawn(lm: steer.FrozenLM, count: int = 3) -> torch.Tensor:
    return torch.randn(count, lm.width, generator=torch.Generator().manual_seed(1))


def final_norm(lm: steer.FrozenLM) -> nn.Module:
    return lm.attachment.decoder.get_submodule(lm.attachment.architecture.final_norm)


def expected_logits(lm: steer.FrozenLM, vector: torch.Tensor) -> np.ndarray:
    """By the architectures' definitions, in float64."""
    norm, head = final_norm(lm), lm.model.get_output_embeddings()
    with torch.no_grad():
        rows = (head(torch.eye(lm.width)) - head(torch.zeros(lm.width))).T
    scale = norm.weight.detach().double().numpy() + (1.0 if type(norm).__name__.startswith("Gemma") else 0.0)
    unit = vector.double().numpy() / np.linalg.norm(vector.double().numpy())
    if isinstance(norm, nn.LayerNorm):
        unit = unit - unit.mean()
    return np.sqrt(lm.width) * (rows.double().numpy() @ (scale * unit))


# The lens.


@pytest.mark.parametrize("lm", NORMED, indirect=True)
def test_lens_is_the_norm_s_scale_and_the_unembedding(lm: steer.FrozenLM) -> None:
    vectors = dict(zip("abc", drawn(lm), strict=True))
    found = lens(lm, vectors, k=4)
    assert list(found.promoted) == list(found.suppressed) == list("abc")
    for name, vector in vectors.items():
        expected = expected_logits(lm, vector)
        expected -= expected.mean()
        order = np.argsort(expected)
        assert [token.id for token in found.promoted[name]] == order[::-1][:4].tolist()
        assert [token.id for token in found.suppressed[name]] == order[:4].tolist()
        for token in (*found.promoted[name], *found.suppressed[name]):
            assert token.logit == pytest.approx(expected[token.id], rel=1e-5)
            assert token.text == visible(lm.tokenizer.convert_ids_to_tokens(token.id))


@pytest.mark.parametrize("lm", NORMED, indirect=True)
def test_lens_is_the_slope_of_the_model_s_logits_at_the_last_block(lm: steer.FrozenLM) -> None:
    """Across the stream: along it, a direction changes nothing but the length, which the norm takes away again."""
    if getattr(lm.model.config, "final_logit_softcapping", None):
        pytest.skip("softcaps are not applied")
    last = steer.Site("resid_post", lm.n_layers - 1)
    ids = lm.tokenizer("a stream of tokens").input_ids
    state = read_tokens(lm, ids, [last])[last][-1]
    if isinstance(final_norm(lm), nn.LayerNorm):
        state = state - state.mean()
    vector = drawn(lm, 1)[0]
    vector = vector - (vector @ state) / (state @ state) * state
    unit = vector / vector.norm()
    step = 0.03 * state.norm()
    edit = steer.ResidualEdit(last, torch.stack([step * unit, -step * unit]))
    with torch.no_grad(), lm.steered(edits=[edit], prompt_lengths=[len(ids)] * 2):
        up, down = lm.model(torch.tensor([ids] * 2)).logits[:, -1]
    slope = (up - down) / 0.06
    expected = direction_logits(lm, vector[None])[0]
    assert (slope - expected).abs().max() < 3e-3 * expected.abs().max()


@pytest.mark.parametrize("name", NO_FINAL_NORM)
def test_lens_refuses_models_without_a_final_norm(name: str) -> None:
    with steer.wrap(tiny(name), tokenizer()) as lm, pytest.raises(steer.SteerError, match="through a norm"):
        lens(lm, drawn(lm, 1)[0])


def test_lens_ranks_tokens_and_no_spare_rows_of_the_head() -> None:
    model = tiny("llama")
    model.resize_token_embeddings(130, mean_resizing=False)
    with steer.wrap(model, tokenizer()) as lm:
        vector = drawn(lm, 1)[0]
        found = lens(lm, vector, k=100)
        assert sorted(token.id for token in found.promoted["direction"]) == list(range(100))
        assert sum(token.logit for token in found.promoted["direction"]) == pytest.approx(0, abs=1e-2)


def test_lens_of_what_sets_directions_apart(llama: steer.FrozenLM) -> None:
    vectors = drawn(llama) + 5.0
    named = dict(zip("abc", vectors, strict=True))
    apart = lens(llama, named, common="mean")
    assert apart == lens(llama, named, common=vectors.mean(0))
    assert apart == lens(llama, {name: vector - vectors.mean(0) for name, vector in named.items()})
    assert apart != lens(llama, named)


def test_lens_of_states(llama: steer.FrozenLM, histories: list[steer.History]) -> None:
    method = steer.StyleVector(layer=[0, 1], neutral="field:bland")
    state = method.fit(llama, histories[0])
    found = lens(llama, state, site="resid_pre[2]")
    assert found.promoted == {"style_vector": lens(llama, state.tensors["resid_post[1]"]).promoted["direction"]}
    with pytest.raises(steer.SteerError, match=r"resid_post\[0\], resid_post\[1\]; name the site"):
        lens(llama, {"ann": state})
    with pytest.raises(steer.SteerError, match=r"no vector at resid_post\[2\]"):
        lens(llama, {"ann": state}, site="resid_post[2]")
    with pytest.raises(steer.SteerError, match="holds no vector"):
        lens(llama, steer.CoS().state("likes tea"))
    with (
        steer.wrap(tiny("llama", seed=1), tokenizer()) as other,
        pytest.raises(steer.SteerError, match="this model is"),
    ):
        lens(other, state, site="resid_post[1]")


def test_lens_refuses_what_it_cannot_show(llama: steer.FrozenLM) -> None:
    vector = drawn(llama, 1)[0]
    for directions, arguments, message in (
        ({}, {}, "nothing to look at"),
        ({"a": 0 * vector}, {}, "'a' is zero"),
        ({"a": vector[:-1]}, {}, "48 wide"),
        ({"a": vector / 0}, {}, "not finite"),
        ({"a": vector}, {"k": 0}, "k=0"),
        ({"a": vector}, {"k": 101}, "there are 100 tokens"),
        ({"a": vector}, {"common": "mean"}, "there is one"),
        ({"a": vector, "b": vector}, {"common": "median"}, "neither"),
        ({"a": vector}, {"site": "z[1]"}, "not part of the residual stream"),
    ):
        with pytest.raises(steer.SteerError, match=message):
            lens(llama, directions, **arguments)


# Tokens as text.


def test_every_byte_is_shown_as_itself_or_as_its_number() -> None:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(sorted(alphabet))}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bytewise = PreTrainedTokenizerFast(tokenizer_object=backend)
    for character in (*map(chr, range(128)), "é", "日", "🙂"):
        tokens = bytewise(character).input_ids
        whole = len(tokens) == 1
        expected = character if whole else "".join(f"\\x{byte:02x}" for byte in character.encode())
        assert "".join(token_text(bytewise, token) for token in tokens) == expected


def test_pieces_keep_the_space_in_front() -> None:
    pieces = ["<unk>", "▁the", "the", "<0xE6>", "<0x41>"]
    backend = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    sentencepiece = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert [token_text(sentencepiece, i) for i in range(5)] == ["<unk>", " the", "the", "\\xe6", "A"]


def test_what_is_invisible_is_marked() -> None:
    assert visible(" a\n\tb") == "␣a↵⇥b"
    assert visible("\x1b[31m\u202e\u200b\xa0") == r"\x1b[31m\u202e\u200b\xa0"
    assert visible("né 日") == "né␣日"


# Tokens of a text.


def test_tokens_are_read_as_transformers_captures_them(lm: steer.FrozenLM) -> None:
    ids = lm.tokenizer("some tokens").input_ids
    sites = ["embed", *(f"resid_post[{layer}]" for layer in range(lm.n_layers - 1))]
    found = read_tokens(lm, ids, sites)
    with torch.no_grad():
        states = lm.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    for site, expected in zip(sites[1:], states[1:-1], strict=True):
        torch.testing.assert_close(found[steer.Site.parse(site)], expected[0])
    assert set(map(str, found)) == set(sites)
    with pytest.raises(steer.SteerError, match="no tokens"):
        read_tokens(lm, [], sites)
    # The model is free again, and nothing stays behind.
    assert all(not slot.operators for slot in lm.attachment.slots.values())
    read_tokens(lm, ids, sites)


def test_projections_are_those_of_numpy(lm: steer.FrozenLM) -> None:
    vectors, site = drawn(lm), steer.Site("resid_post", 1)
    span = response_span(lm, "well, then.", "say so ")
    found = projections(lm, "well, then.", dict(zip("abc", vectors, strict=True)), site, prompt="say so ")
    same = projections(lm, span, dict(zip("abc", vectors, strict=True)), site)
    assert torch.equal(found.cosines, same.cosines)
    with torch.no_grad():
        states = lm.model(torch.tensor([list(span.ids)]), output_hidden_states=True).hidden_states[2][0]
    states = states[span.start :].double().numpy()
    units = vectors.double().numpy() / np.linalg.norm(vectors.double().numpy(), axis=1, keepdims=True)
    np.testing.assert_allclose(found.projections, units @ states.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.cosines, units @ states.T / np.linalg.norm(states, axis=1), rtol=1e-4, atol=1e-5)
    assert "".join(found.tokens) == "well, then."
    assert not found.outlier


def test_the_first_token_of_a_sequence_is_grey_and_out_of_the_scale(llama: steer.FrozenLM) -> None:
    site = steer.Site("resid_post", 1)
    first = read_tokens(llama, llama.tokenizer("abcdef").input_ids, [site])[site][0]
    found = projections(llama, "abcdef", first, site)
    assert found.outlier
    assert found.cosines[0, 0] == pytest.approx(1)
    # The colours end at the largest of the others.
    largest = found.cosines[0, 1:].abs().max().item()
    assert f"{largest:+.3g}" in found.html()
    backs = [style for tag, style in spans(found.html()) if tag in "abcdef" and len(tag) == 1]
    assert len(backs) == 6
    assert "#d0d0d0" in backs[0]
    assert not any("#d0d0d0" in back for back in backs[1:])
    ends = {PROJECTION[0], PROJECTION[-1]}
    assert any(end in back for back in backs[1:] for end in ends)
    # Part of a text does not have it.
    part = projections(llama, Span(llama.tokenizer("abcdef").input_ids, 2, 5), first, site)
    assert part.tokens == ("c", "d", "e")
    torch.testing.assert_close(part.cosines, found.cosines[:, 2:5])


def test_projections_refuse_what_they_cannot_show(llama: steer.FrozenLM) -> None:
    vector = drawn(llama, 1)[0]
    with pytest.raises(steer.SteerError, match="at which site"):
        projections(llama, "abc", vector)
    with pytest.raises(steer.SteerError, match="too short"):
        projections(llama, "a", vector, "resid_post[1]")
    with pytest.raises(steer.SteerError, match="has its prompt"):
        projections(llama, Span([5, 6], 0, 2), vector, "resid_post[1]", prompt="so")
    with pytest.raises(steer.SteerError, match="64 wide"):
        projections(llama, "abc", vector, "z[1]")
    with pytest.raises(steer.SteerError, match="not one of"):
        projections(llama, "abc", vector, "resid_post[1]").html("angle")  # type: ignore[arg-type]


# Pages and pictures.


class _Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.spans: list[tuple[str, str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in ("meta", "!doctype"):
            self.open.append(tag)
        if tag == "span":
            self.spans.append(("", dict(attrs)["style"] or ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "span":
            self.spans[-1] = (data, self.spans[-1][1])


def spans(page: str) -> list[tuple[str, str]]:
    """Texts and styles of a page's spans."""
    return _Page(page).spans


def views(lm: steer.FrozenLM) -> list[Any]:
    vectors = dict(zip((NASTY, "b", "c", "d"), drawn(lm, 4), strict=True))
    return [lens(lm, vectors, k=60), projections(lm, NASTY * 6, vectors, "resid_post[1]")]


def test_pages_are_whole_and_hold_texts_as_text(llama: steer.FrozenLM) -> None:
    for view in views(llama):
        page = _Page(view.html())
        assert not page.open
        assert not page.tags & {"script", "link", "img", "iframe", "style", "svg"}
        assert not {name for name, _ in page.attributes} & {"src", "href", "onload", "onclick"}
        assert "\x1b" not in view.html()
        assert "\u202e" not in view.html()
        assert "&lt;" in view.html()
        assert view._repr_html_() in view.html()


def test_texts_cannot_steer_a_terminal(llama: steer.FrozenLM) -> None:
    for view in views(llama):
        assert "\x1b" not in str(view)
        assert r"\x1b[31m" in str(view)
        with Console(width=100, force_terminal=True).capture() as capture:
            Console(width=100, force_terminal=True, color_system="truecolor").print(view)
        assert "\u202e" not in capture.get()


def test_pictures_have_a_glyph_for_every_label(llama: steer.FrozenLM, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with warnings.catch_warnings():
        # Of a missing glyph; a `$` would be taken for mathematics and fail.
        warnings.simplefilter("error")
        for view in views(llama):
            view.figure().savefig(tmp_path / "view.png")
            assert (tmp_path / "view.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_error_says_what_to_install(
    llama: steer.FrozenLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    for view in views(llama):
        with pytest.raises(steer.SteerError, match=r"steer-toolkit\[plot\]"):
            view.figure()


def test_colours_diverge_from_the_middle_and_texts_on_them_are_readable() -> None:
    def luminance(code: str) -> float:
        channels = (int(code[i : i + 2], 16) / 255 for i in (1, 3, 5))
        return sum(
            share * (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4)
            for share, c in zip((0.2126, 0.7152, 0.0722), channels, strict=True)
        )

    for ramp in (PROJECTION, CHANGE):
        assert [colour(value, ramp) for value in (-2, -1, -0.5, 0, 0.5, 1, 2)] == [ramp[0], *ramp, ramp[-1]]
        values = np.linspace(-1, 1, 101)
        light = [luminance(colour(value, ramp)) for value in values]
        assert all(np.diff(light[:51]) > 0)
        assert all(np.diff(light[50:]) < 0)
        for value, back in zip(values, light, strict=True):
            front = luminance(ink(colour(value, ramp)))
            # What WCAG asks for.
            assert (max(front, back) + 0.05) / (min(front, back) + 0.05) > 4.5


# The commands.


@pytest.fixture
def people(llama: steer.FrozenLM, histories: list[steer.History], tmp_path: Path, monkeypatch: Any) -> Path:
    monkeypatch.setattr("steer.cli.options.load", lambda *_: llama)
    method = steer.StyleVector(layer=[0, 1], neutral="field:bland")
    bank = steer.Bank(tmp_path / "people.bank")
    bank.update({(history.user_id, "style"): method.fit(llama, history) for history in histories})
    bank["ann", "context"] = steer.CoS().state("likes tea")
    return bank.path


def call(*arguments: object) -> Any:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def test_steer_lens(people: Path, llama: steer.FrozenLM, tmp_path: Path) -> None:
    bank = steer.Bank(people)
    states = {user: bank[user, "style"] for user in ("ann", "bob")}
    both = ["lens", "--bank", people, "--user", "ann", "--user", "bob", "--site", "resid_post[1]", "-k", 3]
    found = json.loads(call(*both, "--json").stdout)["directions"]
    expected = lens(llama, states, site="resid_post[1]", k=3)
    for user in states:
        assert [tuple(token.values()) for token in found[user]["promotes"]] == [*expected.promoted[user]]
        assert [tuple(token.values()) for token in found[user]["suppresses"]] == [*expected.suppressed[user]]
    centred = json.loads(call(*both, "--json", "--centred").stdout)["directions"]
    apart = lens(llama, states, site="resid_post[1]", k=3, common="mean")
    assert [token["id"] for token in centred["ann"]["promotes"]] == [token.id for token in apart.promoted["ann"]]
    pictures = call(*both, "--html", tmp_path / "lens.html", "--png", tmp_path / "lens.png")
    assert "promotes" in pictures.stdout
    assert (tmp_path / "lens.html").read_text(encoding="utf-8") == expected.html()
    assert (tmp_path / "lens.png").exists()


def test_steer_lens_of_files(people: Path, llama: steer.FrozenLM, tmp_path: Path) -> None:
    one, two = tmp_path / "formal.safetensors", tmp_path / "two.safetensors"
    first, second = drawn(llama, 2)
    save_file({"vector": first.clone(), "table": torch.zeros(2, 3)}, one)
    save_file({"x": first.clone(), "y": second.clone()}, two)
    found = json.loads(call("lens", "--vector", one, "--vector", two, "--json").stdout)["directions"]
    assert list(found) == ["formal", "x", "y"]
    assert found["formal"] == found["x"] != found["y"]
    for arguments, message in (
        (["--vector", people], "could be read"),
        (["--vector", two, "--vector", two], "two directions are named 'x'"),
        ([], "nothing to look at"),
        (["--bank", people], "belong together"),
        (["--vector", one, "--centred"], "--bank"),
        (["--vector", one, "--png", tmp_path / "lens.nothing"], "the ending of no picture; there are .*png"),
    ):
        with pytest.raises(steer.SteerError, match=message):
            call("lens", *arguments)


def test_steer_tokens(people: Path, llama: steer.FrozenLM, tmp_path: Path) -> None:
    state = steer.Bank(people)["ann", "style"]
    arguments = ["tokens", "HELLO <you>", "--bank", people, "--user", "ann", "--site", "resid_post[1]"]
    expected = projections(llama, "HELLO <you>", {"ann": state}, "resid_post[1]", prompt="greet me")
    found = json.loads(call(*arguments, "--prompt", "greet me", "--json").stdout)
    assert found["tokens"] == list("HELLO <you>")
    assert found["directions"]["ann"]["cosine"] == pytest.approx(expected.cosines[0].tolist())
    assert found["directions"]["ann"]["projection"] == pytest.approx(expected.projections[0].tolist())
    page = tmp_path / "tokens.html"
    shown = call(*arguments, "--html", page, "--png", tmp_path / "tokens.png", "--values", "projection")
    assert "HELLO <you>" in shown.stdout
    assert "projection at resid_post[1]" in page.read_text(encoding="utf-8")
    assert (tmp_path / "tokens.png").exists()
    with pytest.raises(steer.SteerError, match="--values"):
        call(*arguments, "--values", "angle")
