"""A small module with weights that users share, and a run of it in a process of its own, for the tests of training."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from models import tiny, tokenizer
from torch import Tensor, nn

import steer
from steer.train import Example, Split, split_examples
from steer.train.trainer import Trained, train_shared

FEATURES, SOFT = 6, 2


def features(record: steer.Record) -> Tensor:
    """A fixed vector for each record."""
    chance = Random(record.response)
    return torch.tensor([chance.gauss(0, 1) for _ in range(FEATURES)])


class Soft(nn.Module):
    """Two soft tokens: the mean over the history's vectors, through a linear layer and a norm."""

    soft_tokens = SOFT

    def __init__(self, width: int, *, dropout: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.map = nn.Linear(FEATURES, SOFT * width)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.calls, self.fails_at, self.kills = 0, 0, False

    def edits(self, examples: Sequence[Example]) -> list[steer.PrefixEdit]:
        self.calls += self.training
        if self.fails_at and self.calls == self.fails_at:
            if self.kills:
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyboardInterrupt
        means = torch.stack([torch.stack([features(r) for r in e.history]).mean(0) for e in examples])
        width = self.norm.normalized_shape[0]
        tokens = self.norm(self.dropout(self.map(means.to(self.map.weight))).view(len(examples), SOFT, width))
        return [steer.PrefixEdit(tokens, torch.full((len(examples),), SOFT))]


def crowd(users: int = 7, seed: int = 0) -> list[steer.History]:
    """People with texts of different lengths, three to nine each; some without prompts."""
    chance = Random(seed)
    letters = "abcdefgh ABC.!?"

    def text(low: int, high: int) -> str:
        return "".join(chance.choice(letters) for _ in range(chance.randint(low, high)))

    return [
        steer.History(
            f"user {u}",
            tuple(
                steer.Record(f"user {u}", "x" + text(3, 40), text(2, 12) if chance.random() < 0.7 else None, time=t)
                for t in range(3 + u % 7)
            ),
        )
        for u in range(users)
    ]


# Mid-epoch evaluations, several epochs, dropout, accumulation, and batches that are split.
SETTINGS: dict[str, Any] = {
    "epochs": 3,
    "batch": 3,
    "accumulation": 2,
    "batch_tokens": 100,
    "learning_rate": 0.01,
    "evaluate_every": 2,
    "save_every": 3,
    "log_every": 1,
}


def parts(lm: steer.FrozenLM) -> Split:
    return split_examples(lm, crowd(), later=0.3, strangers=0.2, copies=1)


def run(lm: steer.FrozenLM, out: Path, module: Soft, **settings: Any) -> Trained:
    split = parts(lm)
    return train_shared(lm, module, split.train, split.validation, out=out, **SETTINGS | settings)


def entries(log: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The log without times."""
    return [entry for entry in log if "train_runtime" not in entry]


if __name__ == "__main__":
    # A run that may kill itself: python tests/shared_weights.py FOLDER CALL SETTINGS
    torch.set_num_threads(1)
    with steer.wrap(tiny("llama"), tokenizer()) as lm:
        settings = json.loads(sys.argv[3])
        module = Soft(lm.width, dropout=settings.pop("dropout", 0.2))
        module.fails_at, module.kills = int(sys.argv[2]), True
        run(lm, Path(sys.argv[1]), module, **settings)
