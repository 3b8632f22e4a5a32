"""FrozenLM: one view over any supported model. It never trains or changes the model."""

from __future__ import annotations

import re
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeGuard, cast
from uuid import uuid4

import torch
from torch import nn
from transformers import DynamicCache, StopStringCriteria

from steer.architectures import ONLY_PREFIXES, architecture_of, find_decoder
from steer.attach import Attachment
from steer.cache import key_of
from steer.embedded import EMBEDDED, resolve
from steer.errors import SteerError
from steer.fingerprint import Fingerprints
from steer.inject import Edit, Place, StreamEdit
from steer.interop import unwrap
from steer.plan import Amounts, Plan, RowStates, edits_of, kinds_of, rows_of
from steer.sites import Site
from steer.state import Artifact, Blend, Fingerprint, UserState
from steer.steering import Operators, Steering

if TYPE_CHECKING:
    from nnsight import Envoy
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from steer.bank import Bank

# A text, chat messages, or token ids that are used as they are. Text, a message's content and token ids may come in
# pieces, with places for soft tokens between them.
Prompt = str | Sequence[str | Place] | Sequence[Mapping[str, Any]] | Sequence[int | Place]
# A row's states: none, one, a weighted sum, several of these, or several by name.
States = UserState | Blend | Sequence[UserState | Blend] | RowStates | None

# The hooks keep an attachment alive for as long as its model. A strong reference would keep both alive forever.
_WRAPPED: weakref.WeakKeyDictionary[nn.Module, weakref.ref[FrozenLM]] = weakref.WeakKeyDictionary()


