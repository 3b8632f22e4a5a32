"""Under torch.compile there is one graph, no break, and no recompilation when users, strengths or λ change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import ARCHITECTURES, WIDTH, WRAPPED, tiny, tokenizer
from rows import MARKED, MEMORY_WIDTH, RANK, Generated, Row, assert_close, cross_attention, edits_of, generate
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from transformers import CompileConfig, PreTrainedModel

import steer
from steer.inject import Edit, SiteEdit

# Small graphs, for what does not depend on the architecture.
SMALL = "gpt2"
# Compiling is what takes time.
FORWARD = ["llama", "gemma3", "gpt_oss", "gpt2", "gpt_neox", "bloom", "falcon", "llama_lora"]
DECODING = ["llama", "gemma3", "bloom"]


def every(first: Sequence[str]) -> list[object]:
    """All architectures, those that are not named in the full run only."""
    names = [*ARCHITECTURES, *WRAPPED]
    return [name if name in first else pytest.param(name, marks=pytest.mark.full) for name in names]


PROMPTS = ["a prompt", "x", "another, longer one", "the last"]
MIDDLE = steer.Site("resid_mid", 1)
# Two of vectors, 2 + 4 + 4 of the other residual edits, 4 starts and 1 of marks, 12 of the condition, 3 of the memory
# and 3 of the prefix.
BUFFERS = 35


@pytest.fixture
def small() -> Iterator[steer.FrozenLM]:
    with steer.wrap(tiny(SMALL), tokenizer()) as lm:
        yield lm


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def batch(seed: int, slots: Sequence[int] = (4, 3)) -> list[Row]:
    """Rows of other users for the same prompts: so many tokens of memory and prefix in row 0, and fewer in others."""
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, width: int) -> Tensor:
        return torch.randn(rows, width, generator=generator)

    rows = [
        Row(
            prompt,
            vector=2 * normal(2, WIDTH),
            memory=normal(slots[0] if i == 0 else min(i, slots[0]), MEMORY_WIDTH),
            prefix=normal(slots[1] if i == 0 else min((seed + i) % 3, slots[1]), WIDTH),
            context=f"context {i}",
            lam=float(i - seed),
            turn=normal(1, WIDTH)[0],
            clamp=normal(1, WIDTH)[0],
            marks=normal(1, MARKED)[0] > 0,
            reft=normal(RANK, 2 * WIDTH + 1) / WIDTH**0.5,
            condition=normal(1, WIDTH)[0],
        )
        for i, prompt in enumerate(PROMPTS)
    ]
    nobody = 1 + seed % 3
    rows[nobody] = Row(PROMPTS[nobody])
    return rows


def prepared(name: str) -> steer.FrozenLM:
    lm = steer.wrap(tiny(name), tokenizer(), sites=["embed", "resid_post[0]", "resid_post[1]"])
    lm.declare(lm.memory_site(MIDDLE))
    return lm


def otherwise(edits: Sequence[Edit]) -> list[Edit]:
    """The same edits at other strengths, with other targets, thresholds, limits, marks and sides."""
    strengths = torch.tensor([0.5, 0.0, 2.0, -1.0])
    changed = [edit.at_strength(strengths) if isinstance(edit, SiteEdit) else edit for edit in edits]
    for i, edit in enumerate(changed):
        if isinstance(edit, steer.ProjectionEdit):
            assert isinstance(edit.positions, Tensor)
            changed[i] = replace(edit, targets=-3 * strengths, positions=~edit.positions, limit="at_least")
        elif isinstance(edit, steer.LowRankEdit) and edit.condition is not None:
            changed[i] = replace(edit, condition=replace(edit.condition, thresholds=0.1 * strengths, acts="below"))
    return changed


def forward(  # type: ignore[no-untyped-def]
    lm: steer.FrozenLM, call, rows: Sequence[Row], change: Callable[[Sequence[Edit]], Sequence[Edit]] = list
) -> Tensor:
    """Logits of one forward pass over 24 tokens, whatever of them belongs to the rows' prompts."""
    edits = change(edits_of(rows, cross_attention())[:-1])
    ids = torch.randint(5, 100, (len(rows), 24), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    arguments = {"input_ids": ids, "attention_mask": mask}
    if lm.attachment.architecture.takes_position_ids:
        arguments["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), lm.steered(edits=edits, prompt_lengths=[10 + i for i in range(len(rows))]):
        return call(**arguments, use_cache=False).logits


def buffers(lm: steer.FrozenLM) -> list[int]:
    """Where everything lies that the operators keep between forward passes."""
    pool = lm.operators
    keepers = [*pool.gates.values(), *pool.marked.values(), *pool.deciding.values(), *pool.editing.values()]
    keepers += [*pool.attending.values(), pool.overwriting]
    held = [tensor for keeper in keepers for name, tensor in sorted(vars(keeper).items()) if name != "marks"]
    return [tensor.data_ptr() for tensor in held if isinstance(tensor, torch.Tensor)]


@pytest.mark.parametrize("arch", every(FORWARD))
def test_a_forward_pass_is_one_graph_for_all_users(arch: str) -> None:
    lm, counter = prepared(arch), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lm.model.forward, backend=counter, fullgraph=True)
    results, places = [], []
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(4):
            results.append(forward(lm, compiled, batch(seed)))
            places.append(buffers(lm))
            forward(lm, compiled, batch(seed))
        rows = batch(0)
        weaker = [replace(row, vector=None if row.vector is None else 0.1 * row.vector) for row in rows]
        results.append(forward(lm, compiled, weaker))
        changed = forward(lm, compiled, rows, otherwise)
    assert counter.frame_count == 1
    # The same buffers, with other values.
    assert len(places[0]) == BUFFERS
    assert places == [places[0]] * 4
    for result, rows in zip(results, [*map(batch, range(4)), weaker], strict=True):
        assert_close(result, forward(lm, lm.model, rows))
    assert_close(changed, forward(lm, lm.model, batch(0), otherwise))
    for other in [*results[1:], changed]:
        assert (other - results[0]).abs().max() > 0.1


def test_other_users_are_written_into_the_same_buffers(small: steer.FrozenLM) -> None:
    places = []
    for seed in range(3):
        generate(small, [row.without_context() for row in batch(seed)], cross_attention())
        places.append(buffers(small))
    assert len(places[0]) == BUFFERS
    assert places == [places[0]] * 3


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_other_amounts_of_memory_and_prefix_end_in_one_graph(arch: str) -> None:
    """Sizes of soft tokens and memories are shapes. The compiler may need one graph to see that they vary."""
    lm, counter = prepared(arch), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lm.model.forward, backend=counter, fullgraph=True)
    for slots in [(4, 3), (5, 4), (0, 0), (7, 6), (1, 1), (9, 8)]:
        rows = batch(0, slots)
        assert_close(forward(lm, compiled, rows), forward(lm, lm.model, rows))
    assert counter.frame_count <= 2


