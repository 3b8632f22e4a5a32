"""Edits begin where they say, which comes from position ids and never from counting calls."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from models import WIDTH
from rows import assert_close, cross_attention, random_row
from torch import Tensor
from transformers import DynamicCache

import steer
from steer.inject.residual import Positions

PROMPTS = ["a prompt", "xyz", "another, longer one"]
LENGTHS = [len(prompt) for prompt in PROMPTS]
VECTORS = 3 * torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))
SITE = steer.Site("resid_post", 1)


# Narrower than the longest prompt, and row 1 has none.
MARKS = torch.rand(3, 9, generator=torch.Generator().manual_seed(0)) < torch.tensor([[0.5], [0.0], [0.5]])


def edit(where: Positions | Tensor = "response") -> steer.ResidualEdit:
    return steer.ResidualEdit(SITE, VECTORS, where)


def forward(lm: steer.FrozenLM, side: str = "left", *, positions: bool = True) -> tuple[list[Tensor], Tensor]:
    """The hidden states and the mask of one forward pass over the prompts."""
    batch = lm.tokenizer(PROMPTS, padding=True, padding_side=side, return_tensors="pt")
    mask = batch["attention_mask"]
    arguments = {"input_ids": batch["input_ids"], "attention_mask": mask}
    if positions and lm.attachment.architecture.takes_position_ids:
        arguments["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        output = lm.model(**arguments, output_hidden_states=True)
    return [*output.hidden_states, output.logits], mask.bool()


def generate(lm: steer.FrozenLM, edits: Sequence[steer.ResidualEdit], **kwargs: Any) -> Tensor:
    with lm.steered(edits=edits) as steering:
        settings = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        settings |= kwargs
        output = lm.model.generate(**steering.prepare(PROMPTS), **steering.generate_kwargs(), **settings)
    return torch.stack(output.logits, dim=1)


def test_the_first_new_token_is_steered_by_default_and_unsteered_with_generated(lm: steer.FrozenLM) -> None:
    plain = generate(lm, [steer.ResidualEdit(SITE, torch.zeros(3, WIDTH))])
    default, late = generate(lm, [edit()]), generate(lm, [edit("generated")])
    assert ((default - plain)[:, 0].abs().amax(-1) > 0.1).all()
    assert torch.equal(late[:, 0], plain[:, 0])
    assert ((late - plain)[:, 1].abs().amax(-1) > 0.1).all()


@pytest.mark.parametrize("positions", [True, False], ids=["position ids", "mask only"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("where", ["response", "generated", "all", "prompt", "marked"])
def test_exactly_the_positions_that_are_named_are_edited(
    lm: steer.FrozenLM, where: Any, side: str, positions: bool
) -> None:
    if side == "left" and not positions and lm.model.config.model_type == "gpt2":
        pytest.skip("GPT-2 itself needs position ids when the padding is on the left")
    # As if the last two tokens of each row had been generated.
    lengths = [length - 2 for length in LENGTHS]
    plain, mask = forward(lm, side, positions=positions)
    with lm.steered(edits=[edit(MARKS if where == "marked" else where)], prompt_lengths=lengths):
        hidden, _ = forward(lm, side, positions=positions)
    for row, length in enumerate(lengths):
        before, after = (states[2][row, mask[row]] for states in (plain, hidden))
        index = torch.arange(len(before))
        marked = torch.cat([MARKS[row], torch.zeros(20, dtype=torch.bool)])[: len(before)]
        named = {"response": index >= length - 1, "generated": index >= length, "all": index >= 0}
        edited = {**named, "prompt": index < length, "marked": marked}[where]
        assert torch.equal(after[~edited], before[~edited])
        torch.testing.assert_close(after[edited], before[edited] + VECTORS[row])
        # What comes before all edited ones stays as it was up to the logits.
        untouched = edited.cumsum(0) == 0
        assert torch.equal(hidden[-1][row, mask[row]][untouched], plain[-1][row, mask[row]][untouched])
    # Nothing below the site moves.
    assert torch.equal(hidden[1][mask], plain[1][mask])


def test_marked_positions_are_those_of_the_rows_real_tokens(llama: steer.FrozenLM) -> None:
    """With a cache, in chunks, for beams, and beside another edit with marks of its own."""
    late = torch.zeros(3, 22, dtype=torch.bool)
    late[torch.arange(3), torch.tensor(LENGTHS) + 1] = True
    edits = [edit(MARKS), edit(late), steer.ResidualEdit(steer.Site("resid_post", 0), VECTORS, MARKS)]
    plain, early, both = generate(llama, edits[2:]), generate(llama, edits[::2]), generate(llama, edits)
    # The second new token is the first that sees it: what is marked is the position that predicts the third.
    assert_close(both[:, :2], early[:, :2])
    assert ((both - early)[:, 2].abs().amax(-1) > 0.01).all()
    assert (early - plain).abs().amax() > 0.01
    assert_close(generate(llama, edits, prefill_chunk_size=3), both)
    assert_close(generate(llama, edits, use_cache=False), both)
    with llama.steered(edits=edits) as steering:
        batch = steering.prepare(PROMPTS)
        settings = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
        together = llama.model.generate(**batch, **steering.generate_kwargs(), **settings)[:, -4:]
    for row, prompt in enumerate(PROMPTS):
        own = [e.__class__(e.site, e.vectors[row : row + 1], e.positions[row : row + 1]) for e in edits]
        with llama.steered(edits=own) as steering:
            batch = steering.prepare([prompt])
            alone = llama.model.generate(**batch, **steering.generate_kwargs(), **settings)[:, -4:]
        assert torch.equal(together[row], alone[0])


@pytest.mark.parametrize(
    ("marks", "message"),
    [
        (torch.ones(3, 4), r"need a bool tensor \[batch, n\]"),
        (torch.ones(3, dtype=torch.bool), r"this one is torch.bool \[3\]"),
        (torch.ones(3, 0, dtype=torch.bool), "n ≥ 1"),
        (torch.ones(2, 4, dtype=torch.bool), "positions for resid_post.*: 2 rows for a batch of 3"),
    ],
)
def test_marks_that_make_no_sense(llama: steer.FrozenLM, marks: Tensor, message: str) -> None:
    with pytest.raises(steer.SteerError, match=message), llama.steered(edits=[edit(marks)]):
        pass


def test_positions_without_padding_need_no_mask(lm: steer.FrozenLM) -> None:
    ids = torch.randint(5, 100, (3, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = lm.model(ids, output_hidden_states=True).hidden_states[2]
        with lm.steered(edits=[edit()], prompt_lengths=[7, 7, 3]):
            hidden = lm.model(ids, output_hidden_states=True).hidden_states[2]
    moved = (hidden - plain).abs().amax(-1) > 0
    assert moved.tolist() == [[False] * 6 + [True]] * 2 + [[False] * 2 + [True] * 5]


def test_a_conversation_that_continues_a_cache(lm: steer.FrozenLM) -> None:
    """Only new tokens pass the model in the second turn; its last one is where the steering begins."""
    prompt = lm.tokenizer("first turn, then the second", return_tensors="pt").input_ids
    settings = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    one = steer.ResidualEdit(SITE, VECTORS[:1])

    def logits(cache: DynamicCache | None) -> Tensor:
        with lm.steered(edits=[one]) as steering:
            output = lm.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                past_key_values=cache,
                **steering.generate_kwargs(),
                **settings,
            )
        return torch.stack(output.logits, dim=1)

    cache = DynamicCache(config=lm.model.config)
    with torch.no_grad():
        lm.model(prompt[:, :11], past_key_values=cache, use_cache=True)
    assert_close(logits(cache), logits(None))


def test_a_forward_pass_without_prompt_lengths_is_refused_where_they_matter(lm: steer.FrozenLM) -> None:
    for where in ("response", "generated", "prompt"):
        with pytest.raises(steer.SteerError, match="prompt_lengths"), lm.steered(edits=[edit(where)]):
            forward(lm)
    with lm.steered(edits=[edit("all"), edit(MARKS)]):
        forward(lm)


def test_other_numbers_of_rows_are_refused(llama: steer.FrozenLM) -> None:
    with pytest.raises(steer.SteerError, match="3 prompt lengths for a batch of 2"):
        llama.steered(edits=[steer.ResidualEdit(SITE, VECTORS[:2])], prompt_lengths=LENGTHS).__enter__()
    with (
        pytest.raises(steer.SteerError, match="2 rows are bound and the forward pass has 3"),
        llama.steered(edits=[steer.ResidualEdit(SITE, VECTORS[:2])], prompt_lengths=LENGTHS[:2]),
    ):
        forward(llama)
    with (
        pytest.raises(steer.SteerError, match=r"1 rows are bound.*has 2; beams .*generate_kwargs"),
        llama.steered(edits=[steer.ResidualEdit(SITE, VECTORS[:1])], prompt_lengths=LENGTHS[:1]),
    ):
        llama.model.generate(torch.tensor([[5, 6]]), num_beams=2, max_new_tokens=2)
    with (
        pytest.raises(steer.SteerError, match="3 prompts for 2 bound rows"),
        llama.steered(edits=[steer.ResidualEdit(SITE, VECTORS[:2])]) as steering,
    ):
        llama.model.generate(torch.full((3, 4), 7), **steering.generate_kwargs())


def test_a_nested_binding_and_one_from_another_thread_are_refused(llama: steer.FrozenLM) -> None:
    messages: list[str] = []

    def attempt(action) -> None:  # type: ignore[no-untyped-def]
        try:
            action()
        except steer.SteerError as error:
            messages.append(str(error))

    def bind() -> None:
        with llama.steered(edits=[edit("all")]):
            pass

    with llama.steered(edits=[edit("all")]):
        first, _ = forward(llama)
        attempt(bind)
        for action in (bind, lambda: forward(llama)):
            thread = threading.Thread(target=attempt, args=[action])
            thread.start()
            thread.join()
        # The binding that there was is unharmed.
        assert torch.equal(forward(llama)[0][-1], first[-1])
    assert len(messages) == 3
    assert "enclosing block" in messages[0]
    assert "another thread" in messages[1]
    assert "another thread is steering" in messages[2]


def test_what_never_took_part_is_reported(llama: steer.FrozenLM) -> None:
    row = random_row(1, share=1.0)
    embeddings = llama.model.get_input_embeddings()(torch.tensor([[5, 6, 7]]))
    prefix = steer.PrefixEdit.from_rows([row.prefix], WIDTH)
    steered = llama.steered(edits=[prefix], prompt_lengths=[3])
    with pytest.raises(steer.SteerError, match="the prefix never took part"), steered:
        llama.model(inputs_embeds=embeddings)
    contrast = steer.StreamEdit.contrast([row.context], torch.ones(1))
    with (
        pytest.raises(steer.SteerError, match="the contrasted streams never took part"),
        llama.steered(edits=[contrast]),
    ):
        llama.model(torch.tensor([[5, 6, 7]]))
    late = steer.ResidualEdit(steer.Site("resid_post", 2), VECTORS[:1], positions="all")
    # As if compiled code had left it out.
    llama.attachment.decoder.layers[2]._forward_hooks.clear()
    with pytest.raises(steer.SteerError, match=r"vectors at resid_post\[2\]"), llama.steered(edits=[late]):
        llama.model(torch.tensor([[5, 6, 7]]))


def test_a_block_without_a_forward_pass_warns(llama: steer.FrozenLM) -> None:
    with pytest.warns(UserWarning, match="without a forward pass") as caught, llama.steered(edits=[edit()]):
        pass
    assert caught[0].filename == __file__


def test_an_exception_in_the_block_is_not_replaced_by_a_report(llama: steer.FrozenLM) -> None:
    memory = steer.MemoryEdit.from_rows(steer.Site("resid_mid", 1), cross_attention(), [random_row(1, 1.0).memory])
    with pytest.raises(KeyError), llama.steered(edits=[memory]):
        raise KeyError


@pytest.mark.parametrize("settings", [{"prompt_lookup_num_tokens": 2}, {"num_beams": 2, "do_sample": True}], ids=str)
def test_ways_to_decode_that_do_not_work_yet_are_refused(llama: steer.FrozenLM, settings: dict[str, object]) -> None:
    with pytest.raises(steer.SteerError, match="not supported"), llama.steered(edits=[edit()]) as steering:
        llama.model.generate(**steering.prepare(PROMPTS), **steering.generate_kwargs(), max_new_tokens=2, **settings)
