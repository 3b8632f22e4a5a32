"""What `steer extract` says of its states, and what `steer generate` answers with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import steer
from steer.cli.app import app


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(result.exception, steer.SteerError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture
def texts(
    tmp_path: Path, llama: steer.FrozenLM, histories: list[steer.History], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A file of histories; the commands load a tiny model."""
    monkeypatch.setattr("steer.cli.options.load", lambda *_: llama)
    records = [record for history in histories for record in history]
    lines = ({"user_id": r.user_id, "prompt": r.prompt, "text": r.response} for r in records)
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_extract_says_how_it_read_and_of_whom_there_was_too_little(texts: Path) -> None:
    bank = texts.parent / "people.bank"
    faint = run("extract", texts, "--bank", bank, "--layer", 1)
    assert "2 states of natural_gradient named 'style'" in faint.stderr
    assert "The vectors of ann and 1 other are mostly what all users have in common" in " ".join(faint.stderr.split())
    clear = run("extract", texts, "--bank", bank, "--layer", 1, "--set", "step=1e4")
    assert "have in common" not in clear.stderr
    style = run("extract", texts, "--bank", bank, "--layer", 1, "--neutral", "population")
    assert "2 states of style_vector" in style.stderr
    assert "have in common" not in style.stderr
    printed = json.loads(run("extract", texts, "--bank", bank, "--json").stdout)
    assert printed["method"] == "natural_gradient"
    assert 0 < printed["users"]["ann"]["own_share"] < 0.2


def test_generate_answers_as_the_library_does(texts: Path, llama: steer.FrozenLM) -> None:
    bank = texts.parent / "people.bank"
    run("extract", texts, "--bank", bank, "--layer", 1, "--neutral", "population")
    asked = ["generate", "--bank", bank, "--user", "ann", "--user", "bob", "--prompt", "greet me", "--dose", 0.5]
    asked += ["--max-new-tokens", 6, "--json"]
    for more, arguments in (
        ([], {}),
        (["--repetition-penalty", 5], {"repetition_penalty": 5.0}),
        (["--temperature", 0.7], {"temperature": 0.7, "do_sample": True, "top_k": 0, "seeds": [0, 1, 2]}),
    ):
        printed = json.loads(run(*asked, *more).stdout)["rows"]
        expected = llama.generate(
            ["greet me"] * 3,
            bank=steer.Bank(bank),
            users=[None, "ann", "bob"],
            dose=0.5,
            max_new_tokens=6,
            **({"do_sample": False} | arguments),
        )
        assert [row["user"] for row in printed] == [None, "ann", "bob"]
        assert [row["text"] for row in printed] == expected
    with pytest.raises(steer.SteerError, match="is not above 0; 1 is none"):
        run(*asked, "--repetition-penalty", 0)
