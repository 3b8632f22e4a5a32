"""Sites: named places in a model to read and write, in TransformerLens' vocabulary."""

from __future__ import annotations

import re
from dataclasses import dataclass

from steer.errors import SteerError

PER_BLOCK = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z")
WHOLE_MODEL = ("embed", "ln_final")

_WITHIN_BLOCK = ("resid_pre", "z", "attn_out", "resid_mid", "mlp_out", "resid_post")
_LENS_NAMES = {
    "resid_pre": "blocks.{}.hook_resid_pre",
    "resid_mid": "blocks.{}.hook_resid_mid",
    "resid_post": "blocks.{}.hook_resid_post",
    "attn_out": "blocks.{}.hook_attn_out",
    "mlp_out": "blocks.{}.hook_mlp_out",
    "z": "blocks.{}.attn.hook_z",
    "embed": "embed.hook_out",
    "ln_final": "ln_final.hook_out",
}


@dataclass(frozen=True)
class Site:
    """A named place: `embed`, `ln_final`, or one of the per-block names at a layer, written `resid_post[18]`.

    `attn_out` and `mlp_out` are the tensors that are added to the residual stream, after a post-norm where the model
    has one. `z` is the heads' output before the output projection, heads concatenated.
    """

    name: str
    layer: int | None = None

    def __post_init__(self) -> None:
        if self.name in WHOLE_MODEL and self.layer is None:
            return
        if self.name in PER_BLOCK and self.layer is not None and self.layer >= 0:
            return
        raise SteerError(
            f"{self} is not a site; there are {', '.join(WHOLE_MODEL)} and, for a layer l, "
            + ", ".join(f"{name}[l]" for name in PER_BLOCK)
        )

    @classmethod
    def parse(cls, text: str | Site) -> Site:
        """Reads `resid_post[18]` or `embed`. Raises SteerError if it is no site."""
        if isinstance(text, Site):
            return text
        match = re.fullmatch(r"(\w+)(?:\[(-?\d+)\])?", text)
        if match is None:
            raise SteerError(f"{text!r} is not a site; write it like resid_post[18] or embed")
        return cls(match[1], None if match[2] is None else int(match[2]))

    def canonical(self) -> Site:
        """The one name of this tensor: the input of a block is the output of the block before."""
        if self.name == "resid_pre" and self.layer:
            return Site("resid_post", self.layer - 1)
        return self

    @property
    def depth(self) -> tuple[float, int]:
        """Sorts sites by when a forward pass comes to them."""
        if self.layer is None:
            return (-1, 0) if self.name == "embed" else (float("inf"), 0)
        return self.layer, _WITHIN_BLOCK.index(self.name)

    @property
    def lens_name(self) -> str:
        """The hook name of TransformerLens 4. Of the names that it has, those of the tensors that are meant here."""
        return _LENS_NAMES[self.name].format(self.layer)

    def __str__(self) -> str:
        return self.name if self.layer is None else f"{self.name}[{self.layer}]"
