"""The study of soft prefixes: what is held back stays so, arms score the same tokens, runs go on where they stopped."""

from __future__ import annotations

import json
import math
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import tiny, tokenizer
from rows import assert_close

import steer
from steer.cache import Cache
from steer.experiments import retrieval, soft_prefixes, soft_prefixes_arms, soft_prefixes_report
from steer.experiments import soft_prefixes_data as data
from steer.history import History, Record
from steer.plan import edits_of
from steer.score import row_losses

WORDS = ["stone", "harbour", "garden", "letter", "candle", "winter", "engine", "river", "copper", "violin", "window"]


def sentence(seed: int, count: int) -> str:
    rng = np.random.default_rng(seed)
    return " ".join(rng.choice(WORDS, count)) + f" {seed}"


def lines_of(name: str, user: int, i: int) -> dict[str, Any]:
    seed = 1000 * user + i + len(name)
    if name == "commits":
        own = {"title": sentence(seed, 3), "time": 100 + i}
    elif name == "answers":
        own = {"prompt": sentence(seed, 4) + "?", "date": f"2014-01-{i + 1:02}"}
    else:
        own = {"seq": f"{user}:{i:03}"}
    site = ("beer:", "tea:")[user % 2] if name == "answers" else f"author_{name}_"
    return {"user_id": f"{site}{user}", "text": sentence(seed + 7, 8 + i % 3), **own}


def write(folder: Path, name: str, lines: Sequence[dict[str, Any]]) -> None:
    path = folder / data.SETS[name].folder / "texts.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, lines)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in data.SETS:
        # Newest first: the order of the file is not that of time.
        write(tmp_path, name, [lines_of(name, user, i) for user in range(4) for i in reversed(range(7))])
    return tmp_path


@pytest.fixture
def lm() -> steer.FrozenLM:
    return steer.wrap(tiny("llama"), tokenizer(chat=True))


class Bag:
    """Counts of letters, in place of a sentence encoder."""

    identity = "bag of letters"

    def __init__(self, cache: None = None) -> None:
        """Keeps nothing."""

    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        counts = torch.tensor([[float(text.count(chr(code))) for code in range(97, 123)] for text in texts])
        return torch.nn.functional.normalize(counts, dim=1)


