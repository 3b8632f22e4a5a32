"""StyleVector beyond the mean difference at one layer: extractors, sites, many users, records that come and go."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import HEADS, tiny, tokenizer
from rows import assert_close
from sklearn.linear_model import LogisticRegression
from typer.testing import CliRunner

import steer
from steer.cache import Cache
from steer.cli.app import app
from steer.cli.options import parse_settings
from steer.read import read, record_span

SITE = steer.Site("resid_post", 1)
WORDS = ["the", "sea", "is", "grey", "and", "old;", "we", "sing,", "we", "row,", "we", "laugh", "at", "rain"]


def people(users: int = 4, records: int = 6) -> list[steer.History]:
    """Users who answer prompts of their own, each with a favourite letter."""
    rng = np.random.default_rng(0)
    return [
        steer.History(
            f"user {u}",
            tuple(
                steer.Record(
                    f"user {u}",
                    " ".join(rng.choice(WORDS, rng.integers(2, 6))).replace("e", "xyzq"[u % 4]),
                    f"Please say something about the number {u * records + i}.",
                    id=f"{u}-{i}",
                    fields={"plain": " ".join(rng.choice(WORDS, 3))},
                )
                for i in range(records)
            ),
        )
        for u in range(users)
    ]


def states_of(lm: steer.FrozenLM, history: steer.History, field: str | None = None) -> np.ndarray:
    """One vector a record, of the responses or of a field."""
    records = [record if field is None else replace(record, response=record.fields[field]) for record in history]
    return read(lm, [record_span(lm, r) for r in records], [SITE], pool="mean")[SITE].pooled.double().numpy()


def vector(state: steer.UserState) -> np.ndarray:
    return state.tensors[str(SITE)].double().numpy()


def assert_same(actual: steer.UserState, expected: steer.UserState, tolerance: float = 1e-6) -> None:
    """Vectors and norms are equal up to a share of the vectors' norm, and everything else is equal."""
    for site, tensor in expected.tensors.items():
        assert (actual.tensors[site] - tensor).norm() <= tolerance * tensor.norm()
    norms = [state.provenance.calibration["reference_norm"] for state in (actual, expected)]
    assert norms[0] == pytest.approx(norms[1], rel=tolerance)
    sources = [replace(state.provenance, calibration={}) for state in (actual, expected)]
    assert sources[0] == sources[1]


# Extractors.


def test_pca_is_the_first_axis_of_the_differences_towards_their_mean(llama: steer.FrozenLM) -> None:
    (history,) = people(1)
    differences = states_of(llama, history) - states_of(llama, history, "plain")
    axis = np.linalg.eigh(differences.T @ differences)[1][:, -1]
    axis *= np.sign(axis @ differences.mean(0))
    settings: dict[str, Any] = {"layer": 1, "neutral": "field:plain", "extractor": "pca"}
    np.testing.assert_allclose(
        vector(steer.StyleVector(**settings, rescale=False).fit(llama, history)), axis, atol=1e-5
    )
    scaled = vector(steer.StyleVector(**settings).fit(llama, history))
    np.testing.assert_allclose(scaled, axis * np.linalg.norm(differences.mean(0)), rtol=1e-3, atol=1e-3)


def test_the_sign_of_pca_does_not_depend_on_the_decomposition() -> None:
    from steer.encoders import principal_direction

    rows = torch.randn(5, 9, generator=torch.Generator().manual_seed(0)) + 0.5
    for sign in (1, -1):
        axis = principal_direction(sign * rows)
        assert axis @ (sign * rows.mean(0).double()) > 0
        assert axis.norm().item() == pytest.approx(1)


