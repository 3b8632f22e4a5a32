"""steer's states in nnsight 0.8: writing and reading inside a trace.

    model = TransformersModel(hf_model, tokenizer=tokenizer)
    lm = steer.wrap(model)
    with lm.steered(bank, users=users, prompt_lengths=lengths) as steering:
        with model.trace(batch):
            write(model, steering)
            logits = model.output.logits.save()

nnsight wants a block to ask for values in the order in which the model computes them, and `write` passes all sites
of a plan. To read values below them, or between them, write in a block of its own: `with tracer.invoke():`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from steer.attach import in_place
from steer.errors import SteerError
from steer.sites import Site

if TYPE_CHECKING:
    from jaxtyping import Float
    from nnsight import Envoy
    from torch import Tensor

    from steer.attach import Place
    from steer.model import FrozenLM
    from steer.steering import Steering


def write(model: Envoy, steering: Steering) -> None:
    """Does, inside a trace, what steer's own hooks would do; those do nothing meanwhile.

    In generation it is called in each step: `for step in tracer.iter[:n]: write(model, steering)`. Which positions are
    edited follows the positions that the model is given.

    Raises:
        SteerError: the nnsight model is not over the steered one, the block has only some of the batch's rows, or
            streams are contrasted.
    """
    _require_same_model(model, steering.lm)
    runs = steering.hand_over()
    for site in sorted(runs, key=lambda site: site.depth):
        place, run = steering.lm.attachment.place_of(site), runs[site]
        envoy = _envoy(model, place)
        if place.at == "shared":
            in_place(run)(envoy.input)
        elif place.at == "input":
            envoy.input = run(envoy.input)
        elif isinstance(output := envoy.output, tuple):
            envoy.output = (run(output[0]), *output[1:])
        else:
            envoy.output = run(output)


def activations(model: Envoy, lm: FrozenLM, sites: Iterable[Site | str]) -> dict[Site, Float[Tensor, "row pos d"]]:
    """Reads the sites' tensors inside a trace; keep them past it with `.save()`.

    Raises:
        SteerError: the model has no such site, or the nnsight model is over another one.
    """
    _require_same_model(model, lm)
    found: dict[Site, Tensor] = {}
    for site in sorted({Site.parse(site).canonical() for site in sites}, key=lambda site: site.depth):
        place = lm.attachment.place_of(site)
        envoy = _envoy(model, place)
        value: Any = envoy.output if place.at == "output" else envoy.input
        hidden = lm.attachment.unflatten(value[0] if isinstance(value, tuple) else value)
        if hidden.dim() == 2:
            raise SteerError(f"{site}: this model has rows and positions in one dimension there; use steer.read")
        # A clone, as some models go on to add into this very tensor.
        found[site] = hidden.clone()
    return found


def _require_same_model(model: Envoy, lm: FrozenLM) -> None:
    if model._module is not lm.model:
        raise SteerError("this nnsight model is over another model than steer's; use steer.wrap(nnsight_model)")


def _envoy(model: Envoy, place: Place) -> Envoy:
    return model.get(next(name for name, module in model._module.named_modules() if module is place.module))
