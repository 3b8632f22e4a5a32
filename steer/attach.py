"""Hooks: placed once per declared site, they run the operators bound there, and do nothing while none is bound."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import torch
from torch import nn

from steer.architectures import ONLY_PREFIXES, Architecture
from steer.errors import SteerError
from steer.sites import Site

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor
    from torch.utils.hooks import RemovableHandle


class Operator(Protocol):
    """What runs at a site: takes the tensor there and returns its replacement, of the same shape."""

    def __call__(self, hidden: Float[Tensor, "row pos d"], /) -> Float[Tensor, "row pos d"]: ...


class Binding(Protocol):
    """Who uses the hooks at present; told the token positions before every forward pass, and its end."""

    def begin(self, positions: Int[Tensor, "row pos"]) -> None: ...

    def end(self) -> None: ...


class Place(NamedTuple):
    """Where a site's tensor passes: the input or the output of a module.

    A `shared` input is at the same time the residual that goes around the module, so it is written in place.
    """

    module: nn.Module
    at: Literal["input", "output", "shared"]


class Slot:
    """One hooked site, where it is, and the operators bound there."""

    def __init__(self, site: Site, place: Place, attachment: Attachment, operators: tuple[Operator, ...] = ()) -> None:
        self.site, self.place = site, place
        self.operators = operators
        self._attachment = attachment

    def run(self, hidden: Tensor) -> Tensor:
        rows = self._attachment.unflatten(hidden)
        edited = self._apply(rows)
        return edited if rows is hidden else edited.flatten(0, 1)

    def _apply(self, hidden: Tensor) -> Tensor:
        for operator in self.operators:
            hidden = operator(hidden)
        return hidden


class Attachment:
    """The hooks on one model.

    Binding and unbinding only change what the slots hold, never the hooks: a hook that is added after the model was
    compiled is ignored by the compiled code, which would steer the prefill and not the decoding.

    Attributes:
        decoder: what every forward pass calls with the tokens; the architecture's paths start here.
        positions: of the tokens in the present forward pass, `[row, pos]`, while the model is bound.
    """

    def __init__(self, model: nn.Module, decoder: nn.Module, architecture: Architecture) -> None:
        refuse_compiled(model)
        self.decoder = decoder
        self.architecture = architecture
        self.positions: Int[Tensor, "row pos"] | None = None
        blocks = None if architecture.blocks is None else self.decoder.get_submodule(architecture.blocks)
        self.blocks: Sequence[nn.Module] = [] if blocks is None else list(blocks.children())
        self.slots: dict[Site, Slot] = {}
        self.traced = False
        # Of the class, since nnsight puts a `forward` of its own into the module.
        self._arguments = list(inspect.signature(type(self.decoder).forward).parameters)[1:]
        self._binding: Binding | None = None
        self._owner: int | None = None
        self._lock = threading.Lock()
        self._handles: list[RemovableHandle] = [
            self.decoder.register_forward_pre_hook(self._begin, prepend=True, with_kwargs=True),
            self.decoder.register_forward_hook(self._end),
        ]

    def declare(self, sites: Iterable[Site]) -> None:
        """Places hooks at further sites.

        Raises:
            SteerError: the model has no such site, or has been compiled since it was wrapped.
        """
        if not self._handles:
            raise SteerError("this FrozenLM is closed; wrap the model again")
        for site in (site.canonical() for site in sites):
            if site in self.slots:
                continue
            if self.traced or any(module._compiled_call_impl is not None for module in self.decoder.modules()):
                raise SteerError(
                    f"{site} was not declared before the model was compiled, so a hook there would be ignored. "
                    f"Declare it when wrapping, steer.wrap(model, tokenizer, sites=[..., '{site}']), or call "
                    "steer.uncompile(model) first"
                )
            slot = Slot(site, self.place_of(site), self)
            self._handles.append(_hook(slot))
            self.slots[site] = slot

    def bind(self, binding: Binding) -> None:
        """Takes the model for one user of the hooks.

        Raises:
            SteerError: somebody has it already, it is closed, or modules that have hooks were replaced.
        """
        if not self._handles:
            raise SteerError("this FrozenLM is closed; wrap the model again")
        for site, slot in self.slots.items():
            if self.place_of(site).module is not slot.place.module:
                raise SteerError(
                    f"the module at {site} was replaced after the model was wrapped, by an adapter or a library such "
                    "as TransformerLens; put these into the model first, then wrap it"
                )
        if not self._lock.acquire(blocking=False):
            raise SteerError(
                "this model is already steered or read, in an enclosing block or by another thread; put all users "
                "of a batch into one `steered` block, or wrap a second copy of the model"
            )
        self._binding, self._owner = binding, threading.get_ident()

    def install(self, operators: Mapping[Site, tuple[Operator, ...]]) -> None:
        """Puts operators to work at their sites, for whom the model is bound to."""
        for site, bound in operators.items():
            self.slots[site].operators = bound

    def unflatten(self, hidden: Tensor) -> Float[Tensor, "row pos d"]:
        """OPT's feed-forward sees rows and positions as one dimension; parts them, while the model is bound."""
        if hidden.dim() == 2 and self.positions is not None:
            return hidden.unflatten(0, (-1, self.positions.shape[1]))
        return hidden

    def unbind(self) -> None:
        """Gives the model back as it was."""
        for slot in self.slots.values():
            slot.operators = ()
        self._binding = self._owner = self.positions = None
        self._lock.release()

    def remove(self) -> None:
        """Removes every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.slots.clear()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            self.traced = True
        elif self._owner is not None and self._owner != threading.get_ident():
            raise SteerError("another thread is steering this model; its users would leak into this forward pass")
        if self._binding is not None:
            # Not zip(strict=True): a call names only the arguments it has.
            self.positions = _positions(dict(zip(self._arguments, args, strict=False)) | kwargs)
            self._binding.begin(self.positions)

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._binding is not None:
            self.positions = None
            self._binding.end()

    def place_of(self, site: Site) -> Place:
        """Finds a site in the model. Raises SteerError if the model has no such site."""
        name, layer, paths = site.name, site.layer, self.architecture
        if paths.blocks is None and name != "embed":
            raise SteerError(f"{site}: {ONLY_PREFIXES}")
        if layer is None:
            path = paths.embed if name == "embed" else paths.final_norm
            if path is None:
                raise SteerError(f"{site}: this model's head reads resid_post[{len(self.blocks) - 1}] as it is")
            return Place(self.decoder.get_submodule(path), "output")
        if layer >= len(self.blocks):
            raise SteerError(f"{site}: the model has {len(self.blocks)} layers, 0 to {len(self.blocks) - 1}")
        inside = {"attn_out": paths.attn_out, "mlp_out": paths.mlp_out, "z": paths.z, "resid_mid": paths.mid}
        path = inside.get(name, "")
        if path is None:
            raise SteerError(
                f"{site}: in this architecture attention and feed-forward run in parallel, so there is no "
                f"residual between them; use resid_post[{layer}]"
            )
        # Not from `blocks`, which holds what was hooked.
        block = self.decoder.get_submodule(f"{paths.blocks}.{layer}")
        side: Literal["input", "output", "shared"] = "input" if name in ("resid_pre", "z") else "output"
        return Place(block.get_submodule(path), "shared" if name == "resid_mid" else side)


def refuse_compiled(model: nn.Module) -> None:
    """Raises SteerError if compiled code of this model exists, which would ignore hooks that are placed now."""
    if hasattr(model, "_orig_mod"):
        raise SteerError("this is the result of torch.compile(model); wrap the model itself, then compile that")
    # Also where only the blocks were compiled.
    if hasattr(model, "_compiled_call") or any(m._compiled_call_impl is not None for m in model.modules()):
        raise SteerError(
            "this model was compiled before it was wrapped, so its compiled code would ignore steering. Wrap it first, "
            "or call steer.uncompile(model)"
        )


def _positions(arguments: dict[str, Any]) -> Int[Tensor, "row pos"]:
    """Index of each token among its row's real tokens, from position ids, else the mask, else the cache."""
    tokens = arguments.get("input_ids")
    if tokens is None:
        tokens = arguments["inputs_embeds"]
    rows, length = tokens.shape[:2]
    ids, mask = arguments.get("position_ids"), arguments.get("attention_mask")
    if ids is not None and ids.dim() == 3:
        # Qwen-VL: time, height and width of what stands there; in front of these, `generate` puts the plain positions.
        ids = ids[0] if len(ids) == 4 else None
    if ids is not None:
        return ids.expand(rows, -1)
    cache = arguments.get("past_key_values")
    columns = torch.arange(length, device=tokens.device) + (0 if cache is None else cache.get_seq_length())
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        # With a static cache the mask is as long as the cache, so these are not its last columns.
        return (mask.long().cumsum(-1) - 1).clamp(min=0).index_select(1, columns)
    return columns.expand(rows, -1)


def in_place(run: Operator) -> Operator:
    """Writes what an operator returns into the tensor itself, so that whoever else holds it sees the edit as well."""

    def write(hidden: Tensor) -> Tensor:
        # Autograd must not find the values it saved overwritten, hence the copy while it records.
        edited = run(hidden.clone() if torch.is_grad_enabled() else hidden)
        return hidden.copy_(edited)

    return write


def _hook(slot: Slot) -> RemovableHandle:
    module, at = slot.place
    if at == "output":
        return _on_output(module, slot)
    return _on_input(module, slot, in_place(slot.run) if at == "shared" else slot.run)


def _on_output(module: nn.Module, slot: Slot) -> RemovableHandle:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if not slot.operators:
            return None
        if isinstance(output, tuple):
            return (slot.run(output[0]), *output[1:])
        return slot.run(output)

    # Prepended, so that transformers' own capture of hidden states sees the steered values.
    return module.register_forward_hook(hook, prepend=True)


def _on_input(module: nn.Module, slot: Slot, run: Operator) -> RemovableHandle:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not slot.operators:
            return None
        if args:
            return (run(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": run(kwargs["hidden_states"])}

    return module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
