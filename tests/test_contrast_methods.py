"""The recipes of contrast: each paper's equation, written out on plain forward passes, against one step of decoding."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import tiny, tokenizer
from rows import assert_close
from torch import Tensor

import steer
from steer import (
    KNNLM,
    MOD,
    Amulet,
    ContrastiveDecoding,
    CoS,
    CoSMany,
    CoSPair,
    CoSteer,
    DExperts,
    Drift,
    Guidance,
    Pair,
    ProxyTuning,
    UserState,
)
from steer.methods import amulet, costeer
from steer.methods.contrast import Contrast
from steer.methods.drift import log_likelihoods

PIRATE, CLERK = "I am a pirate.", "I am a clerk, and I file."
BRIEF, LOUD = "Answer briefly.", "SHOUT!"
ATTRIBUTES = {"brief": BRIEF, "loud": LOUD, "kind": "Be kind"}

# Log-probabilities of the next token: of a model by its name, or of the steered one, that reads a context in front of
# the prompt, or a system message.
Policy = Callable[..., Tensor]


@pytest.fixture(params=["llama", "gpt2", "gemma3", "bloom"])
def lm(request: pytest.FixtureRequest) -> Iterator[steer.FrozenLM]:
    with steer.wrap(tiny(request.param), tokenizer(chat=True)) as lm:
        yield lm


@pytest.fixture
def llama() -> Iterator[steer.FrozenLM]:
    with steer.wrap(tiny("llama"), tokenizer(chat=True)) as lm:
        yield lm


@pytest.fixture(params=[torch.float32, torch.float64], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def precise(dtype: torch.dtype) -> Iterator[steer.FrozenLM]:
    """What generates; transformers hands logits on in float32."""
    with steer.wrap(tiny("llama", dtype=dtype), tokenizer(chat=True)) as lm:
        yield lm


@pytest.fixture(scope="module")
def models() -> Iterator[dict[str, steer.FrozenLM]]:
    with (
        steer.wrap(tiny("gpt2", seed=5), tokenizer(chat=True)) as small,
        steer.wrap(tiny("llama", seed=6), tokenizer(chat=True)) as tuned,
    ):
        yield {"small": small, "tuned": tuned}


def next_logits(lm: steer.FrozenLM, text: str) -> Tensor:
    """Of the plain model, in float64."""
    assert lm.tokenizer is not None
    with torch.no_grad():
        return lm.model(torch.tensor([lm.tokenizer(text).input_ids])).logits[0, -1].double()


def policy(lm: steer.FrozenLM, models: dict[str, steer.FrozenLM], prompt: str) -> Policy:
    def log_probabilities(
        context: str | None = None, *, system: str | None = None, model: str | None = None, temperature: float = 1.0
    ) -> Tensor:
        said = prompt if context is None else f"{context} {prompt}"
        text = ("" if system is None else f"[system] {system}\n") + f"[user] {said}\n[assistant] "
        return (next_logits(lm if model is None else models[model], text) / temperature).log_softmax(-1)

    return log_probabilities


def scores(
    lm: steer.FrozenLM, models: dict[str, steer.FrozenLM], states: list[UserState | None], prompts: list[str]
) -> Tensor:
    """Log-probabilities of the next token, one row a state."""
    with lm.steered(states=states, models=models) as steering:
        output = lm.model.generate(
            **steering.prepare(prompts),
            **steering.generate_kwargs(),
            max_new_tokens=1,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
        )
    return output.scores[0].log_softmax(-1)


# Each paper's equation, before it is normalized.


def plausible(lp: Policy) -> Tensor:
    """Li et al., Eq. 2 to 4."""
    expert, amateur = lp(PIRATE), lp(PIRATE, model="small", temperature=0.5)
    inside = expert.exp() >= 0.1 * expert.exp().max()
    return torch.where(inside, expert - amateur, -torch.inf)


def among_the_nucleus(lp: Policy) -> Tensor:
    """Liu et al. 2021, Eq. 1, on the fewest tokens that have 0.9 of the probability."""
    base, kept, total = lp(), torch.full_like(lp(), -torch.inf), 0.0
    for token in base.argsort(descending=True).tolist():
        if total < 0.9:
            kept[token] = base[token]
        total += base[token].exp().item()
    return kept + 2 * (lp(model="tuned") - lp(model="small"))


def iterated_amulet(lp: Policy) -> Tensor:
    return amulet.naive_policy(lp(BRIEF), lp(), steps=60, alpha=2.0, anchor=2.0, eta=10.0)


def iterated_costeer(lp: Policy) -> Tensor:
    informed, plain = lp(PIRATE, model="small"), lp(model="small")
    return costeer.naive_policy(lp(), informed, plain, steps=20, alpha=2.0, beta=1.5, anchor=2.0, eta=10.0)


def drifted(lp: Policy) -> Tensor:
    pushed = {"brief": 0.8, "loud": -0.6}
    return lp() + sum(
        weight / 0.5 * (lp(system=ATTRIBUTES[name], model="small") - lp(model="small"))
        for name, weight in pushed.items()
    )


RECIPES: dict[str, tuple[UserState, Callable[[Policy], Tensor]]] = {
    "cos": (CoS(lam=1.5).state(PIRATE), lambda lp: 2.5 * lp(PIRATE) - 1.5 * lp()),
    "cos, attenuated": (CoS(lam=-0.4).state(PIRATE), lambda lp: 0.6 * lp(PIRATE) + 0.4 * lp()),
    "cos_many": (
        CoSMany(lams=(2.0, -0.5)).state((PIRATE, CLERK)),
        lambda lp: lp() + 2.0 * (lp(PIRATE) - lp()) - 0.5 * (lp(CLERK) - lp()),
    ),
    "cos_pair": (
        CoSPair(lam=0.7).state(PIRATE, CLERK),
        lambda lp: lp(PIRATE) + 0.7 * (lp(PIRATE) - lp(CLERK)),
    ),
    "guidance": (
        Guidance(scale=2.5).state(PIRATE, negative=CLERK),
        lambda lp: lp(CLERK) + 2.5 * (lp(PIRATE) - lp(CLERK)),
    ),
    "guidance by system messages": (
        Guidance(scale=3.0).state(system=BRIEF, negative_system=LOUD),
        lambda lp: lp(system=LOUD) + 3.0 * (lp(system=BRIEF) - lp(system=LOUD)),
    ),
    "contrastive_decoding": (ContrastiveDecoding("small").state(PIRATE), plausible),
    "dexperts": (DExperts("tuned", "small").state(), among_the_nucleus),
    "proxy_tuning": (
        ProxyTuning("tuned", "small", alpha=0.5).state(PIRATE),
        lambda lp: lp(PIRATE) + 0.5 * (lp(PIRATE, model="tuned") - lp(PIRATE, model="small")),
    ),
    "amulet": (Amulet().state(BRIEF), iterated_amulet),
    "costeer": (CoSteer("small", beta=1.5).state(PIRATE), iterated_costeer),
    "mod, reverse-kl": (
        MOD((0.2, 0.5, 0.3)).state((PIRATE, CLERK, None)),
        lambda lp: 0.2 * lp(PIRATE) + 0.5 * lp(CLERK) + 0.3 * lp(),
    ),
    "mod, forward-kl": (
        MOD([0.2, 0.8], "forward-kl").state([PIRATE, CLERK]),
        lambda lp: (1 / (0.2 / lp(PIRATE).exp() + 0.8 / lp(CLERK).exp())).log(),
    ),
    "mod, alpha": (
        MOD([0.2, 0.8], "alpha", alpha=0.3).state([PIRATE, CLERK]),
        lambda lp: ((0.2 * lp(PIRATE).exp() ** -0.3 + 0.8 * lp(CLERK).exp() ** -0.3) ** (-1 / 0.3)).log(),
    ),
    "mod, alpha as in the code": (
        MOD([0.2, 0.8], "alpha", alpha=0.3, tempered=True).state([PIRATE, CLERK]),
        lambda lp: -(0.2 * lp(PIRATE).exp() ** -0.3 + 0.8 * lp(CLERK).exp() ** -0.3).log(),
    ),
    "mod of other models": (
        MOD().state(models=["small", "tuned"], systems=[None, LOUD]),
        lambda lp: 0.5 * lp(model="small") + 0.5 * lp(model="tuned", system=LOUD),
    ),
    "mod of other models, forward-kl": (
        MOD(divergence="forward-kl").state(models=["small", "tuned"]),
        lambda lp: -(0.5 / lp(model="small").exp() + 0.5 / lp(model="tuned").exp()).log(),
    ),
    "drift": (Drift(ATTRIBUTES, "small", beta=0.5).state({"brief": 0.8, "loud": -0.6}), drifted),
}
PROMPTS = [f"{name}?" for name in RECIPES]


def test_one_step_of_every_recipe_in_one_batch(lm: steer.FrozenLM, models: dict[str, steer.FrozenLM]) -> None:
    rows = [*(state for state, _ in RECIPES.values()), None]
    found = scores(lm, models, rows, [*PROMPTS, "hello"])
    formulas = [*(formula for _, formula in RECIPES.values()), lambda lp: lp()]
    for prompt, row, formula in zip([*PROMPTS, "hello"], found, formulas, strict=True):
        expected = formula(policy(lm, models, prompt)).log_softmax(-1)
        assert torch.equal(row.isneginf(), expected.isneginf()), prompt
        assert_close(row.double().nan_to_num(neginf=0.0), expected.nan_to_num(neginf=0.0), 2e-4)


def test_a_bank_keeps_every_recipe(llama: steer.FrozenLM, models: dict[str, steer.FrozenLM], tmp_path: Path) -> None:
    bank = steer.Bank(tmp_path / "people.bank")
    bank.update({(name, "contrast"): state for name, (state, _) in RECIPES.items()})
    users = [*RECIPES, None]
    given = llama.generate_tokens(
        ["hello"] * len(users),
        states=[*(state for state, _ in RECIPES.values()), None],
        models=models,
        max_new_tokens=4,
    )
    stored = llama.generate_tokens(
        ["hello"] * len(users), users, steer.Bank(tmp_path / "people.bank"), models=models, max_new_tokens=4
    )
    assert stored == given
    assert len({tuple(tokens) for tokens in given}) > len(users) // 2


def test_neutral_values_leave_the_plain_models_tokens(
    precise: steer.FrozenLM, models: dict[str, steer.FrozenLM]
) -> None:
    plain: list[UserState | None] = [
        CoS(lam=-1.0).state(PIRATE),
        CoSMany(lams=0.0).state([PIRATE, CLERK]),
        Guidance(scale=0.0).state(PIRATE),
        ContrastiveDecoding("small", alpha=1.0).state(),
        DExperts("tuned", "small", alpha=0.0).state(),
        ProxyTuning("tuned", "small", alpha=0.0).state(),
        ProxyTuning("small", "small", alpha=3.0).state(),
        CoSteer("small", steps=0).state(PIRATE),
        CoSteer("small", beta=0.0).state(PIRATE),
        MOD([0.0, 1.0]).state([PIRATE, None]),
        MOD([0.0, 1.0], "forward-kl").state([PIRATE, None]),
        Drift(ATTRIBUTES, "small").state({"brief": 0.0}),
    ]
    # With these the context stands there as plain text.
    as_text: list[UserState | None] = [
        CoS(lam=0.0).state(PIRATE),
        CoSMany(lams=1.0).state([PIRATE]),
        CoSPair(lam=0.0).state(PIRATE, CLERK),
        Guidance(scale=1.0).state(PIRATE),
        Amulet(steps=0).state(PIRATE),
        Amulet(alpha=0.0).state(PIRATE),
        MOD([1.0, 0.0]).state([PIRATE, CLERK]),
        MOD([1.0, 0.0], "alpha").state([PIRATE, CLERK]),
        CoSPair(lam=-1.0).state(CLERK, PIRATE),
    ]
    for states, prompt in [(plain, "hello"), (as_text, f"{PIRATE} hello")]:
        found = precise.generate_tokens(["hello"] * len(states), states=states, models=models, max_new_tokens=6)
        (expected,) = precise.generate_tokens([prompt], max_new_tokens=6)
        assert found == [expected] * len(states)


def test_the_conventions_meet(precise: steer.FrozenLM, models: dict[str, steer.FrozenLM], dtype: torch.dtype) -> None:
    """The same in the words of different papers."""
    same: list[list[UserState | None]] = [
        [
            CoS(lam=1.5).state(PIRATE),
            Guidance(scale=2.5).state(PIRATE),
            CoSMany(lams=[2.5]).state([PIRATE]),
            CoSMany(lams=1.25).state([PIRATE, PIRATE]),
        ],
        [Amulet(steps=7).state(PIRATE), CoS(lam=Amulet(steps=7).lam).state(PIRATE)],
        [
            MOD([0.25, 0.75]).state([PIRATE, CLERK]),
            CoSMany(lams=[0.25, 0.75]).state([PIRATE, CLERK]),
            CoSPair(lam=-0.75).state(PIRATE, CLERK),
        ],
        # One step of CoSteer divides β by λ + 1/η.
        [
            CoSteer("small").state(PIRATE),
            CoSteer("small", steps=1, beta=2.1 * CoSteer("small").coefficient).state(PIRATE),
        ],
        [
            MOD([0.4, 0.6], "forward-kl").state([PIRATE, CLERK]),
            MOD([0.4, 0.6], "alpha", alpha=1.0).state([PIRATE, CLERK]),
            MOD([0.4, 0.6], "alpha", alpha=1.0, tempered=True).state([PIRATE, CLERK]),
        ],
        [
            ProxyTuning("tuned", "small", alpha=2.0).state(),
            DExperts("tuned", "small", top_p=1.0).state(),
        ],
    ]
    for states in same:
        found = scores(precise, models, states, ["hello"] * len(states))
        for row in found[1:]:
            assert_close(row, found[0], 1e-5 if dtype == torch.float32 else 1e-6)


def test_closed_forms_are_what_the_iterations_come_to() -> None:
    assert Amulet().lam == pytest.approx(4.6487, abs=5e-5)
    assert CoSteer("small").coefficient == pytest.approx(1.7833, abs=5e-5)
    for steps, lam in [(1, 0.952), (10, 2.898), (20, 3.567), (100, 5.156)]:
        assert Amulet(steps=steps).lam == pytest.approx(lam, abs=5e-4)
    for steps, weight in [(1, 0.476), (5, 1.126), (10, 1.449), (50, 2.234), (100, 2.578)]:
        assert CoSteer("small", steps=steps).coefficient == pytest.approx(weight, abs=5e-4)
    generator = torch.Generator().manual_seed(0)
    for size, steps, alpha, beta, anchor, eta in [(7, 3, 2.0, 1.0, 2.0, 10.0), (63, 13, 0.5, 2.5, 1.0, 0.3)]:
        one, two, three = torch.randn(3, 2, size, generator=generator, dtype=torch.float64)
        lam = Amulet(steps, alpha, anchor, eta).lam
        expected = amulet.naive_policy(one, two, steps, alpha, anchor, eta)
        assert_close(((1 + lam) * one - lam * two).log_softmax(-1), expected, 1e-12)
        weight = CoSteer("small", steps, alpha, beta, anchor, eta).coefficient
        expected = costeer.naive_policy(one, two, three, steps, alpha, beta, anchor, eta)
        assert_close((one + weight * (two - three)).log_softmax(-1), expected, 1e-12)


def test_recipes_compose_with_vectors(llama: steer.FrozenLM) -> None:
    """Guidance on a vector alone: the row itself carries it, and the stream that it is contrasted with does not."""
    vector = torch.randn(llama.width, generator=torch.Generator().manual_seed(0))
    style = steer.GivenVector().state({"resid_post[1]": vector}, lm=llama)
    guided = Guidance(scale=3.0, steered="own").state()
    only, plain, both = scores(llama, {}, [style, None, [style, guided]], ["hello"] * 3)  # type: ignore[list-item]
    assert_close(both, (3.0 * only - 2.0 * plain).log_softmax(-1))


def test_guidance_on_nothing_is_told(llama: steer.FrozenLM) -> None:
    style = steer.GivenVector().state({"resid_post[1]": torch.ones(llama.width)}, lm=llama)
    guided = Guidance(scale=3.0, steered="own").state()
    with pytest.warns(UserWarning, match="row 1: its mixture contrasts .* it has none"):
        llama.generate_tokens(["hello"] * 2, states=[[style, guided], guided], max_new_tokens=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        silent = [[style, guided], 0.5 * style + guided, Guidance(steered="own").state(PIRATE)]
        llama.generate_tokens(["hello"] * 3, states=silent, max_new_tokens=1)  # type: ignore[arg-type]


# From histories.


@pytest.fixture
def choices() -> steer.History:
    answers = [("ahoy", "good day"), ("arr, rain", "it rains"), ("fair winds", "goodbye")]
    return steer.History(
        "ann",
        tuple(
            steer.Record("ann", chosen, f"say {number}", fields={"rejected": other})
            for number, (chosen, other) in enumerate(answers)
        ),
    )


def test_the_newest_records_become_the_context(llama: steer.FrozenLM, choices: steer.History) -> None:
    newest = "Texts that I wrote:\n\narr, rain\n\nfair winds\n\n"
    one_text: list[Contrast] = [
        CoS(records=2),
        Guidance(records=2),
        ContrastiveDecoding("small", records=2),
        DExperts("tuned", "small", records=2),
        ProxyTuning("tuned", "small", records=2),
        Amulet(records=2),
        CoSteer("small", records=2),
    ]
    for method in one_text:
        state = method.fit(llama, choices)
        assert state.data["context"] == newest
        assert state.provenance.records == tuple(record.id for record in choices.records[1:])
        assert state.provenance.model is None
    each = [f"Texts that I wrote:\n\n{text}\n\n" for text in ("arr, rain", "fair winds")]
    assert CoSMany(records=2).fit(llama, choices).data["contexts"] == each
    assert CoSMany(lams=[2.0, 1.0]).fit(llama, choices).data["contexts"] == each
    assert MOD([0.5, 0.5]).fit(llama, choices).data["contexts"] == each
    pair = CoSPair(records=2).fit(llama, choices).data
    assert pair["positive"] == newest
    assert pair["negative"] == "Texts that I wrote:\n\nit rains\n\ngoodbye\n\n"
    with pytest.raises(steer.SteerError, match="'ann' has no records"):
        Guidance().fit(llama, steer.History("ann", ()))


def test_drift_weighs_attributes_by_choices(models: dict[str, steer.FrozenLM], choices: steer.History) -> None:
    small = models["small"]

    def log_likelihood(prompt: str, answer: str, system: str | None) -> float:
        text = ("" if system is None else f"[system] {system}\n") + f"[user] {prompt}\n[assistant] "
        total = 0.0
        for at, character in enumerate(answer):
            (token,) = small.tokenizer(character).input_ids
            total += next_logits(small, text + answer[:at]).log_softmax(-1)[token].item()
        return total

    gains = []
    for message in ATTRIBUTES.values():
        gain = 0.0
        for record in choices:
            for sign, answer in ((1, record.response), (-1, record.fields["rejected"])):
                with_message, without = (log_likelihood(record.prompt, answer, said) for said in (message, None))
                gain += sign * (with_message - without)
        gains.append(gain)
    expected = torch.tensor(gains) / torch.tensor(gains).norm()
    state = Drift(ATTRIBUTES, "small").fit(small, choices)
    assert list(state.data["weights"]) == list(ATTRIBUTES)
    assert_close(torch.tensor(list(state.data["weights"].values())), expected)
    assert state.provenance.records == tuple(record.id for record in choices)
    # Batches do not show.
    answers = [(f"say {i}", "x" * (1 + 7 * i)) for i in range(5)]
    together, apart = (log_likelihoods(small, answers, BRIEF, batch_tokens=tokens) for tokens in (2048, 1))
    assert_close(together, apart)


def test_drift_weighs_attributes_in_the_steered_models_template(
    models: dict[str, steer.FrozenLM], choices: steer.History
) -> None:
    small, drift = models["small"], Drift(ATTRIBUTES, "small")
    other = copy.deepcopy(tokenizer(chat=True))
    other.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    with steer.wrap(tiny("llama"), other) as large, steer.wrap(tiny("gpt2", seed=5), other) as same:
        found = drift.fit(small, choices, template_of=large)
        assert found.data == drift.fit(same, choices).data
        assert found.data != drift.fit(small, choices).data
        # Where the small model has no template, the other's will do.
        with steer.wrap(tiny("gpt2", seed=5), tokenizer()) as bare:
            assert drift.fit(bare, choices, template_of=large).data == found.data
            with pytest.raises(steer.SteerError, match="needs a chat template"):
                drift.fit(bare, choices)
        # What it reads are the tokens of the stream that it will have in decoding.
        with large.steered(states=[drift.state({"loud": 1.0})], models=models) as steering:
            large.model.generate(**steering.prepare(["say 0"]), **steering.generate_kwargs(), max_new_tokens=1)
            assert steering.prepared is not None
            read = {stream.system: ids for stream, ids in steering.prepared.further[0]}
    assert read[LOUD] == other("<system>SHOUT!<user>say 0").input_ids
    strange = copy.deepcopy(tokenizer(chat=True))
    strange.add_tokens(["<new>"])
    with (
        steer.wrap(tiny("llama"), strange) as stranger,
        pytest.raises(steer.SteerError, match="'small' has another vocabulary"),
    ):
        drift.fit(small, choices, template_of=stranger)


# What cannot be.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CoS(lam=float("nan")), "lam must be finite"),
        (lambda: CoS(lam=True), "lam must be a number, got True"),
        (lambda: CoS(lam=1e39).state(PIRATE), "below 1e"),
        (lambda: CoS().state(5), "a context must be text, got 5"),
        (lambda: CoS(records=0), "records=0"),
        (lambda: CoS(records=2.5), "records must be a whole number"),
        (lambda: CoS(steered="none"), "not one of all, own, further"),
        (lambda: CoSMany(lams=[1.0, float("inf")]), "lams must be finite"),
        (lambda: CoS(lam="much"), "lam must be a number, got 'much'"),
        (lambda: CoSMany(lams=[1.0, 2.0]).state([PIRATE]), "2 lams for 1 contexts"),
        (lambda: CoSMany(lams=[]), "lams must be a list of one or more, got \\[\\]"),
        (lambda: CoSMany(lams=np.array(1.0)), "lams must be a list of one or more"),
        (lambda: CoSMany(lams="12"), "lams must be a list of one or more, got '12'"),
        (lambda: CoSMany(lams=["1"]), "lams must be a number, got '1'"),
        (lambda: CoSMany(lams=True), "lams must be a number, got True"),
        (lambda: CoSMany().state([]), "contexts must be a list of one or more, got \\[\\]"),
        (lambda: CoSMany().state(PIRATE), "contexts must be a list of one or more, got 'I am a pirate.'"),
        (lambda: CoSMany().state(5), "contexts must be a list of one or more, got 5"),
        (lambda: CoSMany().state([PIRATE, " "]), "a context is empty"),
        (lambda: CoSPair(lam=float("inf")), "lam must be finite"),
        (lambda: CoSPair().state(PIRATE, ""), "a context is empty"),
        (lambda: CoSPair().state(PIRATE, PIRATE), "are the same"),
        (lambda: Guidance(scale=float("nan")), "scale must be finite"),
        (lambda: Guidance().state(), "both streams read the same"),
        (lambda: Guidance().state(PIRATE, negative=PIRATE), "both streams read the same"),
        (lambda: Guidance().state(system="\n"), "a system is empty"),
        (lambda: ContrastiveDecoding("small", alpha=0.0), "not a share"),
        (lambda: ContrastiveDecoding("small", alpha=1.1), "not a share"),
        (lambda: ContrastiveDecoding("small", alpha="a"), "alpha must be a number, got 'a'"),
        (lambda: ContrastiveDecoding("small", temperature=0.0), "temperature must be above 0"),
        (lambda: DExperts("tuned", "small", alpha=float("inf")), "alpha must be finite"),
        (lambda: DExperts("tuned", "small", top_p=0.0), "not a probability"),
        (lambda: DExperts("tuned", "small", top_p=None), "top_p must be a number, got None"),
        (lambda: DExperts("tuned", "small").state(" "), "a context is empty"),
        (lambda: ProxyTuning("tuned", "small", alpha=float("nan")), "alpha must be finite"),
        (lambda: Amulet(steps=-1), "steps must not be negative"),
        (lambda: Amulet(steps=2.5), "steps must be a whole number"),
        (lambda: CoSteer("small", steps=2.5), "steps must be a whole number"),
        (lambda: KNNLM(k=2.5), "k must be a whole number"),
        (lambda: KNNLM(weight="a"), "weight must be a number, got 'a'"),
        (lambda: KNNLM(weight=True), "weight must be a number, got True"),
        (lambda: KNNLM(max_tokens=2.5), "max_tokens must be a whole number"),
        (lambda: KNNLM(max_tokens=0), "max_tokens must be above 0"),
        (lambda: Amulet(eta=0.0), "eta must be above 0"),
        (lambda: Amulet(alpha=9.0, steps=99), "take fewer steps"),
        (lambda: CoSteer("small", beta=-1.0), "beta must not be negative"),
        (lambda: CoSteer("small", anchor=0.0), "anchor must be above 0"),
        (lambda: MOD([0.5, 0.6]), "must add up to 1"),
        (lambda: MOD([1.5, -0.5]), "weight must not be negative"),
        (lambda: MOD([float("nan"), 1.0]), "weight must not be negative"),
        (lambda: MOD(divergence="jsd"), "not one of reverse-kl, forward-kl, alpha"),
        (lambda: MOD(divergence="alpha", alpha=0.0), "not above 0 and up to 1"),
        (lambda: MOD(divergence="alpha", alpha="a"), "alpha must be a number, got 'a'"),
        (lambda: MOD([]), "weights must be a list of one or more"),
        (lambda: MOD(1.0), "weights must be a list of one or more, got 1.0"),
        (lambda: MOD(["1"]), "weight must be a number, got '1'"),
        (lambda: MOD().state("abc"), "contexts must be a list of one or more, got 'abc'"),
        (lambda: MOD().state(systems="abc"), "systems must be a list"),
        (lambda: MOD().state(models="abc"), "models must be a list"),
        (lambda: MOD([0.5, 0.5]).state([PIRATE]), "1 contexts, and 2 weights"),
        (lambda: MOD().state([PIRATE], systems=[None, LOUD]), "1 contexts, 2 systems"),
        (lambda: MOD().state(), "no policies"),
        (lambda: MOD().state([PIRATE, ""]), "a context is empty"),
        (lambda: Drift({}, "small"), "needs attributes"),
        (lambda: Drift([BRIEF], "small"), "needs attributes"),
        (lambda: Drift(ATTRIBUTES, "small").state([1.0]), "by the names of attributes"),
        (lambda: Drift(ATTRIBUTES, "small").state({"loud": "much"}), "weight of loud must be a number"),
        (lambda: Drift({"loud": " "}, "small"), "'loud' is empty"),
        (lambda: Drift(ATTRIBUTES, "small", beta=0.0), "beta must be above 0"),
        (lambda: Drift(ATTRIBUTES, "small").state({"rude": 1.0}), "no attribute 'rude'"),
        (lambda: Drift(ATTRIBUTES, "small").state({"loud": float("inf")}), "weight of loud must be finite"),
    ],
)
def test_bad_input_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(steer.SteerError, match=message):
        make()


HALF, ONE, PARTS = np.float32(0.5), np.int64(1), np.array([0.25, 0.75])


@pytest.mark.parametrize(
    "make",
    [
        lambda half, one, parts: CoS(lam=half, records=one).state(PIRATE),
        lambda half, one, parts: CoSMany(lams=half).state([PIRATE, CLERK]),
        lambda half, one, parts: CoSMany(lams=parts).state([PIRATE, CLERK]),
        lambda half, one, parts: CoSPair(lam=half).state(PIRATE, CLERK),
        lambda half, one, parts: Guidance(scale=half).state(PIRATE),
        lambda half, one, parts: ContrastiveDecoding("small", half, half).state(),
        lambda half, one, parts: DExperts("tuned", "small", half, half).state(),
        lambda half, one, parts: ProxyTuning("tuned", "small", half).state(),
        lambda half, one, parts: Amulet(one, half, half, half).state(PIRATE),
        lambda half, one, parts: CoSteer("small", one, half, half, half, half).state(PIRATE),
        lambda half, one, parts: MOD(parts, "alpha", half, parts[0] < 1).state([PIRATE, None]),
        lambda half, one, parts: Drift(ATTRIBUTES, beta=half).state({"loud": half}),
    ],
)
def test_numbers_of_numpys_are_pythons_in_a_state(make: Callable[..., UserState]) -> None:
    found, expected = make(HALF, ONE, PARTS), make(0.5, 1, [0.25, 0.75])
    assert json.dumps(found.provenance.to_json()) == json.dumps(expected.provenance.to_json())
    assert json.dumps(dict(found.data)) == json.dumps(dict(expected.data))


def test_numbers_of_numpys_are_pythons_in_a_store(llama: steer.FrozenLM, choices: steer.History) -> None:
    settings = KNNLM(HALF, ONE, HALF, max_tokens=np.int64(9)).fit(llama, choices).provenance.settings
    assert json.dumps(dict(settings)) == json.dumps({"weight": 0.5, "k": 1, "temperature": 0.5})


def test_a_recipe_that_is_changed_leaves_its_states_as_they_are() -> None:
    attributes, many = dict(ATTRIBUTES), CoSMany(lams=[1.0, 2.0])
    drift = Drift(attributes)
    states = many.state([PIRATE, CLERK]), drift.state({"loud": 1.0})
    many.lams[0] = 9.0  # type: ignore[index]
    attributes["loud"] = "Whisper."
    drift.attributes["loud"] = "Whisper."  # type: ignore[index]
    assert [states[0].provenance.settings["lams"], states[1].provenance.settings["attributes"]] == [
        [1.0, 2.0],
        ATTRIBUTES,
    ]


def test_drift_reads_all_choices_and_takes_no_number_of_them() -> None:
    with pytest.raises(TypeError, match="'records'"):
        Drift(ATTRIBUTES, records=2)  # type: ignore[call-arg]


def test_choices_that_say_nothing_are_refused(models: dict[str, steer.FrozenLM], choices: steer.History) -> None:
    small = models["small"]
    with pytest.raises(steer.SteerError, match="no pairs"):
        Drift(ATTRIBUTES).fit_pairs(small, [])
    with pytest.raises(steer.SteerError, match="no attribute tells"):
        Drift(ATTRIBUTES).fit_pairs(small, [Pair("say", "x", "x")])
    with pytest.raises(steer.SteerError, match="needs the model 'small'"):
        scores(models["tuned"], {}, [CoSteer("small").state(PIRATE)], ["hello"])
