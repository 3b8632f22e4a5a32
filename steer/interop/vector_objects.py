"""Vectors in memory, of repeng and of the package steering-vectors, as states of `GivenVector` and back.

| object | where it is added | site |
|---|---|---|
| repeng's `ControlVector`, `directions[N]` | to the output of block N | `resid_post[N]` |
| `SteeringVector`, `layer_activations[N]`, `decoder_block` | to the output of block N | `resid_post[N]` |
| the same, `self_attn` | to the output of the attention | `attn_out[N]` |
| the same, `mlp` | to the output of the feed-forward | `mlp_out[N]` |
| the same, `post_attention_layernorm` | to the output of that norm | `attn_out[N]` in Gemma 2, Gemma 3 and OLMo 2 |

Both packages count layers from 0 and add at all tokens. steering-vectors goes by the modules of the model, and our
sites by what is added to the residual stream; these are the same tensor unless a norm comes between. In Gemma 2 and 3
and in OLMo 2 norms do come between: there `self_attn` and `mlp` have no site, and the site `attn_out` is the output of
`post_attention_layernorm`, which elsewhere is read by the feed-forward alone. `input_layernorm` has a site nowhere. So
for all but decoder blocks the model must be known.

The packages are imported only to make their objects.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from steer.errors import SteerError
from steer.interop.vector_files import directions_of
from steer.methods import GivenVector
from steer.sites import Site

if TYPE_CHECKING:
    from repeng import ControlVector
    from steering_vectors import SteeringVector

    from steer.inject.positions import Positions
    from steer.model import FrozenLM
    from steer.state import Artifact, UserState


def from_repeng(vector: ControlVector, *, lm: FrozenLM | None = None, positions: Positions = "all") -> UserState:
    """The directions of repeng 0.4 as a state.

    Args:
        vector: `directions` by layer, and `model_type`.
        lm: the model that it is for: widths are checked, and the state is refused by other models.
        positions: where to add it.

    Raises:
        SteerError: this is no such object, or `GivenVector.state` refuses what it holds.
    """
    directions = _attribute(vector, "directions", "a ControlVector of repeng")
    vectors = {Site("resid_post", _layer(at)): torch.from_numpy(np.array(values)) for at, values in directions.items()}
    source = {"format": "repeng", "model_hint": str(getattr(vector, "model_type", ""))}
    return GivenVector(positions).state(vectors, lm=lm, source=source)


def to_repeng(state: UserState, *, artifact: Artifact | None = None, model_type: str = "") -> ControlVector:
    """A state of any method that adds vectors after blocks as repeng's object, which adds them at all tokens.

    Args:
        state: the state.
        artifact: the one that it names, if any.
        model_type: the model's `config.model_type`; what the state was read with if empty.

    Raises:
        SteerError: repeng cannot be imported, or the state does something else.
    """
    try:
        from repeng import ControlVector
    # repeng 0.4 does not import under NumPy 2, for want of a name.
    except (ImportError, AttributeError) as error:
        raise SteerError(f"the package repeng cannot be imported ({error})") from None
    given = GivenVector.of(state, artifact)
    directions = directions_of(given, "a ControlVector of repeng")
    hint = model_type or str(given.data.get("model_hint", ""))
    return ControlVector(hint, {layer: vector.numpy() for layer, vector in directions.items()})


def from_steering_vector(
    vector: SteeringVector, *, lm: FrozenLM | None = None, positions: Positions = "all"
) -> UserState:
    """A `SteeringVector` of steering-vectors 0.12 as a state.

    Args:
        vector: `layer_activations` by layer, and `layer_type`.
        lm: the model that it is for: widths are checked, and the state is refused by other models. Without it only
            vectors for decoder blocks are taken.
        positions: where to add it.

    Raises:
        SteerError: this is no such object, its layers have no site, or `GivenVector.state` refuses what it holds.
    """
    what = "a SteeringVector of steering-vectors"
    activations, kind = _attribute(vector, "layer_activations", what), str(getattr(vector, "layer_type", ""))
    names = {layer_type: name for name, layer_type in _layer_types(lm).items()}
    if kind not in names:
        raise SteerError(f"{_no_site(lm, f'layer_type={kind!r}')}; there is one for {' and '.join(names)}")
    vectors = {Site(names[kind], _layer(at)): values.detach().cpu() for at, values in activations.items()}
    return GivenVector(positions).state(vectors, lm=lm, source={"format": "steering-vectors"})


def to_steering_vector(
    state: UserState, *, lm: FrozenLM | None = None, artifact: Artifact | None = None
) -> SteeringVector:
    """A state of any method that adds vectors at one kind of site as a `SteeringVector`, which adds them at all tokens.

    Args:
        state: the state.
        lm: the model that it is for; without it only vectors after blocks can be given.
        artifact: the one that the state names, if any.

    Raises:
        SteerError: steering-vectors cannot be imported, or cannot add what the state does.
    """
    try:
        from steering_vectors import SteeringVector
    except ImportError as error:
        raise SteerError(f"the package steering-vectors cannot be imported ({error})") from None
    given, types = GivenVector.of(state, artifact), _layer_types(lm)
    vectors = {Site.parse(site): vector for site, vector in given.tensors.items()}
    if foreign := [site for site in vectors if site.name not in types]:
        raise SteerError(f"{_no_site(lm, str(foreign[0]))}; it adds at {' and '.join(f'{name}[l]' for name in types)}")
    if len(kinds := {site.name for site in vectors}) > 1:
        raise SteerError(f"a SteeringVector adds at one kind of site, and the state has {' and '.join(sorted(kinds))}")
    layers = {site.layer: vector for site, vector in vectors.items() if site.layer is not None}
    return SteeringVector(layers, layer_type=types[kinds.pop()])


def _layer_types(lm: FrozenLM | None) -> dict[str, Any]:
    """By the names of our sites, which layer type of steering-vectors has the same tensor in this model."""
    types = {"resid_post": "decoder_block"}
    if lm is None:
        return types
    paths = lm.attachment.architecture
    # Bloom's modules have added the residual to their outputs already, where adding to it comes to the same.
    normed = {name for name in ("attn_out", "mlp_out") if getattr(paths, name).endswith("layernorm")}
    if "attn_out" not in normed:
        types["attn_out"] = "self_attn"
    elif paths.attn_out == "post_attention_layernorm":
        types["attn_out"] = "post_attention_layernorm"
    if "mlp_out" not in normed:
        types["mlp_out"] = "mlp"
    return types


def _no_site(lm: FrozenLM | None, what: str) -> str:
    if lm is None:
        return f"which tensor of a model {what} means depends on the model, so pass lm"
    return f"in this model steering-vectors and steer have no tensor in common for {what}"


def _attribute(thing: object, name: str, what: str) -> Mapping[Any, Any]:
    found = getattr(thing, name, None)
    if not isinstance(found, Mapping):
        raise SteerError(f"{type(thing).__name__} has no {name}, so it is not {what}")
    return found


def _layer(at: Any) -> int:
    # repeng counts from the end in some of its calls; what it stores counts from the front.
    if not isinstance(at, int) or at < 0:
        raise SteerError(f"{at!r} is not the number of a layer; layers count from 0")
    return at
