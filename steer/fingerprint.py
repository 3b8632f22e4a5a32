"""The fingerprint of a model: its architecture and samples of the weights that run, independent of dtype and device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch

from steer.interop.peers import named_parameters
from steer.state import Fingerprint

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

_SAMPLES = 256
_ARCHITECTURE_KEYS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
)
# What PEFT calls the module that it wraps.
_WRAPPED_NAMES = ("base_layer.", "original_module.")


class Fingerprints:
    """The fingerprints of one decoder: one for each choice of PEFT adapters, as they change what it computes."""

    def __init__(self, decoder: PreTrainedModel) -> None:
        self._decoder = decoder
        self._adapted = _adapted(decoder)
        self._known: dict[object, Fingerprint] = {}

    def current(self) -> Fingerprint:
        """That of the weights that run at present."""
        # PEFT switches all modules together.
        choice = [(tuple(_running(module)), tuple(module.merged_adapters)) for module in self._adapted[:1]]
        if str(choice) not in self._known:
            self._known[str(choice)] = self._take()
        return self._known[str(choice)]

    def _take(self) -> Fingerprint:
        config = self._decoder.config
        shape = {key: getattr(config, key, None) for key in _ARCHITECTURE_KEYS}
        name = f"{config.model_type}-{config.num_hidden_layers}x{config.hidden_size}"
        return Fingerprint(name, repr(sorted(shape.items())), tuple(running_samples(self._decoder)))


def running_samples(module: nn.Module) -> list[int]:
    """Samples of a module's weights, and of those adapters that are active, as bit patterns in bfloat16."""
    adapters = dict(_adapters(module))
    own = [p for _, p in sorted(_plain_names(module)) if p not in adapters]
    return _samples(own) + _samples([parameter for parameter, runs in adapters.items() if runs])


def _adapted(root: nn.Module) -> list[Any]:
    return [module for module in root.modules() if hasattr(module, "adapter_layer_names")]


def _adapters(root: nn.Module) -> Iterator[tuple[nn.Parameter, bool]]:
    """Parameters of all adapters, and whether they run."""
    for module in _adapted(root):
        for kind in module.adapter_layer_names:
            for adapter, part in attrgetter(kind)(module).items():
                for parameter in part.parameters() if hasattr(part, "parameters") else [part]:
                    yield parameter, adapter in _running(module)


def _running(module: Any) -> Sequence[str]:
    """Names of the adapters that a module adds to its output; merged ones are part of its weights."""
    return [] if module.disable_adapters or module.merged_adapters else module.active_adapters


def _plain_names(decoder: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in named_parameters(decoder):
        for wrapped in _WRAPPED_NAMES:
            name = name.replace(wrapped, "")
        yield name, parameter


def _samples(parameters: Sequence[Tensor]) -> list[int]:
    """Bit patterns in bfloat16 of weights that are spread over the parameters and within them."""
    if not parameters:
        return []
    values = []
    for which, chosen in groupby(range(_SAMPLES), lambda i: i * len(parameters) // _SAMPLES):
        if size := parameters[which].numel():
            # The multiplier is Knuth's, prime to every size.
            places = [i * 2654435761 % size for i in chosen]
            values.append(_flat(parameters[which])[places].cpu().float())
    return [word & 0xFFFF for word in torch.cat(values).to(torch.bfloat16).view(torch.int16).tolist()]


def _flat(weight: Tensor) -> Tensor:
    """The numbers of a weight; quantized ones mostly come as a kind of tensor that has few operations of its own."""
    plain = type(weight.data) is torch.Tensor
    return (weight.detach() if plain else weight.detach().dequantize()).flatten()
