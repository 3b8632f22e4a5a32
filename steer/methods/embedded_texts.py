"""What methods share whose states are the embeddings of a user's texts by a frozen encoder: PPlug and RECAP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, get_args

import torch
from torch import nn

from steer.errors import SteerError
from steer.history import History, Record
from steer.method import TrainableMethod
from steer.methods.vectors import ids_of_new
from steer.state import Artifact, UserState
from steer.text_encoder import TextEncoder

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

    from steer.model import FrozenLM
    from steer.train.examples import Example

Text = Literal["both", "response"]


@dataclass
class EmbeddedTexts(TrainableMethod):
    """A method that makes edits of the embeddings of a user's texts, by a module that is trained for all users.

    A user without records has a state too: that of somebody whose only text is the mean of all that was trained on.

    Args:
        encoder: a sentence encoder, see `TextEncoder`.
        text: what of a record is encoded: the response with its prompt behind it, or the response.
        max_tokens: of a text that is encoded; None is what the encoder was made for.
        centred: whether the mean of all that was trained on is taken from each embedding, so that what they have in
            common is learned by what users share, and the rest is what tells them apart.
        autoencoding: share of the examples, in training, whose only text is the very record to predict. There are few
            users to learn from and many texts: what an embedding says of a text is learned of each of them (as ICAE
            and ComMer first train; no paper of these methods has it).
    """

    version: ClassVar[int] = 2

    encoder: str = "all-minilm-l6-v2"
    text: Text = "both"
    max_tokens: int | None = None
    centred: bool = False
    autoencoding: float = 0.0

    def __post_init__(self) -> None:
        self._require_one_of(text=Text)
        if not 0 <= self.autoencoding <= 1:
            raise SteerError(f"autoencoding={self.autoencoding} is not a share; give 0 for none, or such as 0.5")

    def artifact_of(self, lm: FrozenLM, module: nn.Module) -> Artifact:
        """The trained weights, and what they were trained for."""
        assert isinstance(module, FromTexts)
        return Artifact(
            method=self.name,
            version=self.version,
            model=lm.fingerprint,
            tensors={key: tensor.detach().cpu().contiguous() for key, tensor in module.state_dict().items()},
            settings={**asdict(self), "identity": module.encoder.identity, **module.facts},
        )

    def fit(self, lm: FrozenLM, history: History) -> UserState:
        """The embeddings of the user's texts, `[text, width of the encoder]` in float32; none for an empty history.

        Raises:
            SteerError: the shared weights were not trained, or with another model or encoder.
        """
        return self._state({"items": self._embeddings(lm, history)}, [record.id for record in history])

    def update(self, lm: FrozenLM, state: UserState, history: History) -> UserState:
        """The state with records added, as the newest ones; what it costs depends on them alone.

        Raises:
            SteerError: as `fit`; or a record is there already.
        """
        self._require_own(state)
        known = state.provenance.records
        new = ids_of_new(history.records, known)
        items = torch.cat([state.tensors["items"], self._embeddings(lm, history)])
        return self._state({"items": items}, [*known, *new])

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
        return self._state({"items": state.tensors["items"][kept].clone()}, [known[i] for i in kept])

    @property
    def hyper_parameters(self) -> dict[str, Any]:
        """All but the encoder's name, as it is compared by what is in it."""
        return {name: own for name, own in super().hyper_parameters.items() if name != "encoder"}

    @classmethod
    def trained_with(cls, artifact: Artifact, device: torch.device) -> tuple[Self, TextEncoder]:
        """The method with the hyper-parameters of an artifact, and its encoder.

        Raises:
            SteerError: the encoder is not there, or another one has its name.
        """
        method = cls(**{part.name: artifact.settings[part.name] for part in fields(cls)})
        encoder = _encoder(method.encoder, method.max_tokens, str(device))
        _require_encoder(encoder, artifact)
        return method, encoder

    def text_encoder(self, lm: FrozenLM) -> TextEncoder:
        """The frozen encoder, loaded once for all methods that have the same, on the model's device."""
        return _encoder(self.encoder, self.max_tokens, str(lm.device))

    def text_of(self, record: Record) -> str:
        """What is encoded of a record."""
        # The response first: what is beyond the encoder's window is cut, and it tells more of who wrote it.
        both = self.text == "both" and record.prompt
        return f"{record.response}\n\n{record.prompt}" if both else record.response

    def _require_one_of(self, **kinds: Any) -> None:
        for name, kind in kinds.items():
            if getattr(self, name) not in get_args(kind):
                raise SteerError(f"{name}={getattr(self, name)!r} is not one of {', '.join(get_args(kind))}")

    def _encoder_and_mean(
        self, lm: FrozenLM, histories: Sequence[History]
    ) -> tuple[TextEncoder, Float[Tensor, " d_in"]]:
        """The encoder, and the mean embedding of all that may be trained on."""
        encoder = self.text_encoder(lm)
        embeddings = encoder.encode([self.text_of(record) for history in histories for record in history])
        if not len(embeddings):
            raise SteerError("there are no records to train on")
        return encoder, embeddings.mean(0)

    def _embeddings(self, lm: FrozenLM, history: History) -> Float[Tensor, "text d_in"]:
        artifact = self._require_trained(lm)
        encoder = self.text_encoder(lm)
        _require_encoder(encoder, artifact)
        return encoder.encode([self.text_of(record) for record in history])


