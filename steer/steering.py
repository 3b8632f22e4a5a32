"""Steering: a plan at work in the model, for one batch at a time."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from steer.attach import Slot
from steer.decoding import Decoding, Prepared
from steer.errors import SteerError
from steer.inject.condition import ConditionedGate, Decide, Decision
from steer.inject.key_values import KeyValueEdit
from steer.inject.memory import AttendToMemory
from steer.inject.neighbours import RecallNeighbours
from steer.inject.positions import Gate, MarkedGate, NamedGate, Positions
from steer.inject.prefix import OverwriteEmbeddings
from steer.inject.residual import AddVectors, EditStates, SiteEdit, operator_of
from steer.inject.rows import Rows
from steer.inject.stream_rows import pad_behind, pad_left, pad_right
from steer.inject.streams import Stream
from steer.plan import Plan
from steer.read import require_room
from steer.sites import Site

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor
    from transformers import Cache

    from steer.attach import Operator
    from steer.model import FrozenLM, Prompt


class Operators:
    """The operators of a model. They outlive the plans, so that another batch is written into the same buffers."""

    def __init__(self, prefix_start: int) -> None:
        self.gates: dict[str, NamedGate] = {}
        self.marked: dict[int, MarkedGate] = {}
        self.deciding: dict[tuple[Site, int], Decide] = {}
        self.conditioned: dict[tuple[Gate, Decide], ConditionedGate] = {}
        self.editing: dict[tuple[object, ...], EditStates] = {}
        self.attending: dict[tuple[Site, int], AttendToMemory] = {}
        self.recalling: dict[tuple[Site, int], RecallNeighbours] = {}
        self.overwriting = OverwriteEmbeddings(prefix_start)

    def clear(self) -> None:
        """Erases whatever is left of the users' states."""
        self.overwriting.clear()
        for gate in self.marked.values():
            gate.clear()
        for deciding in self.deciding.values():
            deciding.clear()
        for editing in self.editing.values():
            editing.clear()
        for attending in self.attending.values():
            attending.clear()
        for recalling in self.recalling.values():
            recalling.clear()