def aot_eager(**settings: object) -> CompileConfig:
    config = CompileConfig(backend="aot_eager", mode=None, **settings)  # type: ignore[arg-type]
    # Else transformers compiles on accelerators only.
    config._compile_all_devices = True  # type: ignore[assignment]
    return config


def static(lm: steer.FrozenLM, rows: Sequence[Row], backend: str = "aot_eager", **settings: object) -> Generated:
    """Generation with a static cache: an eager prefill, and compiled decoding."""
    config = aot_eager(fullgraph=True)
    config.backend = backend
    return generate(
        lm,
        rows,
        cross_attention(),
        cache_implementation="static",
        compile_config=config,
        max_cache_len=64,
        **settings,  # type: ignore[arg-type]
    )


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("arch", every(DECODING))
def test_generation_decodes_in_one_graph_for_all_users(arch: str) -> None:
    lm = prepared(arch)
    plain = [Row(prompt) for prompt in PROMPTS]
    static(lm, batch(0))
    count = graphs()
    # A static cache counts tokens in a number until its window is full, which costs transformers a graph itself.
    assert count == (1 if lm.sliding_window is None else 2)
    for seed in range(1, 4):
        rows = batch(seed)
        compiled, eager = static(lm, rows), generate(lm, rows, cross_attention())
        assert_close(compiled.logits, eager.logits)
        assert torch.equal(compiled.tokens, eager.tokens)
    # Another λ in all rows, and none.
    for lam in (0.0, -1.0, 3.0):
        static(lm, [replace(row, lam=lam) for row in batch(0)])
    assert graphs() == count
    assert not counters["graph_break"]
    # With fewer streams the batch has fewer rows, which is another shape.
    assert_close(static(lm, plain).logits, generate(lm, plain, cross_attention()).logits)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_prefixes_at_places_and_as_keys_and_values_decode_in_one_graph(arch: str) -> None:
    lm, counts = prepared(arch), [3, 0, 2, 1]
    rows = [Row([prompt[:3], steer.Place("here"), prompt[3:], "."]) for prompt in PROMPTS]  # type: ignore[arg-type]
    results = []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        # Other users, of whom others have nothing.
        counts = [counts[-1], *counts[:-1]]
        prefixes = [torch.randn(count, WIDTH, generator=generator) if count else None for count in counts]
        edits: list[Edit] = [
            steer.KeyValueEdit.from_rows(steer.key_values_of(lm, prefixes[::-1])),
            steer.PrefixEdit.from_rows(prefixes, WIDTH, place="here"),
            # Sizes are shapes, so there are as many soft tokens as before in the longest row.
            steer.PrefixEdit.from_rows([torch.randn(3 - count, WIDTH) for count in counts], WIDTH),
        ]
        compiled, eager = static(lm, rows, edits=edits), generate(lm, rows, cross_attention(), edits=edits)
        assert_close(compiled.logits, eager.logits)
        assert torch.equal(compiled.tokens, eager.tokens)
        results.append(compiled.logits)
        assert graphs() == 1
    assert not counters["graph_break"]
    assert all((other - results[0]).abs().max() > 0.1 for other in results[1:])


