"""Shared weights in front of a frozen model, trained on transformers' `Trainer`.

What is trained is a module that turns examples into edits; the loss is that of what users wrote under these edits:

    min_θ  Σ −log p( y_i | edits_θ(history_i, x_i) ; x_i ) / Σ |y_i|

Only the module is a part of what the Trainer sees. The frozen model is called and never registered: it is in no
checkpoint and no optimizer, and gets no gradient.

A checkpoint's weights are safetensors, written at once or not at all. What the Trainer keeps beside them to go on from
there, the state of optimizer, schedule and random numbers, are files of `torch.save`; it reads them with
`weights_only=True`, which runs no code (transformers 5.23, `trainer.py`: `_load_optimizer_and_scheduler`,
`_load_rng_state`). Its own `training_args.bin`, a pickle, is not written: `config.json` says the same.
"""

from __future__ import annotations

import json
import math
import random
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Sampler
from transformers import PrinterCallback, SchedulerType, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import get_parameter_names

from steer.errors import SteerError
from steer.files import draft, is_free
from steer.likelihood import response_losses
from steer.read import by_length
from steer.state import Fingerprint
from steer.train.examples import Example, Examples

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from steer.inject import Edit
    from steer.model import FrozenLM

WEIGHTS, STATE = "model.safetensors", "trainer_state.json"
# So many batches are sorted by length together: a batch has texts of like length, and the order stays random.
_SORTED_TOGETHER = 16
# What a resumed run may do otherwise than the one it continues.
_FREE = ("batch_tokens", "log_every", "save_every")


class MakesEdits(Protocol):
    """What a module to be trained has besides its parameters, those of which are trained that require a gradient.

    A module may also have `soft_tokens`, an int: how many a row gets at most, for the size of forward passes. And
    `rates`: learning rates of parameters whose names begin so, as multiples of that of the others.
    """

    def edits(self, examples: Sequence[Example]) -> Sequence[Edit]:
        """The edits for these rows, whose gradients flow to the parameters."""


@dataclass(frozen=True)
class Trained:
    """How training went. The module itself has the weights that were kept.

    Attributes:
        steps: how many optimizer steps were made.
        kept: after which of them the weights were kept: where the validation loss was lowest, else the last.
        losses: in nats per token, of each validation set at that step, and of all together as "all".
        log: what was logged, by step: the training loss since the last entry, learning rate, validation losses.
        seconds: of training, in this process.
        checkpoint: where the weights are.
    """

    steps: int
    kept: int
    losses: Mapping[str, float]
    log: Sequence[Mapping[str, Any]]
    seconds: float
    checkpoint: Path


