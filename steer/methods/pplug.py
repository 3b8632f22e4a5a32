"""PPlug: all that a user wrote as one soft token, in which each text counts by how close it is to what is asked.

Liu et al., "LLMs + Persona-Plug = Personalized LLMs", ACL 2025, arXiv 2409.11901; code rucliujn/PPlug. With h_i the
embedding of a user's text i by a frozen encoder, and x that of the prompt by an encoder that is trained:

    w = softmax_i( xᵀ h_i / τ )        P = Σ_i w_i · Proj(h_i)        the model reads [ I ; P ; Emb(prompt) ]

I is a soft token that all users share. Projector, I and the prompt's encoder are trained on what many users wrote, with
the model frozen. A user's state is the embeddings, as the weights depend on the prompt.

Where paper and code differ, or other papers differ from this one, there is a hyper-parameter:

* The code has L2-normalized embeddings on both sides and no temperature, so that no text weighs more than e² times
  another. τ is a parameter here, and may be learned.
* Soft tokens are to have the scale of the model's own embeddings. The code has a constant of T5-XXL and torch's own
  initial weights (`published=True`); here the scale is the usual norm of the model's own table.
* The code adds ten copies of every example with parts of the history left out, and the paper none: `copies` of
  `steer.train.train_method`.
* `persona`: a plain mean, the paper's ablation; a Perceiver, whose latents attend to the texts and become `slots` soft
  tokens (PERSOMA, Hebert et al., arXiv 2408.00960); a transformer that makes one soft token of each of the newest
  `slots` texts (UEM, Doddapaneni et al., arXiv 2401.04858).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from torch import nn

from steer.encoders import (
    InputAwareAttention,
    ItemTransformer,
    LearnedTokens,
    PerceiverResampler,
    Projector,
    usual_norm,
)
from steer.encoders import masked_mean as mean_of
from steer.errors import SteerError
from steer.history import History
from steer.inject import Edit, PrefixEdit, PromptPrefix
from steer.methods.embedded_texts import EmbeddedTexts, FromTexts, Items
from steer.sites import Site
from steer.state import Artifact, UserState
from steer.text_encoder import TextEncoder

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

    from steer.encoders import SentenceEncoder
    from steer.model import FrozenLM
    from steer.train.examples import Example

Persona = Literal["attention", "mean", "perceiver", "items"]
Query = Literal["trained", "frozen"]


@dataclass
class PPlug(EmbeddedTexts):
    """Soft tokens from the embeddings of a user's texts, trained in front of the frozen model.

    A user without records has a state too: that of somebody whose only text is the mean of all that was trained on.

    Args:
        encoder: a sentence encoder, see `TextEncoder`; the paper has BAAI/bge-base-en-v1.5.
        text: what of a record is encoded: the response with its prompt behind it, or the response.
        max_tokens: of a text that is encoded; None is what the encoder was made for.
        centred, autoencoding: see `EmbeddedTexts`.
        query: whether the prompt's encoder is trained, as in the paper, or the frozen one. Only attention has it.
        query_prefix: put in front of the prompt; BGE's for queries is "Represent this sentence for searching relevant
            passages: ".
        persona: how texts become soft tokens.
        slots: soft tokens of the Perceiver, or newest texts of the transformer.
        temperature, learned_temperature: τ.
        instruction: whether there is I.
        normalized: whether soft tokens have exactly the scale of the model's embeddings, and not one that is learned.
        published: projectors as in the published code.
    """

    name: ClassVar[str] = "pplug"
    enters: ClassVar[tuple[str, ...]] = (str(Site("embed")),)

    query: Query = "trained"
    query_prefix: str = ""
    persona: Persona = "attention"
    slots: int = 8
    temperature: float = 1.0
    learned_temperature: bool = False
    instruction: bool = True
    normalized: bool = False
    published: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_one_of(query=Query, persona=Persona)
        if self.slots < 1:
            raise SteerError(f"slots={self.slots}: a persona needs one soft token at least")

    def module(self, lm: FrozenLM, histories: Sequence[History]) -> Plug:
        """What is trained: see `steer.train.train_method`.

        Raises:
            SteerError: the histories are empty, or the encoder is not there.
        """
        encoder, mean = self._encoder_and_mean(lm, histories)
        table = cast("nn.Embedding", lm.model.get_input_embeddings())
        return Plug(self, encoder, mean, lm.width_at(Site("embed")), usual_norm(table)).to(lm.device)

    @classmethod
    def bind(
        cls, lm: FrozenLM, states: Sequence[UserState | None], like: UserState, artifact: Artifact | None
    ) -> list[Edit]:
        """One prefix that depends on the prompts."""
        assert artifact is not None
        plug = _plug(artifact, lm.width_at(Site("embed")), lm.device)
        rows = Items.of(states)
        items, mask = plug.pad(rows.items)
        lengths = torch.zeros(rows.count, dtype=torch.long)
        lengths[rows.bound] = plug.lengths(mask).cpu()

        def tokens(prompts: Sequence[str]) -> Float[Tensor, "batch slot d"]:
            with torch.no_grad():
                return rows.spread(plug(items, mask, plug.queries(rows.prompts(prompts))))

        return [PromptPrefix(tokens, lengths, lm.width_at(Site("embed")))]


class Plug(FromTexts):
    """From embeddings of texts and of prompts to soft tokens: what PPlug trains.

    Args:
        method: the hyper-parameters.
        encoder: of the texts; it is frozen, and no part of the module.
        nobody: the embedding that stands for a history without texts.
        width: of the model's token embeddings.
        scale: their usual norm.
    """

    def __init__(
        self, method: PPlug, encoder: TextEncoder, nobody: Float[Tensor, " d_in"], width: int, scale: float
    ) -> None:
        super().__init__(method, encoder, nobody)
        self.method, self.scale = method, scale
        kind = method.persona
        own: dict[str, Any] = {"scale": scale, "normalized": method.normalized, "published": method.published}
        if method.instruction:
            self.instruction = LearnedTokens(1, encoder.width, width, **own)
        if kind in ("attention", "mean"):
            self.projector = Projector(encoder.width, width, **own)
        if kind == "attention":
            self.attention = InputAwareAttention(method.temperature, learned=method.learned_temperature)
            self.query: SentenceEncoder | None = encoder.module() if method.query == "trained" else None
        if kind == "perceiver":
            self.resampler = PerceiverResampler(encoder.width, width, scale=scale, slots=method.slots)
        if kind == "items":
            self.items = ItemTransformer(encoder.width, width, scale=scale, max_items=method.slots)

    @property
    def facts(self) -> dict[str, Any]:
        """What an artifact says besides the hyper-parameters."""
        return {"scale": self.scale}

    @property
    def soft_tokens(self) -> int:
        """Of a row, at most."""
        return self._slots + self.method.instruction

    @property
    def _slots(self) -> int:
        return 1 if self.method.persona in ("attention", "mean") else self.method.slots

    def edits(self, examples: Sequence[Example]) -> list[Edit]:
        """One prefix for each example, from the records before it."""
        items, mask = self.pad(self.histories(examples))
        tokens = self(items, mask, self.queries([example.span.prompt or "" for example in examples]))
        return [PrefixEdit(tokens, self.lengths(mask).cpu())]

    def pad(
        self, rows: Sequence[Float[Tensor, "text d_in"]]
    ) -> tuple[Float[Tensor, "row item d_in"], Bool[Tensor, "row item"]]:
        """The texts of each row that count, and where there are some; nobody's, where a row has none."""
        return super().pad([row[-self.method.slots :] for row in rows] if self.method.persona == "items" else rows)

    def queries(self, prompts: Sequence[str]) -> Float[Tensor, "row d_in"] | None:
        """Embeddings of the prompts, where the persona depends on them."""
        if self.method.persona != "attention":
            return None
        if self.query is None or not prompts:
            return self.encoder.encode(prompts, prefix=self.method.query_prefix).to(self.nobody)
        return self.query(self.query.tokenize(prompts, self.method.query_prefix))

    def lengths(self, mask: Bool[Tensor, "row item"]) -> Tensor:
        """How many soft tokens each row has."""
        own = mask.sum(1)
        if self.method.persona != "items":
            own = torch.full_like(own, self._slots)
        return own + int(self.method.instruction)

    def forward(
        self,
        items: Float[Tensor, "row item d_in"],
        mask: Bool[Tensor, "row item"],
        queries: Float[Tensor, "row d_in"] | None,
    ) -> Float[Tensor, "row slot d"]:
        """The soft tokens, I in front."""
        persona = self._persona(items, mask, queries)
        if not self.method.instruction:
            return persona
        return torch.cat([self.instruction().expand(len(items), -1, -1), persona], 1)

    def _persona(self, items: Tensor, mask: Tensor, queries: Tensor | None) -> Float[Tensor, "row slot d"]:
        kind = self.method.persona
        if kind == "attention":
            return self.attention(queries, items, self.projector(items), mask)[:, None]
        if kind == "mean":
            return mean_of(self.projector(items), mask)[:, None]
        return self.resampler(items, mask) if kind == "perceiver" else self.items(items, mask)


@lru_cache(maxsize=4)
def _plug(artifact: Artifact, width: int, device: torch.device) -> Plug:
    method, encoder = PPlug.trained_with(artifact, device)
    plug = Plug(method, encoder, artifact.tensors["nobody"], width, artifact.settings["scale"])
    return plug.restore(artifact, device)