def test_logistic_regression_is_scikit_learns(llama: steer.FrozenLM) -> None:
    (history,) = people(1)
    own, other = states_of(llama, history), states_of(llama, history, "plain")
    fitted = LogisticRegression(tol=1e-8, max_iter=10_000).fit(np.concatenate([own, other]), [1] * 6 + [0] * 6)
    normal = fitted.coef_[0] / np.linalg.norm(fitted.coef_)
    settings: dict[str, Any] = {"layer": 1, "neutral": "field:plain", "extractor": "logistic"}
    unit = vector(steer.StyleVector(**settings, rescale=False).fit(llama, history))
    np.testing.assert_allclose(unit, normal, atol=1e-4)
    # It tells the two sides apart, and points to the user's.
    assert (own @ unit).min() > (other @ unit).max()
    scaled = vector(steer.StyleVector(**settings).fit(llama, history))
    assert np.linalg.norm(scaled) == pytest.approx(np.linalg.norm((own - other).mean(0)), rel=1e-5)


def test_extractors_against_the_population(llama: steer.FrozenLM) -> None:
    histories = people()
    rows = [states_of(llama, history) for history in histories]
    centre = np.stack([own.mean(0) for own in rows]).mean(0)
    methods = {
        name: steer.StyleVector(layer=1, neutral="population", extractor=name)  # type: ignore[arg-type]
        for name in ("mean", "logistic", "pca")
    }
    for name, method in methods.items():
        method.train(llama, histories)
        np.testing.assert_allclose(method.population[SITE].numpy(), centre, atol=1e-4)
        state = method.fit(llama, histories[2])
        mean = rows[2].mean(0) - centre
        assert np.linalg.norm(vector(state)) == pytest.approx(np.linalg.norm(mean), rel=1e-3)
        assert vector(state) @ mean > 0
        assert state.provenance.settings["extractor"] == name
    axis = np.linalg.svd(rows[2] - centre, full_matrices=False)[2][0]
    assert abs(axis @ vector(methods["pca"].fit(llama, histories[2]))) == pytest.approx(
        np.linalg.norm(rows[2].mean(0) - centre), rel=1e-4
    )
    others = np.concatenate([own for u, own in enumerate(rows) if u != 2])
    labels = [1] * 6 + [0] * 18
    fitted = LogisticRegression(class_weight="balanced", tol=1e-8, max_iter=10_000)
    normal = fitted.fit(np.concatenate([rows[2], others]), labels).coef_[0]
    found = vector(methods["logistic"].fit(llama, histories[2]))
    np.testing.assert_allclose(found / np.linalg.norm(found), normal / np.linalg.norm(normal), atol=1e-4)


def test_a_population_that_was_pooled_otherwise_is_refused(llama: steer.FrozenLM) -> None:
    histories = people(2, 2)
    mean = steer.StyleVector(layer=1, neutral="population").train(llama, histories)
    assert mean is not None
    last = steer.StyleVector(layer=1, neutral="population", pool="last")
    last.use(llama, mean)
    with pytest.raises(steer.SteerError, match="read with pool='mean', and this is pool='last'"):
        last.fit(llama, histories[0])


