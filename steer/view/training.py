"""The course of a training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from steer.view.figures import new_figure


def training_figure(log: Sequence[Mapping[str, Any]]) -> Any:
    """A matplotlib figure of the losses by step, from the entries of a run's log."""
    figure = new_figure(7.0, 4.2)
    axes = figure.subplots()
    validations = dict.fromkeys(key for entry in log for key in entry if _validates(key))
    for key in ("loss", *validations):
        points = [(entry["step"], entry[key]) for entry in log if key in entry]
        if points:
            label = "training" if key == "loss" else key.removeprefix("eval_").removesuffix("_loss")
            look = {"alpha": 0.6} if key == "loss" else {"marker": "o", "markersize": 4}
            axes.plot(*zip(*points, strict=True), label=label, **look)
    axes.set(xlabel="step", ylabel="nats per token")
    axes.grid(color="0.92")
    axes.legend(frameon=False)
    return figure


def _validates(key: str) -> bool:
    # All sets together say nothing more where there is one only, and are no curve of their own where there are two.
    return key.startswith("eval_") and key != "eval_loss"