@pytest.fixture(autouse=True)
def encoder(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setattr(soft_prefixes_arms, "TextEncoder", Bag)
    # Where the model's own answers are kept.
    monkeypatch.setenv("STEER_CACHE", str(tmp_path_factory.mktemp("cache")))


def every(lm: steer.FrozenLM, users: Sequence[data.User], cache: Cache) -> dict[str, soft_prefixes_arms.Arm]:
    return soft_prefixes_arms.arms(lm, users, cache, tokens=20, records=3)


# Splits.


def test_later_records_are_later_and_strangers_are_nobody_known(folder: Path) -> None:
    users = data.read_users(folder)
    for name in data.SETS:
        own = [user for user in users if user.set == name]
        assert Counter(user.known for user in own) == {True: 3, False: 1}
        for user in own:
            assert (len(user.earlier), len(user.later)) == (5, 2)
            assert max(r.time for r in user.earlier) < min(r.time for r in user.later)
            assert not {r.id for r in user.earlier} & {r.id for r in user.later}
            assert len({r.fields["text"] for part in (user.earlier, user.later) for r in part}) == 7


def test_splits_depend_on_names_alone(folder: Path) -> None:
    sides = {(user.set, user.name): user.known for user in data.read_users(folder)}
    for name in data.SETS:
        write(
            folder,
            name,
            [lines_of(name, user, i) | {"text": f"other words {i}"} for user in (3, 1, 0, 2) for i in range(9)],
        )
    assert {(user.set, user.name): user.known for user in data.read_users(folder)} == sides
    fewer = data.read_users(folder, users=3)
    assert Counter((user.set, user.known) for user in fewer) == {
        (n, k): 1 + k for n in data.SETS for k in (True, False)
    }
    assert {(user.set, user.name): user.known for user in fewer}.items() <= sides.items()
    assert all(user.known for user in data.read_users(folder, unseen=0))
    assert not any(user.known for user in data.read_users(folder, unseen=1))


def test_sets_that_are_not_there_are_left_out(folder: Path) -> None:
    (folder / "git_commits" / "texts.jsonl").unlink()
    assert {user.set for user in data.read_users(folder)} == {"answers", "passages"}
    with pytest.raises(steer.SteerError, match=r"there is no git_commits/texts\.jsonl"):
        data.read_users(folder / "git_commits")
    write(folder, "commits", [{"user_id": "a", "text": "b", "time": 3}])
    with pytest.raises(steer.SteerError, match="of 'a' has no 'title', it has user_id, text, time"):
        data.read_users(folder)
    write(folder, "commits", [lines_of("commits", 0, i) for i in range(2)])
    with pytest.raises(steer.SteerError, match="'author_commits_0' of commits has 2 records, too few"):
        data.read_users(folder)


def test_prompts(folder: Path) -> None:
    first = {user.set: user.earlier.records[0] for user in data.read_users(folder)}
    title = first["commits"].fields["query"]
    assert first["commits"].prompt == f"Write the body of a Git commit message titled: {title}"
    assert first["answers"].prompt == first["answers"].fields["query"]
    beginning = first["passages"].fields["query"]
    assert first["passages"].prompt == f"Continue this text: {beginning}"
    assert f"{beginning} {first['passages'].response}" == first["passages"].fields["text"]


@pytest.mark.parametrize(("words", "told"), [(1, 1), (3, 1), (16, 4), (95, 23), (400, 24)])
def test_the_beginning_of_a_text_is_told(words: int, told: int) -> None:
    text = " ".join(["so  so"] * (words // 2) + ["so"] * (words % 2)) + "\n"
    beginning, rest = data.begun(text)
    assert len(beginning.split()) == told
    assert (beginning + rest).replace(" ", "") == text.strip().replace(" ", "")
    assert text.strip().startswith(beginning)
    assert text.strip().endswith(rest)


def test_others_are_of_the_same_site_and_side(folder: Path) -> None:
    write(folder, "answers", [lines_of("answers", user, i) for user in range(12) for i in range(7)])
    users = data.read_users(folder)
    for user in users:
        (other,) = data.strangers(users, user, 1)
        assert other.set == user.set
        assert other.name != user.name
        if user.set == "answers":
            assert other.name.split(":")[0] == user.name.split(":")[0]
            alike = [u for u in users if u.set == "answers" and u.name[:3] == user.name[:3] and u.known == user.known]
            assert other.known == user.known or len(alike) == 1
    everybody = data.strangers(users, users[0], 99)
    assert len(everybody) == 3
    assert data.strangers(users, users[0], 2) == everybody[:2]


def test_texts_are_cut_at_tokens(lm: steer.FrozenLM, folder: Path) -> None:
    assert data.cut(lm, "a letter", 99) == "a letter"
    assert data.cut(lm, "a letter", 3) == "a l"
    users = data.read_users(folder)
    short = data.shortened(lm, users, 9)
    assert {len(record.response) for user in short for part in (user.earlier, user.later) for record in part} == {9}
    assert [user.later.records[0].id for user in short] == [user.later.records[0].id for user in users]
    counts = {(one["set"], one["split"]): one for one in data.statistics(lm, short)}
    assert counts["commits", "known"]["users"] == 3
    assert counts["commits", "known"]["earlier tokens"] == 3 * 5 * 9
    assert counts["commits", "unseen"]["later tokens"] == 2 * 9
    prompts = [len(lm.encode(r.prompt or "")) for u in short if u.set == "answers" and not u.known for r in u.later]
    assert counts["answers", "unseen"]["prompt tokens"] == np.mean(prompts)


# Choosing texts.


@pytest.mark.parametrize("ranker", ["newest", "drawn", "bm25", "dense"])
def test_neither_a_record_itself_nor_a_later_one_is_chosen(ranker: str, folder: Path, tmp_path: Path) -> None:
    user = data.read_users(folder)[0]
    whole = History(user.name, (*user.earlier, *user.later))
    rank = {
        "newest": retrieval.newest,
        "drawn": retrieval.drawn,
        "bm25": retrieval.BM25(),
        "dense": soft_prefixes_arms.Dense(Bag(), Cache(tmp_path / "c")),
    }[ranker]
    for i, record in enumerate(whole):
        found = retrieval.chosen(rank, data.before(whole, record), record, 4)
        assert len(found) == min(i, 4)
        assert len({own.id for own in found}) == len(found)
        assert all(own.time < record.time for own in found)
        # Of another's history, everything.
        assert len(data.before(History("somebody", whole.records), record)) == 7


def test_the_newest_and_the_drawn(folder: Path) -> None:
    user = data.read_users(folder)[0]
    record = user.later.records[0]
    assert retrieval.chosen(retrieval.newest, user.earlier, record, 2) == list(user.earlier)[:-3:-1]
    drawn = retrieval.chosen(retrieval.drawn, user.earlier, record, 4)
    assert drawn[:2] == retrieval.chosen(retrieval.drawn, user.earlier, record, 2)
    firsts = {
        retrieval.chosen(retrieval.drawn, user.earlier, r, 1)[0].id for u in data.read_users(folder) for r in u.later
    }
    assert len(firsts) > 2


def okapi(documents: Sequence[Sequence[str]], query: Sequence[str]) -> list[float]:
    """BM25 as in Lucene: k1 = 1.5, b = 0.75."""
    mean = np.mean([len(own) for own in documents])
    scores = []
    for own in documents:
        total = 0.0
        for word in query:
            held = sum(word in other for other in documents)
            idf = math.log(1 + (len(documents) - held + 0.5) / (held + 0.5))
            count = own.count(word)
            total += idf * count / (count + 1.5 * (0.25 + 0.75 * len(own) / mean))
        scores.append(total)
    return scores


def test_bm25_by_hand(folder: Path) -> None:
    for user in data.read_users(folder):
        for record in user.later:
            texts = [retrieval.document_of(own) for own in user.earlier]
            # A number of one digit is no word to the package.
            documents = [re.findall(r"\b\w\w+\b", text.lower()) for text in texts]
            query = re.findall(r"\b\w\w+\b", record.fields["query"].lower())
            found = retrieval.BM25()(user.earlier, record)
            np.testing.assert_allclose(found, okapi(documents, query), rtol=1e-5, atol=1e-6)


def test_where_no_word_is_shared_the_newest_is_taken() -> None:
    texts = [Record("a", text, fields={"query": "", "text": text}) for text in ("red stone", "blue stone", "old boat")]
    history, bm25 = History("a", tuple(texts)), retrieval.BM25()
    for query in ("nothing", "", "the of", "?"):
        record = Record("a", "x", fields={"query": query, "text": "x"})
        assert bm25(history, record) == [0.0] * 3
        assert retrieval.chosen(bm25, history, record, 2) == texts[:0:-1]
    record = Record("a", "x", fields={"query": "a STONE", "text": "x"})
    assert retrieval.chosen(bm25, history, record, 3) == [texts[1], texts[0], texts[2]]


def test_dense_is_the_cosine_and_is_kept(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    user, bag = data.read_users(folder)[0], Bag()
    record = user.later.records[0]
    dense = soft_prefixes_arms.Dense(bag, Cache(tmp_path / "c"))
    texts = [retrieval.document_of(own) for own in user.earlier]
    expected = bag.encode(texts) @ bag.encode([record.fields["query"]])[0]
    assert_close(torch.tensor(dense(user.earlier, record)), expected)
    nbytes = sum(map(len, texts)) + 5 * 26 * 4
    asked: list[int] = []
    monkeypatch.setattr(Bag, "encode", lambda _, texts: asked.append(len(texts)) or torch.ones(len(texts), 26))
    again = soft_prefixes_arms.Dense(bag, Cache(tmp_path / "c"))
    again(user.earlier, record)
    assert asked == [1]
    arm = soft_prefixes_arms.Shown(again, 4, 20)
    assert arm.cost(None, user.earlier).nbytes == nbytes  # type: ignore[arg-type]


# Arms.


def nats(lm: steer.FrozenLM, prompt: Any, response: str) -> float:
    """By transformers."""
    assert lm.tokenizer is not None
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    text = lm.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([lm.tokenizer(text + response, add_special_tokens=False).input_ids])
    with torch.no_grad():
        logs = lm.model(ids).logits[0].log_softmax(-1)
    return -sum(logs[i - 1, ids[0, i]].item() for i in range(ids.shape[1] - len(response), ids.shape[1]))


def test_texts_stand_in_the_prompt(lm: steer.FrozenLM, folder: Path, tmp_path: Path) -> None:
    users, cache = data.read_users(folder), Cache(tmp_path / "c")
    made = every(lm, users, cache)
    for user in (users[0], users[-1]):
        record = user.later.records[0]
        assert record.prompt is not None
        found = soft_prefixes_arms.score(lm, made["none"], user.earlier, record, cache)
        assert found.nats == pytest.approx(nats(lm, record.prompt, record.response), rel=1e-5)
        assert found.tokens == len(record.response)
        one, two = (own.fields["text"][:20] for own in user.earlier.records[-2:])
        prompt = (
            f"These are texts that I wrote before.\n\nText 1:\n{one}\n\nText 2:\n{two}\n\n"
            f"Now write the next text in my name, as I would.\n\n{record.prompt}"
        )
        found = soft_prefixes_arms.score(lm, made["newest 2"], user.earlier, record, cache)
        assert found.nats == pytest.approx(nats(lm, prompt, record.response), rel=1e-5)
        assert found.prompt_tokens == len(lm.encode(prompt))
        best = retrieval.chosen(retrieval.BM25(), user.earlier, record, 4)[::-1]
        turns = [
            {"role": role, "content": text[:20]}
            for own in best
            for role, text in (("user", own.prompt or ""), ("assistant", own.response))
        ]
        turns.append({"role": "user", "content": record.prompt})
        found = soft_prefixes_arms.score(lm, made["BM25 4, turns"], user.earlier, record, cache)
        assert found.nats == pytest.approx(nats(lm, turns, record.response), rel=1e-5)
    nobody = History("nobody", ())
    assert made["BM25 4"].row(lm, nobody, record) == made["none"].row(lm, nobody, record)


def test_all_arms_score_the_same_tokens(lm: steer.FrozenLM, folder: Path, tmp_path: Path) -> None:
    users = data.shortened(lm, data.read_users(folder), 12)
    for name, arm in every(lm, users, Cache(tmp_path / "c")).items():
        for user, other in ((users[0], users[1]), (users[-1], users[-2])):
            record = user.later.records[1]
            rows = [arm.row(lm, whose.earlier, record) for whose in (user, other)]
            for row in rows:
                assert len(row.span.ids) == row.span.end
                assert list(row.span.ids[row.span.start :]) == lm.tokenizer(record.response).input_ids
                assert row.span.prompt == record.prompt
            apart = (rows[0].span.ids, rows[0].state) != (rows[1].span.ids, rows[1].state)
            assert apart == arm.personal == (name != "none")


def test_states_are_scored_as_steer_scores_them(lm: steer.FrozenLM, folder: Path, tmp_path: Path) -> None:
    users, cache = data.shortened(lm, data.read_users(folder), 12), Cache(tmp_path / "c")
    made = every(lm, users, cache)
    user, record = users[0], users[0].later.records[0]
    base = soft_prefixes_arms.score(lm, made["none"], user.earlier, record, cache)
    seen = set()
    for name in ("style vector, 0.05", "style vector, 0.1", "natural gradient", "trained vector", "prefix tuning"):
        arm = made[name]
        assert isinstance(arm, soft_prefixes_arms.Fitted)
        found = soft_prefixes_arms.score(lm, arm, user.earlier, record, cache)
        state, _, _ = arm.state(lm, user.earlier)
        assert state.provenance.records == tuple(own.id for own in user.earlier.records[-3:])
        shared = arm.artifact(lm)
        edits = edits_of(lm, [{"state": state}], artifacts={shared.hash: shared} if shared else {}, dose=arm.dose)
        span = made["none"].row(lm, user.earlier, record).span
        assert found.nats == pytest.approx(row_losses(lm, span, edits, 1).item(), rel=1e-5)
        assert found.tokens == base.tokens
        assert found.prompt_tokens - base.prompt_tokens == (4 if name == "prefix tuning" else 0)
        assert arm.cost(lm, user.earlier).nbytes == state.nbytes > 0
        assert arm.cost(lm, user.earlier).seconds > 0
        seen.add(found.nats)
    assert len(seen | {base.nats}) == 6


def test_states_together(lm: steer.FrozenLM, folder: Path, tmp_path: Path) -> None:
    users, cache = data.shortened(lm, data.read_users(folder), 12), Cache(tmp_path / "c")
    made = every(lm, users, cache)
    user, record = users[0], users[0].later.records[0]
    names = ("prefix tuning", "natural gradient")
    arms = soft_prefixes_arms.chosen_arms(made, ["none", " + ".join(names), *names])
    assert list(arms) == ["none", "prefix tuning + natural gradient", *names]
    both, *apart = list(arms.values())[1:]
    states = [arm.state(lm, user.earlier)[0] for arm in apart if isinstance(arm, soft_prefixes_arms.Fitted)]
    shared = made["natural gradient"].artifact(lm)  # type: ignore[attr-defined]
    edits = edits_of(lm, [dict(zip(names, states, strict=True))], artifacts={shared.hash: shared})
    found = soft_prefixes_arms.score(lm, both, user.earlier, record, cache)
    span = made["none"].row(lm, user.earlier, record).span
    assert found.nats == pytest.approx(row_losses(lm, span, edits, 1).item(), rel=1e-5)
    assert (
        len({found.nats, *(soft_prefixes_arms.score(lm, arm, user.earlier, record, cache).nats for arm in apart)}) == 3
    )
    assert found.prompt_tokens == span.start + 4
    costs = [arm.cost(lm, user.earlier) for arm in apart]
    assert both.cost(lm, user.earlier).nbytes == sum(cost.nbytes for cost in costs)
    assert both.settings() == {"together": [arm.settings() for arm in apart]}
    with pytest.raises(steer.SteerError, match="there is no arm 'PPlug'; there are none, "):
        soft_prefixes_arms.chosen_arms(made, ["natural gradient + PPlug"])
    with pytest.raises(steer.SteerError, match=r"'natural gradient [+] BM25 1' is not several states"):
        soft_prefixes_arms.chosen_arms(made, ["natural gradient + BM25 1"])


def test_only_known_users_are_trained_on(
    lm: steer.FrozenLM, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    users = data.shortened(lm, data.read_users(folder), 12)
    told: list[History] = []
    train = steer.TrainedVector.train

    def spy(method: Any, lm: Any, histories: Any, *rest: Any) -> Any:
        told.extend(histories)
        return train(method, lm, histories, *rest)

    monkeypatch.setattr(steer.TrainedVector, "train", spy)
    first = every(lm, users, Cache(tmp_path / "c"))["trained vector"]
    assert isinstance(first, soft_prefixes_arms.Fitted)
    state, key, _ = first.state(lm, users[0].earlier)
    known = {user.name: {own.id for own in user.earlier} for user in users if user.known}
    assert len(told) == len(known)
    for history in told:
        assert {record.id for record in history} <= known[history.user_id]
    # Nothing is made twice.
    monkeypatch.setattr(steer.TrainedVector, "train", None)
    monkeypatch.setattr(steer.TrainedVector, "fit", None)
    again = every(lm, users, Cache(tmp_path / "c"))["trained vector"]
    assert isinstance(again, soft_prefixes_arms.Fitted)
    kept, same, _ = again.state(lm, users[0].earlier)
    assert same == key
    assert kept.provenance.to_json() == state.provenance.to_json()
    for name, tensor in state.tensors.items():
        assert torch.equal(kept.tensors[name], tensor)
    shared = first.artifact(lm)
    assert shared is not None
    assert again.artifact(lm).hash == shared.hash  # type: ignore[union-attr]
    # What was trained elsewhere takes its place.
    given = soft_prefixes_arms.Fitted("trained_vector", first.hyper_parameters, [], first.cache, 3, trained=shared)
    assert given.artifact(lm) is shared
    assert given.settings()["artifact"] == shared.hash


# Runs.


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["soft_prefixes", *map(str, arguments)])
    soft_prefixes.main()


@pytest.fixture
def study(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str | Path]:
    monkeypatch.setattr(steer, "load", lambda *_, **__: steer.wrap(tiny("llama"), tokenizer(chat=True)))
    return [folder, "--tokens", "12", "--records", "1", "--shown", "20", "--fitted", "2", "--arms"]


def without_seconds(result: Path) -> dict[str, Any]:
    done = json.loads(result.read_text())
    for arm in done["arms"].values():
        del arm["seconds"]
        for entry in arm["users"]:
            entry.pop("seconds", None)
    return done


@pytest.mark.full
def test_a_killed_run_goes_on(study: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arms = ["BM25 2", "dense 1", "prefix tuning"]
    run(monkeypatch, "run", *study, *arms, "--out", tmp_path / "whole.json")
    losses, calls = soft_prefixes_arms.response_losses, [0]

    def dies(*given: Any) -> Any:
        calls[0] += 1
        if calls[0] == 30:
            raise KeyboardInterrupt
        return losses(*given)

    monkeypatch.setattr(soft_prefixes_arms, "response_losses", dies)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, "run", *study, *arms, "--out", tmp_path / "killed.json")
    assert list(json.loads((tmp_path / "killed.json").read_text())["arms"]) == ["none"]
    run(monkeypatch, "run", *study, *arms, "--out", tmp_path / "killed.json")
    assert without_seconds(tmp_path / "killed.json") == without_seconds(tmp_path / "whole.json")
    # Twelve users without anything, and each arm's with their own records and with another's; one call was lost.
    assert calls[0] <= 12 + 3 * 24 + 1
    # What is there is left alone, and nothing is mixed with another study.
    monkeypatch.setattr(soft_prefixes_arms, "response_losses", None)
    before = (tmp_path / "killed.json").read_text()
    run(monkeypatch, "run", *study, *arms, "--out", tmp_path / "killed.json")
    assert (tmp_path / "killed.json").read_text() == before
    with pytest.raises(steer.SteerError, match="is of another study"):
        run(monkeypatch, "run", *study, *arms, "--out", tmp_path / "killed.json", "--others", "2")
    with pytest.raises(steer.SteerError, match="there is no arm 'BM26 2'; there are none, random 1"):
        run(monkeypatch, "run", *study, "BM26 2", "--out", tmp_path / "killed.json")


def test_from_end_to_end(
    study: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, other = tmp_path / "made" / "soft.json", tmp_path / "made" / "other.json"
    run(monkeypatch, "data", study[0])
    assert "| commits | 3 | known | 15 |" in capsys.readouterr().out
    run(monkeypatch, "run", *study, "BM25 1", "BM25 4", "natural gradient", "--out", out)
    run(monkeypatch, "run", *study, "prefix tuning", "--out", other)
    timed = ["BM25 1", "prefix tuning", "--out", out, "--prompts", "1", "--rounds", "3"]
    run(monkeypatch, "times", *study, *timed)
    done = json.loads(out.read_text())
    entry = done["arms"]["BM25 4"]["users"][0]
    assert "author" not in out.read_text()
    assert set(entry) == {
        *("user", "set", "split", "earlier", "records", "tokens", "own", "others", "prompt tokens", "bytes", "seconds")
    }
    assert set(done["times"]) == {"none", "BM25 1", "prefix tuning"}
    assert [len(seconds) for seconds in done["times"]["BM25 1"].values()] == [3, 3, 3]
    assert done["times"]["BM25 1"]["base"] == done["times"]["none"]["prefill"]
    capsys.readouterr()
    run(monkeypatch, "report", out, other, "--plot", tmp_path / "plot.png")
    printed = capsys.readouterr().out
    for name in ("commits", "answers", "passages", "all"):
        assert f"#### {name}: {12 if name == 'all' else 4} users" in printed
    # Four tables by set, one by side, one of costs.
    assert printed.count("| prefix tuning |") == printed.count("| natural gradient |") == 6
    for suffix in ("", "-tokens"):
        assert (tmp_path / f"plot{suffix}.png").stat().st_size > 10_000
    other.write_text(json.dumps(done | {"study": {}}))
    with pytest.raises(steer.SteerError, match="not results of one study"):
        run(monkeypatch, "report", out, other)
    out.write_text(json.dumps(done | {"arms": {}}))
    with pytest.raises(steer.SteerError, match="run the arm 'none'"):
        run(monkeypatch, "report", out)


@pytest.mark.parametrize("told", [None, {"unseen": 0.0, "users": None, "data": "0123456789abcdef"}])
def test_what_may_have_been_trained_on_unseen_users_is_refused(
    study: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: dict[str, Any] | None
) -> None:
    if told is not None:
        (tmp_path / "study.json").write_text(json.dumps(told))
    with pytest.raises(steer.SteerError, match="was trained on other users, or elsewhere"):
        run(monkeypatch, "run", *study, "none", "--trained", f"x={tmp_path}", "--out", tmp_path / "made.json")
    with pytest.raises(steer.SteerError, match="is not a name and a folder"):
        run(monkeypatch, "run", *study, "none", "--trained", str(tmp_path), "--out", tmp_path / "made.json")


def test_arms_that_differ_in_the_number_of_texts_stand_together() -> None:
    names = ["none", "BM25 4", "PPlug", "BM25 1", "BM25 4, turns", "BM25 2", "random 10", "random 9"]
    halves = [{"study": 1, "arms": dict.fromkeys(part, i)} for i, part in enumerate((names[:5], names[3:]))]
    found = soft_prefixes_report.merged(halves)["arms"]
    assert list(found) == [
        *("none", "BM25 1", "BM25 2", "BM25 4", "PPlug", "BM25 4, turns", "random 9", "random 10"),
    ]
    # The first one's where several have an arm.
    assert found == dict.fromkeys(names[:5], 0) | dict.fromkeys(names[5:], 1)


def test_points_by_hand() -> None:
    rng = np.random.default_rng(0)
    sets = ["a"] * 8 + ["b"] * 4
    own, base, reference = rng.normal(size=(3, 12))
    others = rng.normal(size=(12, 2))

    def entries(values: np.ndarray, **more: Any) -> dict[str, Any]:
        users = [
            {"set": name, "split": ("known", "unseen")[i % 2], "own": values[i], "prompt tokens": i}
            | {key: value[i].tolist() for key, value in more.items()}
            for i, name in enumerate(sets)
        ]
        return {"users": users}

    arms = {"none": entries(base), "BM25 4": entries(reference), "x": entries(own, others=others)}
    done = {"arms": arms}
    assert soft_prefixes_report.sets_of(done) == ["a", "b", "all"]
    for chosen, rows in {"a": slice(0, 8), "b": slice(8, 12), "all": slice(0, 12)}.items():
        found = soft_prefixes_report.points(done, "x", chosen)
        assert found["own"]["mean"] == pytest.approx((own - base)[rows].mean())
        assert found["gap"]["mean"] == pytest.approx((own - others.mean(1))[rows].mean())
        assert found["others"]["mean"] == pytest.approx((others.mean(1) - base)[rows].mean())
        assert found["reference"]["mean"] == pytest.approx((own - reference)[rows].mean())
        assert found["own"]["low"] < found["own"]["mean"] < found["own"]["high"]
    # Users are drawn within their sets: the variance of the mean is that of the sets' means.
    difference = own - base
    expected = math.sqrt(sum((difference[p].var() * difference[p].size) for p in (slice(0, 8), slice(8, 12)))) / 12
    assert found["own"]["high"] - found["own"]["low"] == pytest.approx(2 * 1.96 * expected, rel=0.15)
    known = soft_prefixes_report.points(done, "x", "a", "known")
    assert known["own"]["mean"] == pytest.approx(difference[:8:2].mean())
    assert set(soft_prefixes_report.points(done, "none", "a")) == {"nats", "own", "prompt tokens", "reference"}