def test_the_sample_of_a_population_is_bounded_and_fair(llama: steer.FrozenLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steer.methods.style_vector._SAMPLE", 40)
    histories = [*people(6, 4), steer.History("loud", people(1, 60)[0].records)]
    histories[-1] = steer.History(
        "loud", tuple(replace(r, user_id="loud", id=f"loud-{r.id}") for r in histories[-1].records)
    )
    samples = []
    for order in (histories, histories[::-1]):
        method = steer.StyleVector(layer=1, neutral="population", extractor="logistic")
        artifact = method.train(llama, order)
        assert artifact is not None
        samples.append(artifact)
        whose = artifact.settings["sample"]
        assert artifact.tensors[f"{SITE}.sample"].shape[0] == len(whose) == 40
        assert len(set(whose)) == 7
        # One of seven users has 60 of 84 texts.
        assert max(whose.count(who) for who in set(whose)) < 30
        assert not set(whose) & {history.user_id for history in histories}
    assert samples[0].settings == samples[1].settings
    assert_close(samples[0].tensors[f"{SITE}.sample"], samples[1].tensors[f"{SITE}.sample"])
    plain = steer.StyleVector(layer=1, neutral="population").train(llama, histories)
    assert plain is not None
    method.use(llama, plain)
    with pytest.raises(steer.SteerError, match="train again"):
        method.fit(llama, histories[0])


# Sites.


def test_any_site_and_several_in_one_pass(lm: steer.FrozenLM) -> None:
    history = people(1, 3)[0]
    names = ["attn_out[1]", "z[0]", "embed", "ln_final"]
    method = steer.StyleVector(layer=[0, 1], sites=names, neutral="field:plain")
    passes: list[int] = []
    lm.declare(*method.sites)
    handle = lm.attachment.decoder.register_forward_pre_hook(lambda module, args: passes.append(1))
    state = method.fit(lm, history)
    several = len(passes)
    single = {}
    for name in ("resid_post[0]", "resid_post[1]", *names):
        passes.clear()
        single |= steer.StyleVector(sites=[name], neutral="field:plain").fit(lm, history).tensors
    handle.remove()
    assert several <= len(passes)
    assert state.provenance.sites == ("resid_post[0]", "resid_post[1]", *names)
    for name, expected in single.items():
        assert_close(state.tensors[name], expected)
    assert state.tensors["z[0]"].shape == (lm.width_at(steer.Site("z", 0)),)
    assert len(lm.generate(["hello"], states=[state], dose=0.2, max_new_tokens=3)) == 1


def test_vectors_for_the_heads_may_be_wider_than_the_model(llama: steer.FrozenLM) -> None:
    state = steer.StyleVector(sites=["z[1]"], neutral="field:plain").fit(llama, people(1, 2)[0])
    assert state.tensors["z[1]"].shape == (HEADS * 16,)
    assert llama.generate_tokens(["x"], states=[state], strength=9.0, max_new_tokens=4) != llama.generate_tokens(
        ["x"], max_new_tokens=4
    )


def test_the_papers_recipe() -> None:
    method = steer.StyleVector.paper(layer=18)
    assert (method.neutral, method.pool, method.extractor, method.positions) == ("model", "last", "mean", "generated")
    assert method.sites == (steer.Site("resid_post", 18),)
    assert steer.StyleVector.paper(layer=18, neutral="file:gpt.jsonl").neutral == "file:gpt.jsonl"
    # A place has one name, and is one place however it is named.
    assert replace(steer.StyleVector(layer=1, sites=["resid_pre[2]", "z[0]"]), pool="last").sites == (
        SITE,
        steer.Site("z", 0),
    )
    assert replace(steer.StyleVector(layer=1), layer=2, sites=()).sites == (steer.Site("resid_post", 2),)


def test_style_vectors_that_make_no_sense(monkeypatch: pytest.MonkeyPatch) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "say where to read"),
        ({"layer": 1, "extractor": "median"}, "'median' is not one of mean, logistic, pca"),
        ({"layer": 1, "pool": "max"}, "'max' is not one of last, mean"),
        ({"layer": 1, "positions": "reponse"}, "'reponse' is not one of response, generated, all, prompt"),
        ({"sites": ["nowhere[1]"]}, "not a site"),
    ]
    for settings, message in cases:
        with pytest.raises(steer.SteerError, match=message):
            steer.StyleVector(**settings)
    monkeypatch.setattr("steer.methods.style_vector.find_spec", lambda name: None)
    with pytest.raises(steer.SteerError, match=r"pip install 'steer-toolkit\[extract\]'"):
        steer.StyleVector(layer=1, extractor="logistic")


# The model's own answers.


def answering(answers: dict[str, str]) -> Any:
    """A `generate` that says these, and counts the prompts."""

    def generate(prompts: Sequence[list[int]], **kwargs: Any) -> list[str]:
        generate.asked += len(prompts)  # type: ignore[attr-defined]
        return [answers.get(tokenizer().decode(prompt), "Well.") for prompt in prompts]

    generate.asked = 0  # type: ignore[attr-defined]
    return generate


