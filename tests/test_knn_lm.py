"""kNN-LM over users' own texts: the store, one step written out, and what it is mixed into."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import WIDTH, tiny, tokenizer
from rows import assert_close
from torch import Tensor
from transformers import CompileConfig

import steer
from steer import KNNLM, CoS, Site, UserState
from steer.inject import NeighbourEdit
from steer.kernels import mix_neighbours, naive_mix_neighbours
from steer.read import response_span
from steer.score import row_losses

METHOD = KNNLM(weight=0.4, k=5, temperature=0.5)
PROMPTS = ["greet me", "a longer prompt, of ann", "x"]
STEPS = 5


@pytest.fixture(params=["llama", "gpt2", "gemma3", "gpt_neox", "opt"])
def lm(request: pytest.FixtureRequest) -> Iterator[steer.FrozenLM]:
    with steer.wrap(tiny(request.param), tokenizer()) as lm:
        yield lm


@pytest.fixture
def fitted(llama: steer.FrozenLM, histories: list[steer.History]) -> list[UserState]:
    return [METHOD.fit(llama, history) for history in histories]


def generate(
    lm: steer.FrozenLM,
    states: list[Any],
    prompts: list[str] = PROMPTS,
    *,
    seeds: list[int] | None = None,
    **kwargs: Any,
) -> Any:
    settings = {"max_new_tokens": STEPS, "do_sample": False, "output_scores": True, "output_logits": True} | kwargs
    with lm.steered(states=states) as steering:
        batch = steering.prepare(prompts)
        output = lm.model.generate(
            **batch, **steering.generate_kwargs(seeds=seeds), return_dict_in_generate=True, **settings
        )
    output.sequences = output.sequences[:, batch["input_ids"].shape[1] :]
    return output


def plain(lm: steer.FrozenLM, text: str) -> tuple[Tensor, Tensor]:
    """Final norm's outputs `[pos, d]` and next-token logits `[vocab]` of the plain model, in float64."""
    assert lm.tokenizer is not None
    kept: list[Tensor] = []
    norm = lm.attachment.place_of(Site("ln_final")).module
    handle = norm.register_forward_hook(lambda module, args, output: kept.append(output))
    with torch.no_grad():
        logits = lm.model(torch.tensor([lm.tokenizer(text).input_ids])).logits[0, -1]
    handle.remove()
    return kept[0][0].double(), logits.double()


def by_hand(lm: steer.FrozenLM, history: steer.History, text: str, logits: Tensor | None = None) -> Tensor:
    """Khandelwal et al., Eq. 2 and 3, with METHOD's numbers."""
    assert lm.tokenizer is not None
    keys, after = [], []
    for record in history:
        states, _ = plain(lm, f"{record.prompt}{record.response}")
        tokens = lm.tokenizer(f"{record.prompt}{record.response}").input_ids
        for at in range(len(record.prompt or ""), len(tokens)):
            keys.append(states[at - 1])
            after.append(tokens[at])
    spread = ((torch.stack(keys) - torch.stack(keys).mean(0)) ** 2).sum(1).mean()
    states, own = plain(lm, text)
    distances = ((torch.stack(keys) - states[-1]) ** 2).sum(1)
    recalled = torch.zeros_like(own)
    for entry in distances.argsort()[:5].tolist():
        recalled[after[entry]] += torch.exp(-(distances[entry] - distances.min()) / (0.5 * spread))
    return (0.4 * recalled / recalled.sum() + 0.6 * (own if logits is None else logits).softmax(-1)).log()


def test_steps_are_the_papers_equation(lm: steer.FrozenLM, histories: list[steer.History]) -> None:
    ann, bob = histories
    output = generate(lm, [METHOD.fit(lm, ann), METHOD.fit(lm, bob), None])
    assert lm.tokenizer is not None
    for step in (0, STEPS - 1):
        said = [prompt + lm.tokenizer.decode(row[:step]) for prompt, row in zip(PROMPTS, output.sequences, strict=True)]
        for row, history in enumerate(histories):
            assert_close(output.scores[step][row].double(), by_hand(lm, history, said[row]))
        # A row without a store keeps its logits, bit for bit.
        assert torch.equal(output.scores[step][2], output.logits[step][2])
        assert_close(output.scores[step][2].double(), plain(lm, said[2])[1])


def test_neutral_values_change_nothing(llama: steer.FrozenLM, histories: list[steer.History]) -> None:
    state = KNNLM(weight=0.0).fit(llama, histories[0])
    output = generate(llama, [state, None, state])
    assert all(torch.equal(*step) for step in zip(output.scores, output.logits, strict=True))


