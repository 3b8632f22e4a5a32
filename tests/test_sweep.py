"""Sweeps: each point of the grid is what scoring that point alone gives."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import steer
from steer.cli.app import app
from steer.method import make_method
from steer.plan import edits_of
from steer.score import score
from steer.sweep import sweep
from steer.view import Sweep

LAYERS = [0, 2]
STRENGTHS = [0.5, 2.0, -1.0]


def split(histories: list[steer.History]) -> tuple[list[steer.History], list[steer.History]]:
    """With a third user, so that there are others to choose from."""
    third = tuple(steer.Record("cid", "ok ok ok " + r.response[::-1], r.prompt) for r in histories[0])
    everybody = [*histories, steer.History("cid", third)]
    return [one.split(2)[0] for one in everybody], [one.split(2)[1] for one in everybody]


def fitted(lm: steer.FrozenLM, known: list[steer.History], layer: Any = tuple(LAYERS)) -> dict[str, steer.UserState]:
    method = steer.StyleVector(layer=layer, neutral="population")
    method.train(lm, known)
    return {history.user_id: method.fit(lm, history) for history in known}


@pytest.mark.parametrize("unit", ["strength", "dose"])
def test_each_point_is_its_own_score(llama: steer.FrozenLM, histories: list[steer.History], unit: str) -> None:
    known, later = split(histories)
    done: list[int] = []
    amounts = {f"{unit}s": STRENGTHS}
    found = sweep(llama, later, fitted(llama, known), **amounts, others=2, on_progress=done.append)  # type: ignore[arg-type]
    assert done == [1, 2, 3, 4, 5, 6]
    assert found.unit == unit
    assert found.users == ("ann", "bob", "cid")
    assert found.other is not None
    for i, layer in enumerate(LAYERS):
        states = fitted(llama, known, layer)
        for j, amount in enumerate(STRENGTHS):
            scores = score(llama, later, states, others=2, **{unit: amount}).users  # type: ignore[arg-type]
            for k, one in enumerate(scores):
                assert one.other_mean is not None
                assert found.base[k] == pytest.approx(one.base, rel=1e-5)
                assert found.own[k, i, j] == pytest.approx(one.own - one.base, abs=1e-5)
                assert found.other[k, i, j] == pytest.approx(one.other_mean - one.base, abs=1e-5)
                assert found.tokens[k] == one.tokens
    assert found.own.abs().min() > 1e-3


def test_without_others(llama: steer.FrozenLM, histories: list[steer.History]) -> None:
    known, later = split(histories)
    found = sweep(llama, later[:1], fitted(llama, known), strengths=[1.0])
    assert found.other is None
    assert list(found.maps()) == ["own − none"]
    assert found.to_json()["own_minus_other"] is None


def test_a_site_may_go_by_its_other_name(llama: steer.FrozenLM, histories: list[steer.History]) -> None:
    known, later = split(histories)
    states = fitted(llama, known)
    renamed = {user: at(state, {"resid_post[0]": "resid_pre[1]"}) for user, state in states.items()}
    one, other = (sweep(llama, later, kind, strengths=STRENGTHS) for kind in (states, renamed))
    assert other.sites == one.sites
    assert torch.equal(other.own, one.own)


def at(state: steer.UserState, names: dict[str, str]) -> steer.UserState:
    """The same state, with other names for its sites."""
    source = state.provenance
    norms = {names.get(site, site): norm for site, norm in source.calibration["reference_norm"].items()}
    sites = tuple(names.get(site, site) for site in source.sites)
    tensors = {names.get(site, site): tensor for site, tensor in state.tensors.items()}
    return steer.UserState(replace(source, sites=sites, calibration={"reference_norm": norms}), tensors)


def made_up() -> Sweep:
    own = torch.tensor([[[-0.02, -0.05, 0.9], [0.01, -0.03, 1.4]], [[-0.04, -0.01, 0.7], [0.03, -0.05, 1.0]]])
    sites = tuple(steer.Site("resid_post", layer) for layer in LAYERS)
    base = torch.tensor([3.0, 2.0])
    return Sweep(("<ann>", "bob"), sites, (0.5, 1.0, 4.0), "strength", base, own, own / 4, 1, (10, 20))


def test_maps_are_means_over_users() -> None:
    found = made_up()
    expected = [[-0.03, -0.03, 0.8], [0.02, -0.04, 1.2]]
    torch.testing.assert_close(found.maps()["own − none"], torch.tensor(expected))
    torch.testing.assert_close(found.maps()["own − others'"], torch.tensor(expected) * 3 / 4)
    assert found.best() == (steer.Site("resid_post", 2), 1.0)
    written = json.loads(json.dumps(found.to_json()))
    assert written["best"] == {"site": "resid_post[2]", "strength": 1.0}
    assert written["own_minus_base"][1][1] == pytest.approx(-0.04)
    assert written["users"]["bob"]["own_minus_base"][0][2] == pytest.approx(0.7)


def test_maps_are_shown(tmp_path: Path) -> None:
    found = made_up()
    # The strongest green is the greatest gain, which a great loss elsewhere does not make pale.
    assert 'background:#4d9221;color:#000000;padding:0.2em 0.5em">-0.0400' in found.html()
    assert 'background:#c51b7d;color:#ffffff;padding:0.2em 0.5em">+1.2000' in found.html()
    assert "resid_post[2] +0.0200 -0.0400 +1.2000" in " ".join(str(found).split())
    assert "best for their own: resid_post[2] at strength 1 (2 users, each against 1 other)" in str(found)
    figure = found.figure()
    first, second = figure.axes[0], figure.axes[1]
    assert [text.get_text() for text in first.texts] == ["-0.030", "-0.030", "+0.800", "+0.020", "-0.040", "+1.200"]
    assert [label.get_text() for label in first.get_xticklabels()] == ["0.5", "1", "4"]
    assert first.images[0].get_clim() == pytest.approx((-0.04, 0.04))
    assert second.get_title() == "own − others'"
    figure.savefig(tmp_path / "sweep.png")


def test_what_is_refused(
    llama: steer.FrozenLM, histories: list[steer.History], monkeypatch: pytest.MonkeyPatch
) -> None:
    known, later = split(histories)
    states = fitted(llama, known)
    mixed = states | {"bob": fitted(llama, known, 1)["bob"]}
    for arguments, message in (
        ((later, states), "either strengths or doses"),
        ((known, states, [1.0]), "fitted on"),
        ((later, states, []), "at least one"),
        (([], states, [1.0]), "no records"),
        ((later, mixed, [1.0]), "different sites"),
        ((later, {user: steer.CoS().state("likes tea") for user in states}, [1.0]), "no site"),
    ):
        records, fits, *rest = arguments
        with pytest.raises(steer.SteerError, match=message):
            sweep(llama, records, fits, strengths=rest[0] if rest else None)  # type: ignore[arg-type]
    monkeypatch.setattr("steer.sweep.edits_of", lambda *args, **kwargs: edits_of(*args, **kwargs)[:1])
    with pytest.raises(steer.SteerError, match=r"change nothing at resid_post\[2\]"):
        sweep(llama, later, states, strengths=[1.0])


def test_fewer_others_than_asked_for(llama: steer.FrozenLM, histories: list[steer.History]) -> None:
    known, later = split(histories)
    states = fitted(llama, known)
    found = sweep(llama, later, states, strengths=[1.0], others=8)
    assert found.to_json() == sweep(llama, later, states, strengths=[1.0], others=2).to_json()
    assert found.others == 2
    alone = sweep(llama, later[:1], {"ann": states["ann"]}, strengths=[1.0], others=8)
    assert (alone.other, alone.others) == (None, 0)


@pytest.fixture
def file(tmp_path: Path, histories: list[steer.History]) -> Path:
    records = [record for history in histories for record in history]
    lines = ({"user_id": r.user_id, "prompt": r.prompt, "text": r.response, "id": r.id} for r in records)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "texts.jsonl"


def test_the_command(
    file: Path, llama: steer.FrozenLM, histories: list[steer.History], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steer.cli.options.load", lambda *_: llama)
    paths = {kind: file.with_name(f"sweep.{kind}") for kind in ("json", "html", "png")}
    outputs = [str(part) for kind, path in paths.items() for part in (f"--{kind}", path)]
    arguments = ["sweep", str(file), "--layers", "0,2", "--holdout", "2"]
    grid = ["--strengths", "0.5,2", "--others", "3", "--limit", "1"]
    done = CliRunner().invoke(app, [*arguments, *grid, *outputs])
    assert done.exit_code == 0, done.output
    assert "own − others'" in done.stdout
    assert "others to compare with: 1 and not 3" in done.stderr
    known, later = [one.split(2)[0] for one in histories], [one.split(2)[1].first(1) for one in histories]
    expected = sweep(llama, later, fitted(llama, known), strengths=[0.5, 2], others=1)
    assert json.loads(paths["json"].read_text(encoding="utf-8")) == json.loads(json.dumps(expected.to_json()))
    assert paths["html"].read_text(encoding="utf-8") == expected.html()
    assert paths["png"].exists()


@pytest.mark.parametrize(
    ("name", "settings"),
    [("natural-gradient", {"prior": 1000.0}), ("trained-vector", {"steps": 2}), ("perfit", {"learning_rate": 0.05})],
)
def test_any_method_at_one_layer_at_a_time(
    file: Path,
    llama: steer.FrozenLM,
    histories: list[steer.History],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    settings: dict[str, Any],
) -> None:
    """Each row of the table is what fitting at this layer alone and scoring give."""
    monkeypatch.setattr("steer.cli.options.load", lambda *_: llama)
    written = file.with_suffix(".json")
    arguments = ["sweep", str(file), "--holdout", "1", "--layers", "0,2", "--strengths", "0.5,2", "--others", "1"]
    arguments += ["--method", name, "--json", str(written)]
    arguments += [f"--set={key}={value}" for key, value in settings.items()]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    found = json.loads(written.read_text(encoding="utf-8"))
    assert found["sites"] == ["resid_post[0]", "resid_post[2]"]
    known, later = [one.split(1)[0] for one in histories], [one.split(1)[1] for one in histories]
    for i, layer in enumerate(LAYERS):
        method = make_method(name.replace("-", "_"), layer=layer, **settings)
        artifact = method.train(llama, known)
        states = dict(zip(("ann", "bob"), method.fit_many(llama, known), strict=True))
        shared = {} if artifact is None else {artifact.hash: artifact}
        for j, strength in enumerate((0.5, 2)):
            for one in score(llama, later, states, strength=strength, artifacts=shared).users:
                user, (other,) = found["users"][one.user], one.others.values()
                assert abs(one.own - one.base) > 1e-3
                assert user["own_minus_base"][i][j] == pytest.approx(one.own - one.base, abs=1e-5)
                assert user["other_minus_base"][i][j] == pytest.approx(other - one.base, abs=1e-5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([], "either --strengths or --doses"),
        (["--strengths", "1", "--doses", "1"], "either --strengths or --doses"),
        (["--strengths", "1;2"], "not a list of numbers"),
        (["--doses", "0.1,inf"], "--doses must be finite"),
        (["--strengths", "1", "--holdout", "9"], "nobody"),
        (["--strengths", "1", "--pool", "max"], "pool='max' is not one of"),
        (["--strengths", "1", "--set", "layer=1"], "--layers says"),
        (["--strengths", "1", "--method", "prefix-tuning"], "prefix_tuning: .*'layer'"),
        (["--strengths", "1", "--method", "natural-gradient", "--pool", "mean"], "--pool is for --method style-vector"),
        (["--strengths", "1", "--png", "nowhere/sweep.png"], "nowhere/sweep.png cannot be written"),
    ],
)
def test_a_wrong_call_costs_nothing(
    file: Path, monkeypatch: pytest.MonkeyPatch, wrong: list[str], message: str
) -> None:
    def load(*_: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("steer.cli.options.load", load)
    refused = CliRunner().invoke(app, ["sweep", str(file), "--layers", "0,2", "--holdout", "2", *wrong])
    assert isinstance(refused.exception, steer.SteerError)
    assert re.search(message, str(refused.exception))