def test_records_without_an_answer_are_left_out(llama: steer.FrozenLM, monkeypatch: pytest.MonkeyPatch) -> None:
    (history,) = people(1, 5)
    prompts = [record.prompt or "" for record in history]
    monkeypatch.setattr(llama, "generate", answering({prompts[1]: "", prompts[3]: " \n"}))
    method = steer.StyleVector(layer=1)
    with pytest.warns(UserWarning, match="nothing to 2 of 5 prompts"):
        state = method.fit(llama, history)
    kept = steer.History("user 0", tuple(history.records[i] for i in (0, 2, 4)))
    expected = steer.StyleVector(layer=1).fit(llama, kept)
    assert_same(state, expected)
    assert state.provenance.records == ("0-0", "0-2", "0-4")
    assert state.provenance.calibration["left_out"] == ["0-1", "0-3"]
    with pytest.raises(steer.SteerError, match="'0-1' is in the state already"):
        method.update(llama, state, [history.records[1]])
    # Taking out a record that never counted changes nothing but that it is known no more.
    without = method.remove(llama, state, [history.records[1], history.records[2]])
    assert without.provenance.calibration["left_out"] == ["0-3"]
    assert_same(without, steer.StyleVector(layer=1).fit(llama, steer.History("user 0", kept.records[::2])))
    monkeypatch.setattr("steer.neutral.answers_cache", lambda: Cache("/dev/null/nowhere"))
    monkeypatch.setattr(llama, "generate", answering(dict.fromkeys(prompts, "")))
    with pytest.warns(UserWarning, match="left out"), pytest.raises(steer.SteerError, match="any prompt of 'user 0'"):
        method.fit(llama, history)