def train_shared(
    lm: FrozenLM,
    module: nn.Module,
    train: Examples,
    validation: Mapping[str, Examples] | None = None,
    *,
    out: str | Path,
    epochs: float | None = None,
    steps: int | None = None,
    learning_rate: float = 1e-4,
    weight_decay: float = 1e-4,
    warmup: float = 0.05,
    schedule: str = "linear",
    clip: float = 1.0,
    batch: int = 16,
    accumulation: int = 1,
    batch_tokens: int = 4096,
    bf16: bool = False,
    seed: int = 0,
    early_stopping: int | None = None,
    evaluate_every: int | None = None,
    save_every: int | None = None,
    log_every: int = 10,
    resume: bool = False,
    about: Mapping[str, Any] | None = None,
    on_progress: Callable[[float], None] | None = None,
    on_log: Callable[[Mapping[str, Any]], None] | None = None,
) -> Trained:
    """Trains a module in place, by AdamW, on the mean of −log p per token of what users wrote.

    Writes into `out`: `config.json`, `log.jsonl`, `checkpoints/`, and `result.json` at the end. A run that was stopped
    or killed goes on from its last checkpoint with `resume=True`, and ends as it would have ended; on a CPU, bit for
    bit. The processes of `accelerate launch` or `torchrun` share the work, each with a model on its own device; a
    single process uses one device.

    Args:
        lm: the model; no gradient is computed for its parameters.
        module: has `edits(examples)`, see `MakesEdits`; all its parameters are trained.
        train: what is trained on.
        validation: what is looked at, by name.
        out: a folder; new or empty, unless a run is resumed.
        epochs, steps: how long; one of them. A step is an update of the weights.
        learning_rate: of AdamW, at its highest.
        weight_decay: of all parameters but biases and those of norms.
        warmup: share of the steps over which the learning rate rises.
        schedule: of the learning rate then, by transformers' name: linear, cosine, constant_with_warmup.
        clip: largest norm of the gradient.
        batch: examples in a batch, on each device.
        accumulation: batches in a step. A step's loss is the mean over the tokens of all of them, on all devices.
        batch_tokens: largest forward pass, with padding and soft tokens; a batch is split to it, which changes
            rounding only. What a module runs to make its edits is its own business.
        bf16: run in autocast. Models that are loaded in bfloat16 need none and are faster.
        seed: of the order of the examples, and of dropout.
        early_stopping: stop after so many evaluations without a lower validation loss.
        evaluate_every: steps between evaluations; an epoch if not given. There is one at the start and at the end too.
        save_every: steps between checkpoints; as `evaluate_every` if not given. The best one is saved whenever it is.
        log_every: steps between entries of the log.
        resume: go on where an earlier run in `out` ended; from the start if there was none.
        about: is added to `config.json`.
        on_progress: told the share of the steps that are made.
        on_log: told each entry of the log.

    Raises:
        SteerError: an argument is out of its range, the module has nothing to train or holds what is frozen, `out` is
            taken or was made by another run, or a loss is not finite.
    """
    _require_accelerate()
    _require_sensible(epochs, steps, early_stopping, validation, train)
    for name, count in {"batch": batch, "accumulation": accumulation, "log_every": log_every}.items():
        _require_count(name, count)
    if schedule not in (names := [kind.value for kind in SchedulerType]):
        raise SteerError(f"schedule={schedule!r} is not one of {', '.join(names)}")
    if not 0 <= warmup < 1:
        raise SteerError(f"warmup={warmup} is not a share of the steps; give 0 for none, or such as 0.05")
    _require_trainable(lm, module)
    groups = parameter_groups(module, learning_rate, weight_decay)
    folder = Path(out).resolve()
    settings = {
        "epochs": epochs,
        "steps": steps,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "warmup": warmup,
        "schedule": schedule,
        "clip": clip,
        "batch": batch,
        "accumulation": accumulation,
        "batch_tokens": batch_tokens,
        "bf16": bf16,
        "seed": seed,
        "early_stopping": early_stopping,
        "evaluate_every": evaluate_every,
        "save_every": save_every,
        "log_every": log_every,
    }
    with _own_randomness():
        arguments = _Arguments(
            output_dir=str(folder / "checkpoints"),
            use_cpu=lm.device.type == "cpu",
            num_train_epochs=epochs or 1.0,
            max_steps=steps or -1,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            warmup_steps=warmup,
            lr_scheduler_type=schedule,
            max_grad_norm=clip,
            bf16=bf16,
            seed=seed,
            eval_strategy="steps" if validation else "no",
            metric_for_best_model="loss" if validation else None,
            save_strategy="steps",
            save_total_limit=2,
            logging_steps=log_every,
            # Ours says which step it was, and raises.
            logging_nan_inf_filter=False,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            report_to="none",
        )
        devices = max(arguments.world_size, 1)
        settings |= {"devices": devices, "dtype": str(lm.dtype).removeprefix("torch.")}
        epoch = math.ceil(len(train) / (batch * accumulation * devices))
        every = _require_count("evaluate_every", evaluate_every or epoch)
        arguments.eval_steps, arguments.save_steps = every, _require_count("save_every", save_every or every)
        config = {
            "settings": settings,
            "about": dict(about or {}),
            "model": lm.fingerprint.to_json(),
            "parameters": {name: list(p.shape) for name, p in module.named_parameters()},
            "train": {"examples": len(train), "digest": train.digest},
            "validation": {n: {"examples": len(v), "digest": v.digest} for n, v in (validation or {}).items()},
            "versions": {name: version(name) for name in ("torch", "transformers", "accelerate")},
        }
        if arguments.process_index == 0:
            _claim(folder, config, resume)
        if resume and (done := _finished(folder, module)) is not None:
            return done
        checkpoint = _last_checkpoint(folder / "checkpoints") if resume else None
        arguments.eval_on_start = bool(validation) and checkpoint is None
        order = ByLength(train.lengths, batch * devices, seed)
        watch = _Watch(order, early_stopping, folder, on_progress, on_log)
        trainer = _Trainer(
            model=_Shared(lm, module),
            args=arguments,
            train_dataset=train,
            eval_dataset=dict(validation or {}),
            data_collator=collate,
            callbacks=[watch],
            optimizers=(torch.optim.AdamW(groups, lr=learning_rate), None),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.order, trainer.batch_tokens = order, batch_tokens
        start = time.perf_counter()
        if checkpoint is not None and _has_stopped(checkpoint, early_stopping):
            trainer.state = TrainerState.load_from_json(str(checkpoint / STATE))
        else:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        seconds = time.perf_counter() - start
        trainer.accelerator.free_memory()
    return _finish(folder, module, trainer, seconds)


class _Arguments(TrainingArguments):
    """One device for each process: several in one process would copy the module, and not the frozen model."""

    @property
    def n_gpu(self) -> int:
        return min(super().n_gpu, 1)


class _Shared(nn.Module):
    """The module in front of the frozen model, as the Trainer sees it: a model whose parameters are the module's."""

    # The Trainer counts the tokens of a step then.
    accepts_loss_kwargs = True

    def __init__(self, lm: FrozenLM, module: nn.Module) -> None:
        super().__init__()
        # A FrozenLM is no nn.Module, and is not registered.
        self.lm, self.module = lm, module

    def forward(self, examples: Sequence[Example]) -> tuple[Float[Tensor, " row"], Float[Tensor, " row"]]:
        edits = cast(MakesEdits, self.module).edits(examples)
        return response_losses(self.lm, [example.span for example in examples], edits)


class _Trainer(Trainer):
    """Sums losses over tokens, in forward passes of a bounded size."""

    order: ByLength
    batch_tokens: int

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return self.order

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Adds up the gradients of a batch, part by part, of the mean over all the tokens of the step."""
        model.train()
        assert num_items_in_batch is not None
        examples, parts = inputs["examples"], list(self._parts(inputs["examples"]))
        total = torch.zeros((), device=self.args.device)
        for i, part in enumerate(parts):
            # Devices have different numbers of parts, and meet once a batch.
            with nullcontext() if i == len(parts) - 1 else self.accelerator.no_sync(model):
                sums, _ = model([examples[row] for row in part])
                # Devices' gradients are averaged, and theirs is a part of the sum.
                loss = sums.sum().to(total.device) * self.accelerator.num_processes / num_items_in_batch
                self.accelerator.backward(loss)
            total += loss.detach()
        if not torch.isfinite(total):
            raise SteerError(
                f"the loss of step {self.state.global_step + 1} is not finite; lower the learning rate, and look "
                "whether the model overflows in its dtype"
            )
        return total

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean of −log p per token, of each validation set and of all their tokens together."""
        self._shared.eval()
        totals = {name: self._totals(examples) for name, examples in cast(Any, self.eval_dataset).items()}
        losses = {f"eval_{name}_loss": (total[0] / total[1]).item() for name, total in totals.items()}
        everything = torch.stack(list(totals.values())).sum(0)
        losses["eval_loss"] = (everything[0] / everything[1]).item()
        self.log(losses)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, losses)
        return losses

    def _totals(self, examples: Examples) -> Float[Tensor, "2"]:
        """Sum over the tokens, and their number; each device looks at its share of the examples."""
        own = list(range(self.args.process_index, len(examples), max(self.args.world_size, 1)))
        lengths = examples.lengths
        total = torch.zeros(2, dtype=torch.float64)
        for part in by_length({i: lengths[i] for i in own}, self.batch_tokens, self._soft_tokens):
            sums, counts = self._shared([examples[i] for i in part])
            total += torch.stack([sums.double().sum(), counts.double().sum()]).cpu()
        return self.accelerator.reduce(total.to(self.args.device)).cpu()

    def _parts(self, examples: Sequence[Example]) -> Iterator[list[int]]:
        lengths = {row: example.span.end for row, example in enumerate(examples)}
        return by_length(lengths, self.batch_tokens, self._soft_tokens)

    @property
    def _shared(self) -> _Shared:
        return cast(_Shared, self.model)

    @property
    def _soft_tokens(self) -> int:
        return getattr(self._shared.module, "soft_tokens", 0)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or cast(str, self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: t.detach().cpu().contiguous().clone() for name, t in self._shared.state_dict().items()}
        with draft(folder / WEIGHTS) as unfinished:
            save_file(tensors, unfinished)


