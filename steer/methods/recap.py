"""RECAP: a user's texts as keys and values in front of the prompt, in every layer, which depend on what is asked.

Liu et al., "RECAP: Retrieval-Enhanced Context-Aware Prefix Encoder for Personalized Dialogue Response Generation", ACL
2023, arXiv 2306.07206; code isi-nlp/RECAP. With x what is embedded of the prompt, h_1 … h_k of those texts of the user
that are retrieved for it, and S learned slots:

    C = Attn(S; x)        R = Attn(C; h_1 … h_k)        [K_l ; V_l] = W_l tanh(U R)        for every layer l

Of each slot come one key and one value for each head of each layer. Where this differs from the paper:

* There everything is trained, RoBERTa and DialoGPT too, on Reddit. Here encoder and language model are frozen.
* There x and h are the states of all tokens, and a gate mixes each token's with that of its whole text. Here a text is
  one embedding, as that is what a state keeps; the gate mixes what the slots found in the texts with what they found in
  the prompt, slot by slot: g · R + (1 − g) · C.
* There a transformer over a user's turns predicts the embedding of the next response, and texts close to that are
  retrieved. Here texts are retrieved that are close to the prompt, or the newest ones.
* A model that cannot adapt is easily thrown off by keys and values unlike its own. So they begin as what the model
  itself makes of tokens of the texts, drawn at random; what is trained is added, and is 0 at first. Its unit, for each
  head, is how much such keys or values differ from each other. The first slot is left as it is: most heads look at the
  first token, whatever it is (Xiao et al., "Efficient Streaming Language Models with Attention Sinks", 2309.17453).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar, Literal, cast

import torch
from torch import nn

from steer.encoders.blocks import Block
from steer.encoders.project import init_linear
from steer.errors import SteerError
from steer.history import History
from steer.inject import Edit, KeyValueEdit, KeyValues, PromptKeyValues
from steer.key_values import key_values_of
from steer.methods.embedded_texts import EmbeddedTexts, FromTexts, Items
from steer.state import Artifact, UserState
from steer.text_encoder import TextEncoder

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

    from steer.model import FrozenLM
    from steer.train.examples import Example

Retriever = Literal["similar", "newest"]

# So many tokens at least tell how keys and values differ.
_TOKENS = 32
_HEADS = 8


@dataclass
class Recap(EmbeddedTexts):
    """Keys and values from the embeddings of the user's texts and of the prompt, trained in front of the frozen model.

    A user without records has a state too: that of somebody whose only text is the mean of all that was trained on.

    Args:
        encoder: a sentence encoder, see `TextEncoder`; the paper trains RoBERTa.
        text: what of a record is encoded: the response with its prompt behind it, or the response.
        max_tokens: of a text that is encoded; None is what the encoder was made for.
        centred, autoencoding: see `EmbeddedTexts`.
        slots: keys and values that are trained, for each head; one more stands in front of them.
        retriever: which texts count: those whose embeddings are most similar to the prompt's, or the newest.
        retrieved: how many.
        query_prefix: put in front of the prompt when it is encoded; see `PPlug`.
    """

    name: ClassVar[str] = "recap"

    slots: int = 30
    retriever: Retriever = "similar"
    retrieved: int = 10
    query_prefix: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_one_of(retriever=Retriever)
        for name in ("slots", "retrieved"):
            if getattr(self, name) < 1:
                raise SteerError(f"{name}={getattr(self, name)} is no count; give 1 or more")

    def module(self, lm: FrozenLM, histories: Sequence[History]) -> PrefixEncoder:
        """What is trained: see `steer.train.train_method`.

        Raises:
            SteerError: the histories are empty, the encoder is not there, or the model's layers keep different things
                of a token.
        """
        # Asked first, as it says what is wrong with a model that cannot be given keys and values.
        _ = lm.key_value_shape
        encoder, mean = self._encoder_and_mean(lm, histories)
        own = _of_ordinary_tokens(lm, histories, max(self.slots + 1, _TOKENS))
        return PrefixEncoder(self, encoder, mean, own).to(lm.device)

    @classmethod
    def bind(
        cls, lm: FrozenLM, states: Sequence[UserState | None], like: UserState, artifact: Artifact | None
    ) -> list[Edit]:
        """Keys and values that depend on the prompts."""
        assert artifact is not None
        module, rows = _prefix_encoder(artifact, lm.device), Items.of(states)
        lengths = torch.zeros(rows.count, dtype=torch.long)
        lengths[rows.bound] = module.length

        def key_values(prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                keys, values = module.of(rows.items, rows.prompts(prompts))
            return rows.spread(keys), rows.spread(values)

        return [PromptKeyValues(key_values, lengths, module.begun)]


class PrefixEncoder(FromTexts):
    """From embeddings of texts and of prompts to keys and values: what RECAP trains.

    Args:
        method: the hyper-parameters.
        encoder: of the texts; it is frozen, and no part of the module.
        nobody: the embedding that stands for a history without texts.
        own: keys and values that the model makes of ordinary tokens, one more than there are slots or more.
    """

    own_keys: Tensor
    own_values: Tensor

    def __init__(self, method: Recap, encoder: TextEncoder, nobody: Float[Tensor, " d_in"], own: KeyValues) -> None:
        super().__init__(method, encoder, nobody)
        self.method = method
        self.register_buffer("own_keys", own.keys)
        self.register_buffer("own_values", own.values)
        width, (layers, heads, _, key_width) = encoder.width, own.keys.shape
        self.slots = nn.Parameter(torch.randn(method.slots, width))
        self.inputs, self.input_norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.to_prompt, self.to_texts = (
            Block(width, heads=math.gcd(width, _HEADS), hidden=2 * width, depth=2) for _ in range(2)
        )
        self.gate, self.norm = nn.Linear(2 * width, 1), nn.LayerNorm(width)
        self.inner = nn.Linear(width, width)
        self.keys = nn.Linear(width, layers * heads * key_width)
        self.values = nn.Linear(width, layers * heads * own.values.shape[3])
        for layer in (self.inputs, self.gate, self.inner):
            init_linear(layer)
        for layer in (self.keys, self.values):
            init_linear(layer, 0.0)

    @property
    def length(self) -> int:
        """How many keys and values a row has, for each head."""
        return self.method.slots + 1

    @property
    def begun(self) -> KeyValues:
        """With which training begins."""
        return KeyValues(self.own_keys[:, :, : self.length], self.own_values[:, :, : self.length])

    def edits(self, examples: Sequence[Example]) -> list[Edit]:
        """One prefix for each example, from the records before it."""
        keys, values = self.of(self.histories(examples), [example.span.prompt or "" for example in examples])
        return [KeyValueEdit(keys, values, torch.full((len(examples),), self.length))]

    def of(
        self, rows: Sequence[Float[Tensor, "text d_in"]], prompts: Sequence[str]
    ) -> tuple[Float[Tensor, "row layer head slot k"], Float[Tensor, "row layer head slot v"]]:
        """Keys and values for rows with these texts and prompts."""
        queries = self.encoder.encode(prompts, prefix=self.method.query_prefix)
        retrieved = [self._retrieved(row, query) for row, query in zip(rows, queries, strict=True)]
        return self(*self.pad(retrieved), queries.to(self.nobody))

    def forward(
        self,
        items: Float[Tensor, "row item d_in"],
        mask: Bool[Tensor, "row item"],
        queries: Float[Tensor, "row d_in"],
    ) -> tuple[Float[Tensor, "row layer head slot k"], Float[Tensor, "row layer head slot v"]]:
        """Keys and values for rows with these retrieved texts."""
        asked = self._attend(self.to_prompt, self.slots.expand(len(items), -1, -1), queries[:, None], mask[:, :1])
        found = self._attend(self.to_texts, asked, items, mask)
        gate = self.gate(torch.cat([found, asked], 2)).sigmoid()
        hidden = self.inner(self.norm(gate * found + (1 - gate) * asked)).tanh()
        return (
            _added(self.begun.keys, self.keys(hidden), _deviation(self.own_keys)),
            _added(self.begun.values, self.values(hidden), _deviation(self.own_values)),
        )

    def _attend(
        self,
        block: nn.Module,
        slots: Float[Tensor, "row slot d_in"],
        items: Float[Tensor, "row item d_in"],
        mask: Bool[Tensor, "row item"],
    ) -> Float[Tensor, "row slot d_in"]:
        visible = torch.cat([mask, mask.new_ones(slots.shape[:2])], dim=1)[:, None]
        return cast("Tensor", block(slots, visible, self.input_norm(self.inputs(items))))

    def _retrieved(
        self, row: Float[Tensor, "text d_in"], query: Float[Tensor, " d_in"]
    ) -> Float[Tensor, "retrieved d_in"]:
        count = min(self.method.retrieved, len(row))
        if self.method.retriever == "newest":
            return row[len(row) - count :]
        return row[(row.to(query) @ query).topk(count).indices]


def _added(
    begun: Float[Tensor, "layer head all k"], made: Float[Tensor, "row slot _"], unit: Float[Tensor, "layer head 1 1"]
) -> Float[Tensor, "row layer head all k"]:
    """What it began with, and what was made of each slot but the first, in these units."""
    layers, heads, _, width = begun.shape
    change = made.unflatten(2, (layers, heads, width)).permute(0, 2, 3, 1, 4) * unit
    return begun + nn.functional.pad(change, (0, 0, 1, 0))


def _deviation(states: Float[Tensor, "layer head token k"]) -> Float[Tensor, "layer head 1 1"]:
    """The root mean square of how tokens differ from their mean; the first plays no part, as it is like no other."""
    later = states[:, :, 1:]
    return (later - later.mean(2, keepdim=True)).square().mean((2, 3), keepdim=True).sqrt()


def _of_ordinary_tokens(lm: FrozenLM, histories: Sequence[History], count: int) -> KeyValues:
    """What the model makes of so many tokens of the texts, one each of records drawn at random.

    In float32, behind what it makes of a BOS token where the tokenizer begins with one.
    """
    texts = [record.response for history in histories for record in history if record.response]
    drawn = [lm.encode(texts[i], chat=False) for i in torch.randint(len(texts), (count,)).tolist()]
    ids = [text[int(torch.randint(len(text), ()))] for text in drawn]
    embed = cast("nn.Embedding", lm.model.get_input_embeddings())
    with torch.no_grad():
        (own,) = key_values_of(lm, [embed(torch.tensor(ids, device=lm.device))])
    assert own is not None
    return KeyValues(own.keys[:, :, :count].float(), own.values[:, :, :count].float())


@lru_cache(maxsize=4)
def _prefix_encoder(artifact: Artifact, device: torch.device) -> PrefixEncoder:
    method, encoder = Recap.trained_with(artifact, device)
    tensors = artifact.tensors
    own = KeyValues(tensors["own_keys"], tensors["own_values"])
    return PrefixEncoder(method, encoder, tensors["nobody"], own).restore(artifact, device)