def test_rows_search_in_their_own_store(llama: steer.FrozenLM, fitted: list[UserState]) -> None:
    """With all the weight on it, a row says what its user wrote and nothing else."""
    states = [
        KNNLM(weight=1.0).fit(llama, steer.History(user, (steer.Record(user, text),)))
        for user, text in [("ann", "abcabcabc"), ("bob", "xyzxyz")]
    ]
    output = generate(llama, [*states, fitted[0]])
    assert llama.tokenizer is not None
    texts = [llama.tokenizer.decode(row) for row in output.sequences]
    assert set(texts[0]) <= set("abc")
    assert set(texts[1]) <= set("xyz")
    # Alone, in another order and among others it is the same.
    for row, state in enumerate([*states, fitted[0]]):
        alone = generate(llama, [state], PROMPTS[row : row + 1])
        assert torch.equal(alone.sequences[0], output.sequences[row])
        assert_close(alone.scores[-1][0].exp(), output.scores[-1][row].exp())


def test_neighbours_come_after_streams_and_beside_vectors(
    llama: steer.FrozenLM, fitted: list[UserState], histories: list[steer.History]
) -> None:
    cos = CoS(lam=1.5).state("I am a pirate.")
    output = generate(llama, [[fitted[0], cos], cos, fitted[0]])
    contrasted = 2.5 * plain(llama, f"I am a pirate. {PROMPTS[0]}")[1] - 1.5 * plain(llama, PROMPTS[0])[1]
    expected = by_hand(llama, histories[0], f"I am a pirate. {PROMPTS[0]}", contrasted)
    assert_close(output.scores[0][0].double(), expected)
    vector = steer.GivenVector().state({"resid_post[1]": torch.ones(WIDTH)}, lm=llama)
    steered, both = generate(llama, [vector, [vector, fitted[0]], None]), generate(llama, [[vector, fitted[0]]] * 3)
    own = steered.logits[0][0].softmax(-1)
    share = both.scores[0][0].exp() - 0.6 * own
    assert_close(share.sum(), torch.tensor(0.4))
    assert (share > -1e-6).all()


def test_copies_seeds_and_beams(llama: steer.FrozenLM, fitted: list[UserState]) -> None:
    states = [fitted[0], None, [fitted[1], CoS(lam=0.5).state("short")]]
    sampled: dict[str, Any] = {"do_sample": True, "temperature": 3.0, "num_return_sequences": 2}
    together = generate(llama, states, seeds=[1, 2, 3], **sampled).sequences.unflatten(0, (3, 2))
    assert len({tuple(row.tolist()) for row in together.flatten(0, 1)}) == 6
    for row in range(3):
        alone = generate(llama, states[row : row + 1], PROMPTS[row : row + 1], seeds=[row + 1], **sampled)
        assert torch.equal(alone.sequences, together[row])
    beams = {"num_beams": 3, "num_return_sequences": 2}
    together = generate(llama, [*fitted, None], **beams)
    rows = together.sequences.unflatten(0, (3, 2))
    for row, state in enumerate([*fitted, None]):
        alone = generate(llama, [state], PROMPTS[row : row + 1], **beams)
        assert torch.equal(alone.sequences, rows[row])
        assert_close(alone.sequences_scores, together.sequences_scores[2 * row : 2 * row + 2])
    # What a beam is worth is the sum of the mixed log-probabilities.
    assert llama.tokenizer is not None
    total, best = 0.0, rows[0, 0]
    for step, token in enumerate(best):
        forced = generate(
            llama, [fitted[0]], [PROMPTS[0] + llama.tokenizer.decode(best[:step])], max_new_tokens=1
        ).scores[0][0]
        total += forced[token].item()
    assert together.sequences_scores[0].item() == pytest.approx(total / STEPS, abs=1e-4)


def test_static_caches_compiled_steps_and_chunks(llama: steer.FrozenLM, fitted: list[UserState]) -> None:
    states = [fitted[0], None, [fitted[1], CoS(lam=0.5).state("short")]]
    llama.declare("ln_final")
    eager = generate(llama, states)
    chunked = generate(llama, states[:2], PROMPTS[:2], prefill_chunk_size=4)
    assert torch.equal(chunked.sequences, eager.sequences[:2])
    config = CompileConfig(backend="aot_eager", fullgraph=True)
    config._compile_all_devices = True  # type: ignore[assignment]
    graphs = 0
    for users in (states, [fitted[1], fitted[0], [fitted[0], CoS(lam=1.0).state("other")]]):
        compiled = generate(llama, users, cache_implementation="static", compile_config=config, max_cache_len=64)
        expected = generate(llama, users)
        assert torch.equal(compiled.sequences, expected.sequences)
        assert_close(compiled.scores[-1].exp(), expected.scores[-1].exp())
        found = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert found > 0
        assert graphs in (0, found), "other users were compiled for anew"
        graphs = found
    torch._dynamo.reset()


