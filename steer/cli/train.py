"""`steer train`: histories in, weights that all users share out."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from steer.cli import options, results


def train(
    method: Annotated[str, typer.Argument(help="A method with weights that users share, such as pplug.")],
    data: Annotated[Path, typer.Argument(help="Histories: JSONL, a record a line, as for `steer extract`.")],
    out: Annotated[
        Path, typer.Option(help="Folder for the artifact, the log and checkpoints; new, unless --resume is given.")
    ],
    model: options.Model = "smollm2-135m",
    setting: options.Setting = None,
    epochs: Annotated[
        float | None, typer.Option(help="Passes over the examples (1 if --steps is not given).", show_default=False)
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Or so many updates.", show_default=False)] = None,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW, at its highest.")] = 1e-4,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW; not for biases and norms.")] = 1e-4,
    warmup: Annotated[float, typer.Option(help="Share of the steps over which the learning rate rises.")] = 0.05,
    schedule: Annotated[
        str, typer.Option(help="Of the learning rate after that: linear, cosine, constant_with_warmup, ….")
    ] = "linear",
    batch: Annotated[int, typer.Option(min=1, help="Examples in a batch.")] = 16,
    accumulation: Annotated[int, typer.Option(min=1, help="Batches in an update.")] = 1,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Largest forward pass; batches are split to it.")] = 4096,
    earlier: Annotated[int, typer.Option(min=0, help="Predict records that so many others stand before.")] = 1,
    last: Annotated[
        int | None, typer.Option(min=1, help="From the newest so many of them only.", show_default=False)
    ] = None,
    copies: Annotated[
        int, typer.Option(min=0, help="Further copies of each example, with random parts of the history left out.")
    ] = 0,
    later: Annotated[float, typer.Option(help="Share of users' last examples to validate with.")] = 0.1,
    strangers: Annotated[float, typer.Option(help="Share of users to validate with.")] = 0.1,
    early_stopping: Annotated[
        int | None, typer.Option(min=1, help="Stop after so many evaluations without improvement.", show_default=False)
    ] = None,
    evaluate_every: Annotated[
        int | None, typer.Option(min=1, help="Updates between evaluations; an epoch.", show_default=False)
    ] = None,
    save_every: Annotated[
        int | None, typer.Option(min=1, help="Updates between checkpoints; as evaluations.", show_default=False)
    ] = None,
    log_every: Annotated[int, typer.Option(min=1, help="Updates between entries of the log.")] = 10,
    bf16: Annotated[bool, typer.Option("--bf16", help="Run a float32 model in bfloat16 where that is safe.")] = False,
    seed: Annotated[int, typer.Option(help="Of initial weights, split and order.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an earlier run in --out was stopped.")] = False,
    instruction: options.Instruction = None,
    holdout: Annotated[int, typer.Option(min=0, help="Leave out each user's last N records altogether.")] = 0,
    max_tokens: Annotated[int, typer.Option(min=2, help="Of a record, with its prompt.")] = 1024,
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.Json = False,
) -> None:
    """Train what a method shares between users, on the texts of many.

    Example:

        steer train pplug letters.jsonl --out pplug-letters --epochs 2 --copies 10

        torchrun --nproc-per-node 2 --no-python steer train pplug letters.jsonl --out pplug-letters
    """
    from steer import read_histories
    from steer.method import make_method
    from steer.train import require_trainable, train_method

    training = make_method(method.replace("-", "_"), **options.parse_settings(setting or []))
    # Before a model is loaded.
    require_trainable(training)
    histories = [whole.split(holdout)[0] for _, whole in read_histories(data, instruction=instruction)]
    lm = options.load(model, device or _own_device(), dtype)
    with _progress_bar() as progress:
        task = progress.add_task("training", total=1.0)

        def tell(entry: Mapping[str, Any]) -> None:
            if losses := {name: entry[name] for name in entry if name.startswith("eval_")}:
                said = ", ".join(f"{_name(name)} {loss:.4f}" for name, loss in losses.items())
                progress.console.print(f"step {entry['step']}: {said}")
            elif "loss" in entry:
                progress.update(task, description=f"loss {entry['loss']:.4f}")

        artifact, trained = train_method(
            lm,
            training,
            histories,
            out=out,
            epochs=1.0 if epochs is None and steps is None else epochs,
            steps=steps,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            warmup=warmup,
            schedule=schedule,
            batch=batch,
            accumulation=accumulation,
            batch_tokens=batch_tokens,
            earlier=earlier,
            last=last,
            copies=copies,
            later=later,
            strangers=strangers,
            early_stopping=early_stopping,
            evaluate_every=evaluate_every,
            save_every=save_every,
            log_every=log_every,
            bf16=bf16,
            seed=seed,
            resume=resume,
            max_tokens=max_tokens,
            on_progress=lambda share: progress.update(task, completed=share),
            on_log=tell,
        )
    if find_spec("matplotlib") is not None:
        from steer.view.training import training_figure

        results.write(out / "loss.png", training_figure(trained.log))
    if as_json:
        result: dict[str, Any] = {"method": training.name, "model": model, "out": str(out), "artifact": artifact.hash}
        result |= {"steps": trained.steps, "kept": trained.kept, "losses": dict(trained.losses)}
        print(json.dumps(result))
        return
    for name, loss in trained.losses.items():
        options.out.print(f"{name}: {loss:.4f} nats per token")
    options.err.print(f"{trained.steps} steps; the weights after step {trained.kept} are in {out}", soft_wrap=True)


def _name(key: str) -> str:
    return key.removeprefix("eval_").removesuffix("loss").rstrip("_") or "all"


def _own_device() -> str | None:
    """Of a process that `accelerate launch` or `torchrun` has started."""
    import torch

    rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{rank}" if rank is not None and torch.cuda.is_available() else None


def _progress_bar() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn()
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=options.err, transient=True)
