"""Reading hidden states token by token, for looking at them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from steer.errors import SteerError
from steer.sites import Site

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from steer.model import FrozenLM


@torch.no_grad()
def read_tokens(lm: FrozenLM, ids: Sequence[int], sites: Iterable[Site | str]) -> dict[Site, Float[Tensor, "token d"]]:
    """The hidden states of one text's tokens, in float32 on the CPU; the model runs without its head.

    Many texts are better read with `steer.read`, which pools them.

    Args:
        lm: the model; it must not be steered meanwhile.
        ids: the tokens.
        sites: where; the keys of the result are their canonical names.

    Raises:
        SteerError: there are no tokens, or no such site.
    """
    if not ids:
        raise SteerError("there are no tokens to read")
    wanted = [Site.parse(site).canonical() for site in sites]
    lm.attachment.declare(wanted)
    kept: dict[Site, Tensor] = {}
    lm.attachment.bind(_Silent())
    try:
        lm.attachment.install({site: (_keep(kept, site),) for site in wanted})
        lm.attachment.decoder(input_ids=torch.tensor([ids], device=lm.device), use_cache=False)
    finally:
        lm.attachment.unbind()
    return kept


def _keep(kept: dict[Site, Tensor], site: Site) -> Callable[[Tensor], Tensor]:
    def keep(hidden: Tensor) -> Tensor:
        # A copy, as some models go on to add into this very tensor.
        kept[site] = hidden[0].to("cpu", torch.float32, copy=True)
        return hidden

    return keep


class _Silent:
    """A binding that need not know the positions."""

    def begin(self, positions: Int[Tensor, "row pos"]) -> None:
        pass

    def end(self) -> None:
        pass
