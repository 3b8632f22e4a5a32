"""Pictures of what happened."""

from steer.view.figures import style_figure
from steer.view.lens import Lens, lens
from steer.view.projections import TokenMap, projections
from steer.view.tokens import read_tokens

__all__ = ["Lens", "TokenMap", "lens", "projections", "read_tokens", "style_figure"]
