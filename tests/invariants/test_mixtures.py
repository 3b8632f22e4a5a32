"""Mixtures of any streams: other contexts, other models, both rules, and common beginnings that are read once."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from models import PAD, VOCABULARY, tiny, tokenizer, unwrapped
from rows import assert_close, cross_attention, edits_of, random_row
from torch import Tensor
from transformers import CompileConfig, StoppingCriteria, StoppingCriteriaList

import steer
from steer import decoding
from steer.inject import Mixture, Stream
from steer.inject.streams import Mix

PROMPTS = ["a prompt", "x", "another, longer one", "the last"]
STEPS = 5
# A row that is its own, contexts with and without a prompt alone, other models, and both rules.
MIXTURES: list[Mixture | None] = [
    Mixture((Stream(0.5, "I am a pirate."), Stream(1.5), Stream(-1.0, "short"))),
    None,
    Mixture((Stream(1.0), Stream(0.8, model="expert"), Stream(-0.8, "short", model="antiexpert"))),
    Mixture((Stream(0.3, "I like long contexts"), Stream(0.7)), power=-1.0, scale=-1.0),
]


@pytest.fixture
def models() -> Iterator[dict[str, steer.FrozenLM]]:
    """Two other models with the same tokens; the one is of another architecture, the other's table is narrower."""
    expert = tiny("gpt2", seed=5)
    antiexpert = tiny("bloom", seed=6)
    antiexpert.resize_token_embeddings(VOCABULARY - 1)
    with steer.wrap(expert, tokenizer()) as one, steer.wrap(antiexpert, tokenizer()) as other:
        yield {"expert": one, "antiexpert": other}


def generate(
    lm: steer.FrozenLM,
    models: dict[str, steer.FrozenLM],
    mixtures: list[Mixture | None] = MIXTURES,
    prompts: list[str] = PROMPTS,
    **kwargs: Any,
) -> Any:
    settings = {"max_new_tokens": STEPS, "do_sample": False} | kwargs
    seeds = settings.pop("seeds", None)
    with lm.steered(edits=[steer.StreamEdit(mixtures)], models=models) as steering:
        batch = steering.prepare(prompts)
        output = lm.model.generate(
            **batch,
            **steering.generate_kwargs(seeds=seeds),
            return_dict_in_generate=True,
            output_scores=True,
            **settings,
        )
    output.sequences = output.sequences[:, batch["input_ids"].shape[1] :]
    return output


def logits_of(lm: steer.FrozenLM, text: str, tokens: Tensor) -> Tensor:
    """Of each of the tokens behind a text, from one forward pass; −inf for tokens that the model has not."""
    ids = torch.cat([torch.tensor(lm.tokenizer(text).input_ids), tokens])
    with torch.no_grad():
        logits = lm.model(ids[None, :-1]).logits[0, -len(tokens) :].double()
    return torch.nn.functional.pad(logits, (0, VOCABULARY - logits.shape[1]), value=float("-inf"))


def by_hand(
    lm: steer.FrozenLM, models: dict[str, steer.FrozenLM], mixture: Mixture | None, prompt: str, tokens: Tensor
) -> Tensor:
    """The mixture in float64, stream by stream."""
    mixture = mixture or Mixture((Stream(1.0),))
    logits = [
        logits_of(
            lm if s.model is None else models[s.model], prompt if s.context is None else f"{s.context} {prompt}", tokens
        )
        for s in mixture.streams
    ]
    weights = [stream.weight for stream in mixture.streams]
    if mixture.power:
        powers = torch.stack([w * each.softmax(-1) ** mixture.power for w, each in zip(weights, logits, strict=True)])
        return mixture.scale * powers.sum(0).log()
    # What a stream has not counts there as in the row itself.
    logits = [torch.where(each.isneginf(), logits[0], each) for each in logits]
    return sum(w * each for w, each in zip(weights, logits, strict=True))  # type: ignore[return-value]


