"""The plan of a batch: from the states of its users to the edits of its forward passes, validated once."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from steer.architectures import ONLY_PREFIXES
from steer.companion import require_same_vocabulary
from steer.errors import SteerError, UnknownUser
from steer.inject import (
    Condition,
    Edit,
    KeyValueEdit,
    MemoryEdit,
    NeighbourEdit,
    PrefixEdit,
    PromptKeyValues,
    PromptPrefix,
    SiteEdit,
    StreamEdit,
)
from steer.inject.prefix import runs_of
from steer.inject.prompts import asks, with_prompts, without_prompts
from steer.inject.residual import in_turn
from steer.method import METHODS, method_of
from steer.sites import Site
from steer.state import Artifact, Blend, Provenance, UserState

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

    from steer.bank import Bank
    from steer.model import FrozenLM

# A row's states by name.
RowStates = Mapping[str, UserState | Blend]
# A state's name, its kind, and which it is of the blended states that share both.
Part = tuple[str, str, int]
# One number for all rows, one a row, or either of them by the name of the states.
Amount = float | Sequence[float]
Amounts = Amount | Mapping[str, Amount]


@dataclass(frozen=True)
class Plan:
    """The edits of one batch, in order: streams, prefixes, then residual and memory by block, neighbours last.

    A prefix that depends on prompts is zeros until there are some; `prefixes` and `given` have the parts of soft tokens
    and of keys and values, and `runs` says how many of each row's soft tokens stand at which place.
    """

    batch: int
    residual: tuple[SiteEdit, ...] = ()
    prefix: PrefixEdit | None = None
    memory: tuple[MemoryEdit, ...] = ()
    streams: StreamEdit | None = None
    neighbours: tuple[NeighbourEdit, ...] = ()
    models: Mapping[str, FrozenLM] = field(default_factory=dict)
    prefixes: tuple[PrefixEdit | PromptPrefix, ...] = ()
    key_values: KeyValueEdit | None = None
    given: tuple[KeyValueEdit | PromptKeyValues, ...] = ()

    @classmethod
    def of(cls, lm: FrozenLM, edits: Iterable[Edit], batch: int, models: Mapping[str, FrozenLM] | None = None) -> Plan:
        """Sorts and validates edits.

        Args:
            lm: the model that is steered.
            edits: of all rows.
            batch: number of rows.
            models: others, by the names under which streams mention them.

        Raises:
            SteerError: an edit has another number of rows or another width than the batch and the model, its site does
                not exist, two edits contrast the same row or give it keys and values, these are combined with what
                reads the whole prompt, a stream's model is not there or has another vocabulary, or something other
                than a prefix of soft tokens is to steer an encoder-decoder model.
        """
        edits = list(edits)
        for edit in edits:
            if lm.is_encoder_decoder and not isinstance(edit, PrefixEdit | PromptPrefix):
                raise SteerError(f"{type(edit).__name__}: {ONLY_PREFIXES}")
        residual = tuple(in_turn(e.at(e.site.canonical()) for e in edits if isinstance(e, SiteEdit)))
        memory = tuple(replace(e, site=lm.memory_site(e.site)) for e in edits if isinstance(e, MemoryEdit))
        neighbours = tuple(replace(e, site=e.site.canonical()) for e in edits if isinstance(e, NeighbourEdit))
        parts = tuple(e for e in edits if isinstance(e, PrefixEdit | PromptPrefix))
        prefixes = [part for part in without_prompts(parts) if isinstance(part, PrefixEdit)]
        given = tuple(e for e in edits if isinstance(e, KeyValueEdit | PromptKeyValues))
        key_values = [part for part in without_prompts(given) if isinstance(part, KeyValueEdit)]
        streams = [e for e in edits if isinstance(e, StreamEdit)]
        for edit in residual:
            for what, values in edit.states.items():
                _check(f"{what} for {edit.site}", values, batch, lm.width_at(edit.site))
            if not isinstance(edit.positions, str) and len(edit.positions) != batch:
                raise SteerError(f"positions for {edit.site}: {len(edit.positions)} rows for a batch of {batch}")
            if edit.condition is not None:
                site = edit.condition.site
                _check(f"conditions at {site}", edit.condition.directions, batch, lm.width_at(site))
        for prefix in prefixes:
            _check("prefixes", prefix.embeddings, batch, lm.width_at(Site("embed")))
        for attend in memory:
            _check(f"memories for {attend.site}", attend.memory, batch, attend.layer.key.in_features)
            _check(f"outputs of the cross-attention at {attend.site}", attend.layer.out.weight.T, None, lm.width)
        for recalled in neighbours:
            _check(f"keys for {recalled.site}", recalled.keys, batch, lm.width_at(recalled.site))
        for states in key_values:
            _require_keys_and_values(states, batch, (lm.n_layers, *lm.key_value_shape))
        for stream in streams:
            if len(stream.mixtures) != batch:
                raise SteerError(f"{len(stream.mixtures)} mixtures for a batch of {batch}")
            for name in sorted(stream.models):
                _require_model(lm, name, models or {})
        plan = cls(
            batch=batch,
            residual=residual,
            prefix=PrefixEdit.concatenate(prefixes) if prefixes else None,
            memory=memory,
            streams=StreamEdit.merge(streams) if streams else None,
            neighbours=neighbours,
            models=models or {},
            prefixes=parts,
            key_values=KeyValueEdit.merge(key_values) if key_values else None,
            given=given,
        )
        plan._require_what_goes_together()
        return plan

    def _require_what_goes_together(self) -> None:
        if self.mixes and self.key_values is not None:
            raise SteerError(
                "the streams of a mixture are read from their first token on, and keys and values stand in front of "
                "it; give these rows the same prefix as soft tokens (PrefixEdit)"
            )
        if self.mixes and set(self.runs) - {None}:
            raise SteerError(
                "soft tokens at places in a prompt cannot be combined with contrasted streams yet; let them stand in "
                "front, without a place"
            )
        if self.conditions and self.key_values is not None:
            raise SteerError(
                "a condition is decided from all of the prompt, and nobody reads the part of it that is keys and "
                "values; give these rows the same prefix as soft tokens (PrefixEdit)"
            )

    def of_prompts(self, prompts: Sequence[str]) -> Plan:
        """The same plan with the prefixes that depend on what each row is asked.

        Raises:
            SteerError: they hold values that are not finite, or are not what they were said to be like.
        """
        told = self
        if self.prefix is not None and asks(self.prefixes):
            parts = with_prompts(self.prefixes, prompts)
            prefix = PrefixEdit.concatenate([part for part in parts if isinstance(part, PrefixEdit)])
            _check("prefixes", prefix.embeddings, self.batch, self.prefix.embeddings.shape[-1])
            told = replace(told, prefix=prefix)
        if self.key_values is not None and asks(self.given):
            given = [part for part in with_prompts(self.given, prompts) if isinstance(part, KeyValueEdit)]
            for part in given:
                _require_keys_and_values(part, self.batch, _shape(self.key_values))
            told = replace(told, key_values=KeyValueEdit.merge(given))
        return told

    @property
    def asks(self) -> bool:
        """Whether a prefix depends on what the rows are asked."""
        return asks((*self.prefixes, *self.given))

    @property
    def runs(self) -> dict[str | None, Int[Tensor, " batch"]]:
        """How many soft tokens each row has at each place of its prompt, in the order of `prefix`; None is in front."""
        return runs_of(self.prefixes)

    @property
    def mixes(self) -> bool:
        """Whether some row is mixed from streams."""
        return self.streams is not None and any(self.streams.mixtures)

    @property
    def touches_all_streams(self) -> bool:
        """Whether all streams of a row carry the row's other edits."""
        mixtures = [] if self.streams is None else self.streams.mixtures
        return all(mixture is None or mixture.steered == "all" for mixture in mixtures)

    @property
    def trains(self) -> bool:
        """Whether gradients are to flow into some edit."""
        tensors = [tensor for edit in self.residual for tensor in edit.tensors]
        tensors += [t for edit in self.memory for t in (edit.memory, *edit.layer.parameters())]
        tensors += [] if self.prefix is None else [self.prefix.embeddings]
        tensors += [] if self.key_values is None else [self.key_values.keys, self.key_values.values]
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)

    @property
    def conditions(self) -> list[Condition]:
        """The conditions of residual edits, each once."""
        return list(dict.fromkeys(edit.condition for edit in self.residual if edit.condition is not None))

    @property
    def sites(self) -> set[Site]:
        """Where operators will work."""
        sites = {edit.site for edit in self.residual} | {edit.site for edit in self.memory}
        sites |= {condition.site.canonical() for condition in self.conditions}
        sites |= {edit.site for edit in self.neighbours}
        return sites if self.prefix is None else sites | {Site("embed")}


