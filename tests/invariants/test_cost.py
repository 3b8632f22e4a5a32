"""What a step costs: counted in operations, so that no clock is needed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from models import LAYERS, PAD, WIDTH
from rows import MEMORY_WIDTH, cross_attention, edits_of, random_row
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import steer
from steer.inject import Edit

BATCH = 8


class Operations(TorchDispatchMode):
    """Counts the operations that PyTorch runs, and the numbers that they touch."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        self.calls[str(func)] += 1
        self.numbers += sum(leaf.numel() for leaf in tree_leaves((args, out)) if isinstance(leaf, torch.Tensor))
        return out


def step(lm: steer.FrozenLM, edits: Iterable[Edit]) -> Operations:
    """One decoding step after a prompt of six tokens."""
    ids = torch.full((BATCH, 7), 9)
    mask = torch.ones_like(ids)
    takes_positions = lm.attachment.architecture.takes_position_ids
    with torch.no_grad(), lm.steered(states=[None] * BATCH, edits=edits, prompt_lengths=[6] * BATCH):
        cache = lm.model(ids[:, :6], attention_mask=mask[:, :6]).past_key_values
        positions = {"position_ids": torch.full((BATCH, 1), 6)} if takes_positions else {}
        with Operations() as operations:
            lm.model(ids[:, 6:], attention_mask=mask, past_key_values=cache, **positions)
    return operations


def vectors(seed: int, users: int) -> torch.Tensor:
    distinct = torch.randn(users, WIDTH, generator=torch.Generator().manual_seed(seed))
    return distinct[torch.arange(BATCH) % users]


def everything(users: int) -> list[Edit]:
    rows = [random_row(1 + i % users, share=1.0) for i in range(BATCH)]
    # The same sizes for all users, so that only their number differs.
    rows = [
        replace(row, prefix=row.prefix[:1], memory=row.memory[:1].expand(3, MEMORY_WIDTH))
        for row in rows
        if row.prefix is not None and row.memory is not None
    ]
    return edits_of(rows, cross_attention())[:-1]


def test_a_step_costs_the_same_for_one_user_and_for_many(lm: steer.FrozenLM) -> None:
    one, many = step(lm, everything(1)), step(lm, everything(BATCH))
    assert one.calls == many.calls
    assert one.numbers == many.numbers


def test_vectors_cost_one_addition_per_layer_and_something_constant(lm: steer.FrozenLM) -> None:
    plain = step(lm, [])
    steered = [
        step(lm, [steer.ResidualEdit(steer.Site("resid_post", layer), vectors(layer, BATCH)) for layer in range(n)])
        for n in range(1, LAYERS + 1)
    ]
    for more, fewer in zip(steered[1:], steered, strict=False):
        assert more.calls - fewer.calls == {"aten.addcmul.default": 1}
    constant = steered[0].calls - plain.calls
    assert constant.pop("aten.addcmul.default") == 1
    # The mask: a comparison and a cast (and, without position ids, the positions).
    assert constant.total() <= (4 if lm.attachment.architecture.takes_position_ids else 12)


def test_several_states_at_one_site_cost_one_addition(lm: steer.FrozenLM) -> None:
    site = steer.Site("resid_post", 1)
    three = [steer.ResidualEdit(site, vectors(seed, BATCH)) for seed in range(3)]
    assert step(lm, three).calls == step(lm, three[:1]).calls


def test_a_memory_is_projected_when_it_is_bound_and_not_again(lm: steer.FrozenLM) -> None:
    layer = cross_attention()
    calls: Counter[str] = Counter()
    layer.key.register_forward_hook(lambda *_: calls.update(["key"]))
    layer.query.register_forward_hook(lambda *_: calls.update(["query"]))
    row = random_row(1, share=1.0)
    edit = steer.MemoryEdit.from_rows(steer.Site("resid_mid", 1), layer, [row.memory] * 2)
    with lm.steered(edits=[edit]) as steering:
        batch = steering.prepare([row.prompt] * 2)
        lm.model.generate(**batch, **steering.generate_kwargs(), max_new_tokens=5)
    assert calls == {"key": 1, "query": 5}


def test_no_step_waits_for_a_number(lm: steer.FrozenLM) -> None:
    """Reading a value off the device would stop a GPU's pipeline at every step."""
    plain, steered = step(lm, []), step(lm, everything(BATCH))
    assert steered.calls["aten._local_scalar_dense.default"] == plain.calls["aten._local_scalar_dense.default"]


@pytest.mark.parametrize("streams", [0, 1, BATCH])
def test_one_forward_pass_per_token_however_many_streams(lm: steer.FrozenLM, streams: int) -> None:
    rows: list[int] = []
    lm.attachment.decoder.register_forward_hook(lambda module, args, output: rows.append(output[0].shape[0]))
    contexts = [f"context {i}" if i < streams else None for i in range(BATCH)]
    with lm.steered(edits=[steer.StreamEdit.contrast(contexts, torch.ones(BATCH))]) as steering:
        batch = steering.prepare(["prompt"] * BATCH)
        lm.model.generate(**batch, **steering.generate_kwargs(), max_new_tokens=5, pad_token_id=PAD)
    assert rows == [BATCH + streams] * 5