def test_scores_are_the_mixtures(lm: steer.FrozenLM, models: dict[str, steer.FrozenLM]) -> None:
    output = generate(lm, models)
    scores = torch.stack(output.scores, 1)
    for row, (mixture, prompt) in enumerate(zip(MIXTURES, PROMPTS, strict=True)):
        expected = by_hand(lm, models, mixture, prompt, output.sequences[row])
        assert_close(scores[row].double(), expected)


def test_rows_alone_and_their_copies_give_the_same(llama: steer.FrozenLM, models: dict[str, steer.FrozenLM]) -> None:
    settings: dict[str, Any] = {"do_sample": True, "temperature": 5.0, "num_return_sequences": 3}
    together = generate(llama, models, seeds=[1, 2, 3, 4], **settings).sequences.unflatten(0, (4, 3))
    assert len({tuple(row.tolist()) for row in together.flatten(0, 1)}) == 12
    for row in range(4):
        alone = generate(
            llama, models, MIXTURES[row : row + 1], PROMPTS[row : row + 1], seeds=[row + 1], **settings
        ).sequences
        assert torch.equal(together[row], alone)


def test_every_model_makes_one_pass_a_token(llama: steer.FrozenLM, models: dict[str, steer.FrozenLM]) -> None:
    passes: dict[str, list[tuple[int, ...]]] = {"own": [], "expert": [], "antiexpert": []}
    handles = [
        unwrapped(lm.model).register_forward_pre_hook(
            lambda module, args, kwargs, name=name: passes[name].append(tuple(kwargs["input_ids"].shape)),
            with_kwargs=True,
        )
        for name, lm in {"own": llama, **models}.items()
    ]
    generate(llama, models)
    for handle in handles:
        handle.remove()
    # Only the rows that a stream belongs to.
    assert [len(each) for each in passes.values()] == [STEPS] * 3
    assert [each[1:] for each in passes.values()] == [[(7, 1)] * 4, [(1, 1)] * 4, [(1, 1)] * 4]


def test_static_caches_and_compiled_steps(llama: steer.FrozenLM, models: dict[str, steer.FrozenLM]) -> None:
    config = CompileConfig(backend="aot_eager", fullgraph=True)
    config._compile_all_devices = True  # type: ignore[assignment]
    # transformers cannot compile Bloom.
    models = models | {"antiexpert": models["expert"]}
    compiled = generate(llama, models, cache_implementation="static", compile_config=config, max_cache_len=64)
    eager = generate(llama, models)
    assert torch.equal(compiled.sequences, eager.sequences)
    assert_close(torch.stack(compiled.scores), torch.stack(eager.scores))
    torch._dynamo.reset()


def test_a_token_far_less_likely_than_the_rows_likeliest_is_ruled_out(llama: steer.FrozenLM) -> None:
    contrast = Mixture((Stream(1.0), Stream(-1.0, "some context")))
    output = generate(llama, {}, [replace(contrast, floor=0.1), contrast, replace(contrast, nucleus=0.5), None])
    for row, keeps in enumerate([True, False, True, False]):
        own = logits_of(llama, PROMPTS[row], output.sequences[row]).softmax(-1)
        kept = ~torch.stack(output.scores, 1)[row].isneginf()
        if not keeps:
            assert kept.all()
        elif row == 0:
            assert torch.equal(kept, own >= 0.1 * own.amax(-1, keepdim=True))
        else:
            # The fewest tokens with half of the probability.
            ordered = own.sort(-1, descending=True).values
            counts = (ordered.cumsum(-1) < 0.5).sum(-1) + 1
            assert torch.equal(kept.sum(-1), counts)
            assert torch.equal(own.where(kept, 0.0).sum(-1) >= 0.5, torch.ones(STEPS, dtype=torch.bool))


