"""Pictures of what happened."""

from steer.view.figures import style_figure

__all__ = ["style_figure"]
