"""Keys and values of soft tokens: computed once for a user, and reused for every prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from steer.architectures import ONLY_PREFIXES
from steer.errors import SteerError
from steer.inject import KeyValues, PrefixEdit
from steer.read import by_length
from steer.sites import Site

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from steer.model import FrozenLM


@torch.no_grad()
def key_values_of(
    lm: FrozenLM, prefixes: Sequence[Float[Tensor, "_ d"] | None], *, batch_tokens: int = 2048
) -> list[KeyValues | None]:
    """What a model makes of soft tokens that stand in front, behind a BOS token where the tokenizer begins with one.

    A `KeyValueEdit.from_rows` of these does what `PrefixEdit.from_rows` of the soft tokens does, to rounding, without
    reading them again. It is meant for frozen soft tokens: no gradient flows back to them.

    Args:
        lm: the model.
        prefixes: soft tokens, one row each; None is a row without.
        batch_tokens: soft tokens, with padding, that one forward pass may have.

    Returns:
        Keys and values in the model's precision, on its device; None for a row without soft tokens.

    Raises:
        SteerError: the prompts are read by an encoder.
    """
    if lm.is_encoder_decoder:
        raise SteerError(f"keys and values: {ONLY_PREFIXES}")
    bos = int(lm.adds_bos)
    found: list[KeyValues | None] = [None] * len(prefixes)
    lengths = {i: bos + len(prefix) for i, prefix in enumerate(prefixes) if prefix is not None and len(prefix)}
    for batch in by_length(lengths, batch_tokens):
        edit = PrefixEdit.from_rows([prefixes[i] for i in batch], lm.width_at(Site("embed")))
        for i, own in zip(batch, _read(lm, edit, [lengths[i] for i in batch], bos), strict=True):
            found[i] = own
    return found


def _read(lm: FrozenLM, edit: PrefixEdit, lengths: Sequence[int], bos: int) -> list[KeyValues]:
    ids = torch.full((len(lengths), max(lengths)), lm.placeholder_id, device=lm.device)
    if bos:
        ids[:, 0] = lm.tokenizer.bos_token_id  # type: ignore[union-attr]
    # Padded on the right, where it changes nothing. A cache that knows no windows keeps every token.
    cache = DynamicCache()
    with lm.steered(edits=[edit], prompt_lengths=lengths):
        lm.attachment.decoder(input_ids=ids, past_key_values=cache, use_cache=True)
    layers = [cast(DynamicLayer, layer) for layer in cache.layers]
    keys = torch.stack([cast("Tensor", layer.keys).to(lm.device) for layer in layers], 1)
    values = torch.stack([cast("Tensor", layer.values).to(lm.device) for layer in layers], 1)
    return [
        # Copies, so that a short prefix does not keep the whole batch.
        KeyValues(own_keys[:, :, :length].clone(), own_values[:, :, :length].clone(), bool(bos))
        for own_keys, own_values, length in zip(keys, values, lengths, strict=True)
    ]