class FromTexts(nn.Module):
    """What such a method trains.

    Args:
        method: the hyper-parameters.
        encoder: of the texts; it is frozen, and no part of the module.
        nobody: the embedding that stands for a history without texts.
    """

    nobody: Tensor

    def __init__(self, method: EmbeddedTexts, encoder: TextEncoder, nobody: Float[Tensor, " d_in"]) -> None:
        super().__init__()
        self.encoder, self._method = encoder, method
        self.register_buffer("nobody", nobody)

    @property
    def facts(self) -> dict[str, Any]:
        """What an artifact says besides the hyper-parameters."""
        return {}

    def histories(self, examples: Sequence[Example]) -> list[Float[Tensor, "text d_in"]]:
        """The embeddings of the texts before each example, or of its own in a share of those to train on."""
        texts = [[self._method.text_of(record) for record in self._drawn(example)] for example in examples]
        embedded = self.encoder.encode([text for own in texts for text in own])
        return list(embedded.split([len(own) for own in texts]))

    def pad(
        self, rows: Sequence[Float[Tensor, "text d_in"]]
    ) -> tuple[Float[Tensor, "row item d_in"], Bool[Tensor, "row item"]]:
        """The texts of each row, and where there are some; nobody's, where a row has none."""
        nobody = self.nobody[None]
        origin = nobody if self._method.centred else torch.zeros_like(nobody)
        if not rows:
            return nobody.new_zeros(0, 1, nobody.shape[1]), torch.zeros(0, 1, dtype=torch.bool, device=nobody.device)
        items = [(row.to(nobody) if len(row) else nobody) - origin for row in rows]
        counts = torch.tensor([len(row) for row in items], device=nobody.device)
        padded = nn.utils.rnn.pad_sequence(items, batch_first=True)
        return padded, torch.arange(padded.shape[1], device=nobody.device) < counts[:, None]

    def _drawn(self, example: Example) -> Sequence[Record]:
        own = self.training and torch.rand(()).item() < self._method.autoencoding
        return (example.record,) if own else example.history.records

    def restore(self, artifact: Artifact, device: torch.device) -> Self:
        """Takes the weights of an artifact, to be used and not trained."""
        self.load_state_dict(dict(artifact.tensors))
        return self.requires_grad_(False).eval().to(device)


@dataclass(frozen=True)
class Items:
    """The states of a batch, those of rows that have one.

    Attributes:
        count: of all rows.
        bound: which of them have a state.
        items: the states' embeddings.
    """

    count: int
    bound: list[int]
    items: list[Float[Tensor, "text d_in"]]

    @classmethod
    def of(cls, states: Sequence[UserState | None]) -> Items:
        """None is a row without a state."""
        own = {i: state.tensors["items"] for i, state in enumerate(states) if state is not None}
        return cls(len(states), list(own), list(own.values()))

    def prompts(self, prompts: Sequence[str]) -> list[str]:
        """Those of rows that have a state."""
        return [prompts[row] for row in self.bound]

    def spread(self, made: Float[Tensor, "bound ..."]) -> Float[Tensor, "row ..."]:
        """What was made of the states, over all rows; zeros for the others."""
        owners = torch.tensor(self.bound, dtype=torch.long, device=made.device)
        return made.new_zeros(self.count, *made.shape[1:]).index_copy(0, owners, made)


def _require_encoder(encoder: TextEncoder, artifact: Artifact) -> None:
    wanted = artifact.settings["identity"]
    if encoder.identity != wanted:
        raise SteerError(f"the shared weights were trained with the encoder {wanted}; this one is {encoder.identity}")


@lru_cache(maxsize=4)
def _encoder(name: str, max_tokens: int | None, device: str) -> TextEncoder:
    return TextEncoder(name, max_tokens=max_tokens, device=device)
