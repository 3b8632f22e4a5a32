"""The study of λ: its scores are CoS run anew by hand, its readers refuse what is none, and it runs from end to end."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import EOS, tiny, tokenizer
from scipy.special import logsumexp
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score

import steer
from steer.cache import Cache
from steer.contrast import Text, log_probs
from steer.experiments import contrast
from steer.experiments.contrast import Item, Question

OPTIONS = ("a quiet walk", "a party!", "karaoke", "go dancing, all night long")
QUESTIONS = [
    Question("plans", "I dislike noise.", "what now?", OPTIONS),
    Question("plans", "I am never tired.", "and on Friday?", tuple(reversed(OPTIONS))),
    Question("food", "I eat no meat.", "dinner?", ("soup", "ham", "a steak", "ribs")),
    Question("food", "I am at sea.", "lunch?", ("fish", "corn", "a fir cone", "?")),
]
TALK = {
    "query": "drinks?",
    "assistant_options": "1. tea 2. gin",
    "user_selection": "tea",
    "assistant_acknowledgment": "tea it is",
}


def rerun(lm: steer.FrozenLM, streams: list[str], response: str, lam: float) -> np.ndarray:
    """Log-probability of each of a response's characters under CoS, the streams being texts: with context, without."""
    ids = lm.tokenizer(response).input_ids
    logits = []
    for text in streams:
        prompt = lm.tokenizer(text).input_ids
        with torch.no_grad():
            logits.append(
                lm.model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].double().numpy()
            )
    mixed = (1 + lam) * logits[0] - lam * logits[1]
    return (mixed - logsumexp(mixed, axis=1, keepdims=True))[np.arange(len(ids)), ids]


def plain(text: str) -> str:
    return f"User: {text}\nAssistant:"


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "bloom"])
def test_options_behind_one_run_of_their_prompts(name: str) -> None:
    """The prompts differ in length, the options too, and one has a single token."""
    with steer.wrap(tiny(name), tokenizer()) as lm:
        prompts = [lm.encode(text) for text in ("I like it quiet. what now?", "what now?", "?")]
        options = [lm.tokenizer(option).input_ids for option in ("a walk", "x", "nothing at all, or nearly so")]
        expected = dict(log_probs(lm, [Text(prompts[:2], prompts[2], option) for option in options]))
        for i, own in enumerate(contrast.option_log_probs(lm, prompts, options)):
            torch.testing.assert_close(own, expected[i], rtol=1e-4, atol=1e-4)


def test_scores_of_options_are_those_of_cos_by_hand(tmp_path: Path) -> None:
    with steer.wrap(tiny("llama", dtype=torch.float64), tokenizer()) as lm:
        sums, tokens = contrast.score_options(lm, QUESTIONS, Cache(tmp_path / "c"))
        assert sums.shape == (4, 2, 4, len(contrast.LAMS))
        for i, question in enumerate(QUESTIONS):
            for arm, other in enumerate((i, i ^ 1)):
                texts = [plain(f"{QUESTIONS[other].context} {question.question}"), plain(question.question)]
                for k, option in enumerate(question.options):
                    assert tokens[i, k] == 1 + len(option)
                    for at in (0, 4, 14):
                        expected = rerun(lm, texts, f" {option}", contrast.LAMS[at]).sum()
                        assert sums[i, arm, k, at] == pytest.approx(expected, rel=1e-10)


def test_what_questions_say() -> None:
    sums = np.array([[[-2.0], [-9.0], [-5.0], [-8.0]], [[-3.0], [-2.0], [-9.0], [-9.0]]])
    tokens = np.array([[1.0, 9.0, 2.0, 4.0], [3.0, 1.0, 3.0, 3.0]])
    found = contrast.measures(sums, tokens)
    assert found["accuracy"].tolist() == [[0.0], [1.0]]
    assert found["accuracy, sums"].tolist() == [[1.0], [0.0]]
    assert found["margin"].tolist() == [[-1.0], [1.0]]
    assert found["margin, mean of the others"][0, 0] == pytest.approx(-2 + (1 + 2.5 + 2) / 3)
    assert found["conforming"].tolist() == [[-2.0], [-1.0]]
    assert found["others"][1, 0] == pytest.approx(-(2 + 3 + 3) / 3)
    two = np.concatenate([sums, sums + np.array([0.5, 1.0, 0.0, 0.0])[None, :, None]], 2)
    assert contrast.measures(two, tokens)["accuracy, gains"].tolist() == [[0.25, 0.0], [0.25, 0.0]]
    two[:, 0, 1] += 1
    assert contrast.measures(two, tokens)["accuracy, gains"].tolist() == [[0.25, 1.0], [0.25, 1.0]]