@pytest.mark.parametrize("steered", ["own", "further"])
def test_edits_may_touch_some_of_the_streams(lm: steer.FrozenLM, steered: Any) -> None:
    """Vectors, marks, a prefix, a memory and a condition steer the row itself or what it is contrasted with."""
    rows, layer = [random_row(seed, share=1.0) for seed in (1, 2)], cross_attention()
    edits = edits_of(rows, layer)[:-1]
    prompts = [row.prompt for row in rows]
    contexts = [row.context or "" for row in rows]
    settings: dict[str, Any] = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True}
    settings |= {"output_scores": True, "output_logits": True}

    def scores(edits: list[Any], texts: list[str], *, raw: bool = True) -> Tensor:
        with lm.steered(edits=edits) as steering:
            output = lm.model.generate(**steering.prepare(texts), **steering.generate_kwargs(), **settings)
        return output.logits[0] if raw else output.scores[0]

    # What a condition decides from is the row's own prompt, whatever it is that carries the edit.
    if steered == "further":
        edits = [edit for edit in edits if getattr(edit, "condition", None) is None]
    with_context = [f"{context} {prompt}" for context, prompt in zip(contexts, prompts, strict=True)]
    none = steer.StreamEdit([None, None])
    own = scores([*edits, none] if steered == "own" else [none], with_context)
    further = scores([none] if steered == "own" else [*edits, none], prompts)
    mixtures = [Mixture((Stream(2.0, c), Stream(-1.0)), steered=steered) for c in contexts]
    mixed = scores([*edits, steer.StreamEdit(mixtures)], prompts, raw=False)
    assert_close(mixed, 2 * own - further)


COMMON = "what these streams have in common is a context of some length: "


def apart_and_once(
    lm: steer.FrozenLM, monkeypatch: pytest.MonkeyPatch, plan: dict[str, Any], **settings: Any
) -> list[tuple[Any, int]]:
    """What is generated where every row reads its own beginning, and where common ones may be read once.

    With both, how many tokens the model has read.
    """
    settings = {"max_new_tokens": STEPS, "do_sample": False} | settings
    seeds = settings.pop("seeds", None)
    copies = settings.get("num_return_sequences", 1)
    found, read = [], []
    handle = lm.attachment.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(next(iter([*args, kwargs.get("input_ids")])).numel()), with_kwargs=True
    )
    for spared in (10**9, 0):
        read.clear()
        monkeypatch.setattr(decoding, "_SPARED_TOKENS", spared)
        with lm.steered(**plan) as steering:
            batch = steering.prepare(PROMPTS)
            output = lm.model.generate(
                **batch,
                **steering.generate_kwargs(seeds=seeds),
                return_dict_in_generate=True,
                output_logits=True,
                output_scores=True,
                **settings,
            )
        prompts = batch["input_ids"].repeat_interleave(copies, 0)
        assert torch.equal(output.sequences[:, : prompts.shape[1]], prompts)
        found.append((output, sum(read)))
    handle.remove()
    return found


def assert_same(one: Any, other: Any) -> None:
    """The same tokens, from the same logits and scores."""
    assert torch.equal(one.sequences, other.sequences)
    for name in ("logits", "scores"):
        assert_close(*(torch.stack(output[name]).clamp(min=-1e4) for output in (one, other)))


