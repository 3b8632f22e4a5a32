"""Makes `import steer` work from a checkout that is not installed, with nothing but torch and transformers.

The repository root must stay off the path: its folder `kernels` would hide Hugging Face's package of that name.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import PathFinder
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {
    "steer": "steer",
    "steer.kernels": "kernels",
    "steer.encoders": "encoders",
    "steer.experiments": "experiments",
}


class SourceTree:
    """Finds the package and its parts in the folders of the checkout."""

    @staticmethod
    def find_spec(name, path=None, target=None):  # type: ignore[no-untyped-def]
        folder = FOLDERS.get(name)
        if folder is None:
            return None
        init = ROOT / folder / "__init__.py"
        return importlib.util.spec_from_file_location(name, init, submodule_search_locations=[str(ROOT / folder)])


def use() -> None:
    """Prefers the checkout to an installed package."""
    if SourceTree not in sys.meta_path:
        sys.meta_path.insert(sys.meta_path.index(PathFinder), SourceTree)  # type: ignore[arg-type]