def _require_model(lm: FrozenLM, name: str, models: Mapping[str, FrozenLM]) -> None:
    if name not in models:
        raise SteerError(
            f"a stream needs the model {name!r}, which is not at hand; pass models={{{name!r}: steer.load(...)}}"
        )
    if models[name] is lm:
        raise SteerError(f"the model {name!r} is the steered one itself; its streams need no name")
    if models[name].is_encoder_decoder:
        raise SteerError(f"the model {name!r} has an encoder; streams are continued by models without one")
    require_same_vocabulary(lm, models[name], name)


def _require_keys_and_values(edit: KeyValueEdit, batch: int, shape: tuple[int, int, int, int]) -> None:
    """Raises SteerError unless there are so many layers and heads of these widths."""
    layers, heads, key_width, value_width = shape
    _check("keys", edit.keys, batch, key_width)
    _check("values", edit.values, batch, value_width)
    if _shape(edit) != shape:
        own_layers, own, *_ = _shape(edit)
        raise SteerError(
            f"keys and values of {own_layers} layers with {own} heads; this model has {layers} layers with {heads}"
        )


def _shape(edit: KeyValueEdit) -> tuple[int, int, int, int]:
    return (*edit.keys.shape[1:3], edit.keys.shape[-1], edit.values.shape[-1])


