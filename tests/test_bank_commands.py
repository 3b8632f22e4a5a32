"""`steer bank`: the same as in Python, and what it prints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import steer
from steer.bank import Bank
from steer.cli.app import app
from steer.state import Provenance, UserState

VERSION_1 = Path(__file__).parent / "data" / "bank-v1"


def run(*arguments: object, status: int = 0) -> Result:
    result = CliRunner().invoke(app, ["bank", *map(str, arguments)])
    if isinstance(result.exception, steer.SteerError) and not status:
        raise result.exception
    assert bool(result.exit_code) == bool(status), result.output
    return result


def refused(*arguments: object) -> str:
    result = run(*arguments, status=1)
    assert isinstance(result.exception, steer.SteerError)
    return str(result.exception)


def state(number: float, *records: str) -> UserState:
    return UserState(Provenance("m", 1, sites=("embed",), records=records), {"v": torch.full((4,), number)})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    bank = Bank(tmp_path / "people.bank")
    bank.update({("ada", "style"): state(1.0, "a1"), ("ada", "memory"): state(2.0), ("[bold]bob", "style"): state(3.0)})
    return bank.path


def test_ls_lists_states_and_filters_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steer.cli.bank._PAGE", 2)
    listed = run("ls", folder)
    assert "[bold]bob" in listed.stdout
    assert "3 states of 2 users" in listed.stderr
    rows = json.loads(run("ls", folder, "--name", "style", "--json").stdout)
    assert [(row["user"], row["records"], row["bytes"]) for row in rows] == [("ada", 1, 16), ("[bold]bob", 0, 16)]
    assert json.loads(run("ls", folder, "--user", "nobody", "--json").stdout) == []


def test_show_prints_one_users_states(folder: Path) -> None:
    shown = json.loads(run("show", folder, "ada", "--json").stdout)
    assert set(shown["states"]) == {"style", "memory"}
    assert shown["states"]["memory"]["tensors"]["v"]["norm"] == 4.0
    assert "no state 'style' for user 'carol'" in refused("show", folder, "carol")


def test_rm_deletes_all_or_nothing(folder: Path) -> None:
    assert "'carol' has no states; nothing was deleted" in refused("rm", folder, "ada", "carol")
    assert "no state 'memory' for user '[bold]bob'" in refused("rm", folder, "ada", "[bold]bob", "--name", "memory")
    assert len(Bank(folder)) == 3
    gone = json.loads(run("rm", folder, "ada", "--name", "memory", "--json").stdout)
    assert gone == {"deleted": [{"user": "ada", "name": "memory"}]}
    assert "deleted 2 states of 2 users" in run("rm", folder, "ada", "[bold]bob", "ada").stderr
    assert len(Bank(folder)) == 0
    assert "there is no bank here" in refused("rm", folder.parent / "none", "ada")


def test_merge_makes_the_bank_or_adds_to_it(folder: Path, tmp_path: Path) -> None:
    other = Bank(tmp_path / "other.bank")
    other.update({("ada", "style"): state(-1.0), ("carol", "style"): state(5.0)})
    both = tmp_path / "both.bank"
    assert "both banks have a state 'style' of 'ada'" in refused("merge", both, folder, other.path)
    assert len(Bank(both)) == 3
    merged = json.loads(run("merge", both, other.path, "--conflict", "keep", "--json").stdout)
    assert merged == {"copied": {str(other.path): 1}, "states": 4}
    assert float(Bank(both)["ada", "style"].tensors["v"][0]) == 1
    run("merge", both, other.path, "--conflict", "replace")
    assert float(Bank(both)["ada", "style"].tensors["v"][0]) == -1
    assert "not one of" in refused("merge", both, other.path, "--conflict", "mine")


def test_verify_lists_damage_and_merge_saves_the_rest(folder: Path, tmp_path: Path) -> None:
    assert json.loads(run("verify", folder, "--json").stdout) == {"states": 3, "faults": []}
    for path in (folder / "segments").iterdir():
        content = bytearray(path.read_bytes())
        at = content.find(torch.full((4,), 2.0).numpy().tobytes())
        if at > 0:
            content[at] ^= 1
            path.write_bytes(content)
    found = run("verify", folder, "--json", status=1)
    (fault,) = json.loads(found.stdout)["faults"]
    assert (fault["user"], fault["name"]) == ("ada", "memory")
    assert "state 'memory' of user 'ada'" in run("verify", folder, status=1).stdout
    saved = tmp_path / "saved.bank"
    assert "damaged" in refused("merge", saved, folder)
    assert not saved.exists()
    assert "left out: " in run("merge", saved, folder, "--skip-damaged").stderr
    assert set(Bank(saved)) == {("ada", "style"), ("[bold]bob", "style")}


def test_compact_says_what_it_did(folder: Path) -> None:
    Bank(folder).forget(["ada"])
    done = json.loads(run("compact", folder, "--json").stdout)
    assert done["segments_before"] == done["segments_after"] == 2
    assert done["nbytes_after"] < done["nbytes_before"]
    assert "2 segments to 2" in run("compact", folder).stderr
    assert len(Bank(folder)) == 1


def test_migrate_push_and_pull(tmp_path: Path) -> None:
    old = tmp_path / "old.bank"
    shutil.copytree(VERSION_1, old)
    assert "steer bank migrate" in refused("ls", old)
    assert json.loads(run("migrate", old, tmp_path / "new.bank", "--json").stdout)["states"] == 5
    assert "5 states in" in run("push", tmp_path / "new.bank", tmp_path / "pushed").stderr
    assert "5 states in" in run("pull", tmp_path / "pushed", tmp_path / "pulled.bank").stderr
    assert list(Bank(tmp_path / "pulled.bank")) == list(Bank(tmp_path / "new.bank"))
    run("migrate", old, tmp_path / "hashed.bank", "--hashed")
    assert Bank(tmp_path / "hashed.bank").hashed