def test_the_model_answers_each_prompt_once(
    llama: steer.FrozenLM, answers: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    histories = people(3, 4)
    first = steer.StyleVector(layer=1, neutral_tokens=5).fit_many(llama, histories)
    said = llama.generate([r.prompt for h in histories for r in h], max_new_tokens=5, do_sample=False)
    generate = answering({})
    monkeypatch.setattr(llama, "generate", generate)
    again = steer.StyleVector(layer=1, neutral_tokens=5).fit_many(llama, histories)
    assert generate.asked == 0
    for one, other in zip(first, again, strict=True):
        assert_same(one, other)
    steer.StyleVector(layer=0, neutral_tokens=6).fit(llama, histories[0])
    assert generate.asked == 4
    # Another end of the answers is another answer.
    llama.model.generation_config.eos_token_id = 7
    steer.StyleVector(layer=0, neutral_tokens=5).fit(llama, histories[0])
    assert generate.asked == 8
    assert answers.path.exists()
    assert len(said) == 12


def test_without_a_place_for_answers_there_is_a_warning(llama: steer.FrozenLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steer.neutral.answers_cache", lambda: Cache("/dev/null/nowhere"))
    with pytest.warns(UserWarning, match="answers are not kept"):
        steer.StyleVector(layer=1, neutral_tokens=2).fit(llama, people(1, 2)[0])


# Many users, and records that come and go.


@pytest.mark.parametrize("neutral", ["field:plain", "model", "population"])
@pytest.mark.parametrize("extractor", ["mean", "pca", "logistic"])
def test_many_users_at_once_get_what_each_gets_alone(
    llama: steer.FrozenLM, neutral: str, extractor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Users that begin in one lot of records and end in the next.
    monkeypatch.setattr("steer.methods.style_vector._TOGETHER", 7)
    histories = people(4, 5)
    method = steer.StyleVector(layer=1, neutral=neutral, extractor=extractor, neutral_tokens=4)
    method.train(llama, histories)
    told: list[float] = []
    together = method.fit_many(llama, histories, told.append)
    # Whoever is known from training is not read again.
    assert told == ([] if (neutral, extractor) == ("population", "mean") else [7 / 20, 14 / 20, 1.0])
    for state, history in zip(together, histories, strict=True):
        assert_same(state, method.fit(llama, history), 1e-4)
    assert method.fit_many(llama, []) == []


@pytest.mark.parametrize("neutral", ["field:plain", "model", "population"])
@pytest.mark.parametrize("pool", ["mean", "last"])
def test_records_come_and_go(llama: steer.FrozenLM, neutral: str, pool: Any) -> None:
    histories = people(3, 8)
    method = steer.StyleVector(layer=[0, 1], neutral=neutral, pool=pool, neutral_tokens=4)
    method.train(llama, histories)
    whole, records = histories[0], histories[0].records
    first = method.fit(llama, steer.History("user 0", records[:5]))
    everything = method.fit(llama, whole)
    updated = method.update(llama, first, records[5:])
    assert_same(updated, everything)
    assert_same(method.remove(llama, updated, records[5:]), first)
    # One at a time, and from the front.
    one_by_one = method.fit(llama, steer.History("user 0", records[:1]))
    for record in records[1:]:
        one_by_one = method.update(llama, one_by_one, [record])
    assert_same(one_by_one, everything)
    for record in records[:4]:
        one_by_one = method.remove(llama, one_by_one, [record])
    assert_same(one_by_one, method.fit(llama, steer.History("user 0", records[4:])))
    assert_same(method.update(llama, first, []), first)
    assert_same(method.remove(llama, updated, [*records[5:], *records[6:]]), first)


def test_a_text_that_was_written_twice_counts_twice_until_one_of_the_two_goes(llama: steer.FrozenLM) -> None:
    said = steer.Record("user 0", "the sea", "say something", fields={"plain": "some water"})
    history = steer.History("user 0", (said, *people(1, 2)[0].records, said))
    method = steer.StyleVector(layer=1, neutral="field:plain")
    state = method.fit(llama, history)
    assert len(set(state.provenance.records)) == 4
    assert_same(method.remove(llama, state, [said]), method.fit(llama, steer.History("user 0", history.records[1:])))
    both = [history.records[0], history.records[3]]
    rest = steer.History("user 0", history.records[1:3])
    assert_same(method.remove(llama, state, both), method.fit(llama, rest))


def test_an_update_reads_the_new_records_only(llama: steer.FrozenLM) -> None:
    (history,) = people(1, 12)
    method = steer.StyleVector(layer=1, neutral="field:plain")
    state = method.fit(llama, steer.History("user 0", history.records[:11]))
    tokens: list[int] = []
    handle = llama.attachment.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    method.update(llama, state, history.records[11:])
    handle.remove()
    last = history.records[11]
    sides = [record_span(llama, one).end for one in (last, replace(last, response=last.fields["plain"]))]
    assert sum(tokens) <= sum(sides)


def test_changes_that_cannot_be(llama: steer.FrozenLM) -> None:
    histories = people(2, 4)
    first, later = histories[0].records[:3], histories[0].records[3:]
    method = steer.StyleVector(layer=1, neutral="field:plain")
    state = method.fit(llama, steer.History("user 0", first))
    with pytest.raises(steer.SteerError, match="'0-1' is in the state already"):
        method.update(llama, state, [first[1]])
    with pytest.raises(steer.SteerError, match="'0-3' is in the state already"):
        method.update(llama, state, [*later, *later])
    with pytest.raises(steer.SteerError, match="'0-3' is not in the state"):
        method.remove(llama, state, later)
    with pytest.raises(steer.SteerError, match="delete the state instead"):
        method.remove(llama, state, first)
    with pytest.raises(steer.SteerError, match="a state is of one"):
        method.update(llama, state, [*later, *histories[1].records])
    other: dict[str, Any]
    for other in ({"layer": 0}, {"pool": "last"}, {"neutral": "model"}):
        with pytest.raises(steer.SteerError, match="not fitted by this method"):
            steer.StyleVector(**{"layer": 1, "neutral": "field:plain"} | other).update(llama, state, later)
    for extractor in ("pca", "logistic"):
        whole = steer.StyleVector(layer=1, neutral="field:plain", extractor=extractor)  # type: ignore[arg-type]
        for change in (whole.update, whole.remove):
            with pytest.raises(steer.SteerError, match="fit again"):
                change(llama, whole.fit(llama, histories[0]), later)
    with (
        steer.wrap(tiny("llama", seed=3), tokenizer()) as stranger,
        pytest.raises(steer.SteerError, match="not fitted by this method"),
    ):
        method.update(stranger, state, later)
    # A vector says nothing about where it is added.
    elsewhere = steer.StyleVector(layer=1, neutral="field:plain", positions="all")
    assert elsewhere.update(llama, state, later).provenance.settings["positions"] == "response"


# The command.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model and the histories of four users, on disk."""
    model = tiny("llama")
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    with (tmp_path / "histories.jsonl").open("w") as lines:
        for history in people():
            for record in history:
                line = {"user_id": record.user_id, "id": record.id, "prompt": record.prompt, "text": record.response}
                lines.write(json.dumps(line | dict(record.fields)) + "\n")
    return tmp_path


def extract(folder: Path, *arguments: str) -> Any:
    call = ["extract", str(folder / "histories.jsonl"), "--model", str(folder / "model")]
    result = CliRunner().invoke(app, [*call, "--bank", str(folder / "bank"), *arguments, "--json"])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_steer_extract_by_another_method(folder: Path, llama: steer.FrozenLM) -> None:
    printed = extract(folder, "--set", "step=2", "--layer", "1")
    bank, method = steer.Bank(folder / "bank"), steer.NaturalGradient(layer=1, step=2)
    method.train(llama, people())
    for history in people():
        state = bank[history.user_id, "style"]
        assert_same(state, method.fit(llama, history), 1e-3)
        assert printed["users"][history.user_id]["sites"]["resid_post[1]"]["dose"] > 0
    extract(folder, "--method", "prefix-tuning", "--set", "steps=1", "--set", "length=2", "--name", "prefix")
    assert bank["user 1", "prefix"].tensors["prefix"].shape == (2, llama.width)
    for arguments, message in (
        (["--method", "natural-gradient", "--neutral", "model"], "--neutral is for --method style-vector"),
        (["--method", "nothing"], "there is no method 'nothing'"),
        (["--set", "stp=2"], "natural_gradient: .*'stp'"),
        (["--set", "step"], "--set step is not a hyper-parameter"),
        (["--method", "trained-vector", "--layer", "1", "--resume", "file"], "--resume is for methods that read"),
        (["--method", "caa", "--set", "layer=8,x"], "layer='8,x' names no block"),
        (["--layer", "1", "--set", "layer=2"], "--layer and --set layer say the same"),
        (["--layer", "1", "--set", "pool=last", "--pool", "mean"], "--pool and --set pool say the same"),
        (["--set", "sites=embed", "--site", "embed"], "--site and --set sites say the same"),
        (["--set", "name=me"], "natural_gradient: .*'name'"),
        (["--layer", "1", "--paper", "--set", "pool=mean"], "--paper decides on pool"),
    ):
        with pytest.raises(steer.SteerError, match=message):
            extract(folder, *arguments)


def test_steer_extract(folder: Path, llama: steer.FrozenLM) -> None:
    printed = extract(folder, "--layer", "1", "--site", "attn_out[0]", "--neutral", "field:plain", "--extractor", "pca")
    bank = steer.Bank(folder / "bank")
    method = steer.StyleVector(layer=1, sites=["attn_out[0]"], neutral="field:plain", extractor="pca")
    assert set(printed["users"]) == {f"user {u}" for u in range(4)}
    for history in people():
        state = bank[history.user_id, "style"]
        assert_same(state, method.fit(llama, history), 1e-4)
        row = printed["users"][history.user_id]
        assert row["records"] == 6
        for site, numbers in row["sites"].items():
            assert numbers["norm"] == pytest.approx(state.tensors[site].norm().item(), abs=1e-4)
    assert set(row["sites"]) == {"resid_post[1]", "attn_out[0]"}


def test_a_method_s_name_and_its_layers_may_be_written_either_way(folder: Path) -> None:
    bank, style = steer.Bank(folder / "bank"), ("--neutral", "field:plain", "--user", "user 1", "--name")
    extract(folder, "--method", "style_vector", "--set", "layer=0,1", "--set", "rescale=False", *style, "one")
    extract(folder, "--method", "style-vector", "--layer", "0,1", *style, "other")
    assert_same(bank["user 1", "one"], bank["user 1", "other"])


def test_hyper_parameters_are_read_as_json_as_python_or_as_text() -> None:
    pairs = {"1e-4": 1e-4, "[1, 2]": [1, 2], "null": None, "8,23": (8, 23), "True": True, "false": False, "a,b": "a,b"}
    for text, value in pairs.items():
        assert parse_settings([f"key={text}"]) == {"key": value}


def test_steer_extract_as_in_the_paper(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extract(folder, "--layer", "1", "--neutral", "field:plain", "--paper", "--user", "user 1")
    (settings,) = [state.provenance.settings for state in [steer.Bank(folder / "bank")["user 1", "style"]]]
    assert settings == {"neutral": "field:plain", "pool": "last", "positions": "generated", "extractor": "mean"}
    with pytest.raises(steer.SteerError, match="--paper decides on"):
        extract(folder, "--layer", "1", "--paper", "--pool", "mean")
    with pytest.raises(steer.SteerError, match="say where to read"):
        extract(folder, "--neutral", "field:plain")


KILLED = """
import os, signal, sys
from steer import likelihood
from steer.cli import main
from steer.read import _Reader

init, run, losses, by_length = _Reader.__init__, _Reader._run, likelihood.response_losses, likelihood.by_length
passes, last = 0, int(sys.argv.pop(1))

def small_batches(self, lm, sites, pool, batch_tokens):
    init(self, lm, sites, pool, 200)

def counted(function):
    def call(*args, **kwargs):
        global passes
        if passes == last:
            os.kill(os.getpid(), signal.SIGKILL)
        passes += 1
        return function(*args, **kwargs)
    return call

_Reader.__init__, _Reader._run = small_batches, counted(run)
likelihood.response_losses = counted(losses)
likelihood.by_length = lambda lengths, batch_tokens: by_length(lengths, 200)
try:
    main()
finally:
    print("passes", passes, file=sys.stderr)
"""


@pytest.mark.parametrize("method", ["style-vector", pytest.param("natural-gradient", marks=pytest.mark.full)])
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_extraction_goes_on_where_it_stopped(folder: Path, method: str) -> None:
    def run(last: int, *extra: str) -> tuple[int, int | None]:
        call = [sys.executable, "-P", "-c", KILLED, str(last), "extract", str(folder / "histories.jsonl")]
        call += ["--model", str(folder / "model"), "--bank", str(folder / f"bank{last}{len(extra)}")]
        call += ["--layer", "1", "--method", method, *extra]
        call += ["--neutral", "population"] if method == "style-vector" else []
        done = subprocess.run(call, capture_output=True, text=True, env=os.environ | {"STEER_CACHE": str(folder)})
        counts = [int(line.split()[1]) for line in done.stderr.splitlines() if line.startswith("passes")]
        return done.returncode, counts[0] if counts else None

    resume = ("--resume", str(folder / "readings"))
    whole, killed, resumed = run(-1), run(2, *resume), run(-1, *resume)
    assert whole[0] == resumed[0] == 0
    assert killed == (-signal.SIGKILL, None)
    assert whole[1] is not None
    assert resumed[1] is not None
    assert 0 < resumed[1] < whole[1]
    assert run(0, *resume) == (0, 0)
    banks = [steer.Bank(folder / name) for name in ("bank-10", "bank-12")]
    for user in (f"user {u}" for u in range(4)):
        one, other = (bank[user, "style"] for bank in banks)
        assert_close(one.tensors[str(SITE)], other.tensors[str(SITE)])
