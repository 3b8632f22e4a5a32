"""Shared weights on transformers' Trainer: examples without leaks, the loss, what is stored, going on after a stop."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from models import tiny, tokenizer
from rows import assert_close
from safetensors import safe_open
from safetensors.torch import load_file
from shared_weights import SETTINGS, SOFT, Soft, crowd, entries, features, parts, run
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from typer.testing import CliRunner

import steer
from steer import embedded
from steer.cli.app import app
from steer.files import is_free
from steer.likelihood import negative_log_likelihood
from steer.method import METHODS
from steer.train import Example, Examples, load_artifact, save_artifact, split_examples, train_method
from steer.train.trainer import ByLength, Trained, _Shared, parameter_groups, train_shared

# Examples.


def every(split: Any) -> dict[str, Examples]:
    return {"train": split.train, "later": split.later, "strangers": split.strangers}


@pytest.mark.parametrize(("last", "copies"), [(None, 0), (3, 0), (None, 4), (4, 4)])
def test_an_example_never_sees_itself_or_what_came_later(llama: steer.FrozenLM, last: int | None, copies: int) -> None:
    histories = {history.user_id: history for history in crowd()}
    split = split_examples(llama, list(histories.values()), earlier=2, last=last, copies=copies, later=0.4)
    for kind, examples in every(split).items():
        seen: dict[tuple[str, str], int] = {}
        for example in examples:
            records = histories[example.record.user_id].records
            position = records.index(example.record)
            before = records[max(position - (last or position), 0) : position]
            assert example.history.user_id == example.record.user_id
            number = seen.setdefault((example.record.user_id, example.record.id), 0)
            seen[example.record.user_id, example.record.id] += 1
            if kind == "train" and number:
                kept = [record for record in before if record in example.history.records]
                assert tuple(kept) == example.history.records
                lost = len(before) - len(kept)
                assert lost == 0 if len(before) <= 2 else 1 <= lost <= len(before) // 2 + 1
            else:
                assert example.history.records == before
            span = example.span
            assert llama.tokenizer.decode(span.ids[span.start : span.end]) == example.record.response
        assert set(seen.values()) == {copies + 1 if kind == "train" else 1}


def test_validation_is_later_than_training_or_of_strangers(llama: steer.FrozenLM) -> None:
    histories = crowd(12)
    split = split_examples(llama, histories, later=0.3, strangers=0.25)
    owners = {kind: {e.record.user_id for e in examples} for kind, examples in every(split).items()}
    assert len(owners["strangers"]) == 3
    assert not owners["strangers"] & (owners["train"] | owners["later"])
    assert owners["later"] <= owners["train"] == {history.user_id for history in split.known}
    trained = {e.record.user_id: [] for e in split.train}
    for example in split.train:
        trained[example.record.user_id].append(example.record.time)
        trained[example.record.user_id] += [record.time for record in example.history]
    for example in split.later:
        assert example.record.time > max(trained[example.record.user_id])
    for history in split.known:
        assert max(record.time for record in history) == max(trained[history.user_id])
    together = sum(len(examples) for examples in every(split).values())
    assert together == sum(len(history) - 1 for history in histories)
    assert split_examples(llama, histories, later=0, strangers=0).validation == {}


def test_examples_are_the_same_under_a_seed_whatever_the_order_of_users(llama: steer.FrozenLM) -> None:
    histories = crowd(12)
    one, other = (split_examples(llama, people, copies=2, seed=3) for people in (histories, histories[::-1]))
    for a, b in zip(every(one).values(), every(other).values(), strict=True):
        assert a.digest == b.digest
        assert [e.history.records for e in a] == [e.history.records for e in b]
    changed = split_examples(llama, histories, copies=2, seed=4)
    assert changed.train.digest != one.train.digest
    rewritten = [steer.History(h.user_id, (*h.records[:-1], steer.Record(h.user_id, "new one"))) for h in histories]
    assert split_examples(llama, rewritten, copies=2, seed=3).later.digest != one.later.digest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"earlier": 20}, "nobody has 21 records"),
        ({"earlier": -1}, "cannot be negative"),
        ({"earlier": 3, "last": 2}, "last=2 leaves"),
        ({"later": 1.0}, "later=1.0 is not a share"),
        ({"strangers": -0.1}, "strangers=-0.1 is not a share"),
    ],
)
def test_examples_that_cannot_be_made_are_refused(llama: steer.FrozenLM, arguments: Any, message: str) -> None:
    with pytest.raises(steer.SteerError, match=message):
        split_examples(llama, crowd(), **arguments)
    with pytest.raises(steer.SteerError, match="two histories of 'user 3'"):
        split_examples(llama, [*crowd(), crowd()[3]])


def test_batches_have_texts_of_like_length_and_each_epoch_its_order() -> None:
    chance = random.Random(0)
    lengths = [chance.randint(5, 500) for _ in range(1003)]
    order = ByLength(lengths, 8, seed=1)
    first = list(order)
    assert sorted(first) == list(range(1003))
    assert first == list(ByLength(lengths, 8, seed=1))
    assert first != list(ByLength(lengths, 8, seed=2))
    order.epoch = 1
    assert first != list(order)
    assert sorted(order) == list(range(1003))

    def padding(indices: Sequence[int]) -> float:
        batches = [[lengths[i] for i in indices[at : at + 8]] for at in range(0, len(indices), 8)]
        return sum(max(batch) * len(batch) for batch in batches) / sum(lengths) - 1

    assert padding(first) < 0.15 < 0.4 < padding(range(1003))
    # Long ones do not come first or last.
    halves = [np.mean([lengths[i] for i in half]) for half in (first[:500], first[500:])]
    assert abs(halves[0] - halves[1]) < 60


def test_every_epoch_has_all_examples_in_another_order(llama: steer.FrozenLM, tmp_path: Path) -> None:
    seen: list[str] = []

    class Telling(Soft):
        def edits(self, examples: Sequence[Example]) -> list[steer.PrefixEdit]:
            seen.extend(example.record.id for example in examples)
            return super().edits(examples)

    examples = split_examples(llama, crowd(), later=0, strangers=0).train
    train_shared(llama, Telling(llama.width), examples, out=tmp_path / "run", epochs=2, batch=4)
    epochs = seen[: len(examples)], seen[len(examples) :]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(example.record.id for example in examples)
    assert epochs[0] != epochs[1]


# The loss.


def reference(lm: steer.FrozenLM, examples: Examples, steps: int, rate: float, decay: float) -> Soft:
    """AdamW on the mean over all tokens, text by text, with soft tokens in `inputs_embeds`."""
    module = Soft(lm.width)
    biases = [module.map.bias, *module.norm.parameters()]
    optimizer = torch.optim.AdamW(
        [{"params": [module.map.weight]}, {"params": biases, "weight_decay": 0.0}], lr=rate, weight_decay=decay
    )
    embed = lm.model.get_input_embeddings()
    for _ in range(steps):
        optimizer.zero_grad()
        total, count = torch.zeros(()), 0
        for example in examples:
            mean = torch.stack([features(record) for record in example.history]).mean(0)
            soft = module.norm(module.map(mean).view(SOFT, -1))
            start = max(example.span.start, 1)
            ids = torch.tensor(example.span.ids[: example.span.end])
            logits = lm.model(inputs_embeds=torch.cat([soft, embed(ids)])[None]).logits[0, SOFT:]
            total = total + cross_entropy(logits[start - 1 : -1], ids[start:], reduction="sum")
            count += len(ids) - start
        (total / count).backward()
        optimizer.step()
    return module


@pytest.mark.parametrize(("batch", "batch_tokens"), [(100, 4096), (4, 4096), (4, 90), (3, 1)])
def test_training_is_adamw_on_the_mean_over_all_tokens_of_a_step(
    llama: steer.FrozenLM, tmp_path: Path, batch: int, batch_tokens: int
) -> None:
    examples = split_examples(llama, crowd(5), later=0, strangers=0).train
    assert len(examples) > 12
    module = Soft(llama.width)
    train_shared(
        llama,
        module,
        examples,
        out=tmp_path / "run",
        steps=3,
        batch=batch,
        accumulation=-(-len(examples) // batch),
        batch_tokens=batch_tokens,
        learning_rate=0.02,
        weight_decay=0.1,
        warmup=0,
        schedule="constant",
        clip=1e9,
    )
    expected = reference(llama, examples, 3, 0.02, 0.1)
    for name, parameter in expected.named_parameters():
        assert_close(module.get_parameter(name).detach(), parameter.detach(), 1e-4)


def test_no_forward_pass_is_larger_than_it_may_be(
    llama: steer.FrozenLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    plain = llama.model.forward

    def count(*arguments: Any, **more: Any) -> Any:
        sizes.append(more["input_ids"].numel())
        return plain(*arguments, **more)

    monkeypatch.setattr(llama.model, "forward", count)
    # `logits_to_keep` is looked for in the signature.
    monkeypatch.setattr("steer.likelihood.inspect.signature", lambda _: __import__("inspect").Signature())
    run(llama, tmp_path / "run", Soft(llama.width), epochs=1, batch=20, accumulation=1, batch_tokens=150)
    assert 75 < max(sizes) <= 150


def test_validation_losses_are_means_over_tokens(llama: steer.FrozenLM, tmp_path: Path) -> None:
    module, split = Soft(llama.width), parts(llama)
    trained = run(llama, tmp_path / "run", module, epochs=1)
    with torch.no_grad():
        for name, examples in split.validation.items():
            everyone = list(examples)
            expected = negative_log_likelihood(llama, [e.span for e in everyone], module.edits(everyone))
            assert trained.losses[name] == pytest.approx(expected.item(), rel=1e-5)
        everyone = [*split.later, *split.strangers]
        expected = negative_log_likelihood(llama, [e.span for e in everyone], module.edits(everyone))
        assert trained.losses["all"] == pytest.approx(expected.item(), rel=1e-5)


# What is trained, and what is not.


def test_the_frozen_model_takes_no_part(llama: steer.FrozenLM, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in llama.model.state_dict().items()}
    module = Soft(llama.width)
    start = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    run(llama, tmp_path / "run", module)
    assert all(p.grad is None and not p.requires_grad for p in llama.model.parameters())
    for name, tensor in llama.model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert not any(torch.equal(tensor, start[name]) for name, tensor in module.state_dict().items())

    shared = _Shared(llama, module)
    assert {id(p) for p in shared.parameters()} == {id(p) for p in module.parameters()}
    sums, _ = shared(list(parts(llama).later)[:3])
    leaves, stack, seen = set(), [sums.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaves |= {id(node.variable)} if hasattr(node, "variable") else set()
        stack += [following for following, _ in node.next_functions]
    assert leaves == {id(p) for p in module.parameters()}


def test_checkpoints_hold_what_is_trained_and_no_pickle_of_ours(llama: steer.FrozenLM, tmp_path: Path) -> None:
    module = Soft(llama.width)
    trained = run(llama, tmp_path / "run", module)
    names = {path.name for path in (tmp_path / "run").rglob("*") if path.is_file()}
    ours = {"config.json", "log.jsonl", "result.json", "model.safetensors", "trainer_state.json"}
    assert names == ours | {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    with safe_open(trained.checkpoint / "model.safetensors", "pt") as file:
        assert {name.removeprefix("module.") for name in file.keys()} == set(module.state_dict())  # noqa: SIM118
    for file in trained.checkpoint.glob("*.pt*"):
        if file.name != "rng_state.pth":
            # The state of NumPy's generator is the one thing that needs `safe_globals`.
            torch.load(file, weights_only=True)
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) <= 3
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["settings"]["learning_rate"] == SETTINGS["learning_rate"]
    assert config["train"] == {"examples": len(parts(llama).train), "digest": parts(llama).train.digest}


def test_biases_and_norms_do_not_decay_and_parts_have_their_own_rates() -> None:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

    class RMSNorm(Norm):
        pass

    module = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.LayerNorm(3), "c": RMSNorm(), "d": nn.Embedding(2, 3)})
    attention = nn.MultiheadAttention(4, 1)
    module["e"] = attention
    module.rates = {"d": 10.0}
    found = {
        name: (group["lr"], group["weight_decay"])
        for group in parameter_groups(module, 0.1, 0.01)
        for parameter in group["params"]
        for name, other in module.named_parameters()
        if other is parameter
    }
    assert found == {
        "a.weight": (0.1, 0.01),
        "a.bias": (0.1, 0.0),
        "b.weight": (0.1, 0.0),
        "b.bias": (0.1, 0.0),
        "c.weight": (0.1, 0.0),
        "d.weight": (1.0, 0.01),
        "e.in_proj_weight": (0.1, 0.01),
        "e.in_proj_bias": (0.1, 0.0),
        "e.out_proj.weight": (0.1, 0.01),
        "e.out_proj.bias": (0.1, 0.0),
    }
    module.rates = {"z": 2.0}
    with pytest.raises(steer.SteerError, match="no parameter's name begins with 'z'"):
        parameter_groups(module, 0.1, 0.01)


def test_bf16_keeps_weights_in_float32(llama: steer.FrozenLM, tmp_path: Path) -> None:
    full, half = Soft(llama.width), Soft(llama.width)
    exact = run(llama, tmp_path / "full", full, epochs=1)
    rounded = run(llama, tmp_path / "half", half, epochs=1, bf16=True)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float32}
    assert 0 < abs(exact.losses["all"] - rounded.losses["all"]) < 0.05
    # The two runs were in one process, and the second is not the first's.
    again = Soft(llama.width)
    assert run(llama, tmp_path / "again", again, epochs=1).losses == exact.losses


def test_training_leaves_everybodys_randomness_alone(llama: steer.FrozenLM, tmp_path: Path) -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), np.random.rand(), torch.rand(()).item()

    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = draw()
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    run(llama, tmp_path / "run", Soft(llama.width, dropout=0.2), epochs=1)
    assert draw() == expected


def test_early_stopping_restores_the_best(llama: steer.FrozenLM, tmp_path: Path) -> None:
    module, split = Soft(llama.width), parts(llama)
    # So fast that it soon gets worse.
    trained = run(llama, tmp_path / "run", module, epochs=40, learning_rate=0.2, early_stopping=3, save_every=1000)
    losses = {e["step"]: e["eval_loss"] for e in trained.log if "eval_loss" in e}
    assert 0 in losses
    del losses[0]
    assert trained.kept == min(losses, key=losses.__getitem__)
    assert list(losses).index(trained.kept) == len(losses) - 4
    assert trained.steps == max(losses) < len(split.train) / 6 * 40
    weights = load_file(trained.checkpoint / "model.safetensors")
    assert trained.checkpoint.name == f"checkpoint-{trained.kept}"
    assert all(torch.equal(module.state_dict()[n.removeprefix("module.")], t) for n, t in weights.items())
    everyone = [*split.later, *split.strangers]
    with torch.no_grad():
        loss = negative_log_likelihood(llama, [e.span for e in everyone], module.edits(everyone)).item()
    assert loss == pytest.approx(losses[trained.kept], rel=1e-5)


def test_a_run_that_was_killed_once_it_had_stopped_early_makes_no_further_step(
    llama: steer.FrozenLM, tmp_path: Path
) -> None:
    settings = {"epochs": 40, "learning_rate": 0.2, "early_stopping": 3, "save_every": 1000}
    expected = run(llama, tmp_path / "run", Soft(llama.width), **settings)
    (tmp_path / "run" / "result.json").unlink()
    module = Soft(llama.width)
    actual = run(llama, tmp_path / "run", module, **settings, resume=True)
    assert module.calls == 0
    assert (actual.losses, actual.kept, actual.steps) == (expected.losses, expected.kept, expected.steps)


def test_a_loss_that_is_not_finite_ends_training(llama: steer.FrozenLM, tmp_path: Path) -> None:
    module = Soft(llama.width)
    plain = module.edits
    module.edits = lambda examples: [  # type: ignore[method-assign]
        steer.PrefixEdit(1e30 * edit.embeddings * edit.embeddings.abs(), edit.lengths) for edit in plain(examples)
    ]
    with pytest.raises(steer.SteerError, match=r"loss of step 1 is not finite|not finite"):
        run(llama, tmp_path / "run", module, learning_rate=1e30)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 3}, "by epochs or by steps"),
        ({"epochs": None}, "by epochs or by steps"),
        ({"epochs": 0}, "must be above 0"),
        ({"batch": 0}, "batch=0 is no count"),
        ({"save_every": -1}, "save_every=-1 is no count"),
        ({"schedule": "steep"}, "'steep' is not one of linear"),
        ({"warmup": 2.0}, "warmup=2.0 is not a share"),
        ({"early_stopping": 0}, "early stopping counts evaluations"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    llama: steer.FrozenLM, tmp_path: Path, arguments: Any, message: str
) -> None:
    with pytest.raises(steer.SteerError, match=message):
        run(llama, tmp_path / "run", Soft(llama.width), **arguments)
    assert is_free(tmp_path / "run")


def test_modules_that_cannot_be_trained_are_refused(llama: steer.FrozenLM, tmp_path: Path) -> None:
    with pytest.raises(steer.SteerError, match=r"Linear has no edits\(examples\)"):
        run(llama, tmp_path / "run", nn.Linear(2, 2))  # type: ignore[arg-type]
    holder = Soft(llama.width)
    holder.inner = llama.model  # type: ignore[assignment]
    with pytest.raises(steer.SteerError, match=r"holds 'inner\.model\.embed_tokens\.weight'"):
        run(llama, tmp_path / "run", holder)
    # Referred to without being registered, it is none of the module's.
    holder = Soft(llama.width)
    holder.inner = (llama.model,)  # type: ignore[assignment]
    run(llama, tmp_path / "run", holder, epochs=1)


# Going on.


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Soft, Trained]:
    """A run that nothing has interrupted."""
    with steer.wrap(tiny("llama"), tokenizer()) as lm:
        module = Soft(lm.width, dropout=0.2)
        return module, run(lm, tmp_path_factory.mktemp("whole") / "run", module)


@pytest.mark.parametrize("call", [2, pytest.param(11, marks=pytest.mark.full), 30])
def test_an_interrupted_run_goes_on_to_the_same_end(
    llama: steer.FrozenLM, tmp_path: Path, whole: tuple[Soft, Trained], call: int
) -> None:
    """Bit for bit: from before the first save, in the first epoch, and in a later one."""
    module, expected = whole
    broken = Soft(llama.width, dropout=0.2)
    broken.fails_at = call
    with pytest.raises(KeyboardInterrupt):
        run(llama, tmp_path / "run", broken)
    assert not (tmp_path / "run" / "result.json").exists()
    resumed = Soft(llama.width, dropout=0.2, seed=1)
    first = not any((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))
    assert first == (call == 2)
    if first:
        resumed = Soft(llama.width, dropout=0.2)
    actual = run(llama, tmp_path / "run", resumed, resume=True)
    assert resumed.calls < module.calls or first
    assert entries(actual.log) == entries(expected.log)
    assert (actual.steps, actual.kept, actual.losses) == (expected.steps, expected.kept, expected.losses)
    for name, tensor in module.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert entries(lines) == entries(expected.log)


def test_a_checkpoint_that_was_not_finished_is_passed_over(
    llama: steer.FrozenLM, tmp_path: Path, whole: tuple[Soft, Trained]
) -> None:
    module, expected = whole
    broken = Soft(llama.width, dropout=0.2)
    broken.fails_at = 30
    with pytest.raises(KeyboardInterrupt):
        run(llama, tmp_path / "run", broken)
    folder = tmp_path / "run" / "checkpoints"
    last = max(folder.iterdir(), key=lambda path: int(path.name.rpartition("-")[2]))
    state = (last / "trainer_state.json").read_text()
    (last / "trainer_state.json").write_text(state[: len(state) // 2])
    (folder / "checkpoint-1000").mkdir()
    resumed = Soft(llama.width, dropout=0.2, seed=1)
    actual = run(llama, tmp_path / "run", resumed, resume=True)
    assert entries(actual.log) == entries(expected.log)
    assert all(torch.equal(resumed.state_dict()[n], tensor) for n, tensor in module.state_dict().items())


def test_a_finished_run_is_not_run_again(llama: steer.FrozenLM, tmp_path: Path) -> None:
    module, again = Soft(llama.width), Soft(llama.width, seed=1)
    expected = run(llama, tmp_path / "run", module)
    actual = run(llama, tmp_path / "run", again, resume=True)
    assert again.calls == 0
    assert (actual.losses, actual.kept, actual.steps) == (expected.losses, expected.kept, expected.steps)
    assert all(torch.equal(again.state_dict()[n], tensor) for n, tensor in module.state_dict().items())


def test_folders_of_other_runs_are_refused(llama: steer.FrozenLM, tmp_path: Path) -> None:
    run(llama, tmp_path / "run", Soft(llama.width), epochs=1)
    with pytest.raises(steer.SteerError, match="exists already; resume what was begun"):
        run(llama, tmp_path / "run", Soft(llama.width), epochs=1)
    with pytest.raises(steer.SteerError, match=r"another learning_rate: 0\.01 and not 0\.02"):
        run(llama, tmp_path / "run", Soft(llama.width), epochs=1, learning_rate=0.02, resume=True)
    split = split_examples(llama, crowd(seed=1))
    with pytest.raises(steer.SteerError, match="another train;"):
        train_shared(
            llama,
            Soft(llama.width),
            split.train,
            split.validation,
            out=tmp_path / "run",
            resume=True,
            **SETTINGS | {"epochs": 1},
        )
    with (
        steer.wrap(tiny("llama", seed=1), tokenizer()) as other,
        pytest.raises(steer.SteerError, match="another model;"),
    ):
        run(other, tmp_path / "run", Soft(other.width), epochs=1, resume=True)
    with (
        steer.wrap(tiny("llama").to(torch.bfloat16), tokenizer()) as rougher,
        pytest.raises(steer.SteerError, match="another dtype: float32 and not bfloat16"),
    ):
        run(rougher, tmp_path / "run", Soft(llama.width), epochs=1, resume=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(steer.SteerError, match=r"no config\.json"):
        run(llama, tmp_path / "mine", Soft(llama.width), resume=True)


def in_processes(count: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A run of the module in a process of its own, or in several that share the work."""
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={count}", "--master-port=29561"] if count > 1 else []
    # The folder of the script, which `python -P` leaves out, has what it imports.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"}
    script = Path(__file__).with_name("shared_weights.py")
    command = [sys.executable, *launcher, str(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.full
@pytest.mark.parametrize("call", [9, 24])
def test_a_killed_run_goes_on_to_the_same_end(
    llama: steer.FrozenLM, tmp_path: Path, whole: tuple[Soft, Trained], call: int
) -> None:
    module, expected = whole
    killed = in_processes(1, tmp_path / "run", call, "{}")
    assert killed.returncode == -9, killed.stderr
    resumed = in_processes(1, tmp_path / "run", 0, '{"resume": true}')
    assert resumed.returncode == 0, resumed.stderr
    again = Soft(llama.width, dropout=0.2)
    actual = run(llama, tmp_path / "run", again, resume=True)
    assert again.calls == 0
    assert entries(actual.log) == entries(expected.log)
    assert all(torch.equal(again.state_dict()[n], tensor) for n, tensor in module.state_dict().items())


@pytest.mark.full
def test_two_processes_train_as_one_does(llama: steer.FrozenLM, tmp_path: Path) -> None:
    one = Soft(llama.width)
    settings = {"batch": 4, "accumulation": 1, "clip": 1e9, "steps": 6, "epochs": None}
    expected = run(llama, tmp_path / "one", one, **settings)
    done = in_processes(2, tmp_path / "two", 0, json.dumps(settings | {"batch": 2, "dropout": 0.0}))
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "two" / "result.json").read_text())
    assert result["steps"] == expected.steps
    for name, loss in expected.losses.items():
        assert result["losses"][name] == pytest.approx(loss, rel=1e-4)
    weights = load_file(tmp_path / "two" / "checkpoints" / f"checkpoint-{result['kept']}" / "model.safetensors")
    for name, tensor in one.state_dict().items():
        assert_close(weights[f"module.{name}"], tensor, 1e-3)


