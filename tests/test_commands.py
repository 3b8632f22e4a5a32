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


def test_generate_contrasts_every_user_by_a_context_of_their_own(
    texts: Path, llama: steer.FrozenLM, tmp_path: Path
) -> None:
    people = tmp_path / "people.jsonl"
    people.write_text('{"user_id": "ann", "context": "I sail.", "lam": 3}\n\n{"user_id": "bob", "context": "I row."}\n')
    command = ["generate", "--prompt", "hello", "--contexts", people, "--max-new-tokens", 5, "--json"]
    rows = json.loads(run(*command, "--set", "lam=0.5").output)["rows"]
    states = [None, steer.CoS(lam=3).state("I sail."), steer.CoS(lam=0.5).state("I row.")]
    assert [row["user"] for row in rows] == [None, "ann", "bob"]
    assert [row["tokens"] for row in rows] == llama.generate_tokens(["hello"] * 3, states=states, max_new_tokens=5)
    (_, bob) = json.loads(run(*command, "--user", "bob").output)["rows"]
    assert bob["tokens"] == llama.generate_tokens(["hello"], states=[steer.CoS().state("I row.")], max_new_tokens=5)[0]
    # No line of the file ends within a text.
    people.write_text('{"user_id": "bob", "context": "I row.\u2028I sail."}\n', encoding="utf-8")
    (_, both) = json.loads(run(*command).output)["rows"]
    states = [steer.CoS().state("I row.\u2028I sail.")]
    assert [both["tokens"]] == llama.generate_tokens(["hello"], states=states, max_new_tokens=5)


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        ("", [], "holds no contexts"),
        ("[1]\n", [], "people.jsonl:1: expected an object with a `user_id`"),
        ("\n{", [], "people.jsonl:2: not JSON"),
        (b'{"user_id": "ann", "context": "\xff"}', [], "people.jsonl:1: not JSON in UTF-8"),
        ('{"user_id": "", "context": "x"}', [], ":1: a line is an object with a `user_id`"),
        ('{"user_id": "ann", "context": 5}', [], ":1: a context must be text, got 5"),
        ('{"user_id": "ann", "context": null}', [], ":1: a context must be text, got None"),
        ('{"user_id": "ann", "context": "x", "lam": true}', [], ":1: λ must be a number, got True"),
        ('{"user_id": "ann", "context": "x", "records": 2}', [], ":1: 'records' is nothing that cos knows"),
        ('{"user_id": "ann", "context": "x"}\n{"user_id": "ann", "context": "y"}', [], ":2: 'ann' comes a second time"),
        ('{"user_id": "ann", "context": " "}', [], ":1: a context is empty"),
        (
            '{"user_id": "ann", "context": "x", "lambda": 1}',
            [],
            ":1: 'lambda' is nothing that cos knows; a line has context",
        ),
        ('{"user_id": "ann", "context": "x", "lam": "much"}', [], ":1: λ must be a number, got 'much'"),
        (
            '{"user_id": "ann", "context": "x"}',
            ["--set", "lamb=1"],
            "--set lamb: cos has no such hyper-parameter; it has lam",
        ),
        (
            '{"user_id": "ann", "context": "x"}',
            ["--method", "coss"],
            "--method coss makes no state.* there are amulet, .*cos-many",
        ),
        ('{"user_id": "ann"}', [], ":1: cos: .*'context'"),
        (
            '{"user_id": "ann", "context": "x"}',
            ["--method", "style-vector"],
            "--method style-vector makes no state of a context",
        ),
        ('{"user_id": "ann", "context": "x"}', ["--user", "bob"], "has nothing about 'bob'; there are ann"),
        ('{"user_id": "ann", "context": "x"}', ["--context", "y"], "give one of them"),
        ('{"user_id": "ann", "context": "x"}', ["--beside", "small"], "--beside small is not a name and a model"),
        ('{"user_id": "ann", "context": "x"}', ["--beside", "small=x"], "small=x: no state.* they name none"),
        (
            '{"user_id": "ann", "context": "x"}',
            ["--method", "costeer", "--set", "model=small", "--beside", "smal=x", "--beside", "small=x"],
            "smal=x: no state of these rows needs it; they name small",
        ),
        (None, [], "there is no such file"),
        (None, ["--set", "lam=1"], "there is no such file"),
    ],
)
def test_generate_says_what_is_wrong_with_contexts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lines: str | bytes | None, options: list[str], message: str
) -> None:
    # Before a model is loaded.
    monkeypatch.setattr("steer.cli.options.load", None)
    people = tmp_path / "people.jsonl"
    if lines is not None:
        people.write_bytes(lines if isinstance(lines, bytes) else lines.encode())
    with pytest.raises(steer.SteerError, match=message):
        run("generate", "--prompt", "hello", "--contexts", people, *options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--context", "x", "--lambda", "nan"], "--context and --lambda: λ must be finite"),
        (["--context", "x", "--lambda", "1e39"], "--context and --lambda: the weight"),
        (["--context", " "], "a context is empty"),
        (["--context", "x", "--temperature", "-1"], "--temperature must be above 0"),
        (["--context", "x", "--temperature", "nan"], "--temperature must be above 0"),
        (["--context", "x", "--beside", "foo=bar"], "--beside foo=bar: no state of these rows needs it"),
    ],
)
def test_generate_refuses_before_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    monkeypatch.setattr("steer.cli.options.load", None)
    with pytest.raises(steer.SteerError, match=message):
        run("generate", "--prompt", "hello", *options)


def test_models_that_states_of_a_bank_name_are_given_beside_it(texts: Path, llama: steer.FrozenLM) -> None:
    with steer.Bank(texts.parent / "people.bank") as bank:
        bank["ann", "small"] = steer.CoSteer("small").state("I sail.")
        bank["ann", "other"] = steer.CoS().state("I row.")
    asked = ["generate", "--prompt", "hello", "--bank", bank.path, "--user", "ann", "--beside", "small=x"]
    # It is needed; the test's model only cannot stand beside itself.
    with pytest.raises(steer.SteerError, match="is the steered one itself"):
        run(*asked, "--name", "small")
    with pytest.raises(steer.SteerError, match="small=x: no state of these rows needs it; they name none"):
        run(*asked, "--name", "other")
