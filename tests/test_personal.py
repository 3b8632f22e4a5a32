"""The study of what makes a state personal: runs on a small model, goes on where it stopped, and reports."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny, tokenizer

import steer
from steer.experiments import personal

WORDS = {"ann": "sunny garden with roses", "bob": "cold iron in the harbour", "cat": "a letter for you", "dan": "no"}


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines = [
        {"user_id": user, "prompt": f"question {i}", "response": f"{words} {i} and {words}"}
        for user, words in WORDS.items()
        for i in range(6)
    ]
    texts = tmp_path / "texts.jsonl"
    texts.write_text("\n".join(map(json.dumps, lines)))
    lm = steer.wrap(tiny("llama"), tokenizer())
    monkeypatch.setattr(steer, "load", lambda *_: lm)
    return [str(texts), "--half", "both", "--others", "2", "--records", "2", "--out", str(tmp_path / "out" / "s.json")]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["personal", *arguments])
    personal.main()


def test_arms_are_scored_once_and_reported(
    study: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = tmp_path / "out" / "s.json"
    ways = ["mean, population", "mean, population, whitened", "gradient"]
    run(monkeypatch, *study, "--arms", *ways)
    first = json.loads(result.read_text())
    points = [(entry["arm"], entry["sites"], entry["amount"]) for entry in first["results"]]
    assert points == [
        *((way, f"resid_post[{layer}]", dose) for way in ways[:2] for layer in (1, 2) for dose in (0.05, 0.1)),
        ("gradient", "resid_post[1] resid_post[2]", 1.0),
    ]
    for entry in first["results"]:
        assert len(entry["users"]) == 4
        assert not set(entry["users"]) & set(WORDS)
        base, own, _ = next(iter(entry["users"].values()))
        assert base != own
    assert first["results"][0]["users"] != first["results"][4]["users"]
    monkeypatch.setattr(personal, "run", None)
    run(monkeypatch, *study, "--arms", *ways)
    assert json.loads(result.read_text()) == first
    capsys.readouterr()
    run(monkeypatch, "--report", str(result), "--plot", str(tmp_path / "plot.png"))
    assert capsys.readouterr().out.count("| gradient | resid_post[1] resid_post[2] | 1 |") == 1
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_grids_need_no_others(
    study: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = tmp_path / "out" / "s.json"
    run(monkeypatch, *study, "--others", "0", "--arms", "grid: mean, population")
    entries = json.loads(result.read_text())["results"]
    points = {(entry["sites"], entry["amount"]): entry["totals"]["own_minus_base"]["mean"] for entry in entries}
    assert set(points) == {(f"resid_post[{i}]", dose) for i in range(3) for dose in (0.02, 0.05, 0.1, 0.2)}
    run(monkeypatch, *study[:-1], str(tmp_path / "compared.json"), "--arms", "mean, population")
    compared = json.loads((tmp_path / "compared.json").read_text())["results"]
    assert len(compared) == 4
    for entry in compared:
        same = points[entry["sites"], entry["amount"]]
        assert entry["totals"]["own_minus_base"]["mean"] == pytest.approx(same, abs=1e-6)
    capsys.readouterr()
    drawn: list[Any] = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: drawn.append(figure))
    run(monkeypatch, "--report", str(result), "--plot", str(tmp_path / "plot.png"))
    assert "| grid: mean, population | resid_post[0] | 0.02 |" in capsys.readouterr().out
    cells = {text.get_position(): text.get_text() for text in drawn[0].axes[0].texts}
    assert cells[2, 1] == f"{points['resid_post[1]', 0.1]:+.3f}"
    with pytest.raises(steer.SteerError, match="s was made with --others 0 and others were not"):
        run(monkeypatch, "--report", str(result), str(tmp_path / "compared.json"), "--plot", str(tmp_path / "p.png"))


def test_precision_is_part_of_a_study(study: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    run(monkeypatch, *study, "--arms", "gradient", "--precision", "medium")
    assert asked == ["medium"]
    with pytest.raises(steer.SteerError, match="of another study"):
        run(monkeypatch, *study, "--arms", "gradient")


def test_other_settings_are_another_result(study: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, *study, "--arms", "gradient")
    monkeypatch.setitem(personal.ARMS, "gradient", personal.Arm("natural_gradient", {"step": 3.0}))
    run(monkeypatch, *study, "--arms", "gradient")
    (entry,) = json.loads((tmp_path / "out" / "s.json").read_text())["results"]
    assert entry["settings"]["step"] == 3.0
    with pytest.raises(steer.SteerError, match="of another study"):
        run(monkeypatch, *study, "--arms", "gradient", "--tokens", "5")


def test_halves_share_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    histories = [steer.History(user, tuple(steer.Record(user, f"text {i}") for i in range(9))) for user in "abcdefg"]
    monkeypatch.setattr(sys, "argv", ["personal", "texts", "--half", "first"])
    arguments = personal._parse()
    users = {}
    for half in ("first", "second"):
        arguments.half = half
        setup = personal.Setup.of(histories, arguments)
        users[half] = {history.user_id for history in setup.fitted}
        for known, later in zip(setup.fitted, setup.scored, strict=True):
            assert len(known) == 6
            assert not {record.id for record in known} & {record.id for record in later}
        for user in range(len(setup.fitted)):
            assert user not in setup.strangers(user)
    assert not users["first"] & users["second"]
    assert users["first"] | users["second"] == set("abcdefg")
