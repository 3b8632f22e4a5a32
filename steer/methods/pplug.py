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
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast, get_args

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
from steer.history import History, Record
from steer.inject import Edit, PrefixEdit, PromptPrefix
from steer.method import Method
from steer.sites import Site
from steer.state import Artifact, Provenance, UserState
from steer.text_encoder import TextEncoder

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

    from steer.encoders import SentenceEncoder
    from steer.model import FrozenLM
    from steer.train.examples import Example

Persona = Literal["attention", "mean", "perceiver", "items"]
Query = Literal["trained", "frozen"]
Text = Literal["both", "response"]


@dataclass
class PPlug(Method):
    """Soft tokens from the embeddings of a user's texts, trained in front of the frozen model.

    A user without records has a state too: that of somebody whose only text is the mean of all that was trained on.

    Args:
        encoder: a sentence encoder, see `TextEncoder`; the paper has BAAI/bge-base-en-v1.5.
        text: what of a record is encoded: the response with its prompt behind it, or the response.
        max_tokens: of a text that is encoded; None is what the encoder was made for.
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
    trainable: ClassVar[bool] = True

    encoder: str = "all-minilm-l6-v2"
    text: Text = "both"
    max_tokens: int | None = None
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
        for name, kind in {"text": Text, "query": Query, "persona": Persona}.items():
            if getattr(self, name) not in get_args(kind):
                raise SteerError(f"{name}={getattr(self, name)!r} is not one of {', '.join(get_args(kind))}")
        if self.slots < 1:
            raise SteerError(f"slots={self.slots}: a persona needs one soft token at least")

    def module(self, lm: FrozenLM, histories: Sequence[History]) -> Plug:
        """What is trained: see `steer.train.train_method`.

        Raises:
            SteerError: the histories are empty, or the encoder is not there.
        """
        encoder = self._encoder(lm)
        embeddings = encoder.encode([self._text(record) for history in histories for record in history])
        if not len(embeddings):
            raise SteerError("there are no records to train on")
        table = cast("nn.Embedding", lm.model.get_input_embeddings())
        return Plug(self, encoder, embeddings.mean(0), lm.width_at(Site("embed")), usual_norm(table)).to(lm.device)

    def artifact_of(self, lm: FrozenLM, module: nn.Module) -> Artifact:
        """The trained weights, and what they were trained for."""
        assert isinstance(module, Plug)
        return Artifact(
            method=self.name,
            version=self.version,
            model=lm.fingerprint,
            tensors={key: tensor.detach().cpu().contiguous() for key, tensor in module.state_dict().items()},
            settings={**asdict(self), "identity": module.encoder.identity, "scale": module.scale},
        )

    def fit(self, lm: FrozenLM, history: History) -> UserState:
        """The embeddings of the user's texts, `[text, width of the encoder]` in float32; none for an empty history.

        Raises:
            SteerError: the shared weights were not trained, or with another model or encoder.
        """
        return self._state(self._embeddings(lm, history), [record.id for record in history])

    def update(self, lm: FrozenLM, state: UserState, history: History) -> UserState:
        """The state with records added, as if they had been there; what it costs depends on them alone.

        Raises:
            SteerError: as `fit`; or a record is there already.
        """
        self._require_own(state)
        known = state.provenance.records
        if twice := [record.id for record in history if record.id in known]:
            raise SteerError(f"record {twice[0]!r} is in the state already")
        items = torch.cat([state.tensors["items"], self._embeddings(lm, history)])
        return self._state(items, [*known, *(record.id for record in history)])

    def remove(self, state: UserState, records: Sequence[str]) -> UserState:
        """The state without these records, by their ids, as if they had never been there.

        Raises:
            SteerError: one is not there.
        """
        self._require_own(state)
        known = state.provenance.records
        if strange := [record for record in records if record not in known]:
            raise SteerError(f"record {strange[0]!r} is not in the state")
        kept = [i for i, record in enumerate(known) if record not in set(records)]
        provenance = replace(state.provenance, records=tuple(known[i] for i in kept))
        return UserState(provenance, {"items": state.tensors["items"][kept].clone()})

    @classmethod
    def bind(
        cls, lm: FrozenLM, states: Sequence[UserState | None], like: UserState, artifact: Artifact | None
    ) -> list[Edit]:
        """One prefix that depends on the prompts."""
        assert artifact is not None
        plug = _plug(artifact, lm.width_at(Site("embed")), lm.device)
        rows = [None if state is None else state.tensors["items"] for state in states]
        items, mask = plug.pad([row for row in rows if row is not None])
        bound = [i for i, row in enumerate(rows) if row is not None]
        lengths = torch.zeros(len(rows), dtype=torch.long)
        lengths[bound] = plug.lengths(mask).cpu()

        def tokens(prompts: Sequence[str]) -> Float[Tensor, "batch slot d"]:
            with torch.no_grad():
                made = plug(items, mask, plug.queries([prompts[i] for i in bound]))
            owners = torch.tensor(bound, dtype=torch.long, device=made.device)
            return made.new_zeros(len(rows), *made.shape[1:]).index_copy(0, owners, made)

        return [PromptPrefix(tokens, lengths, lm.width_at(Site("embed")))]

    def use(self, lm: FrozenLM, artifact: Artifact) -> None:
        """Takes what was trained before.

        Raises:
            SteerError: it is of another method, version or model, or was trained with other hyper-parameters, which
                `steer.train.method_of` takes from it.
        """
        super().use(lm, artifact)
        for name, own in asdict(self).items():
            if name != "encoder" and artifact.settings[name] != own:
                self.artifact = None
                raise SteerError(f"the artifact was trained with {name}={artifact.settings[name]!r}, this has {own!r}")

    def _require_own(self, state: UserState) -> None:
        if self.artifact is None or state.provenance.artifact != self.artifact.hash:
            raise SteerError("the state was fitted with other shared weights; fit it again, or use those it names")

    def _state(self, items: Tensor, records: Sequence[str]) -> UserState:
        assert self.artifact is not None
        return UserState(
            provenance=Provenance(
                method=self.name,
                version=self.version,
                model=self.artifact.model,
                sites=(str(Site("embed")),),
                artifact=self.artifact.hash,
                records=tuple(records),
            ),
            tensors={"items": items},
        )

    def _embeddings(self, lm: FrozenLM, history: History) -> Float[Tensor, "text d_in"]:
        if self.artifact is None:
            raise SteerError(
                "the shared weights come first: train them (steer.train.train_method), or use(lm, artifact)"
            )
        self._require_model(lm, self.artifact)
        encoder = self._encoder(lm)
        _require_encoder(encoder, self.artifact)
        return encoder.encode([self._text(record) for record in history])

    def _encoder(self, lm: FrozenLM) -> TextEncoder:
        return _encoder(self.encoder, self.max_tokens, str(lm.device))

    def _text(self, record: Record) -> str:
        # The response first: what is beyond the encoder's window is cut, and it tells more of who wrote it.
        both = self.text == "both" and record.prompt
        return f"{record.response}\n\n{record.prompt}" if both else record.response


class Plug(nn.Module):
    """From embeddings of texts and of prompts to soft tokens: what PPlug trains.

    Args:
        method: the hyper-parameters.
        encoder: of the texts; it is frozen, and no part of the module.
        nobody: the embedding that stands for a history without texts.
        width: of the model's token embeddings.
        scale: their usual norm.
    """

    nobody: Tensor

    def __init__(
        self, method: PPlug, encoder: TextEncoder, nobody: Float[Tensor, " d_in"], width: int, scale: float
    ) -> None:
        super().__init__()
        self.method, self.encoder, self.scale = method, encoder, scale
        self.register_buffer("nobody", nobody)
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
    def soft_tokens(self) -> int:
        """Of a row, at most."""
        return self._slots + self.method.instruction

    @property
    def _slots(self) -> int:
        return 1 if self.method.persona in ("attention", "mean") else self.method.slots

    def edits(self, examples: Sequence[Example]) -> list[Edit]:
        """One prefix for each example, from the records before it."""
        method = self.method
        texts = [[method._text(record) for record in example.history] for example in examples]
        embedded = self.encoder.encode([text for own in texts for text in own])
        items, mask = self.pad(list(embedded.split([len(own) for own in texts])))
        tokens = self(items, mask, self.queries([example.span.prompt or "" for example in examples]))
        return [PrefixEdit(tokens, self.lengths(mask).cpu())]

    def pad(self, rows: Sequence[Float[Tensor, "text d_in"]]) -> tuple[Tensor, Tensor]:
        """The texts of each row, `[row, item, d_in]`, and where there are some; nobody's, where a row has none."""
        nobody = self.nobody[None]
        some = [row.to(nobody) if len(row) else nobody for row in rows]
        if self.method.persona == "items":
            some = [row[-self.method.slots :] for row in some]
        if not some:
            return nobody.new_zeros(0, 1, nobody.shape[1]), torch.zeros(0, 1, dtype=torch.bool, device=nobody.device)
        items = nn.utils.rnn.pad_sequence(some, batch_first=True)
        counts = torch.tensor([len(row) for row in some], device=items.device)
        return items, torch.arange(items.shape[1], device=items.device) < counts[:, None]

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


def _require_encoder(encoder: TextEncoder, artifact: Artifact) -> None:
    wanted = artifact.settings["identity"]
    if encoder.identity != wanted:
        raise SteerError(f"the shared weights were trained with the encoder {wanted}; this one is {encoder.identity}")


@lru_cache(maxsize=4)
def _encoder(name: str, max_tokens: int | None, device: str) -> TextEncoder:
    return TextEncoder(name, max_tokens=max_tokens, device=device)


@lru_cache(maxsize=4)
def _plug(artifact: Artifact, width: int, device: torch.device) -> Plug:
    settings: dict[str, Any] = dict(artifact.settings)
    scale = settings.pop("scale")
    del settings["identity"]
    method = PPlug(**settings)
    encoder = _encoder(method.encoder, method.max_tokens, str(device))
    _require_encoder(encoder, artifact)
    plug = Plug(method, encoder, artifact.tensors["nobody"], width, scale)
    plug.load_state_dict(dict(artifact.tensors))
    return plug.requires_grad_(False).eval().to(device)
