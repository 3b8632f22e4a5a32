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
        ('{"user_id": true, "context": "x"}', [], ":1: a line is an object with a `user_id`"),
        ('{"user_id": "7", "context": "x"}\n{"user_id": 7, "context": "y"}', [], ":2: '7' comes a second time"),
        ('{"user_id": "ann", "context": "x", "lam": true}', [], ":1: lam must be a number, got True"),
        ('{"user_id": "ann", "context": "x", "records": 2}', [], ":1: 'records' is nothing that cos knows"),
        ('{"user_id": "ann", "context": "x"}\n{"user_id": "ann", "context": "y"}', [], ":2: 'ann' comes a second time"),
        ('{"user_id": "ann", "context": " "}', [], ":1: a context is empty"),
        (
            '{"user_id": "ann", "context": "x", "lambda": 1}',
            [],
            ":1: 'lambda' is nothing that cos knows, but 'lam' is; a line has context, and may have lam, steered$",
        ),
        ('{"user_id": "ann", "context": "x", "lam": "much"}', [], ":1: lam must be a number, got 'much'"),
        ('{"user_id": "ann", "context": "x"}', ["--set", "lam=abc"], "^--set: lam must be a number, got 'abc'"),
        ('{"user_id": "ann", "context": "x"}', ["--set", "lam=nan"], "^--set: lam must be finite, got nan"),
        ('{"user_id": "ann", "context": "x"}', ["--set", "lam=-inf"], "^--set: lam must be finite, got -inf"),
        (
            '{"user_id": "ann", "context": "x", "model": "e"}',
            ["--method", "costeer", "--set", "steps=-1"],
            "^--set: steps must not be negative",
        ),
        (
            '{"user_id": "ann", "context": "x"}',
            ["--set", "lamb=1"],
            "--set lamb: cos has no such hyper-parameter, but 'lam' is; it has lam, steered",
        ),
        (
            '{"user_id": "ann", "context": "x"}',
            ["--method", "coss"],
            "--method coss makes no state.* there are amulet, .*cos-many",
        ),
        ('{"user_id": "ann"}', [], ":1: cos needs `context`; a line has context, and may have lam, steered$"),
        (
            '{"user_id": "ann", "positive": "x"}',
            ["--method", "cos-pair"],
            ":1: cos-pair needs `negative`; a line has positive, negative, and may have lam",
        ),
        (
            '{"user_id": "ann"}',
            ["--method", "proxy-tuning"],
            ":1: proxy-tuning needs expert and antiexpert: --set expert=NAME --set antiexpert=NAME, and --beside "
            "NAME=MODEL for each$",
        ),
        (
            '{"user_id": "ann", "context": "x"}',
            ["--method", "costeer"],
            ":1: costeer needs model: --set model=NAME, and --beside NAME=MODEL$",
        ),
        (
            '{"user_id": "ann", "weights": {"formal": 1}}',
            ["--method", "drift"],
            """:1: drift needs attributes: --set 'attributes={"formal": "Answer formally."}'$""",
        ),
        ('{"user_id": "ann", "contexts": 5}', ["--method", "mod"], ":1: mod: a value is of the wrong kind"),
        (
            '{"user_id": "ann", "expert": "e", "antiexpert": "a"}',
            ["--method", "proxy-tuning"],
            "^no --beside for 'e' and 'a'; add --beside e=MODEL --beside a=MODEL$",
        ),
        (
            '{"user_id": "ann"}',
            ["--method", "proxy-tuning", "--set", "expert=e", "--set", "antiexpert=a", "--beside", "e=x"],
            "^no --beside for 'a'; add --beside a=MODEL$",
        ),
        (
            '{"user_id": "ann", "context": "x"}',
            ["--method", "style-vector"],
            "--method style-vector makes no state of a context",
        ),
        ('{"user_id": "ann", "context": "x"}', ["--user", "bob"], "about 'bob'; there are ann. --unknown-user"),
        ('{"user_id": "ann", "context": "x"}', ["--unknown-user", "plane"], "plane is neither error nor plain"),
        (
            '{"user_id": "ann", "context": "x"}',
            ["--strength", "2"],
            "--strength and --dose scale the vectors of a bank",
        ),
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
        (["--context", "x", "--lambda", "nan"], "^--lambda: lam must be finite"),
        (["--context", "x", "--lambda", "1e39"], "^--lambda: the weight"),
        (["--context", " "], "^--context is empty$"),
        (["--prompt", ""], "^--prompt is empty$"),
        (["--dose", "0.1"], "--strength and --dose scale the vectors of a bank"),
        (["--dose", "0.1", "--strength", "1"], "--strength and --dose are two units"),
        (["--contexts", "."], r"^\. is a folder; give a file"),
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
    with pytest.raises(steer.SteerError, match=r"^no --beside for 'small'; add --beside small=MODEL$"):
        run(*asked[:-2], "--name", "small")
    with pytest.raises(steer.SteerError, match="small=x: no state of these rows needs it; they name none"):
        run(*asked, "--name", "other")