def test_what_streams_have_in_common_is_read_once(
    lm: steer.FrozenLM, models: dict[str, steer.FrozenLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same tokens with a common beginning read by every row, and read once and copied."""
    mixtures: list[Mixture | None] = [
        Mixture((Stream(1.5, f"{COMMON} this"), Stream(-0.5, f"{COMMON} or that"))),
        None,
        Mixture((Stream(1.0, COMMON), Stream(0.5, model="expert"))),
        Mixture((Stream(1.0, "a"), Stream(-0.5, "another"))),
    ]
    edit = steer.ResidualEdit(steer.Site("resid_post", 1), 0.1 * torch.randn(4, lm.width), positions="prompt")
    plan = {"edits": [edit, steer.StreamEdit(mixtures)], "models": models}
    sampled: dict[str, Any] = {"do_sample": True, "seeds": [1, 2, 3, 4], "num_return_sequences": 2}
    (apart, all_tokens), (once, fewer) = apart_and_once(lm, monkeypatch, plan, **sampled)
    assert_same(apart, once)
    # A window sees padding between the common part and the rest.
    assert fewer < 0.7 * all_tokens if lm.sliding_window is None else fewer == all_tokens


@pytest.fixture(params=["llama", "gpt2"])
def either(request: pytest.FixtureRequest) -> Iterator[steer.FrozenLM]:
    """With positions that turn keys, and with some that are added."""
    with steer.wrap(tiny(request.param), tokenizer()) as lm:
        yield lm


def long_contexts(steered: Any = "all") -> list[Mixture | None]:
    contexts = [("this", "or that"), ("one", "two"), ("x", "y"), ("", "z")]
    return [
        Mixture((Stream(1.5, f"{COMMON} {own}"), Stream(-0.5, f"{COMMON} {other}")), steered=steered)
        for own, other in contexts
    ]


@pytest.mark.parametrize(
    ("steered", "settings"),
    [
        ("own", {}),
        ("further", {}),
        ("all", {"use_cache": False}),
        ("all", {"cache_implementation": "static"}),
        ("all", {"output_hidden_states": True}),
        ("all", {"output_attentions": True}),
    ],
    ids=str,
)
def test_beginnings_are_read_by_every_row_where_they_must(
    either: steer.FrozenLM, monkeypatch: pytest.MonkeyPatch, steered: Any, settings: dict[str, Any]
) -> None:
    """Where streams are steered differently, and with all that has no cache to copy, or wants every position."""
    if "output_attentions" in settings:
        either.model.set_attn_implementation("eager")
    vectors = torch.randn(4, either.width, generator=torch.Generator().manual_seed(0))
    edit = steer.ResidualEdit(steer.Site("resid_post", 0), vectors, positions="all")
    plan = {"edits": [edit, steer.StreamEdit(long_contexts(steered))]}
    (apart, all_tokens), (once, as_many) = apart_and_once(either, monkeypatch, plan, **settings)
    assert_same(apart, once)
    for name in ("hidden_states", "attentions"):
        if name in apart:
            # The prompts' own, of all layers.
            for one, other in zip(apart[name][0], once[name][0], strict=True):
                assert_close(one, other)
            assert once[name][0][-1].shape[-2] > len(COMMON)
    assert as_many == all_tokens


def test_a_condition_reads_the_whole_beginning(either: steer.FrozenLM, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [random_row(seed, share=1.0) for seed in range(4)]
    edits = [edit for edit in edits_of(rows, cross_attention()) if getattr(edit, "condition", None) is not None]
    assert edits
    plan = {"edits": [*edits, steer.StreamEdit(long_contexts())]}
    (apart, all_tokens), (once, as_many) = apart_and_once(either, monkeypatch, plan)
    assert_same(apart, once)
    assert as_many == all_tokens


# A long common beginning, one token, and none, beside a row that is not mixed.
LENGTHS: list[Mixture | None] = [
    Mixture((Stream(1.5, f"{COMMON} this"), Stream(-0.5, f"{COMMON} or that"))),
    Mixture((Stream(1.0, "a"), Stream(-0.5, "another"))),
    Mixture((Stream(1.0, "one"), Stream(-0.5, "two"))),
    None,
]


@pytest.mark.parametrize("seed", range(3))
def test_beginnings_of_any_length_carry_the_rows_edits(
    either: steer.FrozenLM, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Vectors, marks, projections, memories, and prefixes, which a row lacks whose streams share nothing."""
    rows = [random_row(4 * seed + i, share=1.0) for i in range(4)]
    rows[2] = replace(rows[2], prefix=None)
    rows = [replace(row, prefix=None) for row in rows[:2]] + rows[2:] if seed == 1 else rows
    edits = [edit for edit in edits_of(rows, cross_attention())[:-1] if getattr(edit, "condition", None) is None]
    assert len(edits) == 6
    plan = {"edits": [*edits, steer.StreamEdit(LENGTHS)]}
    (apart, all_tokens), (once, fewer) = apart_and_once(either, monkeypatch, plan)
    assert_same(apart, once)
    assert fewer < 0.9 * all_tokens


def test_beginnings_that_are_read_once_leave_the_neighbours_of_what_follows(
    either: steer.FrozenLM, histories: list[steer.History], monkeypatch: pytest.MonkeyPatch
) -> None:
    ann, bob = (steer.KNNLM(weight=0.4, k=5, temperature=0.5).fit(either, history) for history in histories)
    plan = {"states": [ann, bob, ann, bob], "edits": [steer.StreamEdit(LENGTHS)]}
    (apart, all_tokens), (once, fewer) = apart_and_once(either, monkeypatch, plan)
    assert_same(apart, once)
    assert fewer < 0.9 * all_tokens
    # They took part.
    assert (once.scores[0].softmax(-1) - once.logits[0][:4].softmax(-1)).abs().max() > 0.01


class Watch(StoppingCriteria):
    """Keeps what it is shown, and stops a row after its second token."""

    def __init__(self) -> None:
        self.shown: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.shown.append(input_ids.clone())
        done = torch.zeros(len(input_ids), dtype=torch.bool)
        done[2] = len(self.shown) >= 2
        return done


def test_stopping_criteria_see_the_rows_of_the_batch(llama: steer.FrozenLM, models: dict[str, steer.FrozenLM]) -> None:
    watch, free = Watch(), generate(llama, models).sequences
    # Padding takes the place of what comes after the end, where there is a token for the end.
    end = next(token for token in range(VOCABULARY) if token not in free)
    criteria = StoppingCriteriaList([watch])
    output = generate(llama, models, stopping_criteria=criteria, eos_token_id=end, pad_token_id=PAD)
    plain = llama.tokenizer(["I am a pirate. a prompt", "x"], padding=True, padding_side="left", return_tensors="pt")
    for step, shown in enumerate(watch.shown):
        assert len(shown) == 4
        assert shown[0, : -step - 1].tolist()[-plain.input_ids.shape[1] :] == plain.input_ids[0].tolist()
    assert output.sequences[2].tolist() == [*free[2, :2].tolist(), *[PAD] * 3]
    assert torch.equal(output.sequences[[0, 1, 3]], free[[0, 1, 3]])


def test_criteria_of_generate_itself(llama: steer.FrozenLM) -> None:
    """As a caller has them, without asking for scores: a time, an own criterion and strings."""
    states = [None, steer.CoS(lam=1.5).state("I sail.")]
    free = llama.generate(["a", "b"], states=states, max_new_tokens=12)
    assert llama.generate(["a", "b"], states=states, max_new_tokens=12, max_time=600.0) == free
    shown: list[int] = []

    def third(input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        shown.append(len(input_ids))
        return torch.full((len(input_ids),), len(shown) == 3)

    criteria = StoppingCriteriaList([third])
    tokens = llama.generate_tokens(["a", "b"], states=states, max_new_tokens=12, stopping_criteria=criteria)
    assert shown == [2, 2, 2]
    assert {len(row) for row in tokens} == {3}
    for row, state in enumerate(states):
        stop = free[row][4]
        (cut,) = llama.generate(["ab"[row]], states=[state], max_new_tokens=12, stop_strings=[stop])
        assert cut == free[row][: free[row].index(stop) + 1]


def test_filters_rule_out_the_same_tokens_under_both_rules() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -3.0], [-3.0, 0.0, 1.0, 2.0]])
    own = logits[0].softmax(-1)
    for filters, kept in [({"nucleus": 0.7}, own >= own[1]), ({"floor": 0.3}, own >= 0.3 * own[0])]:
        assert kept.tolist() == [True, True, False, False]
        for power in (0.0, 1.0, -1.0):
            streams = (Stream(0.5), Stream(0.5, "x"))
            free, filtered = (
                Mix.of([Mixture(streams, power=power, **own)], [0.5, 0.5], torch.tensor([0, 0]))(logits)[0]
                for own in ({}, filters)
            )
            assert torch.equal(filtered, free.masked_fill(~kept, float("-inf")))


