"""Decoding: transformers' own decoding methods, run on rows that carry a plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from transformers import DynamicCache
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.utils import GENERATION_MODES_MAPPING

from steer.companion import Companion
from steer.errors import SteerError
from steer.inject.rows import Rows
from steer.inject.stream_rows import Heads, OwnRows, Streams, head_lengths, pad_behind_heads, pad_left
from steer.inject.streams import Mix, Mixture, Stream
from steer.read import require_room
from steer.sampling import SeededRows

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor
    from transformers import Cache

    from steer.inject.neighbours import RecallNeighbours
    from steer.model import FrozenLM
    from steer.plan import Plan

# Reading the common heads of rows first takes a forward pass more. On a CPU that costs what 32 tokens do (SmolLM2 135M,
# benchmarks/heads.py), and with 64 it pays; on a GPU it was not measured.
_SPARED_TOKENS = 64


@dataclass(frozen=True)
class Prepared:
    """A tokenized batch.

    Attributes:
        input_ids, attention_mask: `[batch, pos]`, left-padded; right-padded for an encoder.
        further: for each row, its further streams and their token ids.
    """

    input_ids: Int[Tensor, "batch pos"]
    attention_mask: Int[Tensor, "batch pos"]
    further: Sequence[Sequence[tuple[Stream, list[int]]]]


class Bound(Protocol):
    """A plan that is bound to a model."""

    lm: FrozenLM
    plan: Plan
    owners: Int[Tensor, " batch"]
    prepared: Prepared | None
    has_prefix: bool
    mixed: bool
    recalling: list[RecallNeighbours]

    def remember(self, cache: Cache, owners: Int[Tensor, " row"]) -> None:
        """Writes the plan's keys and values into an empty cache, for rows that belong to these rows of the batch."""

    def require_no_gap(self, mask: Int[Tensor, "row pos"], longest: int) -> None:
        """Raises SteerError if a sliding window that is shorter than a sequence would count padding in its midst."""

    def rows_loaded(self, rows: Rows) -> AbstractContextManager[None]:
        """Binds the plan to these rows of the coming forward passes, while the block lasts."""