# Methods, and the command.


@dataclass
class Toy(steer.TrainableMethod):
    """A method around the module of these tests."""

    name: ClassVar[str] = "toy"

    scale: float = 1.0

    def module(self, lm: steer.FrozenLM, histories: Sequence[steer.History]) -> nn.Module:
        module = Soft(lm.width)
        nn.init.normal_(module.map.weight, std=self.scale)
        return module

    def artifact_of(self, lm: steer.FrozenLM, module: nn.Module) -> steer.Artifact:
        tensors: dict[str, Tensor] = {name: t.detach().cpu().clone() for name, t in module.state_dict().items()}
        return steer.Artifact(self.name, self.version, lm.fingerprint, tensors, {"scale": self.scale})

    def fit(self, lm: steer.FrozenLM, history: steer.History) -> steer.UserState:
        raise NotImplementedError

    @classmethod
    def bind(cls, *arguments: Any) -> Any:
        raise NotImplementedError


@pytest.fixture(autouse=True, scope="module")
def _registered() -> Any:
    yield
    METHODS.pop("toy")


def test_a_method_is_trained_into_an_artifact(llama: steer.FrozenLM, tmp_path: Path) -> None:
    method = Toy(scale=0.5)
    settings: dict[str, Any] = {"steps": 4, "batch": 4, "learning_rate": 0.01, "later": 0.3}
    artifact, trained = train_method(llama, method, crowd(), out=tmp_path / "one", **settings)
    assert method.artifact is artifact
    stored = load_artifact(tmp_path / "one")
    assert stored.hash == artifact.hash
    weights = load_file(trained.checkpoint / "model.safetensors")
    assert all(torch.equal(stored.tensors[name.removeprefix("module.")], t) for name, t in weights.items())
    again, _ = train_method(llama, Toy(scale=0.5), crowd(), out=tmp_path / "two", **settings)
    assert again.hash == artifact.hash
    other, _ = train_method(llama, Toy(scale=0.5), crowd(), out=tmp_path / "three", seed=1, **settings)
    assert other.hash != artifact.hash
    with pytest.raises(steer.SteerError, match="another about;"):
        train_method(llama, Toy(scale=0.6), crowd(), out=tmp_path / "one", resume=True, **settings)
    with pytest.raises(steer.SteerError, match=r"prefix_tuning has no module to train; methods that have:.*\btoy"):
        train_method(llama, steer.PrefixTuning(), crowd(), out=tmp_path / "four")