def _check(what: str, values: Tensor, rows: int | None, width: int) -> None:
    if rows is not None and values.shape[0] != rows:
        raise SteerError(f"{what}: {values.shape[0]} rows for a batch of {rows}")
    if values.shape[-1] != width:
        raise SteerError(f"{what} are {values.shape[-1]} wide, the model is {width} wide there")
    if not torch.isfinite(values).all():
        raise SteerError(f"{what} hold values that are not finite")


def rows_of(
    bank: Bank, users: Sequence[str | None], names: Sequence[str], unknown_user: str = "error"
) -> list[RowStates]:
    """Gathers the states of a batch's users, one user a row; None is a row that stays plain.

    Raises:
        UnknownUser: a user has no state under any of the names, and `unknown_user` is "error" and not "plain".
    """
    known = sorted({user for user in users if user is not None})
    found: dict[str, dict[str, UserState]] = {user: {} for user in known}
    for name in names:
        for user, state in zip(known, bank.get_many(known, name), strict=True):
            if state is not None:
                found[user][name] = state
    strangers = [user for user in known if not found[user]]
    if strangers and unknown_user == "error":
        raise UnknownUser(
            f"{strangers[0]!r} has no state named {' or '.join(names) or 'anything'} in the bank. Fit one, or let such "
            'rows be plain: unknown_user="plain", or --unknown-user plain'
        )
    return [{} if user is None else found[user] for user in users]


def kinds_of(lm: FrozenLM, bank: Bank, names: Sequence[str]) -> list[tuple[str, UserState]]:
    """For each name, the kinds of states for this model that it has in the bank, each shown by a state of zeros.

    They let the edits of a batch depend on the bank and not on who is in the batch, so that compiled code serves
    every batch.
    """
    return [
        (name, UserState(provenance, {key: torch.zeros(shape) for key, shape in shapes.items()}))
        for name, provenance, shapes in bank.templates()
        if name in names and _usable(lm, bank, provenance)
    ]


def _usable(lm: FrozenLM, bank: Bank, provenance: Provenance) -> bool:
    method = METHODS.get(provenance.method)
    return (
        method is not None
        and method.version == provenance.version
        and method.fits(lm, provenance)
        and (provenance.artifact is None or bank.has_artifact(provenance.artifact))
    )


