"""Diverging colours, the same on paper, in the terminal and in HTML, that the colour-blind can tell apart."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

# From −1 through 0 to 1; ColorBrewer's RdBu and PiYG, which are safe for red-green blindness.
PROJECTION = ("#2166ac", "#92c5de", "#f7f7f7", "#f4a582", "#b2182b")
# A change of the loss: green is likelier.
CHANGE = ("#4d9221", "#b8e186", "#f7f7f7", "#f1b6da", "#c51b7d")
WHITE, GREY = "#ffffff", "#d0d0d0"


def colour(value: float, ramp: Sequence[str]) -> str:
    """The colour of a value between −1 and 1, as `#rrggbb`; values beyond are drawn as the end they are nearest to."""
    steps = list(pairwise(ramp))
    place = (min(max(value, -1.0), 1.0) + 1) / 2 * len(steps)
    index = min(int(place), len(steps) - 1)
    low, high = (_channels(end) for end in steps[index])
    mixed = (round(a + (b - a) * (place - index)) for a, b in zip(low, high, strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def ink(background: str) -> str:
    """Black or white, whichever is easier to read on a background."""
    linear = ((channel / 255) ** 2.2 for channel in _channels(background))
    luminance = sum(share * channel for share, channel in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    # Where the contrasts to black and to white are the same.
    return "#000000" if luminance > 0.179 else "#ffffff"


def colour_map(ramp: Sequence[str]) -> Any:
    """The ramp as a colour map of matplotlib."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("steer", list(ramp))


def _channels(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
