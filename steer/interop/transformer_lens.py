"""steer's states in TransformerLens 4: functions for `run_with_hooks`, and activations out of a cache.

A `TransformerBridge` runs the very transformers model that it was booted on, with components of its own between the
modules. So boot the bridge first, then wrap it:

    bridge = TransformerBridge.boot_transformers(name, hf_model=model, tokenizer=tokenizer)
    lm = steer.wrap(bridge, tokenizer)
    with lm.steered(bank, users=users, prompt_lengths=lengths) as steering:
        logits = bridge.run_with_hooks(ids, attention_mask=mask, fwd_hooks=fwd_hooks(bridge, steering))
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from steer.attach import in_place
from steer.errors import SteerError
from steer.interop.peers import require_own_weights
from steer.sites import Site

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor
    from transformer_lens.model_bridge import TransformerBridge

    from steer.attach import Operator
    from steer.steering import Steering


def hook_name(bridge: TransformerBridge, site: Site | str) -> str:
    """The name of the hook point where a site's tensor passes, for a `names_filter` and for hooks of your own.

    Raises:
        SteerError: this architecture has no such hook point, or TransformerLens has processed the weights.
    """
    require_own_weights(bridge)
    site = Site.parse(site).canonical()
    if site.lens_name not in bridge.hook_dict:
        raise SteerError(f"{site}: TransformerLens has no {site.lens_name} in this {bridge.cfg.architecture}")
    return site.lens_name


def fwd_hooks(bridge: TransformerBridge, steering: Steering) -> list[tuple[str, Callable[..., Tensor]]]:
    """Functions that do at TransformerLens' hook points what steer's own hooks would do; those do nothing meanwhile.

    To be called within the `steered` block, for `bridge.run_with_hooks(..., fwd_hooks=...)` or
    `bridge.hooks(fwd_hooks=...)`. Which positions are edited follows the positions that the model is given, so the
    functions serve prefill and decoding alike, with padding on either side.

    Raises:
        SteerError: the bridge is not over the steered model, there is no such hook point, or streams are contrasted.
    """
    if bridge.original_model is not steering.lm.model:
        raise SteerError("this bridge is over another model than the steered one; use steer.wrap(bridge)")
    names = {site: hook_name(bridge, site) for site in steering.plan.sites}
    return [(names[site], _hook(site, run)) for site, run in steering.hand_over().items()]


def activations(
    bridge: TransformerBridge, cache: Mapping[str, Tensor], sites: Iterable[Site | str]
) -> dict[Site, Float[Tensor, "row pos d"]]:
    """Takes the sites' tensors out of what `bridge.run_with_cache` returned, heads concatenated.

    Raises:
        SteerError: the cache was made without a site; its `names_filter` must have `hook_name(bridge, site)`.
    """
    found: dict[Site, Tensor] = {}
    for site in (Site.parse(site).canonical() for site in sites):
        name = hook_name(bridge, site)
        if name not in cache:
            raise SteerError(f"{site}: the cache has no {name}; is it in the names_filter?")
        found[site] = cache[name].flatten(2)
    return found


def _hook(site: Site, run: Operator) -> Callable[..., Tensor]:
    # TransformerLens hooks the norm's input there, and the residual goes around the norm.
    write = in_place(run) if site.name == "resid_mid" else run

    def function(tensor: Tensor, hook: Any) -> Tensor:
        # `z` comes as [row, pos, head, d_head].
        return write(tensor.flatten(2)).view_as(tensor)

    return function