def test_a_method_trains_for_an_epoch_by_itself(llama: steer.FrozenLM, tmp_path: Path) -> None:
    method, told = Toy(scale=0.5), list[float]()
    artifact = method.train(llama, crowd(), told.append)
    expected, trained = train_method(llama, Toy(scale=0.5), crowd(), out=tmp_path / "one", epochs=1)
    assert method.artifact is artifact
    assert artifact.hash == expected.hash
    assert (len(told), told[-1]) == (trained.steps, 1.0)
    with pytest.raises(steer.SteerError, match=r"trained with scale=0\.5, this has 0\.6"):
        Toy(scale=0.6).use(llama, artifact)


def test_artifacts_in_folders_are_checked(llama: steer.FrozenLM, tmp_path: Path) -> None:
    with pytest.raises(steer.SteerError, match="was training finished"):
        load_artifact(tmp_path)
    save_artifact(tmp_path, steer.Artifact("toy", 1, llama.fingerprint, {"a": torch.ones(3)}))
    assert torch.equal(load_artifact(tmp_path).tensors["a"], torch.ones(3))
    other = steer.Artifact("toy", 1, llama.fingerprint, {"a": torch.zeros(3)})
    save_artifact(tmp_path / "other", other)
    (tmp_path / "other" / "artifact.safetensors").replace(tmp_path / "artifact.safetensors")
    with pytest.raises(steer.SteerError, match="has the hash"):
        load_artifact(tmp_path)