def test_a_bank_keeps_the_store(
    llama: steer.FrozenLM, fitted: list[UserState], histories: list[steer.History], tmp_path: Path
) -> None:
    bank = steer.Bank(tmp_path / "people.bank")
    bank.update({(history.user_id, "own"): state for history, state in zip(histories, fitted, strict=True)})
    given = llama.generate_tokens(PROMPTS, states=[fitted[1], None, fitted[0]], max_new_tokens=STEPS)
    users = ["bob", None, "ann"]
    assert llama.generate_tokens(PROMPTS, users, steer.Bank(bank.path), max_new_tokens=STEPS) == given
    assert given != llama.generate_tokens(PROMPTS, max_new_tokens=STEPS)
    (keys, tokens), history = fitted[0].tensors.values(), histories[0]
    assert keys.shape == (sum(len(record.response) for record in history), WIDTH)
    assert llama.tokenizer is not None
    assert llama.tokenizer.decode(tokens) == "".join(record.response for record in history)
    # Nobody in a batch: the kind is prepared for, and nothing is changed.
    assert llama.generate_tokens(["x"], [None], bank, max_new_tokens=3) == llama.generate_tokens(
        ["x"], max_new_tokens=3
    )


@pytest.mark.parametrize(
    ("batch", "copies", "vocab", "entries", "width", "count"),
    [(1, 1, 7, 1, 3, 1), (3, 2, 63, 37, 13, 5), (2, 3, 101, 8, 48, 1000)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_is_its_reference(
    batch: int, copies: int, vocab: int, entries: int, width: int, count: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(batch + vocab)
    logits = 3 * torch.randn(batch, copies, vocab, generator=generator).to(dtype)
    logits[..., 1] = -torch.inf
    arguments = (
        logits,
        torch.randn(batch, copies, width, generator=generator),
        torch.randn(batch, entries, width, generator=generator),
        torch.randint(vocab, (batch, entries), generator=generator),
        torch.tensor([entries, 0, max(entries // 2, 1)][:batch]),
        torch.tensor([0.3, 1.0, 0.0][:batch]),
        torch.tensor([0.4, 0.5, 1.0][:batch]),
        count,
    )
    found, expected = mix_neighbours(*arguments), naive_mix_neighbours(*arguments)
    assert torch.equal(found.isneginf(), expected.isneginf())
    assert not found.isnan().any()
    assert_close(found.nan_to_num(neginf=0.0).double(), expected.nan_to_num(neginf=0.0), 1e-5)
    if batch > 1:
        assert torch.equal(found[1], logits[1].float())


def test_what_cannot_be_recalled_is_refused(
    llama: steer.FrozenLM, fitted: list[UserState], histories: list[steer.History]
) -> None:
    for bad, message in [
        ({"weight": 1.1}, "not a share"),
        ({"weight": float("nan")}, "not a share"),
        ({"k": 0}, "k must be above 0"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"site": "nowhere"}, "not a site"),
    ]:
        with pytest.raises(steer.SteerError, match=message):
            KNNLM(**bad)
    with pytest.raises(steer.SteerError, match="no records to remember"):
        METHOD.fit(llama, steer.History("ann", ()))
    with pytest.raises(steer.SteerError, match="too short to remember"):
        METHOD.fit(llama, steer.History("ann", (steer.Record("ann", "ab"),)))
    store = torch.ones(2, WIDTH), torch.ones(2)
    with pytest.raises(steer.SteerError, match="between 0 and 1"):
        NeighbourEdit.from_rows(Site("ln_final"), [store], [1.5], [1.0], count=1, width=WIDTH)
    with pytest.raises(steer.SteerError, match="finite and not negative"):
        NeighbourEdit.from_rows(Site("ln_final"), [store], [0.5], [float("inf")], count=1, width=WIDTH)
    with pytest.raises(steer.SteerError, match="one neighbour at least"):
        NeighbourEdit.from_rows(Site("ln_final"), [store], [0.5], [1.0], count=0, width=WIDTH)
    narrow = NeighbourEdit.from_rows(Site("ln_final"), [None], [0.5], [1.0], count=1, width=3)
    with pytest.raises(steer.SteerError, match="3 wide"), llama.steered(edits=[narrow]):
        pass
    # Where no token is chosen, nothing can be mixed into the choice.
    with (
        pytest.raises(steer.SteerError, match="the neighbours never took part"),
        llama.steered(states=[fitted[0]]) as steering,
    ):
        llama.model(**steering.prepare(["x"]))
    with (
        pytest.warns(match="without a forward pass"),
        llama.steered(states=[fitted[0]]) as steering,
        pytest.raises(steer.SteerError, match="neighbours need steer's own generation"),
    ):
        steering.hand_over()
    edit = NeighbourEdit.from_rows(Site("ln_final"), [store], [0.5], [1.0], count=1, width=WIDTH)
    with pytest.raises(steer.SteerError, match="cannot be scored yet"):
        row_losses(llama, response_span(llama, "some text"), [edit], 1)