def test_yes_and_no_are_those_of_cos_by_hand() -> None:
    items = [Item("is it so?", True), Item("or not, at sea?", False)]
    contexts = ["I am a sailor.", "You are a sailor."]
    # Characters are tokens here, and the one of the space is the same in both answers.
    same = pytest.raises(steer.SteerError, match="first tokens of Yes and No are the same")
    with steer.wrap(tiny("llama"), tokenizer()) as lm, same:
        contrast.score_persona(lm, items, contexts)
    with steer.wrap(tiny("llama", dtype=torch.float64), tokenizer(chat=True)) as lm:
        found = np.array(contrast.score_persona(lm, items, contexts))
        for i, item in enumerate(items):
            for k, context in enumerate(contexts):
                turns = [[{"role": "user", "content": text}] for text in (f"{context} {item.question}", item.question)]
                texts = [lm.tokenizer.apply_chat_template(t, tokenize=False, add_generation_prompt=True) for t in turns]
                for at in (0, 7, 14):
                    for a, word in enumerate("YN"):
                        expected = rerun(lm, texts, word, contrast.LAMS[at])[0]
                        assert found[i, k, at, a] == pytest.approx(expected, rel=1e-6)


def test_intervals_hold_the_mean_as_often_as_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrast, "_RESAMPLES", 300)
    rng = np.random.default_rng(3)
    hits = np.zeros(2)
    for _ in range(100):
        # Each number eight times: what all of a cluster say is said once.
        values = np.repeat(rng.normal(size=16), 8)[:, None]
        found = contrast.curve(values, [str(i // 8) for i in range(128)])
        hits += [found["low"][0] <= 0 <= found["high"][0], found["low_clustered"][0] <= 0 <= found["high_clustered"][0]]
    assert hits[0] < 70
    assert hits[1] > 85


def test_the_area_under_the_roc_curve_and_its_interval() -> None:
    rng = np.random.default_rng(0)
    scores, truth = rng.normal(size=(60, 3)), np.arange(60) < 30
    scores[truth] += [0.0, 0.7, 1.5]
    found = contrast.told_apart(scores, truth)
    curve = contrast.interval(found, contrast._balanced(60))
    for at in range(3):
        assert curve["mean"][at] == pytest.approx(roc_auc_score(truth, scores[:, at]))
        # Items drawn anew, and the area of each draw.
        draws = np.concatenate([rng.integers(0, 30, size=(400, 30)), rng.integers(30, 60, size=(400, 30))], 1)
        drawn = scores[draws, at]
        areas = (drawn[:, :30, None] > drawn[:, None, 30:]).mean((1, 2))
        width = np.diff(np.quantile(areas, [0.025, 0.975]))
        assert curve["high"][at] - curve["low"][at] == pytest.approx(width, rel=0.2)


def test_draws_of_a_persona_have_as_many_yes_as_no() -> None:
    weights = contrast._balanced(12)
    np.testing.assert_allclose(weights[:, :6].sum(1), 0.5)
    np.testing.assert_allclose(weights[:, 6:].sum(1), 0.5)
    assert not np.allclose(weights[:, :6], weights[:, 6:])


def test_shares_have_wilsons_interval() -> None:
    for hits, count in ((0, 9), (7, 9), (9, 9), (460, 480)):
        found = contrast.share(hits, count)
        expected = binomtest(hits, count).proportion_ci(method="wilson")
        assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_the_range_around_the_best() -> None:
    sure = np.zeros((40, len(contrast.LAMS)))
    sure[:, 3:7] = 1.0
    sure[0, 4] = 0.0
    found = contrast.best(sure)
    assert found["lam"] == contrast.LAMS[3]
    assert found["mean"] == 1.0
    assert found["range"] == [contrast.LAMS[3], contrast.LAMS[6]]


def test_the_maximum_of_several_texts_is_that_of_one_where_there_is_one(llama: steer.FrozenLM) -> None:
    prompts, responses, contexts = ["greet me"] * 3, ["HELLO", "oh, well met", "zz"], ["I shout."] * 3
    one = steer.inverse.infer_lambda(llama, prompts, responses, contexts, grid=contrast.GRID)
    found = contrast.maximum(one.log_likelihood.numpy(), contrast.GRID)
    for name in ("lam", "low", "high"):
        np.testing.assert_allclose(getattr(found, name), getattr(one, name), atol=0.05)


def test_a_maximum_at_an_end_has_no_end_there() -> None:
    grid = np.array(contrast.GRID)
    rising = -((grid - 9.0) ** 2)
    found = contrast.maximum(np.stack([rising, rising[::-1], -((grid - 0.3) ** 2)]), contrast.GRID)
    assert found.lam.tolist() == pytest.approx([6.0, -4.0, 0.3])
    assert found.high.tolist() == pytest.approx([np.inf, found.high[1], 0.3 + 1.959964 / np.sqrt(2)])
    assert found.low[1] == -np.inf
    # Where the parabola has fallen by z²/2.
    assert -((found.low[0] - 9) ** 2) == pytest.approx(rising[-1] - 1.959964**2 / 2, rel=1e-5)


def test_quality_by_hand() -> None:
    true = np.array([-1.0, -1.0, 2.0, 2.0])
    low, high = np.array([-2.0, -0.4, -np.inf, 1.9]), np.array([0.0, 1.0, np.inf, np.inf])
    estimates = contrast.Estimates(np.array([-1.5, 0.0, np.nan, 6.0]), low, high, np.array([4.0, 4.0, 0.0, 1.0]))
    found = contrast.quality(estimates, true)
    assert found["all"]["bias"]["mean"] == pytest.approx((-0.5 + 1 + 4) / 3)
    assert found["all"]["rmse"]["mean"] == pytest.approx(np.sqrt((0.25 + 1 + 16) / 3))
    assert (found["all"]["count"], found["all"]["untold"], found["all"]["at the end"]) == (4, 1, 1)
    assert found["all"]["coverage"]["mean"] == 0.75
    assert found["by lam"][0]["coverage"]["mean"] == 0.5
    assert found["by lam"][0]["expected"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("interest-in-old-maps", "I am a person who is interested in old maps."),
        ("subscribes-to-thrift", "I am a person who subscribes to thrift."),
        ("believes-the-sea-is-wide", "I am a person who believes the sea is wide."),
        ("has-no-fear", "I am a person who has no fear."),
        ("politically-idle", "I am a person who is politically idle."),
        ("patience", "I am a person who scores high in patience."),
    ],
)
def test_sentences_about_personas(name: str, sentence: str) -> None:
    assert contrast.about(name, "I am") == sentence
    assert contrast.about(name, "You are") == sentence.replace("I am", "You are")


def test_sampled_texts_keep_the_token_that_ended_them(llama: steer.FrozenLM) -> None:
    people, lams = contrast.PEOPLE[:3], (0.0, 1.0)
    whole = contrast.sample(llama, people, lams, 12, 0)
    assert [one.person for one in whole[:5]] == [people[0]] * 4 + [people[1]]
    assert [one.lam for one in whole] == [0.0] * 12 + [1.0] * 12
    assert len({tuple(one.response) for one in whole}) == 24
    assert whole != contrast.sample(llama, people, lams, 12, 99)
    # Any token may end a text: the same draws as before, up to it.
    end = Counter(token for one in whole for token in one.response[:-1]).most_common(1)[0][0]
    llama.model.generation_config.eos_token_id = end
    for before, one in zip(whole, contrast.sample(llama, people, lams, 12, 0), strict=True):
        length = before.response.index(end) + 1 if end in before.response else len(before.response)
        assert one.response == before.response[:length]
    llama.model.generation_config.eos_token_id = [end, EOS]
    with pytest.raises(steer.SteerError, match="which one it was is not told"):
        contrast.sample(llama, people, lams, 12, 0)


@pytest.fixture
def prefeval(tmp_path: Path) -> Path:
    folder = tmp_path / "prefeval"
    for topic in ("plans", "food"):
        own = [question for question in QUESTIONS if question.topic == topic]
        said = [{"preference": question.context, "question": question.question} for question in own]
        files = {
            "explicit_preference": said,
            "mcq_options": [
                entry | {"classification_task_options": list(question.options)}
                for entry, question in zip(said, own, strict=True)
            ],
            "implicit_preference/choice-based": [
                entry | {"conversation": TALK | {"user_selection": f"tea {i}"}} for i, entry in enumerate(said)
            ],
        }
        for name, content in files.items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            (folder / name / f"{topic}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def personas(tmp_path: Path) -> Path:
    folder = tmp_path / "personas"
    folder.mkdir()
    for name in ("interest-in-maps", "patience"):
        lines = [{"question": f"{name} {i}?", "answer_matching_behavior": (" Yes", " No")[i % 3 > 0]} for i in range(9)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def test_questions_are_read(prefeval: Path) -> None:
    assert contrast.read_prefeval(prefeval, "explicit") == QUESTIONS[2:] + QUESTIONS[:2]
    assert contrast.read_prefeval(prefeval, "explicit", 1) == [QUESTIONS[2], QUESTIONS[0]]
    implicit = contrast.read_prefeval(prefeval, "implicit")[3]
    turns = implicit.turns(implicit.context)
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 2 + ["user"]
    assert [turn["content"] for turn in turns] == ["drinks?", "1. tea 2. gin", "tea 1", "tea it is", "and on Friday?"]


def test_personas_are_read(personas: Path) -> None:
    items = contrast.read_persona(personas / "patience.jsonl", 40)
    assert [item.says_yes for item in items] == [True] * 3 + [False] * 3
    assert [item.question for item in items] == [f"patience {i}?" for i in (0, 3, 6, 1, 2, 4)]
    assert len(contrast.read_persona(personas / "patience.jsonl", 5)) == 4


CHANGES: list[tuple[str, Callable[[Any], Any], str]] = [
    ("mcq_options", lambda _: "[", "not JSON"),
    ("mcq_options", lambda entries: entries[:1], "food.json: expected a list of two or more objects"),
    ("mcq_options", lambda entries: {"a": entries}, "expected a list"),
    ("mcq_options", lambda entries: entries * 2, "4 questions, and 2 in explicit_preference/food.json"),
    ("mcq_options", lambda entries: [entries[0], {"preference": "x"}], "entry 1 .* 'classification_task_options'"),
    (
        "mcq_options",
        lambda entries: [entries[0] | {"classification_task_options": ["a"]}] * 2,
        "entry 0 .* four options",
    ),
    ("mcq_options", lambda entries: [entries[0] | {"classification_task_options": 3}] * 2, "entry 0"),
    ("explicit_preference", lambda entries: [entries[0], entries[1] | {"preference": " "}], "entry 1 .* text"),
    ("explicit_preference", lambda entries: [{"preference": "x"}] * 2, "entry 0 .* 'question'"),
    ("implicit_preference/choice-based", lambda entries: [entries[0] | {"conversation": {}}] * 2, "entry 0 .* 'query'"),
    ("implicit_preference/choice-based", lambda entries: [entries[0] | {"conversation": [1]}] * 2, "entry 0"),
]


@pytest.mark.parametrize(("where", "change", "said"), CHANGES)
def test_malformed_questions_are_refused(prefeval: Path, where: str, change: Callable[[Any], Any], said: str) -> None:
    path = prefeval / where / "food.json"
    changed = change(json.loads(path.read_text()))
    path.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    with pytest.raises(steer.SteerError, match=said):
        contrast.read_prefeval(prefeval, "implicit" if "implicit" in where else "explicit")


def test_missing_files_are_told(prefeval: Path, tmp_path: Path) -> None:
    with pytest.raises(steer.SteerError, match="there are no files mcq_options"):
        contrast.read_prefeval(tmp_path, "explicit")
    (prefeval / "explicit_preference" / "food.json").unlink()
    with pytest.raises(steer.SteerError, match=r"food\.json: there is no such file"):
        contrast.read_prefeval(prefeval, "explicit")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", ":10: no `question`"),
        ("[]", ":10: no `question`"),
        ('{"question": "so?"}', ":10: no `question`"),
        ('{"question": " ", "answer_matching_behavior": "Yes"}', ":10: no `question`"),
        ('{"question": "so?", "answer_matching_behavior": "Maybe"}', "Yes or No"),
        ('{"question": "so?", "answer_matching_behavior": 1}', "Yes or No"),
    ],
)
def test_malformed_items_are_refused(personas: Path, line: str, said: str) -> None:
    path = personas / "patience.jsonl"
    path.write_text(f"{path.read_text()}\n{line}\n")
    with pytest.raises(steer.SteerError, match=said):
        contrast.read_persona(path, 40)


def test_a_persona_that_says_yes_only_is_refused(personas: Path) -> None:
    path = personas / "patience.jsonl"
    path.write_text("\n".join(line for line in path.read_text().splitlines() if "Yes" in line))
    with pytest.raises(steer.SteerError, match="3 items, of which 3 say Yes"):
        contrast.read_persona(path, 40)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["contrast", *map(str, arguments)])
    contrast.main()


@pytest.mark.parametrize("study", ["prefeval", "persona", "recovery"])
def test_from_end_to_end(
    study: str,
    prefeval: Path,
    personas: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def load(name: str, **_: Any) -> steer.FrozenLM:
        return steer.wrap(tiny(name), tokenizer(chat=study != "prefeval"))

    monkeypatch.setattr(steer, "load", load)
    monkeypatch.setattr(contrast, "_RESAMPLES", 50)
    monkeypatch.setattr(contrast, "GRID", contrast.GRID[::4])
    given = {
        "prefeval": [prefeval, "--form", "explicit", "implicit"],
        "persona": [personas, "--items", "4"],
        "recovery": ["--people", "2", "--tokens", "8", "--rounds", "2"],
    }[study]
    out = tmp_path / "made" / "result.json"
    made = [study, *given, "--models", "llama", "gemma3", "--out", out]
    run(monkeypatch, *made, "--plot", tmp_path / "plot.png")
    printed = capsys.readouterr().out
    done = json.loads(out.read_text())
    assert [result["model"] for result in done["results"]] == sorted(["llama", "gemma3"] * (1 + (study == "prefeval")))[
        ::-1
    ]
    assert done["versions"]["steer"] == steer.__version__
    figures = {"prefeval": ["", "-topics"], "persona": ["", "-each"], "recovery": [""]}[study]
    for suffix in figures:
        assert (tmp_path / f"plot{suffix}.png").stat().st_size > 10_000
    run(monkeypatch, "report", out)
    assert capsys.readouterr().out == printed
    assert printed.count("### llama") == {"prefeval": 2, "persona": 2, "recovery": 1}[study]
    # Nothing is made again, and nothing is mixed with what was asked otherwise.
    monkeypatch.setattr(steer, "load", None)
    run(monkeypatch, *made)
    assert json.loads(out.read_text()) == done
    other = {"prefeval": ["--limit", "2"], "persona": ["--items", "2"], "recovery": ["--seed", "1"]}[study]
    with pytest.raises(steer.SteerError, match="is of another study"):
        run(monkeypatch, *made, *other)


def test_what_was_scored_is_not_scored_again(
    prefeval: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama: steer.FrozenLM
) -> None:
    questions = contrast.read_prefeval(prefeval, "explicit")
    cache = Cache(tmp_path / "c")
    first = contrast.score_options(llama, questions, cache)
    monkeypatch.setattr(contrast, "option_log_probs", None)
    for one, two in zip(first, contrast.score_options(llama, questions, cache), strict=True):
        np.testing.assert_array_equal(one, two)


def test_reports_are_of_studies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other.json").write_text('{"study": {"name": "x"}, "results": [1]}')
    with pytest.raises(steer.SteerError, match="no result of prefeval, persona, recovery"):
        run(monkeypatch, "report", tmp_path / "other.json")
