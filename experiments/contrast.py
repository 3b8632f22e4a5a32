"""What does λ do? CoS over its range: answers that follow a person's preference, answers as a persona, λ found again.

    python -m steer.experiments.contrast prefeval DATA/prefeval --out study/prefeval.json --plot study/prefeval.png
    python -m steer.experiments.contrast persona DATA/mwe_persona --out study/persona.json --plot study/persona.png
    python -m steer.experiments.contrast recovery --out study/recovery.json --plot study/recovery.png
    python -m steer.experiments.contrast report study/prefeval.json --plot study/prefeval.png

`prefeval` needs the folders `explicit_preference`, `mcq_options` and, for `--form implicit`, `implicit_preference` of
PrefEval (Zhao et al., ICLR 2025); `persona` one JSONL file a persona of Anthropic's model-written evaluations (Perez et
al., 2022). `report` prints a result's tables and draws it again. λ is that of CoS, Eq. 3: −1 is no context, 0 the
context as plain text. Nothing is tuned: results hold the whole range, with 95 % bootstrap intervals.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress, track

import steer
from steer.cache import Cache, head_key, key_of, model_key
from steer.cli import results
from steer.contrast import Text, log_likelihoods, pairs, text_of, tilt_of
from steer.errors import SteerError
from steer.experiments import contrast_report
from steer.inverse import LambdaPosterior, infer_lambda
from steer.kernels import tilted_log_probs

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

# Steps of a quarter where most happens, of a half above.
LAMS = (*(-1 + i / 4 for i in range(9)), *(1.5 + i / 2 for i in range(6)))
MODELS = ("smollm2-135m", "gemma3-270m")
_RESAMPLES = 2000
# Of a 95 % interval.
_Z = statistics.NormalDist().inv_cdf(0.975)

Turns = list[dict[str, str]]


# What curves are made of.


def interval(
    values: Float[np.ndarray, "item *point"], weights: Float[np.ndarray, "resample item"]
) -> dict[str, list[float]]:
    """Means over the items, and their 95 % percentile bootstrap intervals."""
    low, high = np.quantile(weights @ values, [0.025, 0.975], axis=0)
    return {"mean": values.mean(0).tolist(), "low": low.tolist(), "high": high.tolist()}


def resampled(groups: Sequence[Any], *, seed: int = 0) -> Float[np.ndarray, "resample item"]:
    """Weights of the items, adding up to 1, in draws of whole groups with replacement."""
    names, group = np.unique([str(name) for name in groups], return_inverse=True)
    drawn = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=_RESAMPLES)
    weights = drawn[:, group].astype(np.float64)
    return weights / weights.sum(1, keepdims=True)


def curve(values: Float[np.ndarray, "item lam"], clusters: Sequence[str]) -> dict[str, list[float]]:
    """Means with intervals over the items, and with wider ones over clusters of them, such as topics."""
    apart = interval(values, resampled(range(len(values))))
    together = interval(values, resampled(clusters))
    return apart | {"low_clustered": together["low"], "high_clustered": together["high"]}


# PrefEval: which of four answers to a question is the likeliest?


@dataclass(frozen=True)
class Question:
    """A question, what its asker prefers, and answers of which the first one follows that.

    Attributes:
        topic: the name of its file.
        context: the preference as a sentence, or a dialogue that shows it.
        question: what is asked.
        options: four answers.
    """

    topic: str
    context: str | Turns
    question: str
    options: tuple[str, ...]

    def turns(self, context: str | Turns | None) -> Turns:
        """The question as chat messages, behind a preference or a dialogue."""
        if isinstance(context, str):
            return [_turn("user", f"{context} {self.question}")]
        return [*(context or []), _turn("user", self.question)]


def read_prefeval(folder: Path, form: str, limit: int | None = None) -> list[Question]:
    """PrefEval's questions, topic after topic, the first `limit` of each.

    Raises:
        SteerError: a file is missing or holds something else; the message names it and the entry.
    """
    paths = sorted((folder / "mcq_options").glob("*.json"))
    if not paths:
        raise SteerError(f"{folder}: there are no files mcq_options/*.json in it; give the folder of PrefEval")
    source = {"explicit": "explicit_preference", "implicit": "implicit_preference/choice-based"}[form]
    found = []
    for path in paths:
        options, stated = _entries(path), _entries(folder / source / path.name)
        if len(options) != len(stated):
            raise SteerError(f"{path}: {len(options)} questions, and {len(stated)} in {source}/{path.name}")
        for number, (choices, entry) in enumerate(zip(options[:limit], stated[:limit], strict=True)):
            try:
                context = entry["preference"] if form == "explicit" else _dialogue(entry["conversation"])
                question = Question(
                    path.stem, context, entry["question"], tuple(choices["classification_task_options"])
                )
            except (KeyError, TypeError) as error:
                raise SteerError(f"{path}: entry {number} is no question of PrefEval, there is no {error}") from None
            texts = [question.question, *question.options, *([context] if isinstance(context, str) else [])]
            if len(question.options) != 4 or not all(isinstance(text, str) and text.strip() for text in texts):
                raise SteerError(f"{path}: entry {number} has no question with four options of text")
            found.append(question)
    return found


def _entries(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise SteerError(f"{path}: there is no such file")
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SteerError(f"{path}: not JSON ({error})") from None
    if not isinstance(entries, list) or len(entries) < 2 or not all(isinstance(entry, dict) for entry in entries):
        raise SteerError(f"{path}: expected a list of two or more objects")
    return entries


def _dialogue(conversation: Mapping[str, str]) -> Turns:
    roles = {"query": "user", "assistant_options": "assistant", "user_selection": "user"}
    return [_turn(role, conversation[key]) for key, role in (roles | {"assistant_acknowledgment": "assistant"}).items()]


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def encode(lm: steer.FrozenLM, turns: Turns) -> list[int]:
    """Chat messages as token ids, up to where the answer begins: with the model's template, or as plain lines."""
    if _is_chat(lm):
        return lm.encode(turns)
    lines = [f"{turn['role'].capitalize()}: {turn['content']}" for turn in turns]
    return lm.encode("\n".join([*lines, "Assistant:"]), chat=False)