def test_a_closed_context_is_not_steered_by_compiled_code(small: steer.FrozenLM) -> None:
    """And an open one is, whichever comes first."""
    rows = [row.without_context() for row in batch(0)]
    small.declare(MIDDLE)
    plain = [Row(prompt) for prompt in PROMPTS]
    expected = generate(small, plain, cross_attention()), generate(small, rows, cross_attention())

    def unsteered() -> list[list[int]]:
        settings = {"cache_implementation": "static", "compile_config": aot_eager(fullgraph=True)}
        return small.generate_tokens(PROMPTS, max_new_tokens=6, **settings)

    for _ in range(2):
        assert unsteered() == expected[0].tokens.tolist()
        assert torch.equal(static(small, rows).tokens, expected[1].tokens)
    assert counters["stats"]["unique_graphs"] >= 2


def test_batches_from_a_bank_share_a_graph_whoever_is_in_them(
    small: steer.FrozenLM, histories: list[steer.History], tmp_path: Path
) -> None:
    """Ann has three states, bob one, and a row may be nobody's."""
    bank = steer.Bank(tmp_path / "people.bank")
    memory = steer.UserLLM(layer=1, read_layer=1, heads=4, steps=1)
    bank.put_artifact(memory.train(small, histories))
    style = steer.StyleVector(layer=1, neutral="field:bland")
    for history in histories:
        bank[history.user_id, "style"] = style.fit(small, history)
    bank["ann", "memory"] = memory.fit(small, histories[0])
    bank["ann", "prefix"] = steer.PrefixTuning(length=3, steps=1).fit(small, histories[0])
    settings = {"cache_implementation": "static", "compile_config": aot_eager(), "max_cache_len": 64}
    results = []
    for users in [("ann", "bob"), ("bob", None), (None, None), ("ann", "ann"), (None, "bob")]:
        arguments = {"users": users, "bank": bank, "max_new_tokens": 6}
        results.append(small.generate_tokens(["hello", "you"], **arguments, **settings))
        assert results[-1] == small.generate_tokens(["hello", "you"], **arguments)
    # One for the sizes of the first batch, and one for all sizes.
    assert graphs() <= 2
    assert results[0][0] == results[3][0] != results[2][0]
    assert results[1][1] == results[2][1]