@pytest.mark.parametrize("negative", [None, "c" * 120])
def test_a_row_reads_and_writes_no_more_than_the_window(negative: str | None) -> None:
    """What a stream writes counts, and the longest stream decides."""
    with steer.wrap(tiny("opt"), tokenizer()) as lm:
        state = steer.Guidance().state(context="a" * 100, negative=negative)
        taken = len(lm.tokenizer("c" * (100 if negative is None else 120) + " hello").input_ids)
        room = lm.window - taken + 1  # type: ignore[operator]
        assert len(lm.generate_tokens(["hello"], states=[state], max_new_tokens=room, eos_token_id=None)[0]) == room
        with pytest.raises(steer.SteerError, match=r"row 0: .* 201 tokens and the model's window is 200; shorten"):
            lm.generate_tokens(["hello"], states=[state], max_new_tokens=room + 1)


def test_the_handy_constructor_says_what_streams_carry() -> None:
    edit = steer.StreamEdit.contrast(["a", None], [1.0, 2.0], against="b", steered="own")
    assert edit.mixtures == [Mixture((Stream(2.0, "a"), Stream(-1.0, "b")), steered="own"), None]


@pytest.mark.parametrize("power", [-1.0, -0.5, 1.0, 2.0])
def test_a_mixture_of_one_stream_is_that_stream(power: float) -> None:
    """Whatever the power: the scale is its reciprocal unless it is given."""
    logits = torch.randn(2, 9, generator=torch.Generator().manual_seed(0))
    mix = Mix.of([Mixture((Stream(1.0),), power=power), None], [1.0, 1.0], torch.tensor([0, 1]))
    assert_close(mix(logits).log_softmax(1), logits.log_softmax(1))


