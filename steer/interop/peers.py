"""The transformers model inside of another library's object."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from steer.errors import SteerError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase


def unwrap(model: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Returns the transformers model in a `TransformerBridge` or an nnsight model, and nnsight's tokenizer.

    Any other model is returned as it is. TransformerLens' tokenizer is left where it is: it puts a BOS in front of
    every text, also where the model's own puts none, so that other activations would be read.

    Raises:
        SteerError: there is no local transformers model inside, its weights are not loaded, or TransformerLens has
            processed them.
    """
    libraries = {base.__module__.partition(".")[0] for base in type(model).__mro__}
    tokenizer = None
    if "transformer_lens" in libraries:
        require_own_weights(model)
        inner = getattr(model, "original_model", None)
    elif "nnsight" in libraries:
        inner, tokenizer = model._module, getattr(model, "tokenizer", None)
    else:
        return model, None
    if not isinstance(inner, PreTrainedModel):
        raise SteerError(
            f"there is no transformers model in this {type(model).__name__}, and only those can be wrapped"
        )
    if any(parameter.is_meta for parameter in inner.parameters()):
        raise SteerError("the weights of this nnsight model are not loaded yet; make it with dispatch=True")
    return inner, tokenizer


def require_own_weights(bridge: Any) -> None:
    """Raises SteerError if TransformerLens has folded or centred the weights.

    The same text then has other activations, and a state that was read from the model's own means nothing there.
    """
    if getattr(bridge, "_weights_processed", False):
        raise SteerError(
            "TransformerLens has processed this model's weights (enable_compatibility_mode), so that its activations "
            "are not the model's own any more; leave that out, or pass no_processing=True"
        )


def named_parameters(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters under their own names, also where a `TransformerBridge` has put its components in between.

    Some of those hold further parameters, such as the three parts of GPT-2's joint projection; they are left out.
    """
    while (inner := module._modules.get("_original_component")) is not None:
        module = inner
    for name, parameter in module.named_parameters(recurse=False):
        yield f"{prefix}{name}", parameter
    for name, child in module.named_children():
        yield from named_parameters(child, f"{prefix}{name}.")


def without_components(module: nn.Module) -> None:
    """Takes out, in place, what a `TransformerBridge` has put between a model's modules."""
    for name, child in list(module._modules.items()):
        while child is not None and "_original_component" in child._modules:
            child = child._modules["_original_component"]
        module._modules[name] = child
        if child is not None:
            without_components(child)