def compiled_by_generate(model: PreTrainedModel) -> None:
    ids = tokenizer()(PROMPTS[0], return_tensors="pt").input_ids
    model.generate(ids, max_new_tokens=3, cache_implementation="static", compile_config=aot_eager(), max_cache_len=64)


def compiled_in_place(model: PreTrainedModel) -> None:
    model.compile(backend="aot_eager")
    model(torch.tensor([[5, 6, 7]]))


def compiled_by_blocks(model: PreTrainedModel) -> None:
    for block in model.base_model.h:
        block.compile(backend="aot_eager")
    model(torch.tensor([[5, 6, 7]]))


@pytest.mark.parametrize(
    "compile_", [compiled_by_generate, pytest.param(compiled_in_place, marks=pytest.mark.full), compiled_by_blocks]
)
def test_a_model_compiled_before_is_refused_until_it_is_uncompiled(compile_) -> None:  # type: ignore[no-untyped-def]
    model = tiny(SMALL)
    compile_(model)
    with pytest.raises(steer.SteerError, match="compiled before it was wrapped"):
        steer.wrap(model, tokenizer())
    steer.uncompile(model)
    with steer.wrap(model, tokenizer()) as lm:
        lm.declare(MIDDLE)
        compile_(model)
        rows = [row.without_context() for row in batch(0)]
        compiled = static(lm, rows)
    with steer.wrap(tiny(SMALL), tokenizer()) as never_compiled:
        assert_close(compiled.logits, generate(never_compiled, rows, cross_attention()).logits)


def test_the_result_of_torch_compile_is_refused() -> None:
    with pytest.raises(steer.SteerError, match="wrap the model itself"):
        steer.wrap(torch.compile(tiny(SMALL), backend="aot_eager"), tokenizer())


def test_a_site_declared_after_compilation_is_refused_until_it_is_uncompiled(small: steer.FrozenLM) -> None:
    rows = [row.without_context() for row in batch(0)]
    static(small, [replace(row, memory=None) for row in rows], edits=edits_of(rows, cross_attention())[:2])
    with pytest.raises(steer.SteerError, match=r"resid_mid\[1\] was not declared before the model was compiled"):
        static(small, rows)
    steer.uncompile(small.model)
    small.attachment.blocks[0].compile(backend="aot_eager")
    with pytest.raises(steer.SteerError, match=r"resid_mid\[1\] was not declared"):
        small.declare(MIDDLE)
    steer.uncompile(small.model)
    assert_close(static(small, rows).logits, generate(small, rows, cross_attention()).logits)


def test_code_compiled_behind_the_back_is_reported() -> None:
    """`torch.compile(model.forward)` leaves no trace on the model, so only the silence of the hooks gives it away."""
    model = tiny(SMALL).requires_grad_(False)
    compiled = torch.compile(model.forward, backend="aot_eager")
    ids = torch.tensor([[5, 6, 7]])
    compiled(ids)
    with steer.wrap(model, tokenizer()) as lm:
        edit = steer.ResidualEdit(steer.Site("resid_post", 1), torch.ones(1, WIDTH), positions="all")
        with pytest.warns(UserWarning, match="without a forward pass"), lm.steered(edits=[edit]):
            compiled(ids)


@pytest.mark.parametrize("arch", ["gpt2", pytest.param("llama", marks=pytest.mark.full)])
def test_inductor(arch: str) -> None:
    lm = prepared(arch)
    for seed in range(2):
        rows = batch(seed)
        assert_close(static(lm, rows, "inductor").logits, generate(lm, rows, cross_attention()).logits)
    assert graphs() == 1
    assert not counters["graph_break"]
