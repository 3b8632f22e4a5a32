"""Pictures of what happened."""

from steer.view.figures import style_figure
from steer.view.influence import Influence, Measure
from steer.view.lens import Lens, lens
from steer.view.posterior import posterior_figure
from steer.view.projections import TokenMap, Values, projections
from steer.view.sweep import Sweep
from steer.view.tokens import read_tokens

__all__ = [
    "Influence",
    "Lens",
    "Measure",
    "Sweep",
    "TokenMap",
    "Values",
    "lens",
    "posterior_figure",
    "projections",
    "read_tokens",
    "style_figure",
]
