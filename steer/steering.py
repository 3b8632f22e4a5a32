"""Steering: a plan at work in the model, for one batch at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.utils import GENERATION_MODES_MAPPING

from steer.attach import Slot
from steer.errors import SteerError
from steer.inject.condition import ConditionedGate, Decide, Decision
from steer.inject.memory import AttendToMemory
from steer.inject.positions import Gate, MarkedGate, NamedGate, Positions
from steer.inject.prefix import OverwriteEmbeddings
from steer.inject.residual import AddVectors, EditStates, SiteEdit, operator_of
from steer.inject.rows import Rows
from steer.inject.streams import OwnRows, Streams, pad_left
from steer.plan import Plan
from steer.sampling import SeededRows
from steer.sites import Site

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

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


class Steering:
    """A plan bound to a model; made by `FrozenLM.steered`.

    Attributes:
        plan: what is bound.
    """

    def __init__(self, lm: FrozenLM, plan: Plan, prompt_lengths: Sequence[int] | None = None) -> None:
        self.lm, self.plan = lm, plan
        self._given_lengths = prompt_lengths
        self._contrasts: list[list[int] | None] | None = None
        self._prepared: tuple[Tensor, Tensor] | None = None
        self._ran = False
        self._rows: Rows | None = None
        self._decided: tuple[Decision, ...] | None = None
        self._owners = torch.arange(plan.batch, device=lm.device)
        # Autograd keeps what a step computed until its backward pass, so training does not reuse buffers.
        self._pool = Operators(lm.operators.overwriting.start) if plan.trains else lm.operators
        self._mixed = self._contrasts_nothing
        self._has_prefix = plan.prefix is not None and bool(plan.prefix.lengths.any())
        if prompt_lengths is not None and len(prompt_lengths) != plan.batch:
            raise SteerError(f"{len(prompt_lengths)} prompt lengths for a batch of {plan.batch}")

    # Life of a binding.

    def open(self) -> None:
        """Takes the model and puts the plan into it.

        Raises:
            SteerError: the model is taken, or a site cannot be hooked any more.
        """
        if self._has_prefix and (window := self.lm.sliding_window) is not None:
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
        self._deciding: list[Decide] = []
        working: dict[Site, list[EditStates | AttendToMemory | OverwriteEmbeddings | Decide]]
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
        self._unplaced = self._has_prefix and rows.prompt_lengths is None
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
            self._pool.overwriting.load(plan.prefix, rows, lm.dtype, lm.device_at(Site("embed")))
        for attend, operator in zip(plan.memory, self._attending, strict=True):
            operator.load(attend, rows, lm.device_at(attend.site))

    def _plain_rows(self) -> Rows:
        lengths = self._given_lengths
        return Rows(self._owners, None if lengths is None else torch.as_tensor(lengths, device=self.lm.device))

    def _report_idle(self) -> None:
        idle = [f"the {op.what} at {edits[0].site}" for op, edits in self._editing.values() if not op.fired]
        conditions = zip(self._deciding, self.plan.conditions, strict=True)
        idle += [f"the condition at {condition.site}" for op, condition in conditions if not op.fired]
        idle += ["the memory" for operator in self._attending if not operator.fired]
        if self.plan.prefix is not None and not self._pool.overwriting.fired:
            idle.append("the prefix")
        if not self._mixed:
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
            SteerError: the plan contrasts streams, which are a way of decoding and not an edit at a site.
        """
        if not self._contrasts_nothing:
            raise SteerError("contrasted streams need steer's own generation; hand over a plan without a StreamEdit")
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
                "and pass **steering.generate_kwargs() to generate, or prompt_lengths=[...] to lm.steered"
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
        """Tokenizes a batch, with contexts and placeholders where the plan wants them, left-padded.

        Args:
            prompts: texts or lists of chat messages, one a row.
            chat: whether texts go through the chat template; if None, whenever the tokenizer has one.

        Returns:
            `input_ids` and `attention_mask`, both `[batch, pos]`, for `model.generate`.
        """
        lm, streams = self.lm, self.plan.streams
        if len(prompts) != self.plan.batch:
            raise SteerError(f"{len(prompts)} prompts for a batch of {self.plan.batch}")
        contexts = streams.contexts if streams is not None else [None] * len(prompts)
        rows = [
            self._with_prefix(row, lm.encode(p, context=c, chat=chat)) for row, (p, c) in _numbered(prompts, contexts)
        ]
        self._contrasts = [
            None if c is None else self._with_prefix(row, lm.encode(p, chat=chat))
            for row, (p, c) in _numbered(prompts, contexts)
        ]
        ids, mask = pad_left(rows, lm.pad_token_id)
        self._prepared = ids.to(lm.device), mask.to(lm.device)
        return {"input_ids": self._prepared[0], "attention_mask": self._prepared[1]}

    def _with_prefix(self, row: int, ids: list[int]) -> list[int]:
        prefix, start = self.plan.prefix, self._pool.overwriting.start
        slots = 0 if prefix is None else int(prefix.lengths[row])
        return ids[:start] + [self.lm.placeholder_id] * slots + ids[start:]

    def generate_kwargs(self, *, streamer: Any = None, seeds: Sequence[int] | None = None) -> dict[str, Any]:
        """What to pass to transformers' `generate` besides the batch.

        Args:
            streamer: a transformers streamer. (Given to `generate` itself it would be dropped, as `generate` does with
                every callable `custom_generate`.)
            seeds: one a row, for sampling that does not depend on the rest of the batch.
        """

        # transformers tells a decoding method's own arguments by its signature, so there are none here but its own.
        def decode(
            model: Any,
            input_ids: Tensor,
            logits_processor: Any,
            stopping_criteria: Any,
            generation_config: Any,
            **kw: Any,
        ) -> Any:
            return self._decode(
                model, input_ids, logits_processor, stopping_criteria, generation_config, kw, streamer, seeds
            )

        return {"custom_generate": decode}

    def _decode(
        self,
        model: Any,
        input_ids: Tensor,
        processor: Callable[[Tensor, Tensor], Tensor],
        criteria: Any,
        config: Any,
        kwargs: dict[str, Any],
        streamer: Any,
        seeds: Sequence[int] | None,
    ) -> Any:
        """Runs transformers' own decoding method on rows that carry the plan."""
        mode = config.get_generation_mode(None)
        copies = max(config.num_beams, config.num_return_sequences)
        self._validate(mode, input_ids, copies, seeds)
        owners = self._owners if copies == 1 else self._owners.repeat_interleave(copies)
        streams = None if self._contrasts_nothing else self._streams(input_ids, copies, owners)
        if streamer is not None:
            # As `generate` does with a streamer of its own; some take what comes first for the prompt and skip it.
            streamer.put(input_ids.cpu())
        if seeds is not None:
            row_seeds = [seed + 1_000_003 * copy for seed in seeds for copy in range(copies)]
            steps = config.max_length - input_ids.shape[1]
            processor = SeededRows(processor, row_seeds, steps, input_ids.shape[1])
        lengths = _prompt_lengths(input_ids, kwargs)
        if streams is not None:
            processor = streams.processor(processor, sample=config.do_sample and seeds is None)
            criteria = streams.lengthened(criteria)
            streamer = None if streamer is None else OwnRows(streamer, streams.batch)
            self._widen(model, config, mode, kwargs, streams, copies)
            input_ids, owners = streams.input_ids, owners[streams.owners]
            lengths = streams.attention_mask.sum(1)
            self._mixed = True
        method = getattr(type(model), GENERATION_MODES_MAPPING[mode])
        with self._rows_loaded(Rows(owners, lengths)):
            output = method(
                model,
                input_ids,
                logits_processor=processor,
                stopping_criteria=criteria,
                generation_config=config,
                **({} if streamer is None else {"streamer": streamer}),
                **kwargs,
            )
        return output if streams is None else streams.own(output)

    @property
    def _contrasts_nothing(self) -> bool:
        return self.plan.streams is None or not any(self.plan.streams.contexts)

    def _validate(self, mode: GenerationMode, input_ids: Tensor, copies: int, seeds: Sequence[int] | None) -> None:
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.BEAM_SEARCH):
            raise SteerError(
                f"{mode.value.replace('_', ' ')} is not supported under steering yet; use greedy, sampling or beams"
            )
        if input_ids.shape[0] != self.plan.batch * copies:
            raise SteerError(f"{input_ids.shape[0] // copies} prompts for {self.plan.batch} bound rows")
        if seeds is not None and (mode != GenerationMode.SAMPLE or len(seeds) != self.plan.batch):
            raise SteerError(f"seeds are for sampling (do_sample=True), one for each of the {self.plan.batch} rows")
        if self._contrasts_nothing and not self._has_prefix:
            return
        if self._prepared is None or not torch.equal(self._prepared[0].repeat_interleave(copies, 0), input_ids):
            raise SteerError(
                "prefixes and contexts are part of the prompt: make the batch with steering.prepare(prompts), and pass "
                "it to generate as it is"
            )
        if not self._contrasts_nothing and mode == GenerationMode.BEAM_SEARCH:
            raise SteerError("beams cannot be contrasted yet: their scores would mix beams; use greedy or sampling")

    def _streams(self, input_ids: Tensor, copies: int, owners: Tensor) -> Streams:
        assert self.plan.streams is not None and self._contrasts is not None and self._prepared is not None
        return Streams.build(
            input_ids,
            self._prepared[1].repeat_interleave(copies, 0),
            [self._contrasts[owner] for owner in owners.tolist()],
            self.plan.streams.lams[owners.cpu()],
            self.lm.pad_token_id,
        )

    def _widen(
        self, model: Any, config: Any, mode: GenerationMode, kwargs: dict[str, Any], streams: Streams, copies: int
    ) -> None:
        """Replaces what `generate` had built for the batch's own rows by the same for all rows of the streams."""
        cache = kwargs.pop("past_key_values", None)
        if cache is not None and getattr(cache, "_is_user_defined", False):
            raise SteerError("contrasted streams start from the prompt; a cache of your own cannot be continued")
        rows = len(streams.input_ids)
        model._prepare_cache_for_generation(
            config, kwargs, mode, rows // copies, config.max_length - 1 + streams.padding
        )
        kwargs["attention_mask"] = streams.attention_mask
        if "position_ids" in kwargs:
            kwargs["position_ids"] = (streams.attention_mask.cumsum(1) - 1).clamp(min=0)

    @contextmanager
    def _rows_loaded(self, rows: Rows) -> Iterator[None]:
        self._load(rows)
        try:
            yield
        finally:
            self._load(self._plain_rows())


def _numbered(
    prompts: Sequence[Prompt], contexts: Sequence[str | None]
) -> Iterator[tuple[int, tuple[Prompt, str | None]]]:
    return enumerate(zip(prompts, contexts, strict=True))


def _prompt_lengths(input_ids: Tensor, kwargs: dict[str, Any]) -> Int[Tensor, " row"]:
    """Real tokens of each row's prompt, from what `generate` hands to a decoding method."""
    rows = input_ids.shape[0]
    # `generate` drops a mask without padding. Position ids do not tell where a prompt that is padded on the right ends.
    if (mask := kwargs.get("attention_mask")) is not None:
        return mask.sum(1)
    if (positions := kwargs.get("position_ids")) is not None:
        # Qwen-VL has several for each token, the plain ones first.
        positions = positions[0] if positions.dim() == 3 else positions
        return positions[:, -1].expand(rows) + 1
    return torch.full((rows,), input_ids.shape[1], device=input_ids.device)
