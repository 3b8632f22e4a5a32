"""User-LLM: layers of the frozen model attend to a memory of the user's history.

Ning et al., "User-LLM: Efficient LLM Contextualization with User Embeddings", arXiv 2402.13598. Between self-attention
and feed-forward of chosen layers, as in Flamingo:

    O ← O + tanh(α) · XAttn(LN(O), E, E),   α = 0 to begin with

E holds one vector per item of the history. Here these come from the frozen model itself, the mean over an item's tokens
at one site; the cross-attention layers are trained, shared by all users, and the artifact of the method.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from steer.errors import SteerError
from steer.history import History
from steer.inject import Edit, GatedCrossAttention, MemoryEdit
from steer.likelihood import batches_of, negative_log_likelihood
from steer.method import Method
from steer.methods.vectors import layer_sites
from steer.read import Span, read, record_span, response_span
from steer.sites import Site
from steer.state import Artifact, Provenance, UserState
from steer.train import each_step

if TYPE_CHECKING:
    from steer.model import FrozenLM


@dataclass
class UserLLM(Method):
    """Cross-attention from chosen layers to one vector per record.

    Args:
        layer: the layers that attend; at `resid_mid`, or after the block where the architecture has no such place.
        read_layer: after which block the records' vectors are read.
        heads: of the cross-attention.
        steps, learning_rate, batch: of training.
        seed: of the initial weights and the order of records.

    Raises:
        SteerError: no layer.
    """

    name: ClassVar[str] = "user_llm"

    layer: int | Sequence[int]
    read_layer: int
    heads: int = 8
    steps: int = 30
    learning_rate: float = 1e-3
    batch: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        layer_sites(self.layer, "resid_mid")

    @property
    def sites(self) -> list[Site]:
        """Where the layers attend."""
        return layer_sites(self.layer, "resid_mid")

    @torch.enable_grad()
    def train(
        self,
        lm: FrozenLM,
        histories: Iterable[History],
        on_progress: Callable[[float], None] | None = None,
        *,
        on_step: Callable[[int, float], None] | None = None,
    ) -> Artifact:
        """Trains the cross-attention layers: each record is to be predicted from the memory of its user's others.

        Args:
            lm: the model; no gradient is computed for its parameters.
            histories: users with at least two records each.
            on_progress: told the share of the steps that are made.
            on_step: told the number of each step and its loss in nats per token.

        Raises:
            SteerError: no user has two records.
        """
        examples = [example for history in histories if len(history) > 1 for example in self._examples(lm, history)]
        if not examples:
            raise SteerError("training needs users with at least two records: one is predicted from the others")
        generator, told = torch.Generator().manual_seed(self.seed), each_step(self.steps, on_progress, on_step)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            layers = {site: GatedCrossAttention(lm.width, lm.width, heads=self.heads) for site in self.sites}
        for layer in layers.values():
            layer.to(lm.device)
        parameters = [parameter for layer in layers.values() for parameter in layer.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=self.learning_rate)
        for step, chosen in enumerate(batches_of(examples, self.batch, self.steps, generator)):
            memories = [memory for _, memory in chosen]
            edits = [MemoryEdit.from_rows(site, layer, memories) for site, layer in layers.items()]
            loss = negative_log_likelihood(lm, [span for span, _ in chosen], edits)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if told is not None:
                told(step, loss.item())
        self.artifact = Artifact(
            method=self.name,
            version=self.version,
            model=lm.fingerprint,
            tensors={
                f"{site}.{key}": tensor.detach().cpu()
                for site, layer in layers.items()
                for key, tensor in layer.state_dict().items()
            },
            settings={"sites": [str(site) for site in self.sites], "heads": self.heads, "read_layer": self.read_layer},
        )
        return self.artifact

    def fit(self, lm: FrozenLM, history: History) -> UserState:
        """Reads the memory, one vector for each record, oldest first.

        Raises:
            SteerError: the history is empty, or the layers were not trained.
        """
        if self.artifact is None:
            raise SteerError("the cross-attention layers come first: call train(lm, histories), or use(lm, artifact)")
        self._require_model(lm, self.artifact)
        if not len(history):
            raise SteerError(f"{history.user_id!r} has no records to remember")
        return UserState(
            provenance=Provenance(
                method=self.name,
                version=self.version,
                model=lm.fingerprint,
                sites=tuple(str(site) for site in self.sites),
                artifact=self.artifact.hash,
                records=tuple(record.id for record in history),
                settings={"read_layer": self.read_layer},
            ),
            tensors={"memory": self._memory(lm, history)},
        )

    @classmethod
    def bind(
        cls, lm: FrozenLM, states: Sequence[UserState | None], like: UserState, artifact: Artifact | None
    ) -> list[Edit]:
        """One memory edit for each layer."""
        assert artifact is not None
        memories = [None if state is None else state.tensors["memory"] for state in states]
        return [MemoryEdit.from_rows(site, layer, memories) for site, layer in _layers(artifact).items()]

    def _examples(self, lm: FrozenLM, history: History) -> list[tuple[Span, torch.Tensor]]:
        memory = self._memory(lm, history)
        others = [torch.cat([memory[:i], memory[i + 1 :]]) for i in range(len(history))]
        return [(record_span(lm, record), rest) for record, rest in zip(history, others, strict=True)]

    def _memory(self, lm: FrozenLM, history: History) -> torch.Tensor:
        site = Site("resid_post", self.read_layer)
        spans = [response_span(lm, record.response) for record in history]
        reading = read(lm, spans, [site], pool="mean")[site]
        # In units of the usual norm, so that the layers' initial weights fit every model.
        return reading.pooled / reading.norm * lm.width**0.5


# Compiled code knows a layer by its identity, so the layers of an artifact are made once.
@lru_cache(maxsize=16)
def _layers(artifact: Artifact) -> dict[Site, GatedCrossAttention]:
    layers: dict[Site, GatedCrossAttention] = {}
    for text in artifact.settings["sites"]:
        weights: dict[str, Any] = {
            key.removeprefix(f"{text}."): tensor
            for key, tensor in artifact.tensors.items()
            if key.startswith(f"{text}.")
        }
        inner, width = weights["query.weight"].shape
        heads = artifact.settings["heads"]
        layer = GatedCrossAttention(width, weights["key.weight"].shape[1], heads=heads, head_width=inner // heads)
        layer.load_state_dict(weights)
        layers[Site.parse(text)] = layer.requires_grad_(False).eval()
    return layers
