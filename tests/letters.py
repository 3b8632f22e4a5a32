"""What tests share of methods whose states are embeddings of texts: users of one letter each, and what holds of all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch

import steer
from steer import History, Record
from steer.likelihood import response_losses
from steer.methods.embedded_texts import EmbeddedTexts
from steer.train import split_examples, train_method

M = TypeVar("M", bound=EmbeddedTexts)


def history(user: str, word: str, count: int = 6) -> History:
    records = [Record(user, f"{word} {word} {i}", f"question {i}", time=float(i)) for i in range(count)]
    return History(user, tuple(records))


HISTORIES = [history("ann", "aaa"), history("bob", "bbbb", 5), history("cid", "cc", 4), history("dot", "ddd")]


def write_histories(file: Path) -> None:
    """As the commands read them."""
    records = [record for whole in HISTORIES for record in whole]
    lines = (
        {"user_id": r.user_id, "prompt": r.prompt, "text": r.response, "id": r.id, "time": r.time} for r in records
    )
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def trained(lm: steer.FrozenLM, method: M, folder: Path) -> M:
    """The method after a few steps."""
    train_method(lm, method, HISTORIES, out=folder / "out", steps=3, batch=4, strangers=0.0, learning_rate=1e-2)
    return method


def assert_rows_are_alone(lm: steer.FrozenLM, bank: steer.Bank) -> list[list[int]]:
    """Users of a bank, among them a plain row, generate in a batch what each generates alone."""
    users, prompts = ["ann", None, "dot", "cid"], ["question 5", "question 5", "x", "question 3"]
    together = lm.generate_tokens(prompts, users, bank, max_new_tokens=5)
    assert together == [
        lm.generate_tokens([p], [u], bank, max_new_tokens=5)[0] for p, u in zip(prompts, users, strict=True)
    ]
    assert together[1] == lm.generate_tokens(["question 5"], max_new_tokens=5)[0]
    return together


def assert_it_learns_who_writes(
    lm: steer.FrozenLM, method: EmbeddedTexts, folder: Path, learning_rate: float
) -> dict[str, steer.UserState]:
    """Later texts become likelier with one's own state than with another's; returns the states."""
    split = split_examples(lm, HISTORIES, strangers=0.0, later=0.2)
    settings = {"steps": 60, "batch": 8, "strangers": 0.0, "later": 0.2, "learning_rate": learning_rate}
    _, result = train_method(lm, method, HISTORIES, out=folder / "out", **settings)  # type: ignore[arg-type]
    first = next(entry["eval_loss"] for entry in result.log if "eval_loss" in entry)
    assert result.losses["all"] < first - 0.5
    states = {h.user_id: method.fit(lm, h.first(3)) for h in HISTORIES}
    own, other = [], []
    for example in split.later:
        users = [example.record.user_id, *sorted(set(states) - {example.record.user_id})]
        rows = [states[user] for user in users]
        losses, _ = response_losses(lm, [example.span] * len(rows), method.bind(lm, rows, rows[0], method.artifact))
        own.append(losses[0].item())
        other.append(losses[1:].mean().item())
    assert np.mean(own) < np.mean(other)
    return states


def assert_records_come_and_go(
    lm: steer.FrozenLM, method: EmbeddedTexts, other: EmbeddedTexts
) -> tuple[steer.UserState, steer.UserState, steer.UserState]:
    """Adding and taking out records is as if they had been there or not; not to states of other shared weights.

    Returns somebody's state, that of a user without records, and that of one whose only text is the mean.
    """
    whole, first = method.fit(lm, HISTORIES[0]), method.fit(lm, HISTORIES[0].first(4))
    grown = method.update(lm, first, History("ann", HISTORIES[0].records[4:]))
    assert torch.equal(grown.tensors["items"], whole.tensors["items"])
    assert grown.provenance == whole.provenance
    back = method.remove(grown, [record.id for record in HISTORIES[0].records[4:]])
    assert torch.equal(back.tensors["items"], first.tensors["items"])
    assert back.provenance == first.provenance
    with pytest.raises(steer.SteerError, match="is in the state already"):
        method.update(lm, whole, HISTORIES[0].first(1))
    with pytest.raises(steer.SteerError, match="'stranger' is not in the state"):
        method.remove(whole, ["stranger"])
    for change in (lambda: other.update(lm, whole, HISTORIES[1]), lambda: other.remove(whole, [])):
        with pytest.raises(steer.SteerError, match="fitted with other shared weights"):
            change()
    nobody = method.fit(lm, History("new", ()))
    assert nobody.tensors["items"].shape == (0, 24)
    assert method.artifact is not None
    return whole, nobody, steer.UserState(nobody.provenance, {"items": method.artifact.tensors["nobody"][None]})
