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


def test_ls_shows_all_of_every_id_and_no_control_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    users = {"long." * 50: "long." * 50, "a\x1b[2Jb\x07\n": r"a\x1b[2Jb\x07\n", "\u202eabc": r"\u202eabc", "Zoë": "Zoë"}
    bank = Bank(tmp_path / "people.bank")
    bank.update({(user, "style"): state(1.0) for user in users})
    lines = run("ls", bank.path).stdout.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [*users.values()]
    assert r"\u202eabc / style" in run("show", bank.path, "\u202eabc").stdout


def test_what_is_damaged_does_not_hide_the_rest(folder: Path, tmp_path: Path) -> None:
    """Of one the facts, so that nobody knows whose it is, and of one the tensors."""
    for pattern in (torch.full((4,), 2.0).numpy().tobytes(), b'"user": "[bold]bob"'):
        for path in (folder / "segments").iterdir():
            path.write_bytes(path.read_bytes().replace(pattern, pattern[:-2] + b"x" + pattern[-1:]))
    listed = run("ls", folder, "--json", status=1)
    assert "1 entries cannot be read" in str(listed.exception)
    assert [(row["user"], row["name"]) for row in json.loads(listed.stdout)] == [("ada", "style"), ("ada", "memory")]
    assert "memory" in run("ls", folder, status=1).stdout
    for name, written in (("style", ["ada"]), ("memory", [])):
        exported = run("export", folder, tmp_path / name, "--name", name, "--json", status=1)
        assert "states are left out" in str(exported.exception)
        assert "left out: 1 entries cannot be read" in exported.stderr
        assert ("left out: state 'memory' of user 'ada'" in exported.stderr) == (name == "memory")
        assert [row["user"] for row in json.loads(exported.stdout)["files"]] == written
        assert [path.stem for path in (tmp_path / name).iterdir()] == written


def test_show_prints_one_users_states(folder: Path) -> None:
    Bank(folder)["ada", "large"] = UserState(Provenance("m", 1), {"v": torch.full((4,), 1e30)})
    shown = json.loads(run("show", folder, "ada", "large", "--json").stdout)
    assert shown["states"]["large"]["tensors"]["v"]["norm"] == pytest.approx(2e30)
    del Bank(folder)["ada", "large"]
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
    for target in (both, tmp_path / "new.bank"):
        assert "--conflict mine is not one of" in refused("merge", target, other.path, "--conflict", "mine")
    assert not (tmp_path / "new.bank").exists()
    (tmp_path / "file").touch()
    assert "not a bank but a file" in refused("merge", tmp_path / "file", folder)
    twice = run("merge", tmp_path / "new.bank", other.path, other.path, "--conflict", "keep").stderr
    assert "copied 2 states" in twice


def test_merge_makes_a_hashed_bank(folder: Path, tmp_path: Path) -> None:
    new, other = tmp_path / "new.bank", Bank(tmp_path / "other.bank")
    other["carol", "style"] = state(5.0)
    run("merge", new, folder, other.path, "--hashed")
    bank = Bank(new, hashed=True)
    assert len(bank) == 4
    assert float(bank["carol", "style"].tensors["v"][0]) == 5
    assert not any(b'"user": "' in path.read_bytes() for path in new.rglob("*") if path.is_file())
    (row,) = json.loads(run("ls", new, "--name", "memory", "--json").stdout)
    shown = json.loads(run("show", new, row["user"], "--by-hash", "--json").stdout)
    assert set(shown["states"]) == {"style", "memory"}
    assert "keeps user ids as they are" in refused("merge", folder, other.path, "--hashed")
    # A hashed one stays so.
    run("merge", tmp_path / "again.bank", new)
    assert Bank(tmp_path / "again.bank").hashed


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
