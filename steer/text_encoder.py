"""Frozen text encoders: embeddings of what people wrote, each text encoded once and kept on disk."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from safetensors.torch import load, save

from steer.cache import Cache, embeddings_cache, if_possible, key_of
from steer.embedded import EMBEDDED, resolve
from steer.encoders import SentenceEncoder
from steer.errors import SteerError
from steer.fingerprint import running_samples
from steer.read import by_length

if TYPE_CHECKING:
    from jaxtyping import Float
    from sentence_transformers import SentenceTransformer
    from torch import Tensor

_WINDOW = 2048


class TextEncoder:
    """A frozen sentence encoder by name, through sentence-transformers.

    An embedding is computed once for each text, and kept on disk under a hash of the encoder and of the text: the file
    holds nothing that was written, but embeddings tell much of it, so whoever erases a person's data deletes it too.

    Args:
        name: an embedded model, a folder, or a model of the hub such as `BAAI/bge-base-en-v1.5`. One that comes without
            sentence-transformers' configuration gets the mean over tokens.
        normalized: whether embeddings get norm 1, or are left as pooling gives them.
        max_tokens: longer texts are cut; None is what the model was made with, 256 for the default and 512 for BGE.
        cache: where embeddings are kept: "default" is `embeddings.sqlite` beside the embedded models, and None nowhere.
        device: a GPU if there is one, by default.
        batch_tokens: largest forward pass, with padding.

    Attributes:
        cache: as above; None for as long as embeddings are to be computed, such as to time it.

    Raises:
        SteerError: sentence-transformers is missing, there is no such encoder, or it cannot read so many tokens.
    """

    def __init__(
        self,
        name: str | Path = "all-minilm-l6-v2",
        *,
        normalized: bool = True,
        max_tokens: int | None = None,
        cache: Cache | Literal["default"] | None = "default",
        device: str | torch.device | None = None,
        batch_tokens: int = 8192,
    ) -> None:
        self.name = _name(name)
        self.cache = embeddings_cache() if cache == "default" else cache
        self._batch_tokens = batch_tokens
        model = _load(name, device)
        if max_tokens is not None:
            _limit(model, self.name, max_tokens)
        self._encoder = SentenceEncoder(model, normalized=normalized).eval().requires_grad_(False)

    @property
    def width(self) -> int:
        """Of the embeddings."""
        return self._encoder.width

    @property
    def max_tokens(self) -> int | None:
        """Of a text; what is beyond is cut."""
        return self._encoder.model.max_seq_length

    @cached_property
    def identity(self) -> str:
        """What tells this encoder from others, for provenance: its name, and a hash.

        The hash is over samples of the weights, as in a model's fingerprint, and over what else embeddings depend on:
        the layers and their pooling, normalization, the tokenizer and the number of tokens. Dtype, device and folder
        play no part.
        """
        pooling = ("pooling_mode", "include_prompt")
        layers = [
            [type(layer).__name__, *(getattr(layer, key, None) for key in pooling)] for layer in self._encoder.layers
        ]
        settings = [self._encoder.normalized, self.max_tokens, self.width]
        words = sorted(self._encoder.model.tokenizer.get_vocab().items())
        return f"{self.name}:{key_of(running_samples(self._encoder), layers, words, settings)[:16]}"

    def encode(
        self, texts: Sequence[str], on_progress: Callable[[int], None] | None = None, *, prefix: str = ""
    ) -> Float[Tensor, "text d"]:
        """The texts' embeddings, float32, on the CPU.

        Texts of like length share a forward pass. What is on disk, or among the texts twice, is not encoded again.

        Args:
            texts: any number; no text gives no rows.
            on_progress: told the number of texts done after each batch.
            prefix: put in front of each text. BGE has one for queries, "Represent this sentence for searching relevant
                passages: ", and none for what is searched.
        """
        if isinstance(texts, str):
            raise SteerError("encode takes a list of texts, and this is a single one: give [text]")
        rows, done = torch.empty(len(texts), self.width), 0
        for start in range(0, len(texts), _WINDOW):
            window = texts[start : start + _WINDOW]
            keys = [self._key(prefix, text) for text in window]
            counts, known = Counter(keys), dict[str, torch.Tensor]()
            for batch in self._batches(dict(zip(keys, window, strict=True)), prefix):
                known |= batch
                done += sum(counts[key] for key in batch)
                if on_progress is not None:
                    on_progress(done)
            rows[start : start + len(window)] = torch.stack([known[key] for key in keys])
        return rows

    def module(self) -> SentenceEncoder:
        """A copy to be trained, in evaluation mode: what it gives at first is what `encode` gives, to rounding.

        `module.tokenize(texts, prefix)` makes what the module takes, and a gradient of its result reaches all weights
        that it depends on; no others require one.
        """
        module = copy.deepcopy(self._encoder).requires_grad_(True)
        module.freeze_unused()
        return module

    def _batches(self, texts: dict[str, str], prefix: str) -> Iterator[dict[str, Tensor]]:
        """Embeddings by key: what is in the cache at once, and then batch by batch, each kept before it is given."""
        found = dict[str, bytes]()
        if self.cache is not None:
            with if_possible("embeddings"):
                found = self.cache.get(list(texts))
        if found:
            yield {key: load(value)["embedding"] for key, value in found.items()}
        missing = [key for key in texts if key not in found]
        for chosen in by_length(self._lengths([prefix + texts[key] for key in missing]), self._batch_tokens):
            batch = [missing[i] for i in chosen]
            # What is kept must not depend on whether somebody trains in autocast at the time.
            with torch.no_grad(), torch.autocast(self._encoder.model.device.type, enabled=False):
                embeddings = self._encoder(self._encoder.tokenize([texts[key] for key in batch], prefix))
            new = dict(zip(batch, embeddings.float().cpu(), strict=True))
            if self.cache is not None:
                with if_possible("embeddings"):
                    self.cache.put({key: save({"embedding": row.clone()}) for key, row in new.items()})
            yield new

    def _lengths(self, texts: Sequence[str]) -> dict[int, int]:
        """Tokens of each text, once it is cut."""
        if not texts:
            return {}
        ids = self._encoder.model.tokenizer(list(texts), truncation=True).input_ids
        return {i: len(own) for i, own in enumerate(ids)}

    def _key(self, prefix: str, text: str) -> str:
        return key_of("embedding", 1, self.identity, torch.get_float32_matmul_precision(), prefix, text)


def _name(name: str | Path) -> str:
    """A folder's own name: where it lies says nothing about what is in it."""
    folder = Path(name).expanduser()
    return folder.resolve().name if str(name) not in EMBEDDED and folder.is_dir() else str(name)