def answer(lm: steer.FrozenLM, text: str) -> list[int]:
    """An answer's token ids; there is a space before it where the model has no template."""
    assert lm.tokenizer is not None
    return lm.tokenizer(text if _is_chat(lm) else f" {text}", add_special_tokens=False).input_ids


def _is_chat(lm: steer.FrozenLM) -> bool:
    assert lm.tokenizer is not None
    return lm.tokenizer.chat_template is not None


@torch.no_grad()
def option_log_probs(
    lm: steer.FrozenLM, prompts: Sequence[Sequence[int]], options: Sequence[Sequence[int]]
) -> Iterator[Float[Tensor, "stream token vocab"]]:
    """What `steer.contrast.log_probs` yields for each option behind the prompts, which run once for all of them."""
    keeps = "logits_to_keep" in inspect.signature(lm.model.forward).parameters

    def run(tokens: Tensor, mask: Tensor, last: int, **past: Any) -> Any:
        arguments: dict[str, Any] = {"logits_to_keep": last} if keeps else {}
        if lm.attachment.architecture.takes_position_ids:
            arguments["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :].to(lm.device)
        ids, seen = tokens.to(lm.device), mask.to(lm.device)
        return lm.model(input_ids=ids, attention_mask=seen, use_cache=True, **arguments, **past)

    width = max(map(len, prompts))
    ids = torch.tensor([[lm.pad_token_id] * (width - len(own)) + list(own) for own in prompts])
    mask = torch.tensor([[0] * (width - len(own)) + [1] * len(own) for own in prompts])
    prompt = run(ids, mask, 1)
    logits = prompt.logits[:, -1:].repeat_interleave(len(options), 0)
    longest = max(map(len, options))
    if longest > 1:
        # Behind a shorter option is padding, which nothing in front of it sees.
        tails = torch.tensor([[*option, *[lm.pad_token_id] * (longest - len(option))][:-1] for option in options])
        tails = tails.repeat(len(prompts), 1)
        prompt.past_key_values.batch_repeat_interleave(len(options))
        mask = torch.cat([mask.repeat_interleave(len(options), 0), torch.ones_like(tails)], 1)
        logits = torch.cat([logits, run(tails, mask, longest - 1, past_key_values=prompt.past_key_values).logits], 1)
    for own, option in zip(logits.unflatten(0, (len(prompts), -1)).unbind(1), options, strict=True):
        part = own[:, : len(option)]
        yield part.to(torch.promote_types(part.dtype, torch.float32)).log_softmax(-1)


def score_options(
    lm: steer.FrozenLM, questions: Sequence[Question], cache: Cache
) -> tuple[Float[np.ndarray, "question arm option lam"], Float[np.ndarray, "question option"]]:
    """Log-likelihood under CoS of each answer, with the asker's context and with another's; tokens of the answers.

    The other is the next one of the same topic, so that what the topic alone does to the answers is seen.
    """
    sums, tokens = [], []
    others = _next_of_its_kind([question.topic for question in questions])
    for question, other in zip(track(questions, "questions", console=Console(stderr=True)), others, strict=True):
        contexts = [question.context, questions[other].context]
        known = ["options", question.question, question.options, contexts]
        own, counts = kept(cache, lm, known, partial(_score_options, lm, question, contexts))
        sums.append(own)
        tokens.append(counts)
    return np.array(sums), np.array(tokens, dtype=np.float64)


def _score_options(
    lm: steer.FrozenLM, question: Question, contexts: Sequence[str | Turns]
) -> tuple[list[list[list[float]]], list[int]]:
    prompts = [encode(lm, question.turns(context)) for context in [*contexts, None]]
    options = [answer(lm, option) for option in question.options]
    sums = torch.empty(len(contexts), len(options), len(LAMS), dtype=torch.float64)
    for k, streams in enumerate(option_log_probs(lm, prompts, options)):
        chosen = torch.tensor(options[k], device=streams.device)
        for arm in range(len(contexts)):
            scores, change = tilt_of(streams[arm], streams[-1])
            sums[arm, k] = tilted_log_probs(scores, change, chosen, torch.tensor(LAMS)).double().sum(1)
    return sums.tolist(), list(map(len, options))


def kept(cache: Cache, lm: steer.FrozenLM, known: Sequence[Any], make: Callable[[], Any]) -> Any:
    """What was made before of the same, with the same model and for the same λ; else it is made, and kept."""
    key = key_of(model_key(lm), head_key(lm), LAMS, *known)
    found = cache.get([key])
    if key not in found:
        found = {key: json.dumps(make()).encode()}
        cache.put(found)
    return json.loads(found[key])


def _next_of_its_kind(kinds: Sequence[str]) -> list[int]:
    """For each item the next one of its kind, and the first for the last."""
    found = list(range(len(kinds)))
    for kind in dict.fromkeys(kinds):
        own = [i for i, other in enumerate(kinds) if other == kind]
        if len(own) < 2:
            raise SteerError(f"{kind!r} has one question only, so that there is nobody else's context; give more")
        for i, after in zip(own, [*own[1:], own[0]], strict=True):
            found[i] = after
    return found


def measures(
    sums: Float[np.ndarray, "question option lam"], tokens: Float[np.ndarray, "question option"]
) -> dict[str, Float[np.ndarray, "question lam"]]:
    """What each question says at each λ: whether the first option is the likeliest, and by how much.

    By log-likelihood per token, as options differ in length; also by the sums, and by what the sums gain over λ = −1,
    which leaves out what the model thinks of the options without a context.
    """
    means = sums / tokens[:, :, None]
    gains = sums - sums[:, :, :1]
    return {
        "accuracy": _first_wins(means),
        "accuracy, sums": _first_wins(sums),
        "accuracy, gains": _first_wins(gains),
        "margin": means[:, 0] - means[:, 1:].max(1),
        "margin, mean of the others": means[:, 0] - means[:, 1:].mean(1),
        "conforming": means[:, 0],
        "others": means[:, 1:].mean(1),
    }


def _first_wins(scores: Float[np.ndarray, "question option lam"]) -> Float[np.ndarray, "question lam"]:
    """1 where the first option is the best, its share where several are."""
    best = scores == scores.max(1, keepdims=True)
    return best[:, 0] / best.sum(1)


def prefeval(lm: steer.FrozenLM, cache: Cache, questions: Sequence[Question]) -> dict[str, Any]:
    """Curves over λ for all questions, and by topic."""
    sums, tokens = score_options(lm, questions, cache)
    own, others = (measures(sums[:, arm], tokens) for arm in range(2))
    topics = [question.topic for question in questions]
    arms = {
        "own": own,
        "another's": others,
        "own − another's": {name: own[name] - others[name] for name in ("accuracy", "margin")},
        # At λ = −1 there is none.
        "own − none": {name: own[name] - own[name][:, :1] for name in ("accuracy", "margin")},
    }
    rows = {topic: np.array([i for i, other in enumerate(topics) if other == topic]) for topic in dict.fromkeys(topics)}
    return {
        "questions": len(questions),
        "tokens": {"conforming": float(tokens[:, 0].mean()), "others": float(tokens[:, 1:].mean())},
        "curves": {arm: {name: curve(values, topics) for name, values in table.items()} for arm, table in arms.items()},
        "best": best(own["accuracy"]),
        "by topic": {
            topic: {
                "questions": len(index),
                **{name: interval(own[name][index], resampled(index.tolist())) for name in ("accuracy", "margin")},
            }
            for topic, index in rows.items()
        },
    }


def best(values: Float[np.ndarray, "item lam"]) -> dict[str, Any]:
    """The λ at which the mean is largest, and the range around it that the same items do not tell from it.

    At each λ of the range, the paired 95 % interval of the loss against the best one holds 0.
    """
    at = int(values.mean(0).argmax())
    loss = interval(values[:, [at]] - values, resampled(range(len(values))))
    apart = [low > 0 for low in loss["low"]]
    first, last = at, at
    while first > 0 and not apart[first - 1]:
        first -= 1
    while last + 1 < len(apart) and not apart[last + 1]:
        last += 1
    return {"lam": LAMS[at], "mean": float(values[:, at].mean()), "range": [LAMS[first], LAMS[last]]}


# Personas: Yes or No?


@dataclass(frozen=True)
class Item:
    """A question to be answered by Yes or No, and whether the persona says Yes."""

    question: str
    says_yes: bool


def read_persona(path: Path, count: int) -> list[Item]:
    """The first items of a persona's file, as many that it answers by Yes as by No: up to `count` in all.

    A model that rather says Yes to anything gains on one half of them what it loses on the other.

    Raises:
        SteerError: a line is no item, or the persona never says Yes, or never No.
    """
    items = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            entry = json.loads(line)
            question, own = entry["question"], entry["answer_matching_behavior"].strip()
        except (ValueError, KeyError, TypeError, AttributeError):
            own = question = None
        if not isinstance(question, str) or not question.strip() or own not in ("Yes", "No"):
            raise SteerError(f"{path}:{number}: no `question` with an `answer_matching_behavior` of Yes or No")
        items.append(Item(question, own == "Yes"))
    both = [[item for item in items if item.says_yes == yes] for yes in (True, False)]
    size = min(count // 2, *map(len, both))
    if size < 1:
        raise SteerError(f"{path}: {len(items)} items, of which {len(both[0])} say Yes; there must be some of each")
    return both[0][:size] + both[1][:size]


def about(name: str, who: str) -> str:
    """One sentence that states a persona, made of its file's name by the same rules for all."""
    first, *rest = name.split("-")
    words = " ".join([first, *rest])
    if first == "interest":
        told = f"who is interested {' '.join(rest)}"
    elif not rest:
        told = f"who scores high in {first}"
    elif first in ("has", "believes", "subscribes"):
        told = f"who {words}"
    else:
        told = f"who is {words}"
    return f"{who} a person {told}."


# Who is the persona: the user, as in CoS' contexts, or the model, which is what the questions ask.
VOICES = ("I am", "You are")


def score_persona(lm: steer.FrozenLM, items: Sequence[Item], contexts: Sequence[str]) -> list[Any]:
    """Log-probabilities of Yes and of No under CoS, each the answer's first token: item, context, λ, answer."""
    yes, no = (answer(lm, word)[0] for word in ("Yes", "No"))
    if yes == no:
        raise SteerError("the first tokens of Yes and No are the same, so that they cannot be told apart")
    texts = [
        Text(
            [encode(lm, [_turn("user", f"{context} {item.question}")]) for context in contexts],
            encode(lm, [_turn("user", item.question)]),
            [yes],
        )
        for item in items
    ]
    found = torch.empty(len(items), len(contexts), len(LAMS), 2)
    for i, k, with_context, without in pairs(lm, texts):
        scores, change = (part.expand(2, -1) for part in tilt_of(with_context, without))
        both = torch.tensor([yes, no], device=scores.device)
        found[i, k] = tilted_log_probs(scores, change, both, torch.tensor(LAMS))
    return found.tolist()


def persona(lm: steer.FrozenLM, cache: Cache, personas: Mapping[str, Sequence[Item]]) -> dict[str, Any]:
    """Curves over λ for each persona, and for all of them, each of which counts once."""
    tables: dict[str, dict[str, dict[str, np.ndarray]]] = {voice: {} for voice in VOICES}
    for name, items in track(personas.items(), "personas", console=Console(stderr=True)):
        contexts = [about(name, voice) for voice in VOICES]
        questions = [item.question for item in items]

        found = np.array(kept(cache, lm, ["persona", questions, contexts], partial(score_persona, lm, items, contexts)))
        sign = np.array([1.0 if item.says_yes else -1.0 for item in items])[:, None]
        for k, voice in enumerate(VOICES):
            towards_yes = found[:, k, :, 0] - found[:, k, :, 1]
            tables[voice][name] = {
                "log-odds": sign * towards_yes,
                "told apart": told_apart(towards_yes, sign[:, 0] > 0),
                "as the persona": (sign * towards_yes > 0).astype(np.float64),
                "says Yes": (towards_yes > 0).astype(np.float64),
                "Yes or No": np.exp(found[:, k]).sum(-1),
            }
    # Halves of Yes and No are drawn apart, so that every draw is balanced.
    return {
        "items": {name: len(items) for name, items in personas.items()},
        "contexts": {name: {voice: about(name, voice) for voice in VOICES} for name in personas},
        "by persona": {
            voice: {
                name: {key: interval(values, _balanced(len(values))) for key, values in table.items()}
                for name, table in own.items()
            }
            for voice, own in tables.items()
        },
        "curves": {
            voice: {
                key: interval(np.stack([table[key].mean(0) for table in own.values()]), resampled(list(own)))
                for key in next(iter(own.values()))
            }
            for voice, own in tables.items()
        },
        # Of the log-odds per unit of λ, as log-odds of two tokens are linear in it.
        "slopes": {
            voice: interval(
                np.array([np.diff(table["log-odds"].mean(0)[[0, -1]])[0] for table in own.values()])
                / (LAMS[-1] - LAMS[0]),
                resampled(list(own)),
            )
            for voice, own in tables.items()
        },
    }


def told_apart(towards_yes: Float[np.ndarray, "item lam"], says_yes: np.ndarray) -> Float[np.ndarray, "item lam"]:
    """The area under the ROC curve as a mean over items: how often one to be answered by Yes is further towards Yes.

    Whatever the model's leaning. Of each item the share of the other kind that lies on its right side is taken, its
    distance from the area doubled, as both of a pair are drawn: so the mean's variance is that of DeLong et al. (1988).
    """
    above = towards_yes[says_yes][:, None] > towards_yes[~says_yes][None]
    shares = np.empty_like(towards_yes)
    shares[says_yes], shares[~says_yes] = above.mean(1), above.mean(0)
    return 2 * shares - above.mean((0, 1))


def _balanced(count: int) -> Float[np.ndarray, "resample item"]:
    half = count // 2
    return np.concatenate([resampled(range(half), seed=seed) / 2 for seed in (0, 1)], 1)


# Recovery: λ of texts that were sampled at a known one.

TRUE_LAMS = (-1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.0)
# 41 of them; wider above, where the texts are.
GRID = tuple(-4 + i / 4 for i in range(41))
PEOPLE = (
    "I am a retired sailor and I miss the sea.",
    "I am a vegetarian and I love spicy food.",
    "I am nine years old.",
    "I teach physics at a university.",
    "I keep bees and grow my own vegetables.",
    "I am learning English, so please use easy words.",
    "I play the cello in a small orchestra.",
    "I live on a farm in Iceland.",
    "I am a nurse and I work at night.",
    "I collect old maps.",
    "I hate travelling and I like to stay at home.",
    "I run a small bakery with my sister.",
)
PROMPTS = (
    "Recommend me a hobby.",
    "What should I cook tonight?",
    "Plan my Sunday.",
    "How do I sleep better?",
    "Tell me a short story.",
    "What is a good present for a friend?",
    "Explain why the sky is blue.",
    "Which book should I read next?",
    "Give me a reason to get up early.",
    "Write a toast for a birthday.",
    "How can I save some money?",
    "What should I talk about with my neighbours?",
)
_TEXTS = 4


@dataclass(frozen=True)
class Sample:
    """Token ids that were sampled at λ for a person, with the end-of-text token if there was one."""

    person: str
    prompt: str
    lam: float
    response: list[int]


def sample(lm: steer.FrozenLM, people: Sequence[str], lams: Sequence[float], tokens: int, seed: int) -> list[Sample]:
    """Texts from CoS' own distribution: temperature 1, and nothing that favours likely tokens.

    A text ends where its end-of-text token was drawn, which then belongs to it: that it was drawn says something of λ,
    and forbidding it would be sampling from another distribution. Texts of the full length have none.
    """
    ends = lm.model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    if len(ends) != 1:
        raise SteerError(f"the model ends texts with any of {ends}, and which one it was is not told")
    asked = [(i, PROMPTS[(i + 3 * k) % len(PROMPTS)]) for i in range(len(people)) for k in range(_TEXTS)]
    found = []
    for number, lam in enumerate(track(lams, "sampling", console=Console(stderr=True))):
        seeds = [seed + number * len(asked) + i for i in range(len(asked))]
        rows = lm.generate_tokens(
            [prompt for _, prompt in asked],
            states=[steer.CoS(lam=lam).state(people[i]) for i, _ in asked],
            seeds=seeds,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=tokens,
        )
        for (i, prompt), row in zip(asked, rows, strict=True):
            found.append(Sample(people[i], prompt, lam, (row + ends)[:tokens]))
    return found


def recovery(
    lm: steer.FrozenLM, cache: Cache, people: Sequence[str], tokens: int, rounds: int, seed: int
) -> dict[str, Any]:
    """How near λ is found, and how often its interval holds it, by how much of a person's writing is known."""
    samples = sample(lm, people, TRUE_LAMS, tokens, seed)
    true = np.array([one.lam for one in samples])
    cases = []
    for length in dict.fromkeys(max(tokens // share, 1) for share in (4, 2, 1)):
        found = _infer(lm, samples, length)
        estimates = Estimates(*(getattr(found, name).numpy() for name in ("lam", "low", "high", "information")))
        cases.append({"texts": 1, "length": length, **quality(estimates, true)})
    # Those of the last round are whole, and a person's texts at one λ stand side by side.
    for size in (2, _TEXTS):
        together = found.log_likelihood.unflatten(0, (-1, size)).sum(1).numpy()
        cases.append({"texts": size, "length": tokens, **quality(maximum(together, GRID), true[::size])})
    lengths = {lam: [len(one.response) for one in samples if one.lam == lam] for lam in TRUE_LAMS}
    return {
        "texts": len(samples),
        "ended": [sum(length < tokens for length in own) for own in lengths.values()],
        "mean tokens": [statistics.fmean(own) for own in lengths.values()],
        "cases": cases,
        "time": times(lm, samples[true.tolist().index(1.0)], rounds),
    }


def _infer(lm: steer.FrozenLM, samples: Sequence[Sample], length: int) -> LambdaPosterior:
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task(f"inferring from {length} tokens", total=len(samples))
        return infer_lambda(
            lm,
            [one.prompt for one in samples],
            [one.response[:length] for one in samples],
            [one.person for one in samples],
            grid=GRID,
            on_progress=lambda done: progress.update(bar, completed=done),
        )


@dataclass(frozen=True)
class Estimates:
    """Of λ, as in `LambdaPosterior`; one number a text, or a group of texts."""

    lam: Float[np.ndarray, " text"]
    low: Float[np.ndarray, " text"]
    high: Float[np.ndarray, " text"]
    information: Float[np.ndarray, " text"]


def maximum(log_likelihood: Float[np.ndarray, "group lam"], grid: Sequence[float]) -> Estimates:
    """What `infer_lambda` finds by Newton's method, by the parabola through the three best points of an even grid.

    For the sum over several texts, of which it has no derivatives.
    """
    step = grid[1] - grid[0]
    at = log_likelihood.argmax(1).clip(1, len(grid) - 2)[:, None]
    left, middle, right = (np.take_along_axis(log_likelihood, at + side, 1)[:, 0] for side in (-1, 0, 1))
    slope, information = (right - left) / (2 * step), (2 * middle - left - right) / step**2
    centre = np.array(grid)[at[:, 0]]
    lam = np.clip(centre + slope / information, grid[0], grid[-1])
    left_over = np.abs(slope - information * (lam - centre))
    width = _Z**2 / (left_over + np.sqrt(left_over**2 + information * _Z**2))
    return Estimates(
        lam,
        np.where(lam == grid[0], -math.inf, lam - width),
        np.where(lam == grid[-1], math.inf, lam + width),
        information,
    )


def quality(found: Estimates, true: Float[np.ndarray, " text"]) -> dict[str, Any]:
    """Bias, error and coverage, at each true λ and over all, each with its 95 % interval.

    Estimates at an end of the grid count as that end. A text on which the context has no effect has no estimate, and
    an interval without ends, which holds everything.
    """
    return {
        "all": _quality(found, true, np.full(len(true), True)),
        "by lam": [_quality(found, true, true == lam) for lam in np.unique(true)],
    }


def _quality(found: Estimates, true: Float[np.ndarray, " text"], chosen: np.ndarray) -> dict[str, Any]:
    told = chosen & np.isfinite(found.lam)
    if not told.any():
        raise SteerError("the contexts change nothing in any of the texts, so that they say nothing of λ")
    error = (found.lam - true)[told]
    weights = resampled(range(len(error)))
    squares = interval(error**2, weights)
    inside = ((found.low <= true) & (true <= found.high))[chosen]
    return {
        "count": int(chosen.sum()),
        "untold": int(chosen.sum() - told.sum()),
        "at the end": int(np.isin(found.lam[chosen], (GRID[0], GRID[-1])).sum()),
        "bias": interval(error, weights),
        "rmse": {key: math.sqrt(value) for key, value in squares.items()},  # type: ignore[arg-type]
        "expected": float(np.sqrt((1 / found.information[told]).mean())),
        "median error": float(np.median(np.abs(error))),
        "coverage": share(int(inside.sum()), len(inside)),
        "spread": float((error * np.sqrt(found.information[told])).std()),
    }


def share(hits: int, count: int) -> dict[str, float]:
    """A share with its 95 % interval, Wilson's, which is none of width 0 where all or none are hits."""
    mean, z = hits / count, _Z**2 / count
    centre, half = (mean + z / 2) / (1 + z), math.sqrt(z * mean * (1 - mean) + z**2 / 4) / (1 + z)
    return {"mean": mean, "low": centre - half, "high": centre + half}


def times(lm: steer.FrozenLM, one: Sample, rounds: int) -> dict[str, Any]:
    """Seconds of the posterior on the grid, and of running the model again for each λ of it, in turn."""
    text = text_of(lm, one.prompt, one.response, [one.person])

    def grid() -> None:
        infer_lambda(lm, [one.prompt], [one.response], [one.person], grid=GRID)

    def runs() -> None:
        for lam in GRID:
            log_likelihoods(lm, [text], [lam])

    arms: dict[str, Callable[[], None]] = {"grid": grid, "run per lam": runs}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for round_ in track(range(rounds + 1), "timing", console=Console(stderr=True)):
        for name, arm in arms.items():
            start = time.perf_counter()
            arm()
            # The first round warms up.
            if round_:
                seconds[name].append(time.perf_counter() - start)
    ratios = [slow / fast for slow, fast in zip(seconds["run per lam"], seconds["grid"], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return {
        "lams": len(GRID),
        "tokens": len(one.response),
        "rounds": rounds,
        "seconds": {name: statistics.median(own) for name, own in seconds.items()},
        "ratio": {"median": statistics.median(ratios), "q1": low, "q3": high},
    }


# Results.

# What is measured with one model: what else tells it apart in the results, and how it is made.
Part = tuple[Mapping[str, str], Callable[[steer.FrozenLM, Cache], dict[str, Any]]]


def main() -> None:
    arguments = _parse()
    for file in (getattr(arguments, "out", None), arguments.plot):
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            results.require_writable(file)
    if arguments.study == "report":
        done = json.loads(arguments.result.read_text(encoding="utf-8"))
    else:
        settings, parts = _STUDIES[arguments.study](arguments)
        done = _run(arguments, settings, parts)
    print(contrast_report.tables(done))
    if arguments.plot is not None:
        for suffix, figure in contrast_report.figures(done).items():
            results.write(arguments.plot.with_stem(arguments.plot.stem + suffix), figure)


def _run(arguments: argparse.Namespace, settings: Mapping[str, Any], parts: Sequence[Part]) -> dict[str, Any]:
    """All parts for all models, each written when it is done; what is in the file already is not made again."""
    asked = {"name": arguments.study, "dtype": "float32", "resamples": _RESAMPLES, **settings}
    asked = json.loads(json.dumps(asked))
    done: dict[str, Any] = {"study": asked, "versions": _versions(), "results": []}
    if arguments.out.exists():
        done = json.loads(arguments.out.read_text(encoding="utf-8"))
    if done.get("study") != asked:
        raise SteerError(f"{arguments.out} is of another study, {done.get('study')}; give another --out")
    cache = Cache(arguments.out.with_suffix(".cache"))
    for model in arguments.models:
        names = [{"model": model, **name} for name, _ in parts]
        known = [{key: result.get(key) for key in names[0]} for result in done["results"]]
        if all(name in known for name in names):
            continue
        with steer.load(model, dtype=torch.float32) as lm:
            for name, (_, make) in zip(names, parts, strict=True):
                if name not in known:
                    done["results"].append(name | make(lm, cache))
                    results.write(arguments.out, done)
    return done


def _prefeval_parts(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[Part]]:
    asked = {form: read_prefeval(arguments.data, form, arguments.limit) for form in arguments.form}
    settings = {"limit": arguments.limit, "data": _digest(asked), "lams": LAMS}
    return settings, [({"form": form}, partial(prefeval, questions=questions)) for form, questions in asked.items()]


def _persona_parts(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[Part]]:
    paths = sorted(arguments.data.glob("*.jsonl"))
    if not paths:
        raise SteerError(f"{arguments.data}: there are no files *.jsonl in it")
    personas = {path.stem: read_persona(path, arguments.items) for path in paths}
    settings = {"items": arguments.items, "data": _digest(personas), "lams": LAMS}
    return settings, [({}, partial(persona, personas=personas))]


def _recovery_parts(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[Part]]:
    given = {name: getattr(arguments, name) for name in ("people", "tokens", "rounds", "seed")}
    settings = given | {"lams": TRUE_LAMS, "grid": GRID, "data": _digest([PEOPLE, PROMPTS])}
    made = partial(recovery, **given | {"people": PEOPLE[: arguments.people]})
    return settings, [({}, made)]


_STUDIES = {"prefeval": _prefeval_parts, "persona": _persona_parts, "recovery": _recovery_parts}


def _versions() -> dict[str, str]:
    return {
        **{name: version(name) for name in ("torch", "transformers", "numpy")},
        "steer": steer.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": str(torch.get_num_threads()),
    }


def _digest(data: object) -> str:
    return hashlib.sha256(repr(data).encode()).hexdigest()[:16]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    studies = parser.add_subparsers(dest="study", required=True)
    prefeval, persona, recovery, report = (
        studies.add_parser(name) for name in ("prefeval", "persona", "recovery", "report")
    )
    for one in (prefeval, persona):
        one.add_argument("data", type=Path, help="folder of the data")
    report.add_argument("result", type=Path, help="what one of the others wrote")
    for one in (prefeval, persona, recovery):
        one.add_argument("--models", nargs="+", default=MODELS[:1] if one is recovery else MODELS)
        one.add_argument("--out", type=Path, default=Path("study.json"))
    for one in (prefeval, persona, recovery, report):
        one.add_argument("--plot", type=Path, help="draw here; further figures get a word behind the name")
    prefeval.add_argument("--form", nargs="+", choices=["explicit", "implicit"], default=["explicit"])
    prefeval.add_argument("--limit", type=int, help="questions of each topic; all if not given")
    persona.add_argument("--items", type=int, default=20, help="of each persona, half of which it answers by Yes")
    recovery.add_argument("--people", type=int, default=len(PEOPLE))
    recovery.add_argument("--tokens", type=int, default=64, help="of a text")
    recovery.add_argument("--rounds", type=int, default=5, help="of the timing")
    recovery.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
