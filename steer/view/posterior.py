"""Posteriors of λ as a figure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from steer.view.figures import new_figure

if TYPE_CHECKING:
    from steer.inverse import LambdaPosterior


def posterior_figure(found: LambdaPosterior) -> Any:
    """A row a text: its posterior in grey, and the likeliest λ with its interval in red; a matplotlib figure."""
    count, grid = len(found.lam), found.grid
    figure = new_figure(9, min(1.4 + 0.28 * count, 30))
    axes = figure.subplots()
    # Each λ stands for what is nearest to it.
    edges = torch.cat([grid[:1], (grid[1:] + grid[:-1]) / 2, grid[-1:]])
    share = found.posterior / found.posterior.max(1, keepdim=True).values
    axes.pcolormesh(edges.numpy(), range(count + 1), share.numpy(), cmap="Greys", vmin=0, vmax=1.4)
    middle = torch.arange(count) + 0.5
    low, high = (end.clamp(grid[0], grid[-1]) for end in (found.low, found.high))
    known = ~found.lam.isnan()
    axes.hlines(middle[known].numpy(), low[known].numpy(), high[known].numpy(), colors="#b2182b", lw=1.5)
    axes.plot(found.lam.numpy(), middle.numpy(), "o", color="#b2182b", ms=5, clip_on=False)
    axes.set_yticks(middle.numpy(), range(1, count + 1))
    axes.set(xlim=(grid[0].item(), grid[-1].item()), ylim=(count, 0), xlabel="λ", ylabel="text")
    axes.set_title(f"posterior of λ (grey), its maximum and {found.level:.0%} interval (red)", fontsize=11, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    return figure