def _load(name: str | Path, device: str | torch.device | None) -> SentenceTransformer:
    try:
        from sentence_transformers import SentenceTransformer
    except ModuleNotFoundError as error:
        if error.name != "sentence_transformers":
            raise
        raise SteerError("text encoders need sentence-transformers: pip install 'steer-toolkit[soft]'") from None
    if str(name) in EMBEDDED and EMBEDDED[str(name)].kind != "sentence-encoder":
        raise SteerError(f"{name} is a {EMBEDDED[str(name)].kind}, not a sentence encoder")
    path = resolve(name)
    try:
        return SentenceTransformer(
            path,
            device=str(device or ("cuda" if torch.cuda.is_available() else "cpu")),
            local_files_only=Path(path).exists(),
            # Whatever precision the weights are stored in; and no pickles.
            model_kwargs={"dtype": torch.float32, "use_safetensors": True},
        )
    except (OSError, ValueError) as error:
        raise SteerError(f"{name} could not be loaded as a sentence encoder: {error}") from error


def _limit(model: SentenceTransformer, name: str, max_tokens: int) -> None:
    longest = getattr(model.config, "max_position_embeddings", None)
    if max_tokens < 1 or (longest is not None and max_tokens > longest):
        raise SteerError(f"max_tokens={max_tokens}: {name} reads texts of 1 to {longest} tokens")
    model.max_seq_length = max_tokens
