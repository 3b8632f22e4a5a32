"""Twins: further modules around the very weights of a frozen model, for adapters that the model itself never sees."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from steer.architectures import find_decoder
from steer.interop.peers import without_components

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from steer.model import FrozenLM


def twin_of(lm: FrozenLM) -> PreTrainedModel:
    """The decoder of a model's text once more: other modules, the same tensors, of which no byte is copied.

    It is in evaluation mode, without the model's hooks, and none of its parameters requires a gradient. What becomes of
    its modules does not reach the model, as long as nobody writes into the weights.
    """
    decoder, path = find_decoder(lm.model)
    text = cast("PreTrainedModel", decoder.get_submodule(path))
    # What deepcopy finds here it takes as the copy. Parameters are other objects around the same storage, as gradients
    # and `requires_grad` belong to the object; tied ones are one object, and stay so.
    made: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in text.parameters()}
    made |= {id(buffer): buffer for buffer in text.buffers()}
    made |= {id(hooks): type(hooks)() for module in text.modules() for hooks in _hooks(module)}
    twin = copy.deepcopy(text, made).eval()
    without_components(twin)
    return twin


def _hooks(module: nn.Module) -> list[dict[int, Any]]:
    """What a module keeps of hooks that run in its forward and backward passes."""
    return [
        held
        for name, held in vars(module).items()
        if name.startswith(("_forward_", "_backward_")) and isinstance(held, dict)
    ]
