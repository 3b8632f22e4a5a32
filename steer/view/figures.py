"""Figures, drawn with matplotlib (`pip install steer-toolkit[plot]`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from steer.errors import SteerError

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

DPI = 130


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure of that many inches. Raises SteerError if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SteerError("figures need matplotlib: pip install 'steer-toolkit[plot]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def drawable(text: str) -> str:
    """The text with escapes for characters that matplotlib's font lacks; it would draw them all as the same box."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    glyphs = get_font(findfont(FontProperties())).get_charmap()
    return "".join(c if ord(c) in glyphs else c.encode("unicode_escape").decode() for c in text)


def style_figure(
    path: str | Path,
    users: Sequence[str],
    change: Float[Tensor, "writer steered"],
    vectors: Float[Tensor, "user d"],
    texts: Float[Tensor, "text d"],
    writers: Int[Tensor, " text"],
    *,
    strength: float,
) -> None:
    """Draws whether style vectors are personal: what each does to everybody's texts, and where the texts lie.

    Args:
        path: of the picture; its ending chooses the format.
        users: names, in the order of the other arguments.
        change: nats per token that vector j adds to the negative log-likelihood of user i's texts.
        vectors: the style vectors.
        texts: pooled hidden states of texts that no vector was fitted on, minus their neutral.
        writers: who wrote them.
        strength: at which `change` was measured.
    """
    figure = new_figure(12.5, 5.4)
    table, plane = figure.subplots(1, 2)
    image = _draw_change(table, users, change)
    table.set_title(f"Does a style make its owner's texts likelier? (strength {strength:g})", fontsize=11)
    figure.colorbar(image, ax=table, label="change of nats per token (green: likelier)", shrink=0.85)
    _draw_plane(plane, users, vectors, texts, writers)
    figure.savefig(path, dpi=DPI)


def _draw_change(axes: Any, users: Sequence[str], change: Tensor) -> Any:
    limit = change.abs().max().item()
    image = axes.imshow(change.numpy(), cmap="PiYG_r", vmin=-limit, vmax=limit)
    for i in range(len(users)):
        for j in range(len(users)):
            weight = "bold" if i == j else "normal"
            colour = "white" if change[i, j].abs() > 0.6 * limit else "black"
            axes.text(j, i, f"{change[i, j]:+.2f}", ha="center", va="center", color=colour, fontweight=weight)
    axes.set_xticks(range(len(users)), users, rotation=30, ha="right")
    axes.set_yticks(range(len(users)), users)
    axes.set(xlabel="steered as", ylabel="later texts of")
    return image


def _draw_plane(axes: Any, users: Sequence[str], vectors: Tensor, texts: Tensor, writers: Tensor) -> None:
    """The plane that the vectors span best; texts as dots, vectors as arrows."""
    _, _, directions = torch.linalg.svd(vectors - vectors.mean(0), full_matrices=False)
    dots, arrows = texts @ directions[:2].T, vectors @ directions[:2].T
    for i, user in enumerate(users):
        colour = f"C{i}"
        own = dots[writers == i]
        axes.scatter(own[:, 0], own[:, 1], color=colour, s=42, alpha=0.75, label=user, edgecolors="white")
        axes.annotate(
            "", xy=arrows[i].tolist(), xytext=(0, 0), arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 2}
        )
    # Arrows do not count when matplotlib chooses the limits.
    axes.update_datalim(arrows.tolist())
    axes.autoscale_view()
    axes.axhline(0, color="0.85", zorder=0)
    axes.axvline(0, color="0.85", zorder=0)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    axes.set_title("Style vectors (arrows) and later texts (dots) in the residual stream", fontsize=11)
    axes.set(xlabel="first direction", ylabel="second direction")