def test_a_row_contrasts_once(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steer.cli.options.load", None)
    with steer.Bank(texts.parent / "people.bank") as bank:
        bank["ann", "pair"] = steer.CoSPair().state("I sail.", "I row.")
        bank["ann", "plain"] = steer.CoS().state("I row.")
    people = texts.parent / "people.jsonl"
    people.write_text('{"user_id": "ann", "context": "I sail."}\n')
    asked = ["generate", "--prompt", "hello", "--bank", bank.path, "--user", "ann"]
    for more, said in (
        ([], "^the states 'pair' and 'plain' of 'ann' contrast streams; choose one with --name$"),
        (
            ["--contexts", people, "--name", "pair"],
            "^'ann' has a context from --contexts and the state 'pair' of the bank, which both contrast streams; leave "
            "one out$",
        ),
        (["--context", "I sail."], "^'ann' has a context from --context and the state 'pair' of the bank"),
        (["--name", "pair", "--strength", 2], "--strength and --dose scale the vectors of a bank, and there are none"),
    ):
        with pytest.raises(steer.SteerError, match=said):
            run(*asked, *more)


def test_users_of_whom_nothing_is_known_may_have_plain_rows(texts: Path, llama: steer.FrozenLM) -> None:
    people = texts.parent / "people.jsonl"
    people.write_text('{"user_id": 7, "context": "I sail."}\n')
    asked = ["generate", "--prompt", "hello", "--contexts", people, "--user", "zed", "--unknown-user", "plain"]
    asked += ["--max-new-tokens", 5, "--json"]
    state = steer.CoS().state("I sail.")
    rows = json.loads(run(*asked, "--user", "7").output)["rows"]
    assert [row["user"] for row in rows] == [None, "zed", "7"]
    expected = llama.generate_tokens(["hello"] * 3, states=[None, None, state], max_new_tokens=5)
    assert [row["tokens"] for row in rows] == expected
    plain, zed = json.loads(run(*asked).output)["rows"]
    assert plain["tokens"] == zed["tokens"] == expected[0]


def test_a_context_that_is_too_long_is_told_by_its_user(texts: Path) -> None:
    people = texts.parent / "people.jsonl"
    people.write_text(json.dumps({"user_id": "ann", "context": "sea " * 3000}) + "\n")
    for more in ([], ["--stream"]):
        with pytest.raises(steer.SteerError, match=r"^'ann': with its context the prompt has"):
            run("generate", "--prompt", "hello", "--contexts", people, *more)
    with pytest.raises(steer.SteerError, match=r"^'\(context\)': with its context the prompt has"):
        run("generate", "--prompt", "hello", "--context", "sea " * 3000)


@pytest.mark.parametrize("method", ["knn-lm", "cos"])
def test_extract_has_a_line_for_each_user_where_there_are_no_vectors(texts: Path, method: str) -> None:
    bank = texts.parent / "people.bank"
    shown = run("extract", texts, "--bank", bank, "--method", method).stdout
    with steer.Bank(bank) as store:
        sizes = [sum(t.nbytes for t in store[user, "style"].tensors.values()) for user in ("ann", "bob")]
    assert any(sizes) == (method == "knn-lm")
    assert [line.split() for line in shown.strip().splitlines()] == [
        ["user", "records", "bytes"],
        ["ann", "3", str(sizes[0])],
        ["bob", "3", str(sizes[1])],
    ]