class Decoding:
    """One call of `generate` under a plan, for a streamer, and with the rows' own seeds for sampling."""

    def __init__(self, bound: Bound, streamer: Any, seeds: Sequence[int] | None) -> None:
        self.bound, self.lm, self.plan = bound, bound.lm, bound.plan
        self.streamer, self.seeds = streamer, seeds

    def run(
        self,
        model: Any,
        input_ids: Tensor,
        processor: Callable[[Tensor, Tensor], Tensor],
        criteria: Any,
        config: Any,
        prompts: Tensor,
        kwargs: dict[str, Any],
    ) -> Any:
        """What a `custom_generate` callable is to do; the arguments are those that transformers hands to it.

        `input_ids` are what is continued, one a row. `prompts` is the batch that `generate` was called with, which in
        an encoder-decoder model is something else.
        """
        mode = config.get_generation_mode(None)
        copies = max(config.num_beams, config.num_return_sequences)
        self._validate(mode, input_ids, copies, config, prompts)
        streamer = self.streamer
        if streamer is not None:
            # As `generate` does with a streamer of its own; some take what comes first for the prompt and skip it.
            streamer.put(input_ids.cpu())
        for recalling in self.bound.recalling:
            processor = recalling.processor(processor)
        if self.seeds is not None:
            row_seeds = [seed + 1_000_003 * copy for seed in self.seeds for copy in range(copies)]
            steps = config.max_length - input_ids.shape[1]
            processor = SeededRows(processor, row_seeds, steps, input_ids.shape[1])
        # The same tensor tells that nothing need be gathered anew.
        owners = self.bound.owners if copies == 1 else self.bound.owners.repeat_interleave(copies)
        rows, streams = Rows(owners, _prompt_lengths(input_ids, kwargs)), None
        method = getattr(type(model), GENERATION_MODES_MAPPING[mode])
        with ExitStack() as binding:
            if self.plan.mixes:
                streams = self._streams(owners, input_ids, config)
                for companion in streams.companions:
                    binding.enter_context(companion.bound())
                processor = streams.processor(processor, sample=config.do_sample and self.seeds is None)
                criteria = streams.criteria(criteria)
                streamer = None if streamer is None else OwnRows(streamer, streams.batch)
                self._widen(model, config, mode, kwargs, streams, owners)
                input_ids = streams.input_ids
                rows = Rows(owners[streams.owners], streams.attention_mask.sum(1), streams.touched)
                self.bound.mixed = True
            if self.plan.key_values is not None and self.plan.key_values.lengths.any():
                self._remember(kwargs, owners, config)
            binding.enter_context(self.bound.rows_loaded(rows))
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

    def _remember(self, kwargs: dict[str, Any], owners: Tensor, config: Any) -> None:
        """Fills the cache with the keys and values in front of the prompts."""
        cache, prepared = kwargs.get("past_key_values"), self.bound.prepared
        assert prepared is not None
        if cache is None or getattr(cache, "_is_user_defined", False):
            raise SteerError(
                "keys and values stand at the beginning of a cache; leave out use_cache=False and your own"
            )
        self.bound.require_no_gap(prepared.attention_mask, config.max_length)
        self.bound.remember(cache, owners)

    def _validate(self, mode: GenerationMode, input_ids: Tensor, copies: int, config: Any, prompts: Tensor) -> None:
        batch, prepared = self.plan.batch, self.bound.prepared
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.BEAM_SEARCH):
            raise SteerError(
                f"{mode.value.replace('_', ' ')} is not supported under steering yet; use greedy, sampling or beams"
            )
        if input_ids.shape[0] != batch * copies:
            raise SteerError(f"{input_ids.shape[0] // copies} prompts for {batch} bound rows")
        if self.seeds is not None and (mode != GenerationMode.SAMPLE or len(self.seeds) != batch):
            raise SteerError(f"seeds are for sampling (do_sample=True), one for each of the {batch} rows")
        if self.plan.mixes and config.guidance_scale not in (None, 1):
            raise SteerError(
                "guidance_scale is a contrast of transformers' own, and these rows are contrasted already; leave it "
                "out, or use Guidance instead of these states"
            )
        if not self.plan.mixes and not self.bound.has_prefix:
            return
        if prepared is None or not torch.equal(prepared.input_ids, prompts):
            raise SteerError(
                "prefixes and contexts are part of the prompt: make the batch with steering.prepare(prompts), and pass "
                "it to generate as it is"
            )
        if self.plan.mixes and mode == GenerationMode.BEAM_SEARCH:
            raise SteerError("beams cannot be contrasted yet: their scores would mix beams; use greedy or sampling")

    # Streams.

    def _streams(self, owners: Tensor, input_ids: Tensor, config: Any) -> Streams:
        """Appends the further streams to the rows of the batch, whose copies have streams of their own."""
        prepared, edit = self.bound.prepared, self.plan.streams
        assert prepared is not None and edit is not None
        batch = owners.tolist()
        mixtures = [edit.mixtures[owner] for owner in batch]
        own = [ids[mask.bool()].tolist() for ids, mask in zip(prepared.input_ids, prepared.attention_mask, strict=True)]
        rows = [own[owner] for owner in batch]
        further = [(row, stream, ids) for row, owner in enumerate(batch) for stream, ids in prepared.further[owner]]
        inside = [(row, stream, ids) for row, stream, ids in further if stream.model is None]
        steps = config.max_length - input_ids.shape[1]
        first = [
            (row, mixture.streams[0], own[batch[row]]) for row, mixture in enumerate(mixtures) if mixture is not None
        ]
        self._require_room([*first, *further], batch, steps)
        rows += [ids for _, _, ids in inside]
        row_owners = [*range(len(batch)), *(row for row, _, _ in inside)]
        ids, mask, heads = self._padded(rows, [batch[row] for row in row_owners], input_ids.shape[1], config)
        touched = [_touches(mixture, 0) for mixture in mixtures]
        touched += [_touches(mixtures[row], 1) for row, _, _ in inside]
        weights = [1.0 if mixture is None else mixture.streams[0].weight for mixture in mixtures]
        weights += [stream.weight for _, stream, _ in inside]
        stream_owners, companions = list(row_owners), []
        for other, beside in self._beside(further).items():
            rows_of_other = torch.tensor([row for row, _, _ in beside], device=input_ids.device)
            companions.append(Companion(other, [ids for _, _, ids in beside], rows_of_other, config, steps))
            stream_owners += [row for row, _, _ in beside]
            weights += [stream.weight for _, stream, _ in beside]
        device = input_ids.device
        return Streams(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            owners=torch.tensor(row_owners, device=device),
            touched=torch.tensor(touched, device=device),
            heads=heads,
            mix=Mix.of(mixtures, weights, torch.tensor(stream_owners, device=device)),
            companions=companions,
            prompts=input_ids,
        )

    def _require_room(self, streams: Sequence[tuple[int, Stream, list[int]]], batch: Sequence[int], steps: int) -> None:
        """Raises SteerError unless what each stream reads, and then writes, fits into the window of its model."""
        for row, stream, ids in streams:
            require_room(
                self.lm if stream.model is None else self.plan.models[stream.model],
                len(ids) + steps - 1,  # The last token is not read.
                f"row {batch[row]}: the prompt and what may follow it have",
                name=stream.model,
                remedy="shorten the context or the prompt, or lower max_new_tokens",
            )

    def _beside(
        self, further: Sequence[tuple[int, Stream, list[int]]]
    ) -> dict[FrozenLM, list[tuple[int, Stream, list[int]]]]:
        """The streams of other models. A model that has several names makes one pass for all of them."""
        found: dict[FrozenLM, list[tuple[int, Stream, list[int]]]] = {}
        for row, stream, ids in further:
            if stream.model is not None:
                found.setdefault(self.plan.models[stream.model], []).append((row, stream, ids))
        return found

    def _padded(
        self, rows: list[list[int]], groups: list[int], at_least: int, config: Any
    ) -> tuple[Tensor, Tensor, Heads | None]:
        """Left-pads the rows; those of one prompt share what they have in common at the beginning, if it pays."""
        heads = head_lengths(rows, groups)
        tails = max(len(row) - heads[group] for row, group in zip(rows, groups, strict=True))
        # Of the padded rows, as padding is computed like any other token.
        spared = len(rows) * (max(map(len, rows)) - tails) - len(heads) * max(heads)
        # Padding between a head and what follows would take up places in a window, what a condition reads comes in one
        # piece, and whoever asks for the prompt's hidden states wants all of them.
        whole = self.lm.sliding_window is not None or self.plan.conditions or not self.plan.touches_all_streams
        whole = whole or config.output_hidden_states or config.output_attentions or not config.use_cache
        whole = whole or config.cache_implementation not in (None, "dynamic")
        if whole or spared < _SPARED_TOKENS:
            return *pad_left(rows, self.lm.pad_token_id, at_least=at_least), None
        return pad_behind_heads(rows, groups, self.lm.pad_token_id, at_least)

    def _widen(
        self, model: Any, config: Any, mode: GenerationMode, kwargs: dict[str, Any], streams: Streams, owners: Tensor
    ) -> None:
        """Replaces what `generate` had built for the batch's own rows by the same for all rows of the streams."""
        cache = kwargs.pop("past_key_values", None)
        if cache is not None and getattr(cache, "_is_user_defined", False):
            raise SteerError("contrasted streams start from the prompt; a cache of your own cannot be continued")
        rows, copies = len(streams.input_ids), max(config.num_beams, config.num_return_sequences)
        model._prepare_cache_for_generation(
            config, kwargs, mode, rows // copies, config.max_length - 1 + streams.padding
        )
        kwargs["attention_mask"] = streams.attention_mask
        if "position_ids" in kwargs:
            kwargs["position_ids"] = (streams.attention_mask.cumsum(1) - 1).clamp(min=0)
        if streams.heads is not None:
            self._read_heads(streams, streams.heads, kwargs["past_key_values"])

    def _read_heads(self, streams: Streams, heads: Heads, cache: DynamicCache) -> None:
        """Reads what the rows of each prompt have in common once, and gives each row a copy of keys and values."""
        device = streams.input_ids.device
        mask = heads.attention_mask.to(device)
        arguments: dict[str, Any] = {"attention_mask": mask, "past_key_values": cache, "use_cache": True}
        if self.lm.attachment.architecture.takes_position_ids:
            arguments["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        # Of each group's first row; a head ends before the last token of any.
        lengths = streams.attention_mask.sum(1)[: streams.batch : streams.batch // self.plan.batch]
        with self.bound.rows_loaded(Rows(self.bound.owners, lengths)):
            self.lm.attachment.decoder(input_ids=heads.input_ids.to(device), **arguments)
        cache.batch_select_indices(heads.groups.to(device))


def _touches(mixture: Mixture | None, stream: int) -> bool:
    return mixture is None or mixture.touches(stream)


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