def test_what_cannot_be_mixed_is_refused(llama: steer.FrozenLM, models: dict[str, steer.FrozenLM]) -> None:
    with pytest.raises(steer.SteerError, match="needs the model 'antiexpert'"):
        generate(llama, {"expert": models["expert"]})
    with pytest.raises(steer.SteerError, match="is the steered one itself"):
        generate(llama, models | {"expert": llama})
    other = copy.deepcopy(tokenizer())
    other.add_tokens(["<new>"])
    with (
        steer.wrap(tiny("llama", seed=3), other) as stranger,
        pytest.raises(steer.SteerError, match="'expert' has another vocabulary"),
    ):
        generate(llama, models | {"expert": stranger})
    llama.model.config.max_position_embeddings = 16
    with pytest.raises(steer.SteerError, match="row 0: with its context the prompt has 23 tokens"):
        generate(llama, models)
    for bad, message in [
        ({"streams": ()}, "needs a stream"),
        ({"streams": (Stream(1.0, model="expert"),)}, "cannot be another model's"),
        ({"streams": (Stream(1.0), Stream(-1.0)), "power": 1.0}, "must not be negative"),
        ({"streams": (Stream(0.0), Stream(0.0)), "power": 1.0}, "one must be above 0"),
        ({"streams": (Stream(1.0),), "power": -1.0, "scale": 1.0}, "must have the sign of power=-1"),
        ({"streams": (Stream(1.0),), "power": 1.0, "scale": 0.0}, "must have the sign of power=1"),
        ({"streams": (Stream(1.0),), "power": 1.0, "scale": float("inf")}, "below 1e\\+06"),
        ({"streams": (Stream(1.0),), "power": -1e-9}, "take power=0"),
        ({"streams": (Stream(1.0),), "power": float("nan")}, "power must be finite"),
        ({"streams": (Stream(1.0),), "scale": 2.0}, "belongs to the arithmetic rule"),
        ({"streams": (Stream(1.0),), "floor": 1.5}, "not a share"),
        ({"streams": (Stream(1.0),), "nucleus": 0.0}, "not a probability"),
        ({"streams": (Stream(1.0),), "steered": "none"}, "not one of all, own, further"),
    ]:
        with pytest.raises(steer.SteerError, match=message):
            Mixture(**bad)
    # In float32, 1e39 would be infinite.
    for weight in (float("nan"), 1e39, -1e6):
        with pytest.raises(steer.SteerError, match="must be finite and below"):
            Stream(weight)
    for weight in ("a", None, True):
        with pytest.raises(steer.SteerError, match="must be finite and below"):
            Stream(weight)  # type: ignore[arg-type]
    assert Stream(np.float32(0.5)) == Stream(0.5)  # type: ignore[arg-type]
    for name in ("context", "system", "model"):
        with pytest.raises(steer.SteerError, match=f"a {name} is empty"):
            Stream(1.0, **{name: " "})
        with pytest.raises(steer.SteerError, match=f"the {name} of a stream must be text, got 5"):
            Stream(1.0, **{name: 5})  # type: ignore[arg-type]