class ByLength(Sampler[int]):
    """Examples in a random order, drawn anew each epoch, in which those of a batch have like lengths.

    Attributes:
        epoch: which one is drawn.
    """

    def __init__(self, lengths: Sequence[int], batch: int, seed: int) -> None:
        self._lengths, self._batch, self._seed = lengths, batch, seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        chance = random.Random(f"{self._seed} {self.epoch}")
        order = chance.sample(range(len(self)), len(self))
        size = self._batch * _SORTED_TOGETHER
        batches = []
        for start in range(0, len(order), size):
            some = sorted(order[start : start + size], key=self._lengths.__getitem__)
            batches += [some[i : i + self._batch] for i in range(0, len(some), self._batch)]
        # What is left over comes last, as the others are to fill whole batches.
        whole = [batch for batch in batches if len(batch) == self._batch]
        chance.shuffle(whole)
        return iter([i for batch in [*whole, *(b for b in batches if len(b) < self._batch)] for i in batch])


class _Watch(TrainerCallback):
    """Follows a run: the order of each epoch, the log, the best checkpoint, and when to stop."""

    def __init__(
        self,
        order: ByLength,
        patience: int | None,
        folder: Path,
        on_progress: Callable[[float], None] | None,
        on_log: Callable[[Mapping[str, Any]], None] | None,
    ) -> None:
        self._order, self._patience, self._log = order, patience, folder / "log.jsonl"
        self._on_progress, self._on_log = on_progress, on_log

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            # What was logged after the checkpoint that this run goes on from is logged again.
            with draft(self._log) as unfinished:
                unfinished.write_text("".join(json.dumps(entry) + "\n" for entry in state.log_history))

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._order.epoch = int(state.epoch or 0)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        with self._log.open("a") as file:
            file.write(json.dumps(state.log_history[-1]) + "\n")
        if self._on_log is not None:
            self._on_log(state.log_history[-1])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._on_progress is not None and state.is_world_process_zero:
            self._on_progress(state.global_step / state.max_steps)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        losses = _evaluations(state.log_history)
        if not losses:
            return
        # Without weights of its own the best would be lost.
        control.should_save |= min(losses, key=losses.__getitem__) == state.global_step
        if _is_in_vain(losses, self._patience):
            # Saved too, so that a run that is killed now does not go on.
            control.should_save = control.should_training_stop = True


