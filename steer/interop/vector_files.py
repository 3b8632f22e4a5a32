"""Vector files of other programs, as states of `GivenVector`, and states as such files.

| ending | programs | what it holds | where it is added |
|---|---|---|---|
| `.gguf` | repeng, llama.cpp, EasySteer | tensors `direction.N`, `[d]` | `resid_post[N]` |
| `.safetensors` | any | tensors `[d]`, named by a site or by N | there, or at `resid_post[N]` |
| `.pt` | hotwire-vllm, EasySteer | one tensor `[layers, d]`, or `[d]` | `resid_post[N]` for row N, or for any N |

Layers count from 0 in all of them. `direction.N` is added to what block N puts out: repeng wraps block N and adds to
its output; llama.cpp keeps direction.1 first in a buffer, N at n_embd · (N − 1), and adds after block il what is at
n_embd · (il − 1), so that the two cancel. Only `direction.0` has no place in that buffer. llama.cpp refuses a file that
has it, so none is written; repeng and EasySteer take it, so it is read.

A `.pt` file is a pickle. It goes through torch's restricted unpickler, which makes tensors and plain containers and
calls nothing else; what that refuses is refused. No such file is written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from steer.errors import SteerError
from steer.files import draft
from steer.inject.positions import Positions
from steer.interop import state_files
from steer.methods import GivenVector
from steer.sites import Site
from steer.state import UserState

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from steer.model import FrozenLM
    from steer.state import Artifact

_ARCHITECTURE = "controlvector"
# Other programs have no positions in their files, and do not look at this key.
_POSITIONS = "steer.positions"
# What EasySteer calls the tensors that it adds to.
_COMPONENTS = {None: "resid_post", "hidden_states": "resid_post", "attention_heads": "z"}


def read(
    path: str | Path,
    *,
    lm: FrozenLM | None = None,
    layers: Sequence[int] | None = None,
    positions: Positions | None = None,
) -> UserState:
    """Reads one state from a file, whose ending says what it is: .gguf, .safetensors or .pt.

    Args:
        path: of the file.
        lm: the model that the vectors are for. Widths are checked, and the state is refused by other models.
        layers: take the vectors of these layers only. A `.pt` file needs it: the programs that read such files are told
            with each request which layer to use.
        positions: where the vectors are to be added. None for what the file says; most say nothing, and then it is at
            all tokens, as other programs do.

    Raises:
        SteerError: the file is missing, damaged, or of no kind that is read; it has not these layers; layers or
            positions are given and it holds something else than vectors; or the model is not the one it is for.
    """
    path = Path(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise SteerError(f"{path}: this ending is not known; vector files end in {', '.join(ENDINGS)}")
    if not path.is_file():
        raise SteerError(f"{path}: there is no such file")
    try:
        return _as_asked(reader(path, layers), lm, layers, positions)
    except SteerError as error:
        raise SteerError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise SteerError(f"{path}: its metadata are not those of its vectors ({error})") from None


def write_gguf(path: str | Path, state: UserState, *, artifact: Artifact | None = None, model_hint: str = "") -> None:
    """Writes a control vector for llama.cpp, repeng and EasySteer: all of it, or nothing.

    Whatever the state's positions are, these programs add it at all tokens. The file has them under `steer.positions`,
    where `read` finds them.

    Args:
        path: of the file, which is replaced.
        state: of any method that does nothing but add vectors.
        artifact: the one that the state names, if any.
        model_hint: the model's `config.model_type`; what the state was read with if empty.

    Raises:
        SteerError: the state does something else, or adds at another place than after a block from the second on; the
            package gguf is missing; or the file cannot be written.
    """
    gguf, path = _gguf(), Path(path)
    given = GivenVector.of(state, artifact)
    directions = directions_of(given, "a GGUF control vector")
    if 0 in directions:
        raise SteerError(
            "llama.cpp refuses a file with direction.0, so what is added at resid_post[0] cannot go into a control "
            "vector; write safetensors instead"
        )
    with draft(path) as unfinished:
        writer = gguf.GGUFWriter(unfinished, _ARCHITECTURE)
        try:
            writer.add_string(f"{_ARCHITECTURE}.model_hint", model_hint or str(given.data.get("model_hint", "")))
            writer.add_uint32(f"{_ARCHITECTURE}.layer_count", len(directions))
            writer.add_string(_POSITIONS, given.provenance.settings["positions"])
            for layer, vector in directions.items():
                writer.add_tensor(f"direction.{layer}", vector.numpy())
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


def directions_of(given: UserState, what: str) -> dict[int, Float[Tensor, " d"]]:
    """The vectors of a state of `GivenVector` by their layers. Raises SteerError if one is not added after a block."""
    sites = {Site.parse(site): vector for site, vector in given.tensors.items()}
    if elsewhere := [site for site in sites if site.name != "resid_post"]:
        raise SteerError(f"{what} is added after blocks, at resid_post[l], and this state adds at {elsewhere[0]}")
    return {site.layer: vector for site, vector in sites.items() if site.layer is not None}


def _as_asked(
    state: UserState, lm: FrozenLM | None, layers: Sequence[int] | None, positions: Positions | None
) -> UserState:
    """The state with these layers and positions only, and for this model."""
    source = state.provenance
    if lm is not None and source.model not in (None, lm.fingerprint):
        raise SteerError(f"the state was read from {source.model}; this model is {lm.fingerprint}")
    if source.method != GivenVector.name:
        if layers is not None or positions is not None:
            raise SteerError(f"this is a {source.method} state, whose layers and positions are not to be chosen")
        return state
    vectors = {Site.parse(site): vector for site, vector in state.tensors.items()}
    if layers is not None:
        if missing := set(layers) - {site.layer for site in vectors}:
            raise SteerError(f"it has no vector for layer {min(missing)}; there are {', '.join(map(str, vectors))}")
        vectors = {site: vector for site, vector in vectors.items() if site.layer in layers}
    made = GivenVector(positions or source.settings["positions"]).state(
        vectors, lm=lm, reference_norms=source.calibration.get("reference_norm"), source=state.data
    )
    model = made.provenance.model or source.model
    return replace(made, provenance=replace(made.provenance, model=model, records=source.records))


def _read_gguf(path: Path, layers: Sequence[int] | None) -> UserState:
    try:
        reader = _strict_reader(path)
        # By `contents` of a field: strings, numbers or lists of them.
        fields = {name: field.contents() for name, field in reader.fields.items()}
        # In the byte order of this machine, and apart from the mapped file.
        tensors = {t.name: t.data.astype(t.data.dtype.newbyteorder("=")) for t in reader.tensors}
    except (OSError, ValueError, KeyError, IndexError, TypeError, OverflowError) as error:
        raise SteerError(f"this is no readable GGUF file ({error})") from None
    if (found := fields.get("general.architecture")) != _ARCHITECTURE:
        raise SteerError(f"this is no control vector: its general.architecture is {found!r}, not {_ARCHITECTURE!r}")
    component = _easysteer_component(fields.get("controlvector.easysteer"))
    vectors: dict[Site, Tensor] = {}
    for name, data in tensors.items():
        match = re.fullmatch(r"direction\.(\d{1,6})", name)
        if match is None or data.dtype.kind != "f":
            raise SteerError(f"its tensor {name!r} of {data.dtype} is no direction.N of floats, N counted from 0")
        site = Site(component, int(match[1]))
        if site in vectors:
            raise SteerError(f"it has two tensors for layer {site.layer}")
        vectors[site] = torch.from_numpy(data)
    source = {"format": "gguf", "model_hint": str(fields.get("controlvector.model_hint", ""))}
    return GivenVector(fields.get(_POSITIONS, "all")).state(vectors, source=source)


def _easysteer_component(described: Any) -> str:
    """The name of the sites that EasySteer adds to; repeng and llama.cpp do not tell, as they know one only."""
    if described is None:
        return _COMPONENTS[None]
    try:
        content = json.loads(described)
        version, component = content["version"], content.get("component")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise SteerError("its metadata of EasySteer cannot be read") from None
    if version != 1 or not isinstance(component, str | None) or component not in _COMPONENTS:
        raise SteerError(
            f"EasySteer adds it to {component!r} (version {version!r} of its metadata); known is "
            f"{' and '.join(filter(None, _COMPONENTS))}, version 1"
        )
    return _COMPONENTS[component]


def _read_safetensors(path: Path, layers: Sequence[int] | None) -> UserState:
    found = state_files.read(path)
    if isinstance(found, UserState):
        return found
    vectors: dict[Site, Tensor] = {}
    for name, tensor in found.items():
        site = Site("resid_post", int(name)) if re.fullmatch(r"\d{1,6}", name) else Site.parse(name).canonical()
        if site in vectors:
            raise SteerError(f"it has two tensors for {site}")
        vectors[site] = tensor
    return GivenVector().state(vectors, source={"format": "safetensors"})


def _read_pt(path: Path, layers: Sequence[int] | None) -> UserState:
    if layers is None:
        raise SteerError(
            "a .pt file holds vectors for every layer, or one for any, and is used at the layer that a request names; "
            "say which: layers=[20]"
        )
    tensor = _load_pt(path)
    if tensor.dim() not in (1, 2) or not tensor.is_floating_point():
        raise SteerError(f"it holds {tensor.dtype} {list(tensor.shape)}; expected floats [layers, d] or [d]")
    if tensor.dim() == 2 and (beyond := [layer for layer in layers if not 0 <= layer < len(tensor)]):
        raise SteerError(f"it has {len(tensor)} layers, 0 to {len(tensor) - 1}, and layer {beyond[0]} is asked for")
    vectors: dict[Site, Tensor] = {
        Site("resid_post", layer): (tensor[layer] if tensor.dim() == 2 else tensor).clone() for layer in layers
    }
    return GivenVector().state(vectors, source={"format": "pt"})


def _load_pt(path: Path) -> Tensor:
    """The one tensor of a `.pt` file, which may be wrapped in a dictionary."""
    try:
        # The one place where a pickle is read. Restricted to weights, it makes tensors and calls nothing of the file's.
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    # A damaged pickle can end in any error.
    except Exception as error:
        first = str(error).partition("\n")[0]
        raise SteerError(
            f"torch does not load it as weights only ({type(error).__name__}: {first:.160}). It is damaged, or a "
            "pickle of more than tensors, which could run code; where you trust it, save its tensors as safetensors"
        ) from None
    if isinstance(loaded, Mapping):
        held = [value for value in loaded.values() if isinstance(value, torch.Tensor)]
        if len(held) != 1:
            raise SteerError(f"it holds {len(held)} tensors, and one is expected; save that one as safetensors")
        loaded = held[0]
    if not isinstance(loaded, torch.Tensor):
        raise SteerError(f"it holds a {type(loaded).__name__} and no tensor")
    # A file of a few bytes may describe a tensor of any size, all of it one number.
    dense = loaded.layout == torch.strided and not loaded.is_quantized and loaded.device.type == "cpu"
    if not dense or loaded.nbytes > loaded.untyped_storage().nbytes():
        raise SteerError("it holds no plain dense tensor; save it as safetensors")
    return loaded.detach()


_READERS: dict[str, Callable[[Path, Sequence[int] | None], UserState]] = {
    ".gguf": _read_gguf,
    ".safetensors": _read_safetensors,
    ".pt": _read_pt,
}
ENDINGS = tuple(_READERS)


def _gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise SteerError("GGUF files need the package gguf: pip install 'steer-toolkit[embedded]'") from None
    return gguf


def _strict_reader(path: Path) -> Any:
    class Reader(_gguf().GGUFReader):  # type: ignore[misc]
        # Behind its end a file reads as empty there, and a count of 2⁶⁰ would be counted to the end.
        def _get(self, offset: int, dtype: Any, count: int = 1, *rest: Any, **more: Any) -> Any:
            found = super()._get(offset, dtype, count, *rest, **more)
            if len(found) < int(count):
                raise ValueError("it ends too early")
            return found

    return Reader(path)