def edits_of(
    lm: FrozenLM,
    rows: Sequence[RowStates],
    *,
    kinds: Iterable[tuple[str, UserState]] = (),
    artifacts: Mapping[str, Artifact] | None = None,
    strength: Amounts | None = None,
    dose: Amounts | None = None,
) -> list[Edit]:
    """Binds the states of a batch, all states of one kind at once.

    They act in the order of their names, so that a row's result does not depend on what other rows have.

    Args:
        lm: the model they are for.
        rows: each row's states by name.
        kinds: states that show which further kinds to prepare for, as `kinds_of` gives them.
        artifacts: what the states' methods share, by hash.
        strength: raw coefficients of residual edits; 1 if None. The coefficients of a blend come on top.
        dose: the same for vectors, in units of the median residual norm at the site.

    Raises:
        SteerError: a state is from another model, its artifact is missing, strength and dose are both given, there is
            nothing for them or for a blend's coefficients to scale, or a blend is to have a dose.
    """
    if strength is not None and dose is not None:
        raise SteerError("strength and dose are two units of the same thing; give one of them")
    table = [_parts(row) for row in rows]
    likes = {(name, _kind(state), 0): state for name, state in kinds}
    likes |= {part: state for row in table for part, (_, state) in row.items()}
    edits: list[Edit] = []
    for part, like in sorted(likes.items(), key=lambda item: item[0]):
        name, method = part[0], method_of(like)
        weights = [row[part][0] if part in row else 1.0 for row in table]
        own = [row[part][1] if part in row else None for row in table]
        for state in (like, *own):
            if state is not None:
                _require_same_model(lm, name, state)
        bound = method.bind(lm, own, like, _artifact(like, artifacts or {}))
        if set(weights) != {1.0} and not any(isinstance(edit, SiteEdit) for edit in bound):
            raise SteerError(
                f"a {method.name} state has no edit of the residual stream to scale, so in a blend its coefficient "
                "must be 1; add it as it is, 0.8 * vector + context"
            )
        blended = any(isinstance(row.get(name), Blend) for row in rows)
        edits += [_scaled(edit, name, weights, strength, dose, blended) for edit in bound]
    if (strength is not None or dose is not None) and not any(isinstance(edit, SiteEdit) for edit in edits):
        raise SteerError("strength and dose scale edits of the residual stream; none of these states has one")
    names = sorted({name for name, _, _ in likes})
    for amounts in (strength, dose):
        if isinstance(amounts, Mapping) and (stray := sorted(set(amounts) - set(names))):
            raise SteerError(f"no state is named {stray[0]!r}; there are {', '.join(names)}")
    return edits


def _parts(row: RowStates) -> dict[Part, tuple[float, UserState]]:
    """A row's states with their coefficients; a name may stand for a blend of several."""
    parts: dict[Part, tuple[float, UserState]] = {}
    for name, states in row.items():
        seen: Counter[str] = Counter()
        for weight, state in Blend.of(states).parts:
            kind = _kind(state)
            parts[name, kind, seen[kind]] = weight, state
            seen[kind] += 1
    return parts


def _kind(state: UserState) -> str:
    """States of one kind are bound together, so they agree in all that `bind` takes from one of them."""
    source = state.provenance
    settings = dict(source.settings)
    return json.dumps([source.method, source.version, source.sites, source.artifact, settings], sort_keys=True)


def _require_same_model(lm: FrozenLM, name: str, state: UserState) -> None:
    model = state.provenance.model
    if model is not None and model != lm.fingerprint:
        raise SteerError(f"the state {name!r} was read from {model}; this model is {lm.fingerprint}")


def _artifact(like: UserState, artifacts: Mapping[str, Artifact]) -> Artifact | None:
    wanted = like.provenance.artifact
    if wanted is None:
        return None
    if wanted not in artifacts:
        raise SteerError(
            f"a {like.provenance.method} state needs the artifact {wanted[:10]}…, which is not at hand; put it into "
            "the bank with bank.put_artifact(...), or pass artifacts=[...]"
        )
    return artifacts[wanted]


def _scaled(
    edit: Edit, name: str, weights: Sequence[float], strength: Amounts | None, dose: Amounts | None, blended: bool
) -> Edit:
    if not isinstance(edit, SiteEdit):
        return edit
    if dose is not None and (amounts := _per_row(dose, name, len(weights))) is not None:
        if blended:
            raise SteerError("the coefficients of a blend are strengths; give a strength and no dose with it")
        return edit.at_dose(amounts)
    if strength is not None and (amounts := _per_row(strength, name, len(weights))) is not None:
        edit = edit.at_strength(amounts)
    return edit if set(weights) == {1.0} else edit.at_strength(torch.tensor(weights))


def _per_row(amounts: Amounts, name: str, batch: int) -> Tensor | None:
    if isinstance(amounts, Mapping):
        return _per_row(amounts[name], name, batch) if name in amounts else None
    values = torch.as_tensor(amounts, dtype=torch.float32)
    if values.dim() == 0:
        values = values.expand(batch)
    if values.shape != (batch,):
        raise SteerError(f"{len(values)} strengths or doses for a batch of {batch}")
    if not torch.isfinite(values).all():
        raise SteerError(f"strength and dose must be finite, got {values.tolist()}")
    return values
