"""`steer bank import` and `steer bank export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import LAYERS, WIDTH
from typer.testing import CliRunner, Result

import steer
from steer.cli.app import app
from steer.cli.bank_files import file_stems, user_of
from steer.interop import state_files, vector_files
from steer.state import Provenance

ODD = [
    "ada",
    "Ada",
    "a/b",
    "..",
    ".hidden",
    "-x",
    "a%2Fb",
    "Zoë",
    "\u202eabc",
    "a b\n",
    "con.gguf",
    "x" * 300,
    "ü" * 512,
]


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(app, ["bank", *(str(argument) for argument in arguments)])
    if isinstance(result.exception, steer.SteerError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def state(number: int = 0, *layers: int) -> steer.UserState:
    generator = torch.Generator().manual_seed(number)
    own = {steer.Site("resid_post", at): torch.randn(WIDTH, generator=generator) for at in layers or (1, 2)}
    return steer.GivenVector().state(own)


@pytest.fixture
def people(tmp_path: Path) -> Path:
    """A bank in which users of odd names have vectors."""
    bank = steer.Bank(tmp_path / "people.bank")
    bank.update({(user, "style"): state(number) for number, user in enumerate(ODD)})
    return bank.path


@pytest.mark.parametrize("ending", ["gguf", "safetensors"])
def test_there_and_back(people: Path, tmp_path: Path, ending: str) -> None:
    out, new = tmp_path / "out", tmp_path / "new.bank"
    written = json.loads(run("export", people, out, "--format", ending, "--json").stdout)["files"]
    assert [row["user"] for row in written] == ODD
    files = [Path(row["file"]) for row in written]
    assert sorted(out.iterdir()) == sorted(files)
    assert [row["bytes"] for row in written] == [file.stat().st_size for file in files]
    # No two are one where capitals do not count, and none is hidden or outside.
    assert len({file.name.lower() for file in files}) == len(ODD)
    assert all(file.parent == out and file.name[0] not in ".-" for file in files)
    for user, file in zip(ODD, files, strict=True):
        if file.name.startswith("%sha256-"):
            with pytest.raises(steer.SteerError, match="too long for the name of a file; say it with --user"):
                run("import", new, file)
            run("import", new, file, "--user", user)
    rest = [file for file in files if not file.name.startswith("%sha256-")]
    read = json.loads(run("import", new, *rest, "--json").stdout)["states"]
    assert [row["user"] for row in read] == [user for user in ODD if len(user) < 300]
    old, copy = steer.Bank(people), steer.Bank(new)
    for user in ODD:
        assert copy[user, "style"].provenance == old[user, "style"].provenance
        for site, tensor in old[user, "style"].tensors.items():
            assert torch.equal(copy[user, "style"].tensors[site], tensor)


@given(st.lists(st.text(min_size=1, max_size=80).filter(lambda text: text.isprintable()), unique=True, max_size=5))
@settings(max_examples=200, deadline=None)
def test_names_of_files_tell_their_users(users: list[str]) -> None:
    stems = file_stems(users)
    assert len({stem.lower() for stem in stems.values()}) == len(users)
    for user, stem in stems.items():
        assert stem.isascii()
        assert not {"/", "\\", "\0", ":"} & {*stem}
        assert len(stem) <= 200
        if not stem.startswith("%sha256-"):
            assert user_of(Path("folder") / f"{stem}.gguf") == user


def test_a_folder_is_imported_for_a_model(
    llama: steer.FrozenLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steer.cli.options.load", lambda *_: llama)
    files = tmp_path / "files"
    files.mkdir()
    vector_files.write_gguf(files / "ada.gguf", state(1))
    torch.save(torch.ones(LAYERS, WIDTH), files / "ben.PT")
    (files / "notes.txt").touch()
    bank = tmp_path / "people.bank"
    result = run("import", bank, files, "--name", "mood", "--model", "x", "--layer", "1,2", "--positions", "response")
    assert "2 states named 'mood'" in result.stderr
    for user in ("ada", "ben"):
        stored = steer.Bank(bank)[user, "mood"]
        assert stored.provenance.model == llama.fingerprint
        assert stored.provenance.settings["positions"] == "response"
        assert list(stored.tensors) == ["resid_post[1]", "resid_post[2]"]
    # Nothing of these is in the bank then.
    vector_files.write_gguf(files / "cid.gguf", state(1, 7))
    with pytest.raises(steer.SteerError, match=r"cid.gguf: the model has 3 layers|cid.gguf: it has no vector"):
        run("import", tmp_path / "other.bank", files, "--model", "x", "--layer", "1")
    assert not (tmp_path / "other.bank").exists()


def test_nothing_is_replaced_unasked(people: Path, tmp_path: Path) -> None:
    vector_files.write_gguf(tmp_path / "ada.gguf", state(99))
    vector_files.write_gguf(tmp_path / "new.gguf", state(99))
    with pytest.raises(steer.SteerError, match="'ada' has a state 'style' already; nothing was imported"):
        run("import", people, tmp_path / "new.gguf", tmp_path / "ada.gguf")
    assert steer.Bank(people).names_of("new") == []
    run("import", people, tmp_path / "ada.gguf", "--replace")
    assert torch.equal(steer.Bank(people)["ada", "style"].tensors["resid_post[1]"], state(99).tensors["resid_post[1]"])
    with pytest.raises(steer.SteerError, match=r"ada\.gguf exists; nothing was written"):
        run("export", people, tmp_path, "--user", "Zoë", "--user", "ada", "--format", "gguf")
    assert sorted(path.name for path in tmp_path.glob("*.gguf")) == ["ada.gguf", "new.gguf"]
    run("export", people, tmp_path, "--user", "ada", "--format", "gguf", "--model-hint", "llama", "--replace")
    assert vector_files.read(tmp_path / "ada.gguf").data["model_hint"] == "llama"


def test_a_new_bank_is_made_with_all_that_is_asked_for(people: Path, tmp_path: Path) -> None:
    new, file = tmp_path / "new.bank", tmp_path / "ada.gguf"
    vector_files.write_gguf(file, state())
    for options in (["--name", "a/b"], ["--by-hash"], ["--by-hash", "--hashed"], ["--user", "x" * 2000]):
        with pytest.raises(steer.SteerError):
            run("import", new, file, *options)
        assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["people.bank"]
    run("import", new, file, "--hashed")
    bank = steer.Bank(new, hashed=True)
    ((user, _),) = bank
    run("import", new, file, "--by-hash", "--user", user, "--replace")
    assert list(bank) == [(user, "style")]
    run("export", new, tmp_path / "out", "--by-hash", "--user", user)
    assert (tmp_path / "out" / f"{user}.safetensors").exists()
    with pytest.raises(steer.SteerError, match="keeps user ids as they are"):
        run("import", people, file, "--hashed", "--user", "new")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["import", "b", "ada.gguf", "ada.safetensors"], "are both for the user 'ada'"),
        (["import", "b", "a%64a.gguf", "ada.gguf"], "are both for the user 'ada'"),
        (["import", "b", "ada.gguf", "ben.gguf", "--user", "ada"], "--user ada is for one file, and there are 2"),
        (["import", "b", "empty"], "the folder has no files that end in .gguf"),
        (["import", "b", "none.gguf"], "none.gguf: there is no such file"),
        (["import", "b", "a%FF.gguf"], "its name is that of no user"),
        (["import", "b", "ada.gguf", "--layer", "1,x"], "--layer 1,x is not a list of numbers"),
        (["import", "b", "ada.gguf", "--positions", "here"], "positions='here' is not one of"),
        (
            ["export", "people.bank", "out", "--format", "pt"],
            "--format pt is not one of safetensors, gguf. A .pt file is",
        ),
        (["export", "people.bank", "out", "--model-hint", "llama"], "--model-hint is for --format gguf"),
        (["export", "people.bank", "out", "--user", "nobody"], "no state 'style' for user 'nobody'"),
        (["export", "people.bank", "out", "--name", "mood"], "nobody has a state 'mood'; there are style"),
        (["export", "people.bank", "ada.gguf"], "cannot be made a folder"),
        (["export", "none.bank", "out"], "there is no bank here"),
    ],
)
def test_bad_calls(
    people: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("ada.gguf", "ben.gguf", "a%64a.gguf", "a%FF.gguf"):
        vector_files.write_gguf(name, state())
    state_files.write("ada.safetensors", state())
    Path("empty").mkdir()
    with pytest.raises(steer.SteerError, match=message):
        run(*arguments)
    assert not Path("b").exists()
    assert not list(Path("out").glob("*"))


def test_what_goes_along_and_what_does_not(
    llama: steer.FrozenLM, histories: list[steer.History], tmp_path: Path
) -> None:
    """A common vector is part of a GGUF file; of a safetensors file it is not, which is said."""
    method = steer.TrainedVector(layer=1, shared_steps=1, steps=1)
    artifact = method.train(llama, histories)
    assert artifact is not None
    bank = steer.Bank(tmp_path / "people.bank")
    bank.put_artifact(artifact)
    bank["ann", "style"] = method.fit(llama, histories[0])
    said = run("export", bank.path, tmp_path / "out", "--format", "gguf").stderr
    assert "Other programs add these vectors at all tokens; here it was at: response" in " ".join(said.split())
    whole = vector_files.read(tmp_path / "out" / "ann.gguf")
    assert whole.provenance.settings["positions"] == "response"
    expected = steer.GivenVector.of(bank["ann", "style"], artifact)
    assert torch.equal(whole.tensors["resid_post[1]"], expected.tensors["resid_post[1]"])
    run("export", bank.path, tmp_path / "out")
    said = run("import", tmp_path / "new.bank", tmp_path / "out" / "ann.safetensors").stderr
    assert f"need the artifact {artifact.hash[:10]}…" in " ".join(said.split())
    steer.Bank(tmp_path / "new.bank").put_artifact(artifact)
    told: dict[str, Any] = {"users": ["ann"], "max_new_tokens": 4}
    copy = steer.Bank(tmp_path / "new.bank")
    assert llama.generate(["x"], bank=copy, **told) == llama.generate(["x"], bank=bank, **told)


def test_states_without_vectors(tmp_path: Path) -> None:
    bank = steer.Bank(tmp_path / "people.bank")
    bank["ann", "context"] = steer.UserState(Provenance("cos", 1), data={"context": "hello", "lam": 1.0})
    with pytest.raises(steer.SteerError, match="is no plain vector"):
        run("export", bank.path, tmp_path / "out", "--name", "context", "--format", "gguf")
    run("export", bank.path, tmp_path / "out", "--name", "context")
    run("import", bank.path, tmp_path / "out", "--user", "bob", "--name", "context")
    assert steer.Bank(bank.path)["bob", "context"].data == {"context": "hello", "lam": 1.0}