def test_nobody_steers_a_companion_meanwhile(llama: steer.FrozenLM, models: dict[str, steer.FrozenLM]) -> None:
    """Rows of as many users would otherwise be steered in the other model, silently."""
    expert, runs = models["expert"], []
    mixtures: list[Mixture | None] = [Mixture((Stream(1.0), Stream(5.0, model="expert")))]
    before = generate(llama, models, mixtures, PROMPTS[:1])
    edit = steer.ResidualEdit(steer.Site("resid_post", 1), 20 * torch.randn(1, expert.width), positions="all")
    handle = unwrapped(llama.model).register_forward_pre_hook(lambda module, args: runs.append(1))
    with expert.steered(edits=[edit]) as steering:
        with pytest.raises(steer.SteerError, match="already steered"):
            generate(llama, models, mixtures, PROMPTS[:1])
        assert not runs
        expert.model(**steering.prepare(PROMPTS[:1]))
    handle.remove()
    # It is free again, after a refusal and after a generation.
    for _ in range(2):
        assert torch.equal(generate(llama, models, mixtures, PROMPTS[:1]).sequences, before.sequences)


def test_a_model_of_two_names_makes_one_pass_a_token(llama: steer.FrozenLM, models: dict[str, steer.FrozenLM]) -> None:
    shapes: list[tuple[int, ...]] = []
    handle = unwrapped(models["expert"].model).register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    twice = models | {"antiexpert": models["expert"]}
    output = generate(llama, twice)
    handle.remove()
    assert len(shapes) == STEPS
    assert set(shapes[1:]) == {(2, 1)}
    expected = by_hand(llama, twice, MIXTURES[2], PROMPTS[2], output.sequences[2])
    assert_close(torch.stack(output.scores, 1)[2].double(), expected)


@pytest.mark.parametrize("context", [None, "I sail."])
def test_a_companion_reads_no_more_than_its_window(llama: steer.FrozenLM, context: str | None) -> None:
    mixtures: list[Mixture | None] = [None, Mixture((Stream(1.0), Stream(0.5, context, model="small")))]
    with steer.wrap(tiny("opt"), tokenizer()) as small:
        taken = 0 if context is None else len(context) + 1
        prompt = "x" * (small.window - len(llama.tokenizer("").input_ids) - taken - 4)  # type: ignore[operator]
        runs: list[int] = []
        handle = unwrapped(llama.model).register_forward_pre_hook(lambda module, args: runs.append(1))
        with pytest.raises(steer.SteerError, match=r"row 1: .* 201 tokens and the window of the model 'small' is 200"):
            generate(llama, {"small": small}, mixtures, ["x", prompt], max_new_tokens=6)
        assert not runs
        handle.remove()
        # The last new token is not read.
        assert generate(llama, {"small": small}, mixtures, ["x", prompt], max_new_tokens=5).sequences.shape[1] == 5
        too_long = [None, Mixture((Stream(1.0), Stream(0.5, "c" * 200, model="small")))]
        with (
            pytest.raises(steer.SteerError, match=r"row 1: with its context .* window of the model 'small' is 200"),
            llama.steered(edits=[steer.StreamEdit(too_long)], models={"small": small}) as steering,
        ):
            steering.prepare(["x", "y"])


def test_a_contrast_of_transformers_own_is_refused(llama: steer.FrozenLM, models: dict[str, steer.FrozenLM]) -> None:
    with pytest.raises(steer.SteerError, match="guidance_scale is a contrast of transformers' own"):
        generate(llama, models, guidance_scale=2.0)
    generate(llama, models, guidance_scale=1.0)


def test_a_companion_without_a_tokenizer_is_refused_for_that(
    llama: steer.FrozenLM, models: dict[str, steer.FrozenLM]
) -> None:
    with (
        steer.wrap(tiny("gpt2", seed=5)) as bare,
        pytest.raises(steer.SteerError, match="the model 'expert' was wrapped without a tokenizer"),
    ):
        generate(llama, models | {"expert": bare})