class Steering:
    """A plan bound to a model; made by `FrozenLM.steered`.

    Attributes:
        plan: what is bound.
        owners: the batch's rows, each of which belongs to itself.
        prepared: the batch as `prepare` tokenized it.
        has_prefix: whether some row has a prefix, of soft tokens or of keys and values.
        mixed: whether the plan's streams have taken part in a generation; True where there are none.
        recalling: the plan's neighbour edits at work.
        remembered: whether the plan's keys and values have taken part in a forward pass; True where there are none.
    """

    def __init__(self, lm: FrozenLM, plan: Plan, prompt_lengths: Sequence[int] | None = None) -> None:
        self.lm, self.plan = lm, plan
        self._given_lengths = prompt_lengths
        self.prepared: Prepared | None = None
        self._ran = False
        self._rows: Rows | None = None
        self._decided: tuple[Decision, ...] | None = None
        self.owners = torch.arange(plan.batch, device=lm.device)
        # Autograd keeps what a step computed until its backward pass, so training does not reuse buffers.
        self._pool = Operators(lm.operators.overwriting.start) if plan.trains else lm.operators
        self.mixed = not plan.mixes
        self.has_prefix = any(edit is not None and bool(edit.lengths.any()) for edit in (plan.prefix, plan.key_values))
        self.remembered = plan.key_values is None or not plan.key_values.lengths.any()
        self._starts = self._starts_in_front()
        self._untold = plan.asks
        if prompt_lengths is not None and len(prompt_lengths) != plan.batch:
            raise SteerError(f"{len(prompt_lengths)} prompt lengths for a batch of {plan.batch}")

    # Life of a binding.

    def open(self) -> None:
        """Takes the model and puts the plan into it.

        Raises:
            SteerError: the model is taken, or a site cannot be hooked any more.
        """
        if self.has_prefix and (window := self.lm.sliding_window) is not None:
            warnings.warn(
                f"some layers of this model see no further back than {window} tokens, and forget a prefix after that",
                stacklevel=4,
            )
        attachment = self.lm.attachment
        attachment.declare(self.plan.sites)
        attachment.bind(self)
        try:
            self._working = self._assemble()
            attachment.install(self._working)
            self._load(self._plain_rows())
        except BaseException:
            self._pool.clear()
            attachment.unbind()
            raise

    def close(self, *, check: bool = True) -> None:
        """Gives the model back as it was. Warns if no forward pass was made.

        Raises:
            SteerError: forward passes were made, and a part of the plan never took part in one.
        """
        self._decided = self.decisions
        # What a step of training has bound is needed in its backward pass, and goes with it.
        if self._pool is self.lm.operators:
            self._pool.clear()
        self._rows = None
        self.lm.attachment.unbind()
        if check and self._ran:
            self._report_idle()
        elif check:
            warnings.warn(
                "the steered block ended without a forward pass of the model that could be steered; was the model "
                "compiled before it was wrapped?",
                # The line after the caller's `with`: past close, steered and contextlib.
                stacklevel=4,
            )

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """What the plan's conditions decided about the latest prompts, also after the block; empty without conditions.

        In the order of `plan.conditions`; `similarities` and `acts` of a decision hold one value for each row.
        """
        if self._decided is not None:
            return self._decided
        return tuple(op.decision(condition) for op, condition in zip(self._deciding, self.plan.conditions, strict=True))

    def _assemble(self) -> dict[Site, tuple[Operator, ...]]:
        pool, plan = self._pool, self.plan
        self._gates: dict[str | int, Gate] = {}
        self._editing: dict[tuple[object, ...], tuple[EditStates, list[SiteEdit]]] = {}
        self._attending: list[AttendToMemory] = []
        self.recalling: list[RecallNeighbours] = []
        self._deciding: list[Decide] = []
        working: dict[Site, list[EditStates | AttendToMemory | OverwriteEmbeddings | Decide | RecallNeighbours]]
        working = {site: [] for site in plan.sites}
        if plan.prefix is not None:
            working[Site("embed")].append(pool.overwriting)
        for i, condition in enumerate(plan.conditions):
            site = condition.site.canonical()
            self._deciding.append(pool.deciding.setdefault((site, i), Decide()))
            self._deciding[i].reset(plan.batch, self.lm.device_at(site))
            working[site].append(self._deciding[i])
        for edit in plan.residual:
            kind, gate = operator_of(edit), self._gate(edit)
            # What is added is summed; of the other kinds each edit has its own place.
            place = 0 if issubclass(kind, AddVectors) else len(self._editing)
            key = (edit.site, kind, gate, place)
            if key not in self._editing:
                self._editing[key] = pool.editing.setdefault(key, kind(gate)), []
                working[edit.site].append(self._editing[key][0])
            self._editing[key][1].append(edit)
        for i, attend in enumerate(plan.memory):
            self._attending.append(pool.attending.setdefault((attend.site, i), AttendToMemory()))
            working[attend.site].append(self._attending[-1])
        for i, recalled in enumerate(plan.neighbours):
            self.recalling.append(pool.recalling.setdefault((recalled.site, i), RecallNeighbours()))
            self.recalling[-1].used = False
            working[recalled.site].append(self.recalling[-1])
        for bound in (operator for operators in working.values() for operator in operators):
            bound.fired = False
        return {site: tuple(operators) for site, operators in working.items()}

    def _gate(self, edit: SiteEdit) -> Gate | ConditionedGate:
        gate = self._gate_of(edit.positions)
        if edit.condition is None:
            return gate
        decide = self._deciding[self.plan.conditions.index(edit.condition)]
        return self._pool.conditioned.setdefault((gate, decide), ConditionedGate(gate, decide))

    def _gate_of(self, positions: Positions | Tensor) -> Gate:
        """Edits that share their marks share the gate."""
        if isinstance(positions, str):
            named = self._pool.gates.setdefault(positions, NamedGate(positions))
            return self._gates.setdefault(positions, named)
        others = [gate for gate in self._gates.values() if isinstance(gate, MarkedGate)]
        if same := [gate for gate in others if gate.marks is positions]:
            return same[0]
        marked = self._pool.marked.setdefault(len(others), MarkedGate())
        marked.marks = positions
        return self._gates.setdefault(len(others), marked)

    def _load(self, rows: Rows) -> None:
        """Writes the plan's tensors into the buffers, one row for each row of the coming forward passes."""
        plan = self.plan
        loaded, self._rows = self._rows, rows
        # Not asked for in `begin`, as compiled code would guard on whether there is a prefix in the batch.
        self._unplaced = self.has_prefix and (rows.prompt_lengths is None or self._starts is None or self._untold)
        for gate in self._gates.values():
            gate.load(rows)
        for deciding, condition in zip(self._deciding, plan.conditions, strict=True):
            deciding.load(condition, rows, self.lm.device_at(condition.site))
        if loaded is not None and loaded.owners is rows.owners:
            return
        with torch.set_grad_enabled(plan.trains):
            self._gather(rows)

    def _gather(self, rows: Rows) -> None:
        lm, plan = self.lm, self.plan
        for editing, edits in self._editing.values():
            editing.load(edits, rows, lm.dtype, lm.device_at(edits[0].site))
        if plan.prefix is not None:
            counts = torch.stack([*plan.runs.values()], 1)
            starts = torch.zeros_like(counts) if self._starts is None else self._starts
            self._pool.overwriting.load(plan.prefix, starts, counts, rows, lm.dtype, lm.device_at(Site("embed")))
        for attend, operator in zip(plan.memory, self._attending, strict=True):
            operator.load(attend, rows, lm.device_at(attend.site))
        for recalled, recalling in zip(plan.neighbours, self.recalling, strict=True):
            recalling.load(recalled, rows, lm.device_at(recalled.site))

    def _plain_rows(self) -> Rows:
        lengths: Any = self._given_lengths
        if self.lm.is_encoder_decoder and self.prepared is not None:
            # `generate` runs the encoder before it hands over to the decoding.
            lengths = self.prepared.attention_mask.sum(1)
        return Rows(self.owners, None if lengths is None else torch.as_tensor(lengths, device=self.lm.device))

    def _report_idle(self) -> None:
        idle = [f"the {op.what} at {edits[0].site}" for op, edits in self._editing.values() if not op.fired]
        conditions = zip(self._deciding, self.plan.conditions, strict=True)
        idle += [f"the condition at {condition.site}" for op, condition in conditions if not op.fired]
        idle += ["the memory" for operator in self._attending if not operator.fired]
        idle += ["the neighbours" for operator in self.recalling if not (operator.fired and operator.used)]
        if self.plan.prefix is not None and not self._pool.overwriting.fired:
            idle.append("the prefix")
        if not self.remembered:
            idle.append("the prefix of keys and values")
        if not self.mixed:
            idle.append("the contrasted streams")
        if idle:
            raise SteerError(
                f"{idle[0]} never took part in a forward pass, so nothing was steered by it. Was the model compiled "
                "before it was wrapped, called with inputs_embeds, or generated without steering.generate_kwargs()?"
            )

    def hand_over(self) -> dict[Site, Operator]:
        """Takes the operators out of steer's own hooks, for other code to run at their sites.

        Returns:
            For each site one function, from the tensor `[row, pos, d]` there to its replacement. Positions still come
            from the forward pass of the model, so the model must be the one that is steered.

        Raises:
            SteerError: the plan contrasts streams, mixes neighbours in or has keys and values: these are no edits at a
                site.
        """
        if self.plan.mixes:
            raise SteerError("contrasted streams need steer's own generation; hand over a plan without a StreamEdit")
        if self.plan.neighbours:
            raise SteerError("neighbours need steer's own generation; hand over a plan without a NeighbourEdit")
        if self.plan.key_values is not None:
            raise SteerError(
                "keys and values stand in a cache, not at a site; hand over soft tokens (PrefixEdit) instead"
            )
        attachment = self.lm.attachment
        attachment.install(dict.fromkeys(self._working, ()))
        return {
            site: Slot(site, attachment.place_of(site), attachment, (self._guard(site), *operators)).run
            for site, operators in self._working.items()
        }

    def _guard(self, site: Site) -> Operator:
        """Stands in front of operators that others run."""

        def check(hidden: Tensor) -> Tensor:
            if self._rows is None:
                raise SteerError(f"{site}: the `steered` block that these operators belong to has ended")
            if hidden.shape[0] != len(self._rows):
                raise SteerError(
                    f"{site}: {hidden.shape[0]} rows came by, and {self.plan.batch} are bound; hand the whole batch to "
                    "the operators, in one piece"
                )
            return hidden

        return check

    # One forward pass; called by the hooks.

    def begin(self, positions: Int[Tensor, "row pos"]) -> None:
        """Computes once what the operators of this forward pass share."""
        # Not a count: compiled code would guard on its value.
        self._ran = True
        assert self._rows is not None
        if positions.shape[0] != len(self._rows):
            raise SteerError(
                f"{len(self._rows)} rows are bound and the forward pass has {positions.shape[0]}; beams and return "
                "sequences need model.generate(..., **steering.generate_kwargs())"
            )
        for gate in self._gates.values():
            gate.begin(positions, self.lm.dtype)
        for deciding in self._deciding:
            deciding.begin(positions)
        if self._unplaced:
            raise SteerError(
                "a prefix is written over placeholders in the prompt: make the batch with steering.prepare(prompts), "
                "and pass **steering.generate_kwargs() to generate, or prompt_lengths=[...] to lm.steered; what "
                "depends on the prompts, or stands at places in them, needs prepare"
            )
        if self.plan.prefix is not None:
            self._pool.overwriting.begin(positions)
        for attending in self._attending:
            attending.begin()

    def end(self) -> None:
        """Forgets what belonged to this forward pass only."""
        for gate in self._gates.values():
            gate.end()
        for deciding in self._deciding:
            deciding.end()
        self._pool.overwriting.end()

    # Generation.

    def prepare(self, prompts: Sequence[Prompt], *, chat: bool | None = None) -> dict[str, Tensor]:
        """Tokenizes a batch, with contexts and placeholders where the plan wants them.

        It is padded on the left, and for an encoder on the right: nothing follows there.

        Args:
            prompts: texts or lists of chat messages, one a row.
            chat: whether texts go through the chat template; if None, whenever the tokenizer has one.

        Returns:
            `input_ids` and `attention_mask`, both `[batch, pos]`, for `model.generate`.
        """
        if len(prompts) != self.plan.batch:
            raise SteerError(f"{len(prompts)} prompts for a batch of {self.plan.batch}")
        mixtures = [None] * self.plan.batch if self.plan.streams is None else self.plan.streams.mixtures
        rows, starts, further = [], [], []
        for row, (prompt, mixture) in enumerate(zip(prompts, mixtures, strict=True)):
            own, *others = (Stream(1.0),) if mixture is None else mixture.streams
            tokens, begun = self._encode(row, prompt, own, chat, mixture is None or mixture.touches(0))
            rows.append(tokens)
            starts.append(begun)
            further.append([(s, self._encode(row, prompt, s, chat, mixture.touches(1))[0]) for s in others if mixture])
        padded, mask = self._padded(rows)
        # Only when all else went well, as an earlier batch may be in use.
        told = self.plan.of_prompts([self.lm.text_of(prompt) for prompt in prompts])
        if told is not self.plan:
            self.plan, self._untold = told, False
            # What is loaded are zeros, or the soft tokens of earlier prompts.
            self._rows = None
            self._load(self._plain_rows())
        self.prepared = Prepared(padded.to(self.lm.device), mask.to(self.lm.device), further)
        self._place(starts)
        return {"input_ids": self.prepared.input_ids, "attention_mask": self.prepared.attention_mask}

    def _padded(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        pad, given = self.lm.pad_token_id, self.plan.key_values
        if self.lm.is_encoder_decoder:
            return pad_right(rows, pad)
        return pad_left(rows, pad) if given is None else pad_behind(rows, given.lengths.tolist(), pad)

    def _encode(
        self, row: int, prompt: Prompt, stream: Stream, chat: bool | None, touched: bool
    ) -> tuple[list[int], list[int]]:
        """Token ids of a row in a stream, with placeholders, and the position of each of its runs of soft tokens."""
        ids, places = self.lm.encode_with_places(prompt, context=stream.context, system=stream.system, chat=chat)
        if stream.context or stream.system:
            what, remedy = "with its context the prompt has", "shorten the context"
            require_room(self._model_of(stream), len(ids), f"row {row}: {what}", name=stream.model, remedy=remedy)
        # Placeholders are no text to another model.
        if not touched or stream.model is not None:
            return ids, []
        placed, starts = self._with_prefixes(row, ids, places)
        if len(placed) > len(ids):
            require_room(self.lm, len(placed), f"row {row}: with its prefix the prompt has")
        return placed, starts

    def _model_of(self, stream: Stream) -> FrozenLM:
        return self.lm if stream.model is None else self.plan.models[stream.model]

    def _with_prefixes(self, row: int, ids: list[int], places: dict[str, int]) -> tuple[list[int], list[int]]:
        """Puts placeholders where soft tokens, keys and values go."""
        placeholder, given = self.lm.placeholder_id, self.plan.key_values
        # How many of the tokens are among the keys and values, and how many places these take up besides.
        inside, added = (0, 0) if given is None else self._inside(row, ids, given)
        counts = {place: int(lengths[row]) for place, lengths in self.plan.runs.items()}
        if missing := [place for place, count in counts.items() if count and place is not None and place not in places]:
            raise SteerError(
                f"row {row} has soft tokens for the place {missing[0]!r}, and its prompt has no such place; put "
                f"Place({missing[0]!r}) between the pieces of it"
            )
        found: dict[str | None, int] = {None: self._pool.overwriting.start}
        found.update(places)
        out, done = [*ids[:inside], *[placeholder] * added], inside
        starts = dict.fromkeys(counts, 0)
        for place, index in sorted(found.items(), key=lambda item: item[1]):
            if place in counts:
                out += ids[done : max(index, done)]
                done, starts[place] = max(index, done), len(out)
                out += [placeholder] * counts[place]
        out += ids[done:]
        if given is not None and len(out) == inside + added:
            raise SteerError(f"row {row}: nothing is left to be read behind its keys and values; give it a prompt")
        return out, list(starts.values())

    def _inside(self, row: int, ids: list[int], given: KeyValueEdit) -> tuple[int, int]:
        inside = int(given.bos and given.lengths[row] > 0)
        if inside and ids[:1] != [getattr(self.lm.tokenizer, "bos_token_id", None)]:
            raise SteerError(f"row {row}: its keys and values begin with those of a BOS token, and its prompt has none")
        return inside, int(given.added[row])

    def _starts_in_front(self) -> Tensor | None:
        """Where soft tokens stand without having seen prompts; None where that depends on them."""
        if self.plan.key_values is not None or set(self.plan.runs) - {None}:
            return None
        return torch.full((self.plan.batch, len(self.plan.runs)), self._pool.overwriting.start)

    def _place(self, starts: list[list[int]]) -> None:
        """Takes note of where soft tokens stand in the prompts of this batch, and of where an encoder's prompts end."""
        if self._starts_in_front() is None:
            self._starts, self._rows = torch.tensor(starts, dtype=torch.long), None
        elif not self.lm.is_encoder_decoder:
            return
        self._load(self._plain_rows())

    def forward_kwargs(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """What to pass to a bare forward pass in the place of a batch that `prepare` has made.

        It is the batch itself with position ids, and where there are keys and values the cache that holds them, with
        gradients if they are trained, and only the tokens behind them.

        Raises:
            SteerError: it is not the batch that was prepared last, or a sliding window would count the padding between
                keys and values of different lengths, and what follows.
        """
        if self.prepared is None or not torch.equal(batch["input_ids"], self.prepared.input_ids):
            raise SteerError("this is not the batch that steering.prepare(prompts) has made last; prepare it again")
        given, arguments = self.plan.key_values, dict[str, Any](batch)
        mask = batch["attention_mask"]
        if self.lm.attachment.architecture.takes_position_ids:
            arguments["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        if given is None or not given.lengths.any():
            return arguments
        self.require_no_gap(mask, mask.shape[1])
        cache, slots = DynamicCache(config=self.lm.model.config), int(given.lengths.max())
        self.remember(cache, self.owners)
        behind = {name: ids[:, slots:] for name, ids in arguments.items() if name in ("input_ids", "position_ids")}
        return arguments | behind | {"past_key_values": cache}

    def remember(self, cache: Cache, owners: Int[Tensor, " row"]) -> None:
        """Writes the plan's keys and values into an empty cache, for rows that belong to these rows of the batch."""
        assert self.plan.key_values is not None
        devices = [self.lm.device_at(Site("resid_post", layer)) for layer in range(self.lm.n_layers)]
        self.plan.key_values.fill(cache, owners, self.lm.dtype, devices)
        self.remembered = True

    def require_no_gap(self, mask: Int[Tensor, "row pos"], longest: int) -> None:
        """Raises SteerError if a sliding window that is shorter than a sequence would count padding in its midst."""
        given, window = self.plan.key_values, self.lm.sliding_window
        assert given is not None
        slots = int(given.lengths.max())
        between = (mask[:, slots] == 0) & (given.lengths.to(mask.device)[: len(mask)] > 0)
        if window is not None and longest > window and bool(between.any()):
            raise SteerError(
                f"some layers of this model see no further back than {window} tokens, and would count the padding "
                "between a row's keys and values and its prompt; batch prompts of one length, or use soft tokens "
                "(PrefixEdit)"
            )

    def generate_kwargs(self, *, streamer: Any = None, seeds: Sequence[int] | None = None) -> dict[str, Any]:
        """What to pass to transformers' `generate` besides the batch.

        Args:
            streamer: a transformers streamer. (Given to `generate` itself it would be dropped, as `generate` does with
                every callable `custom_generate`.)
            seeds: one a row, for sampling that does not depend on the rest of the batch.
        """
        decoding = Decoding(self, streamer, seeds)

        # transformers tells a decoding method's own arguments by its signature, so there are none here but its own.
        def decode(
            model: Any,
            input_ids: Tensor,
            logits_processor: Any,
            stopping_criteria: Any,
            generation_config: Any,
            inputs_tensor: Tensor,
            **kw: Any,
        ) -> Any:
            config = generation_config
            return decoding.run(model, input_ids, logits_processor, stopping_criteria, config, inputs_tensor, kw)

        return {"custom_generate": decode}

    @contextmanager
    def rows_loaded(self, rows: Rows) -> Iterator[None]:
        """Binds the plan to these rows of the coming forward passes, while the block lasts."""
        self._load(rows)
        try:
            yield
        finally:
            self._load(self._plain_rows())