def collate(examples: Sequence[Example]) -> dict[str, Any]:
    """A batch as the Trainer wants it: it counts the tokens to predict by `labels`, which have no other use."""
    tokens = [token for e in examples for token in e.span.ids[max(e.span.start, 1) : e.span.end]]
    return {"examples": list(examples), "labels": torch.tensor(tokens)}


def parameter_groups(module: nn.Module, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
    """A module's parameters for an optimizer: without decay for biases and norms, at the learning rates they have.

    Raises:
        SteerError: one of the module's `rates` is for parameters that it does not have.
    """
    rates: Mapping[str, float] = getattr(module, "rates", {})
    names = [name for name, _ in module.named_parameters()]
    if stray := [start for start in rates if not any(name.startswith(start) for name in names)]:
        raise SteerError(f"rates: no parameter's name begins with {stray[0]!r}; there are {', '.join(names)}")
    norms = [type(part) for part in module.modules() if "Norm" in type(part).__name__]
    decayed = set(get_parameter_names(module, norms, [r"(?:^|[._])bias$"]))
    groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        factor = next((factor for start, factor in rates.items() if name.startswith(start)), 1.0)
        # A number by itself, such as a temperature, is no weight either.
        decays = name in decayed and parameter.dim() > 0
        groups[learning_rate * factor, weight_decay if decays else 0.0].append(parameter)
    return [{"params": own, "lr": rate, "weight_decay": decay} for (rate, decay), own in groups.items()]


def _evaluations(log: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Validation losses by step; not that of the initial weights, which are in no checkpoint."""
    return {entry["step"]: entry["eval_loss"] for entry in log if "eval_loss" in entry and entry["step"]}


def _is_in_vain(losses: Mapping[int, float], patience: int | None) -> bool:
    """Whether so many evaluations went by without a lower loss."""
    best = min(losses, key=losses.__getitem__)
    return patience is not None and sum(step > best for step in losses) >= patience


def _has_stopped(checkpoint: Path, patience: int | None) -> bool:
    """Whether a run had stopped early when it was saved."""
    losses = _evaluations(json.loads((checkpoint / STATE).read_text())["log_history"])
    return bool(losses) and _is_in_vain(losses, patience)


def _finish(folder: Path, module: nn.Module, trainer: _Trainer, seconds: float) -> Trained:
    log = trainer.state.log_history
    losses = _evaluations(log)
    kept = min(losses, key=losses.__getitem__) if losses else trainer.state.global_step
    result = {
        "steps": trainer.state.global_step,
        "kept": kept,
        "losses": _losses_at(log, kept),
        "seconds": round(seconds, 3),
    }
    if trainer.args.process_index == 0:
        with draft(folder / "result.json") as unfinished:
            unfinished.write_text(json.dumps(result, indent=1) + "\n")
    trainer.accelerator.wait_for_everyone()
    return _load(folder, module, result, log)


def _finished(folder: Path, module: nn.Module) -> Trained | None:
    """What an earlier run has ended with."""
    if not (folder / "result.json").is_file():
        return None
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return _load(folder, module, json.loads((folder / "result.json").read_text()), log)


def _load(folder: Path, module: nn.Module, result: Mapping[str, Any], log: Sequence[Mapping[str, Any]]) -> Trained:
    checkpoint = folder / "checkpoints" / f"checkpoint-{result['kept']}"
    weights = load_file(checkpoint / WEIGHTS)
    module.load_state_dict({name.removeprefix("module."): tensor for name, tensor in weights.items()})
    module.zero_grad()
    module.eval()
    return Trained(**result, log=tuple(log), checkpoint=checkpoint)


def _losses_at(log: Sequence[Mapping[str, Any]], step: int) -> dict[str, float]:
    return {
        key.removeprefix("eval_").removesuffix("loss").rstrip("_") or "all": value
        for entry in log
        if entry["step"] == step
        for key, value in entry.items()
        if key.startswith("eval_")
    }


def _claim(folder: Path, config: Mapping[str, Any], resume: bool) -> None:
    """Makes the folder and says in it what is done there; what another run has made is refused."""
    file = folder / "config.json"
    if not resume and not is_free(folder):
        raise SteerError(f"{folder}: exists already; resume what was begun there, or give a place where nothing is")
    if file.is_file():
        if different := _difference(json.loads(file.read_text()), json.loads(json.dumps(config))):
            raise SteerError(
                f"{folder} was begun with another {different}; resume it with the same, or give another folder"
            )
    elif not is_free(folder):
        raise SteerError(f"{folder}: there are files in it and no config.json, so no run to resume; give another place")
    folder.mkdir(parents=True, exist_ok=True)
    with draft(file) as unfinished:
        unfinished.write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n")


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """What makes it another run, in words."""
    for name, value in new["settings"].items():
        if name not in _FREE and old["settings"].get(name) != value:
            return f"{name}: {old['settings'].get(name)} and not {value}"
    if Fingerprint.from_json(old["model"]) != Fingerprint.from_json(new["model"]):
        return "model"
    return next((key for key in ("about", "parameters", "train", "validation") if old[key] != new[key]), None)


def _last_checkpoint(folder: Path) -> Path | None:
    """The latest whole one: its state is written last, and does not parse if it was not written to its end."""
    found = {int(path.name.rpartition("-")[2]): path for path in folder.glob("checkpoint-*") if _is_whole(path)}
    return found[max(found)] if found else None


def _is_whole(checkpoint: Path) -> bool:
    if not re.fullmatch(r"checkpoint-\d+", checkpoint.name):
        return False
    try:
        json.loads((checkpoint / STATE).read_text())
    except (OSError, ValueError):
        return False
    return True


@contextmanager
def _own_randomness() -> Iterator[None]:
    """The Trainer seeds all generators; what others draw from them stays as it was."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _require_accelerate() -> None:
    if find_spec("accelerate") is None:
        raise SteerError("training needs accelerate: pip install 'steer-toolkit[train]'")


def _require_trainable(lm: FrozenLM, module: nn.Module) -> None:
    parameters = dict(module.named_parameters())
    if not callable(getattr(module, "edits", None)):
        raise SteerError(f"{type(module).__name__} has no edits(examples), and so nothing to be trained for")
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise SteerError(f"{type(module).__name__} has no parameters to train")
    model = {id(parameter) for parameter in lm.model.parameters()}
    if frozen := [name for name, parameter in parameters.items() if id(parameter) in model]:
        raise SteerError(
            f"{type(module).__name__} holds {frozen[0]!r}, a parameter of the frozen model, which would be trained and "
            "be in every checkpoint; refer to the model without registering it, such as from inside a tuple"
        )


def _require_count(name: str, count: int) -> int:
    if count < 1:
        raise SteerError(f"{name}={count} is no count; give 1 or more")
    return count


def _require_sensible(
    epochs: float | None,
    steps: int | None,
    early_stopping: int | None,
    validation: Mapping[str, Examples] | None,
    train: Examples,
) -> None:
    if (epochs is None) == (steps is None):
        raise SteerError("say how long to train: by epochs or by steps, and by one of them")
    if (epochs if steps is None else steps) <= 0:  # type: ignore[operator]
        raise SteerError(f"epochs={epochs} or steps={steps} must be above 0")
    if early_stopping is not None and (not validation or early_stopping < 1):
        raise SteerError("early stopping counts evaluations: give 1 or more, and examples to validate with")
    if not len(train):
        raise SteerError("there is nothing to train on")
    if empty := [name for name, examples in (validation or {}).items() if not len(examples)]:
        raise SteerError(f"there is nothing in the validation set {empty[0]!r}; leave it out")