class FrozenLM:
    """A frozen language model with places to read and to steer.

    Made by `steer.load` or `steer.wrap`. While it is open the model is in evaluation mode and its parameters require no
    gradient; `close()` leaves the model as it was.

    Attributes:
        model: the transformers model, usable as ever.
        tokenizer: its tokenizer; None if the model is only fed token ids.
        width: of the residual stream.
        n_layers: number of blocks that have sites; 0 in an encoder-decoder model.
        is_encoder_decoder: whether an encoder reads the prompts; soft tokens are all that can be put into these then.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        sites: Iterable[Site | str] | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        decoder, path = find_decoder(model)
        if decoder in _WRAPPED and _WRAPPED[decoder]() is not None:
            raise SteerError("this model is wrapped already; use that FrozenLM, or close() it first")
        self._text = cast("PreTrainedModel", decoder.get_submodule(path))
        self._config = self._text.config
        self.is_encoder_decoder = bool(model.config.is_encoder_decoder)
        self._fingerprints = Fingerprints(model if self.is_encoder_decoder else self._text)
        self.width = cast(int, self._config.hidden_size)
        self.operators = Operators(prefix_start=int(self.adds_bos))
        self.attachment = Attachment(model, decoder, architecture_of(self._config).inside(path))
        self.n_layers = len(self.attachment.blocks)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        training = [module for module in model.modules() if module.training]
        # Also when a FrozenLM is forgotten without close(): nobody could wrap the model again.
        self._restore = weakref.finalize(self, _restore, self.attachment, training, trainable)
        self._restore.atexit = False
        model.eval()
        for parameter in trainable:
            parameter.requires_grad_(False)
        every_block = [Site("resid_post", layer) for layer in range(self.n_layers)]
        try:
            self.declare(*([Site("embed"), *every_block] if sites is None else sites))
        except BaseException:
            self.close()
            raise
        _WRAPPED[decoder] = weakref.ref(self)

    def declare(self, *sites: Site | str) -> None:
        """Prepares sites for reading and steering; `embed` and all `resid_post` are, unless told otherwise.

        Raises:
            SteerError: the model has no such site, or was compiled in the meantime.
        """
        self.attachment.declare(Site.parse(site) for site in sites)

    def close(self) -> None:
        """Removes every hook and leaves the model as it was. Closing twice does nothing."""
        self._restore()
        _WRAPPED.pop(self.attachment.decoder, None)

    def __enter__(self) -> FrozenLM:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # What the model is.

    @property
    def device(self) -> torch.device:
        """Where the token ids go."""
        return next(self._text.get_input_embeddings().parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the residual stream."""
        return self._text.dtype

    def device_at(self, site: Site) -> torch.device:
        """Where the tensor at a site lives; differs between layers under a `device_map`."""
        if site.layer is None:
            return self.device
        return next(self.attachment.blocks[site.layer].parameters()).device

    def width_at(self, site: Site) -> int:
        """Width of the tensor at a site."""
        if site.layer is None:
            # Where OPT's embeddings are narrower than the stream, what the head reads is so too.
            return getattr(self._config, "word_embed_proj_dim", self.width)
        if site.name != "z":
            return self.width
        projection = cast(Any, self.attachment.blocks[site.layer].get_submodule(self.attachment.architecture.z))
        # Not its weight, which may be quantized and packed. GPT-2's Conv1D has its own name for it.
        return projection.nx if hasattr(projection, "nx") else projection.in_features

    def memory_site(self, site: Site) -> Site:
        """Where cross-attention for `site` enters: after the block if attention and feed-forward are parallel."""
        if site.name == "resid_mid" and self.attachment.architecture.mid is None:
            return Site("resid_post", site.layer)
        return site.canonical()

    @property
    def sliding_window(self) -> int | None:
        """How many tokens back the layers with a sliding window see; None if the model has no such layers."""
        kinds = getattr(self._config, "layer_types", None)
        # Where the layers' kinds are not told, a window is meant for all of them.
        return getattr(self._config, "sliding_window", None) if kinds is None or "sliding_attention" in kinds else None

    @cached_property
    def key_value_shape(self) -> tuple[int, int, int]:
        """Of what a layer keeps of a token: heads, width of their keys, and of their values. Seen in a forward pass.

        Raises:
            SteerError: the layers differ in it, or there is an encoder, which keeps nothing.
        """
        if self.is_encoder_decoder:
            raise SteerError(f"keys and values: {ONLY_PREFIXES}")
        cache = DynamicCache()
        with torch.no_grad():
            self.attachment.decoder(
                input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.device), past_key_values=cache, use_cache=True
            )
        shapes = {
            (layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]) for layer in cast(Any, cache).layers
        }
        if len(shapes) != 1:
            raise SteerError("this model's layers keep different things of a token; prefixes must be soft tokens here")
        return shapes.pop()

    @property
    def fingerprint(self) -> Fingerprint:
        """Architecture and sampled weights, independent of dtype and device.

        The weights are those that run: without the head, without the rest of a multimodal model, and with the adapters
        of PEFT that are active, so that a model with other adapters is another model. One whose adapters are disabled
        is the plain one.
        """
        return self._fingerprints.current()

    # Text to tokens.

    @property
    def pad_token_id(self) -> int:
        """What shorter rows are padded with."""
        return self._first_token_id("pad_token_id", "eos_token_id", "bos_token_id")

    @property
    def placeholder_id(self) -> int:
        """What stands in the prompt where soft tokens go. Not EOS if it can be helped: penalties count prompts."""
        if self.tokenizer is not None and self.tokenizer.pad_token_id == self.tokenizer.eos_token_id:
            return self._first_token_id("bos_token_id", "eos_token_id")
        return self.pad_token_id

    def _first_token_id(self, *names: str) -> int:
        found = [getattr(self.tokenizer, name, None) for name in names]
        return next((token for token in found if token is not None), 0)

    @cached_property
    def adds_bos(self) -> bool:
        """Whether the tokenizer begins every prompt with a BOS token, behind which soft tokens stand."""
        if self.tokenizer is None or self.tokenizer.bos_token_id is None:
            return False
        return self.tokenizer("a").input_ids[:1] == [self.tokenizer.bos_token_id]

    @property
    def _special_ids(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts in front of a text and behind it."""
        assert self.tokenizer is not None
        whole, bare = (self.tokenizer("a", add_special_tokens=special).input_ids for special in (True, False))
        start = whole.index(bare[0])
        return whole[:start], whole[start + len(bare) :]

    @property
    def window(self) -> int | None:
        """How many tokens the model was made to read; None where it is not told."""
        return getattr(self._config, "max_position_embeddings", None)

    @property
    def vocabulary_size(self) -> int:
        """How many tokens have an embedding; some of them may be padding of the table."""
        return cast(Any, self._text.get_input_embeddings()).num_embeddings

    @cached_property
    def vocabulary(self) -> str:
        """What tells the tokens of a model, and their numbers, from those of others."""
        tokens = self._config.vocab_size if self.tokenizer is None else self.tokenizer.get_vocab()
        return key_of(tokens)

    def encode(
        self, prompt: Prompt, *, context: str | None = None, system: str | None = None, chat: bool | None = None
    ) -> list[int]:
        """Token ids of a prompt.

        Args:
            prompt: a text, chat messages, or token ids. Nothing stands at the places in it.
            context: goes in front of the last user message, joined by one space (METHODS §1.3); in front of the first
                text in a message of several parts.
            system: the system message, in place of one that there is.
            chat: whether a text goes through the chat template, as one user message with the assistant's turn opened
                after it; if None, whenever the tokenizer has a template.

        Raises:
            SteerError: the prompt is empty, has a place twice, or the tokenizer cannot do what is asked.
        """
        return self.encode_with_places(prompt, context=context, system=system, chat=chat)[0]

    def encode_with_places(
        self, prompt: Prompt, *, context: str | None = None, system: str | None = None, chat: bool | None = None
    ) -> tuple[list[int], dict[str, int]]:
        """Like `encode`, with the places of the prompt: how many of the tokens stand before each, in order.

        The pieces of a text between places are tokenized apart.
        """
        if _is_ids(prompt):
            if context is not None or system is not None:
                raise SteerError("a context needs a prompt of text; this one is token ids")
            return _joined([[piece] if isinstance(piece, int) else piece for piece in prompt])
        if not prompt:
            raise SteerError("a prompt is empty")
        if self.tokenizer is None:
            raise SteerError("this model was wrapped without a tokenizer: prompts must be token ids")
        has_template = self.tokenizer.chat_template is not None
        marks = Marks()
        is_text = isinstance(prompt, str) or not isinstance(prompt[0], Mapping)
        if is_text and not (has_template if chat is None else chat):
            if system is not None:
                raise SteerError("a system message needs a chat template")
            text = marks.text(prompt)
            return self._tokens(text if context is None else f"{context} {text}", marks)
        if not has_template:
            raise SteerError("the tokenizer has no chat template; pass texts, and chat=False")
        turns = cast("Sequence[Mapping[str, Any]]", [{"role": "user", "content": prompt}] if is_text else prompt)
        messages: list[dict[str, Any]] = [
            {**turn, "content": marks.text(turn["content"])} if "content" in turn else dict(turn) for turn in turns
        ]
        if context is not None:
            last = next((m for m in reversed(messages) if m["role"] == "user"), None)
            if last is None:
                raise SteerError("a context goes into the user's turn, and there is none")
            last["content"] = _behind(context, last["content"])
        if system is not None:
            messages = [{"role": "system", "content": system}, *(m for m in messages if m["role"] != "system")]
        if marks.places:
            rendered = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            return self._pieces(marks.split(cast(str, rendered)))
        # transformers 5 returns a mapping; its type hints also allow for the ids alone.
        encoded = cast(
            "Mapping[str, list[int]]", self.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        )
        return encoded["input_ids"], {}

    def _tokens(self, text: str, marks: Marks) -> tuple[list[int], dict[str, int]]:
        """Token ids of a text, with special tokens, and its places."""
        assert self.tokenizer is not None
        if not marks.places:
            return self.tokenizer(text).input_ids, {}
        front, behind = self._special_ids
        return self._pieces([front, *marks.split(text), behind])

    def _pieces(self, pieces: Sequence[str | list[int] | Place]) -> tuple[list[int], dict[str, int]]:
        """Token ids of texts that already have their special tokens, of token ids and places."""
        tokenizer = cast("PreTrainedTokenizerBase", self.tokenizer)
        return _joined(
            [
                tokenizer(piece, add_special_tokens=False).input_ids if isinstance(piece, str) else piece
                for piece in pieces
            ]
        )

    def text_of(self, prompt: Prompt) -> str:
        """What a prompt asks, without template: its text, that of the last user message, or that of its token ids."""
        if _is_ids(prompt):
            ids = [piece for piece in prompt if isinstance(piece, int)]
            return "" if self.tokenizer is None else cast(str, self.tokenizer.decode(ids, skip_special_tokens=True))
        if not isinstance(prompt, str) and prompt and isinstance(prompt[0], Mapping):
            prompt = next((m["content"] for m in reversed(prompt) if m["role"] == "user"), "")  # type: ignore[index]
        if isinstance(prompt, str):
            return prompt
        parts: list[Any] = [part for part in prompt if not isinstance(part, Place)]
        if all(isinstance(part, str) for part in parts):
            return "".join(parts)
        return " ".join(part["text"] for part in parts if part.get("type") == "text")

    # Steering.

    @contextmanager
    def steered(
        self,
        bank: Bank | None = None,
        users: Sequence[str | None] | None = None,
        *,
        names: Sequence[str] | None = None,
        states: Sequence[States] | None = None,
        edits: Sequence[Edit] = (),
        artifacts: Iterable[Artifact] = (),
        strength: Amounts | None = None,
        dose: Amounts | None = None,
        models: Mapping[str, FrozenLM] | None = None,
        prompt_lengths: Sequence[int] | None = None,
        unknown_user: str = "error",
    ) -> Iterator[Steering]:
        """Steers the model for one batch while the block lasts; the model's own API stays as it is.

        The rows come from a bank and users, from states, from edits, or from all of them together.

        Args:
            bank, users: one user a row, None for a plain row; all of a user's states apply.
            names: use only the bank's states of these names.
            states: a row's states, given directly: one, several, or a weighted sum, `0.8 * alice + 0.3 * formal`.
            edits: ready edits for the whole batch.
            artifacts: what the methods of `states` share, if a bank does not hold it.
            strength, dose: how much of each vector: a raw coefficient (1 if neither is given), or a share of the median
                residual norm. One number, one a row, or a mapping from the states' names to either.
            models: others whose logits take part in mixtures, by the names that states and streams have for them.
            prompt_lengths: real tokens of each row's prompt, for bare forward passes. `generate` needs none.
            unknown_user: "error", or "plain" to leave rows of users without a state unsteered.

        Raises:
            SteerError: bad input, before anything is bound; or the block made forward passes in which some part of the
                plan had no effect.
        """
        rows, kinds, shared = self._rows(bank, users, names, states, unknown_user)
        bound = edits_of(
            self,
            rows,
            kinds=kinds,
            artifacts=shared | {artifact.hash: artifact for artifact in artifacts},
            strength=strength,
            dose=dose,
        )
        plan = Plan.of(self, [*bound, *edits], len(rows) or _batch_of(edits), models)
        _warn_of_equal_streams(plan, rows, edits)
        steering = Steering(self, plan, prompt_lengths)
        steering.open()
        try:
            yield steering
        except BaseException:
            steering.close(check=False)
            raise
        steering.close()

    def _rows(
        self,
        bank: Bank | None,
        users: Sequence[str | None] | None,
        names: Sequence[str] | None,
        states: Sequence[States] | None,
        unknown_user: str,
    ) -> tuple[list[RowStates], list[tuple[str, UserState]], dict[str, Artifact]]:
        if (bank is None) != (users is None):
            raise SteerError("`bank` and `users` belong together: states are looked up by user in a bank")
        if isinstance(users, str):
            raise SteerError(f"`users` holds one user a row; write users=[{users!r}]")
        if unknown_user not in ("error", "plain"):
            raise SteerError(f'unknown_user={unknown_user!r} is neither "error" nor "plain"')
        if states is not None and (isinstance(states, str | Mapping) or not isinstance(states, Iterable)):
            raise SteerError("`states` holds one entry a row; write states=[state]")
        given = [_by_name(state) for state in states or []]
        if bank is None or users is None:
            return given, [], {}
        chosen = bank.names() if names is None else list(names)
        if missing := [name for name in chosen if name not in bank.names()]:
            raise SteerError(f"the bank has no states named {missing[0]!r}; it has {', '.join(bank.names()) or 'none'}")
        rows = rows_of(bank, users, chosen, unknown_user)
        if given and len(given) != len(rows):
            raise SteerError(f"{len(rows)} users and {len(given)} rows of states")
        kinds = kinds_of(self, bank, chosen)
        shared = {kind.provenance.artifact for _, kind in kinds} - {None}
        rows = [{**row, **extra} for row, extra in zip(rows, given or [{}] * len(rows), strict=True)]
        return rows, kinds, {key: bank.artifact(key) for key in shared if key is not None}

    def generate_tokens(
        self,
        prompts: Sequence[Prompt],
        users: Sequence[str | None] | None = None,
        bank: Bank | None = None,
        *,
        names: Sequence[str] | None = None,
        states: Sequence[States] | None = None,
        edits: Sequence[Edit] = (),
        artifacts: Iterable[Artifact] = (),
        strength: Amounts | None = None,
        dose: Amounts | None = None,
        models: Mapping[str, FrozenLM] | None = None,
        unknown_user: str = "error",
        chat: bool | None = None,
        seeds: Sequence[int] | None = None,
        streamer: Any = None,
        **generate: Any,
    ) -> list[list[int]]:
        """Like `generate`, but returns the new token ids of each row, up to and without an end-of-text token."""
        if isinstance(prompts, str):
            raise SteerError("`prompts` holds one prompt a row; write [prompt]")
        if not prompts:
            return []
        if "assistant_model" in generate:
            raise SteerError("assisted decoding is not supported under steering yet")
        config = generate.get("generation_config")
        limit = {} if config is not None or "max_length" in generate else {"max_new_tokens": 64}
        generate = limit | ({} if config is not None else {"pad_token_id": self.pad_token_id}) | generate
        if (strings := generate.pop("stop_strings", None)) is not None:
            # Of transformers' own accord nothing would do this: it forgets a tokenizer where decoding is not its own.
            if self.tokenizer is None:
                raise SteerError("this model was wrapped without a tokenizer, which stop_strings need")
            stop = StopStringCriteria(self.tokenizer, strings)
            generate["stopping_criteria"] = [*(generate.get("stopping_criteria") or ()), stop]
        if users is None and states is None and not edits:
            states = [None] * len(prompts)
        with self.steered(
            bank,
            users,
            names=names,
            states=states,
            edits=edits,
            artifacts=artifacts,
            strength=strength,
            dose=dose,
            models=models,
            unknown_user=unknown_user,
        ) as steering:
            batch = steering.prepare(prompts, chat=chat)
            output = cast(Any, self.model).generate(
                **batch, **steering.generate_kwargs(streamer=streamer, seeds=seeds), **generate
            )
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        ends = generate.get("eos_token_id", (config or self.model.generation_config).eos_token_id)
        ends = {ends} if isinstance(ends, int) else set(ends or [])
        # A decoder that has an encoder starts from one token of its own, and not from the prompt.
        start = 1 if self.is_encoder_decoder else batch["input_ids"].shape[1]
        return [_until(row, ends) for row in sequences[:, start:].tolist()]

    def generate(self, prompts: Sequence[Prompt], *args: Any, **kwargs: Any) -> list[str]:
        """Answers a batch of prompts, each row in the manner of its own user.

        Args:
            prompts: texts, chat messages or token ids, one a row.
            users, bank, names, states, edits, artifacts, strength, dose, models, unknown_user: as for `steered`.
            chat: whether texts go through the chat template; if None, whenever the tokenizer has one.
            seeds: one a row, for sampling (`do_sample=True`) that does not depend on the rest of the batch.
            streamer: a transformers streamer, for a single prompt.
            **generate: for transformers' `generate`; 64 new tokens unless they set another limit.

        Returns:
            The answers, one a row; with `num_return_sequences=n`, n for each row, in order.
        """
        if self.tokenizer is None:
            raise SteerError("this model was wrapped without a tokenizer; use generate_tokens")
        tokens = self.generate_tokens(prompts, *args, **kwargs)
        return self.tokenizer.batch_decode(tokens, skip_special_tokens=True)


def _warn_of_equal_streams(plan: Plan, rows: Sequence[RowStates], edits: Sequence[Edit]) -> None:
    """Warns of rows whose mixture is to contrast their other edits, where they have none."""
    if plan.streams is None or any(not isinstance(edit, StreamEdit) for edit in edits):
        return
    for row, mixture in enumerate(plan.streams.mixtures):
        states = rows[row].values() if rows else ()
        # One of them is the mixture itself.
        count = sum(len(state.parts) if isinstance(state, Blend) else 1 for state in states)
        if mixture is not None and mixture.contrasts_edits and count < 2:
            warnings.warn(
                f"row {row}: its mixture contrasts the row with and without its other states, and it has none, so that "
                "all streams are the same",
                stacklevel=4,
            )


class Marks:
    """Stands for the places in texts while these go through a template: by what is in nobody's text.

    Attributes:
        places: those that were met, by their marks.
    """

    def __init__(self) -> None:
        self.places: dict[str, Place] = {}

    def text(self, content: Any) -> Any:
        """A text in one piece, with marks where it has places; parts of other kinds as they are."""
        if not content or isinstance(content, str) or not all(isinstance(piece, str | Place) for piece in content):
            return content
        return "".join(piece if isinstance(piece, str) else self._mark(piece) for piece in content)

    def split(self, text: str) -> list[str | Place]:
        """The pieces of a text with marks, without empty ones."""
        if not self.places:
            return [text]
        pieces = re.split("(" + "|".join(self.places) + ")", text)
        return [self.places.get(piece, piece) for piece in pieces if piece]

    def _mark(self, place: Place) -> str:
        mark = uuid4().hex
        self.places[mark] = place
        return mark


def _is_ids(prompt: Prompt) -> TypeGuard[Sequence[int | Place]]:
    return not isinstance(prompt, str) and any(isinstance(piece, int) for piece in prompt)


def _joined(pieces: Sequence[list[int] | Place]) -> tuple[list[int], dict[str, int]]:
    """Token ids in one piece, and how many of them stand before each place."""
    ids: list[int] = []
    places: dict[str, int] = {}
    for piece in pieces:
        if isinstance(piece, Place):
            if piece.name in places:
                raise SteerError(f"a prompt has the place {piece.name!r} twice; its soft tokens stand in one")
            places[piece.name] = len(ids)
        else:
            ids += piece
    return ids, places


def _behind(context: str, content: str | Sequence[Mapping[str, Any]]) -> str | list[Mapping[str, Any]]:
    """The content of a message with a context in front of its text."""
    if isinstance(content, str):
        return f"{context} {content}"
    parts = list(content)
    at = next((i for i, part in enumerate(parts) if part.get("type") == "text"), None)
    if at is None:
        raise SteerError("a context goes in front of text, and the user's turn has none")
    parts[at] = {**parts[at], "text": f"{context} {parts[at]['text']}"}
    return parts


def wrap(
    model: PreTrainedModel | TransformerBridge | Envoy,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    sites: Iterable[Site | str] | None = None,
) -> FrozenLM:
    """Prepares a transformers model for reading and steering.

    Args:
        model: a causal language model, or an encoder-decoder one to generate with, that was not compiled yet; wrap
            first, compile after. Also the model in a TransformerBridge or in an nnsight model.
        tokenizer: its tokenizer; nnsight's if None. Without one, prompts are token ids.
        sites: where to place hooks; `embed` and all `resid_post` if None. More can be declared until it is compiled. An
            encoder-decoder model has `embed` alone, which is what its encoder reads.

    Raises:
        SteerError: the architecture is not described, or the model was compiled or wrapped before.
    """
    inner, own = unwrap(model)
    return FrozenLM(inner, tokenizer or own, sites=sites)


def load(name: str, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> FrozenLM:
    """Loads and wraps a model.

    Args:
        name: a short name from `steer models`, a folder, or a hub id.
        device: "cuda" if there is one, else "cpu", when None.
        dtype: of the weights; as they are stored when None.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    if name in EMBEDDED and EMBEDDED[name].kind != "causal-lm":
        raise SteerError(f"{name} is a {EMBEDDED[name].kind}, not a language model that could be steered")
    path = resolve(name)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = AutoModelForSeq2SeqLM if AutoConfig.from_pretrained(path).is_encoder_decoder else AutoModelForCausalLM
    model = kind.from_pretrained(path, dtype=dtype or "auto")
    cast(nn.Module, model).to(device)
    return wrap(model, AutoTokenizer.from_pretrained(path))


def uncompile(model: nn.Module) -> None:
    """Forgets all compiled code of this process, so that a model which was compiled before can be wrapped."""
    torch._dynamo.reset()
    for module in model.modules():
        vars(module).pop("_compiled_call", None)
        module._compiled_call_impl = None
        lm = _WRAPPED[module]() if module in _WRAPPED else None
        if lm is not None:
            lm.attachment.traced = False


def _restore(attachment: Attachment, training: list[nn.Module], trainable: list[nn.Parameter]) -> None:
    attachment.remove()
    for module in training:
        module.training = True
    for parameter in trainable:
        parameter.requires_grad_(True)


def _by_name(states: States) -> RowStates:
    if states is None:
        return {}
    if isinstance(states, Mapping):
        return {name: _require_state(state) for name, state in states.items()}
    named: dict[str, UserState | Blend] = {}
    for given in states if isinstance(states, Iterable) and not isinstance(states, str) else [states]:
        own = _by_method(_require_state(given))
        if not named.keys().isdisjoint(own):
            raise SteerError(
                "a row has two states of one method; give them names, {'mine': state, 'hers': state}, or weights, "
                "0.8 * state + 0.3 * state"
            )
        named |= own
    return named


def _require_state(state: object) -> UserState | Blend:
    if not isinstance(state, UserState | Blend):
        raise SteerError(
            f"`states` holds one UserState a row, or a dict of them by name, and no {type(state).__name__}; make one "
            'with steer.CoS(lam=1).state("I sail.")'
        )
    return state


def _by_method(states: UserState | Blend) -> RowStates:
    if isinstance(states, UserState):
        return {states.provenance.method: states}
    methods = {state.provenance.method for _, state in states.parts}
    return {name: Blend(tuple(p for p in states.parts if p[1].provenance.method == name)) for name in methods}


def _batch_of(edits: Sequence[Edit]) -> int:
    if not edits:
        raise SteerError("nothing to steer by: give a bank and users, states, or edits")
    edit = edits[0]
    if isinstance(edit, StreamEdit):
        return len(edit.mixtures)
    return len(next(value for value in vars(edit).values() if isinstance(value, torch.Tensor)))


def _until(tokens: list[int], ends: set[int]) -> list[int]:
    stop = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:stop]