def test_the_command_trains_as_the_library_does(
    llama: steer.FrozenLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steer.cli.options.load", lambda *_: llama)
    file = tmp_path / "texts.jsonl"
    histories = crowd()
    lines = [
        {"user_id": r.user_id, "prompt": r.prompt, "text": r.response, "time": r.time, "id": r.id}
        for history in histories
        for r in history
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = ["train", "toy", file, "--out", tmp_path / "run", "--set", "scale=0.5", "--steps", 4, "--batch", 4]
    asked += ["--learning-rate", 0.01, "--later", 0.3, "--holdout", 1, "--log-every", 2]

    def call(*more: object) -> Any:
        result = CliRunner().invoke(app, [str(word) for word in (*asked, *more)])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result

    printed = json.loads(call("--json").stdout)
    settings: dict[str, Any] = {"steps": 4, "batch": 4, "learning_rate": 0.01, "later": 0.3, "log_every": 2}
    known = [history.split(1)[0] for history in histories]
    artifact, trained = train_method(llama, Toy(scale=0.5), known, out=tmp_path / "own", **settings)
    assert printed["artifact"] == artifact.hash
    assert printed["losses"] == pytest.approx(trained.losses)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    expected = {"artifact.safetensors", "artifact.json", "config.json", "checkpoints", "log.jsonl", "result.json"}
    assert names == expected | {"loss.png"}
    with pytest.raises(steer.SteerError, match="exists already"):
        call()
    again = call("--resume")
    assert re.search(r"later: \d\.\d{4} nats per token", again.stdout)
    with pytest.raises(steer.SteerError, match="has no module to train"):
        CliRunner().invoke(app, ["train", "prefix-tuning", str(file), "--out", str(tmp_path)], catch_exceptions=False)


@pytest.mark.full
def test_a_real_model_learns_from_the_voices(tmp_path: Path) -> None:
    if not embedded.installed("smollm2-135m"):
        pytest.skip("needs the model: steer models pull smollm2-135m")
    voices = [h for _, h in steer.read_histories(Path(steer.__file__).with_name("data") / "voices.jsonl")]
    with steer.load("smollm2-135m", dtype=torch.float32) as lm:
        split = split_examples(lm, voices, later=0.1, strangers=0.0, earlier=8, max_tokens=64)
        module = Soft(lm.width)
        scale = lm.model.get_input_embeddings().weight.float().square().mean().sqrt().item()
        nn.init.constant_(module.norm.weight, scale)
        trained = train_shared(
            lm, module, split.train, split.validation, out=tmp_path, steps=12, batch=8, learning_rate=2e-3
        )
    losses = [entry["eval_loss"] for entry in trained.log if "eval_loss" in entry]
    assert min(losses[1:]) < losses[0] - 0.03
